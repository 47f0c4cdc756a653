"""What a check answers, and how a check says no."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any


class Status(enum.StrEnum):
    """How a check ended."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"
    EXPECTED_FAILURE = "expected_failure"
    UNEXPECTED_PASS = "unexpected_pass"
    WARNING = "warning"


@dataclasses.dataclass(frozen=True)
class CheckResult:
    """The outcome of one check on one model.

    Attributes:
        check: the check's name.
        model: the reference model's name; None for a check of the strategy or the distribution as a whole.
        status: how it ended. ``warning`` is the failure of a check that is not mandatory yet.
        reason: why it did not simply pass; empty if it did.
    """

    check: str
    model: str | None
    status: Status
    reason: str = ""

    @property
    def ok(self) -> bool:
        """Whether this outcome lets a plugin conform."""
        return self.status not in (Status.FAILED, Status.UNEXPECTED_PASS)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON data."""
        return dataclasses.asdict(self) | {"status": str(self.status)}

    def __str__(self) -> str:
        where = f"{self.check}[{self.model}]" if self.model else self.check
        return f"{where}: {self.status}" + (f": {self.reason}" if self.reason else "")


class CheckFailed(AssertionError):
    """A promise was not kept; the message says which and where."""


class CheckSkipped(Exception):
    """A check does not apply; the message says why."""


def demand(condition: bool, reason: str) -> None:
    """Fail the running check with ``reason`` unless the condition holds.

    Raises:
        CheckFailed: if it does not.
    """
    if not condition:
        raise CheckFailed(reason)
