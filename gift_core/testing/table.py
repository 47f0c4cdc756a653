"""The table of checks: each is one function whose docstring is its promise.

A check that is new in version ``0.N`` is a warning there and becomes mandatory with ``0.N+1``, so that an upgrade of the core never
breaks a plugin that conformed without a release of notice. What the first version brought is mandatory from the start.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, Literal

Level = Literal["api", "tuning", "files", "numerics", "torch"]
Scope = Literal["strategy", "model"]

#: The levels, from what matters first. Running one runs those before it too.
LEVELS: tuple[Level, ...] = ("api", "tuning", "files", "numerics", "torch")
FIRST_VERSION = "0.1"


@dataclasses.dataclass(frozen=True)
class Check:
    """One row of the table.

    Attributes:
        name: how results and ``expected_failures`` call it.
        level: the level at which it runs.
        scope: whether it is asked once of the strategy, or once for each model.
        since: the version that brought it, ``major.minor``.
        mandatory_from: the version from which its failure fails a plugin; before, it warns.
        needs: the capability that a strategy must declare for it to apply; empty for all strategies.
        function: takes a `Candidate` or a `Subject`, by scope, and raises if the promise is not kept.
    """

    name: str
    level: Level
    scope: Scope
    since: str
    mandatory_from: str
    needs: str
    function: Callable[[Any], None]

    @property
    def promise(self) -> str:
        """What the check promises of a strategy that passes it."""
        return inspect.cleandoc(self.function.__doc__ or "")

    def is_mandatory(self, version: str) -> bool:
        """Whether it must pass under this version of the core."""
        return _release(version) >= _release(self.mandatory_from)


TABLE: dict[str, Check] = {}


def check(
    level: Level, *, scope: Scope = "model", since: str = FIRST_VERSION, needs: str = ""
) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Enter a function into the table, under its own name."""

    def enter(function: Callable[[Any], None]) -> Callable[[Any], None]:
        name = function.__name__
        TABLE[name] = Check(name, level, scope, since, mandatory_from(since), needs, function)
        return function

    return enter


def mandatory_from(since: str) -> str:
    """The version from which a check that is new in ``since`` must pass: the next minor one."""
    major, minor = _release(since)
    return since if since == FIRST_VERSION else f"{major}.{minor + 1}"


def up_to(level: Level) -> list[Check]:
    """The checks of a level and of those before it, in order."""
    ranks = {name: rank for rank, name in enumerate(LEVELS)}
    return sorted((row for row in TABLE.values() if ranks[row.level] <= ranks[level]), key=lambda row: ranks[row.level])


def _release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)
