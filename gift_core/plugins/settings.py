"""Which plugins may be used: five environment variables, and the same switches as arguments.

================================  =====================================================================================
``GIFT_DISABLE_PLUGIN_AUTOLOAD``  1: use no installed plugin but those that ``GIFT_PLUGINS`` names
``GIFT_PLUGINS``                  use these and no others
``GIFT_BLOCK_PLUGINS``            never use these
``GIFT_STRICT_PLUGINS``           1: a plugin that fails is an error instead of a warning
``GIFT_TRACE_PLUGINS``            1: say on stderr what is imported and called, and how long it took
================================  =====================================================================================

A list is separated by commas; each name is a distribution, an entry point or ``distribution:name``. A switch is 1, true, yes or on, or
0, false, no or off; an empty variable counts as unset. All are read before any plugin is imported.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterable, Iterator, Mapping

from gift_core.errors import PluginSettingError
from gift_core.plugins.names import CORE, is_called, normalise

#: The name under which pluggy knows the hooks.
PROJECT = "gift"

NO_AUTOLOAD = "GIFT_DISABLE_PLUGIN_AUTOLOAD"
ALLOW = "GIFT_PLUGINS"
BLOCK = "GIFT_BLOCK_PLUGINS"
STRICT = "GIFT_STRICT_PLUGINS"
TRACE = "GIFT_TRACE_PLUGINS"
#: Every variable that is read.
VARIABLES = (NO_AUTOLOAD, ALLOW, BLOCK, STRICT, TRACE)

_BOOLEANS = dict.fromkeys(("1", "true", "yes", "on"), True) | dict.fromkeys(("", "0", "false", "no", "off"), False)


@dataclasses.dataclass(frozen=True)
class PluginSettings:
    """The switches in force.

    Attributes:
        autoload: whether installed plugins that ``allow`` does not name may be used.
        allow: if not empty, the only plugins that may be used; those of the core always may.
        block: plugins that may not be used, even if ``allow`` names them.
        strict: whether a plugin that fails is an error instead of a warning.
        trace: whether to say on stderr what is imported and called.
        isolated: whether nothing that is installed is seen, as in `isolated_plugins`.
    """

    autoload: bool = True
    allow: tuple[str, ...] = ()
    block: tuple[str, ...] = ()
    strict: bool = False
    trace: bool = False
    isolated: bool = False

    def refusal(self, distribution: str, name: str) -> str | None:
        """Why an entry of a distribution may not be used; None if it may."""
        for item in self.block:
            if stands_for(item, distribution, name):
                return f"{BLOCK} names {item!r}"
        if normalise(distribution) == CORE or any(stands_for(item, distribution, name) for item in self.allow):
            return None
        if self.allow:
            return f"{ALLOW} names others only"
        return None if self.autoload else f"{NO_AUTOLOAD} is set"


_given: dict[str, object] = {}


def current_settings() -> PluginSettings:
    """The switches in force now: those given as arguments, and the environment's for the rest.

    Raises:
        PluginSettingError: if a variable's value is not one that a switch can have.
    """
    environment: dict[str, object] = {
        "autoload": not _boolean(NO_AUTOLOAD, os.environ),
        "allow": _names(os.environ.get(ALLOW, "")),
        "block": _names(os.environ.get(BLOCK, "")),
        "strict": _boolean(STRICT, os.environ),
        "trace": _boolean(TRACE, os.environ),
    }
    return PluginSettings(**(environment | _given))  # type: ignore[arg-type]


@contextlib.contextmanager
def plugin_settings(
    *,
    autoload: bool | None = None,
    allow: Iterable[str] | None = None,
    block: Iterable[str] | None = None,
    strict: bool | None = None,
    trace: bool | None = None,
) -> Iterator[PluginSettings]:
    """The switches as arguments, within a context; they come before the environment, and None leaves a switch as it is.

    Args:
        autoload: False uses no installed plugin but those in ``allow``.
        allow: use these plugins and no others.
        block: never use these.
        strict: make a plugin that fails an error instead of a warning.
        trace: say on stderr what is imported and called.
    """
    given = {"autoload": autoload, "allow": _listed("allow", allow), "block": _listed("block", block)}
    given |= {"strict": strict, "trace": trace}
    with _override({key: value for key, value in given.items() if value is not None}) as settings:
        yield settings


@contextlib.contextmanager
def isolation() -> Iterator[PluginSettings]:
    """Within the context nothing that is installed is seen; the core's own names stay."""
    with _override({"isolated": True}) as settings:
        yield settings


def as_variables(settings: PluginSettings) -> dict[str, str]:
    """The environment variables that mean the same, for a process of its own."""
    values = {NO_AUTOLOAD: not settings.autoload, STRICT: settings.strict, TRACE: settings.trace}
    switches = {variable: "1" if value else "0" for variable, value in values.items()}
    return switches | {ALLOW: ",".join(settings.allow), BLOCK: ",".join(settings.block)}


def stands_for(item: str, distribution: str, name: str) -> bool:
    """Whether an item of a list means an entry: by its distribution, its name or both."""
    return normalise(item) == normalise(distribution) or is_called(item, distribution, name)


def trace(text: str) -> None:
    """Say something about plugins on stderr, if that is switched on."""
    if current_settings().trace:
        print(f"gift plugins: {text}", file=sys.stderr)


@contextlib.contextmanager
def _override(given: Mapping[str, object]) -> Iterator[PluginSettings]:
    before = dict(_given)
    _given.update(given)
    try:
        yield current_settings()
    finally:
        _given.clear()
        _given.update(before)


def _boolean(variable: str, environment: Mapping[str, str]) -> bool:
    text = environment.get(variable, "").strip().lower()
    if text not in _BOOLEANS:
        raise PluginSettingError(f"{variable} is {text!r}: set it to 1, true, yes or on, or to 0, false, no or off.")
    return _BOOLEANS[text]


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in (part.strip() for part in text.split(",")) if name)


def _listed(argument: str, names: Iterable[str] | None) -> tuple[str, ...] | None:
    if names is None:
        return None
    if isinstance(names, str):
        raise PluginSettingError(f"{argument} takes a list of names, got {names!r}: write [{names!r}].")
    return tuple(names)
