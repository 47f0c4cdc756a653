"""The hooks: what a plugin of the group ``gift.plugins`` may implement, and when the core calls it.

An entry point names a module, or an object, whose functions are marked::

    from gift_core.plugins.hooks import hookimpl

    plugin_api = 1

    @hookimpl
    def gift_register_checks(registry):
        registry.add("is_wide", is_wide)

A hook may take fewer arguments than are listed here, never others, and none with a default. Its return value is not used. A hook
that raises is reported with its distribution and stops no other plugin's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import pluggy

from gift_core.plugins.settings import PROJECT

if TYPE_CHECKING:
    from torch import nn

hookspec = pluggy.HookspecMarker(PROJECT)
#: Marks a function as the implementation of the hook of its name.
hookimpl = pluggy.HookimplMarker(PROJECT)


class Registry(Protocol):
    """Takes what a plugin registers of one kind; all of it is taken, or nothing."""

    def add(self, name: str, thing: Callable[..., Any]) -> None:
        """Register ``thing`` under ``name``, which may be any text without a colon.

        Raises:
            InvalidPluginError: if the name is none, or the thing cannot be called.
            PluginConflictError: if the core or this plugin has the name already.
        """


class Summary(Protocol):
    """What a plan or a finished tuning says of itself; a `gift_core.Report`."""

    def to_dict(self) -> dict[str, Any]:
        """Counts and names, as JSON data."""


class Plan(Protocol):
    """What is about to be done; a `gift_core.TuningPlan`."""

    @property
    def report(self) -> Summary:
        """The plan as counts and names."""


class Strategy(Protocol):
    """What was asked for; a `gift_core.FineTuningStrategy`."""

    def to_config(self) -> dict[str, Any]:
        """Its registered name and its parameters."""


@hookspec
def gift_register_strategies(registry: Registry) -> None:
    """Register strategies under names: a class, or a function that returns a strategy.

    Called when a strategy is asked for that no entry point of the group ``gift.strategies`` provides, and by ``gift list --hooks``.
    A strategy that is always there is better declared as such an entry point, which is listed without running code.

    Args:
        registry: ``registry.add(name, factory)``.
    """


@hookspec
def gift_register_checks(registry: Registry) -> None:
    """Register checks for strategy files: a function that takes the arguments written in the file and returns a check.

    Args:
        registry: ``registry.add(name, factory)``; in a file ``check = "name(1, 'text')"`` calls ``factory(1, "text")``.
    """


@hookspec
def gift_register_actions(registry: Registry) -> None:
    """Register actions for strategy files.

    Args:
        registry: ``registry.add(name, action)``; the action is called with the site, and with the cap's ``params`` as keywords.
    """


@hookspec
def gift_before_enable(module: nn.Module, strategy: Strategy, plan: Plan) -> None:
    """Called by ``enable_fine_tuning`` once the plan is made, before the model is changed.

    It may look, log and measure. The model is the user's, and the plan holds only for it as it is: change nothing.

    Args:
        module: the root of the model, still plain.
        strategy: what was asked for.
        plan: what is about to be done to it.
    """


@hookspec
def gift_after_enable(module: nn.Module, strategy: Strategy, report: Summary) -> None:
    """Called by ``enable_fine_tuning`` after the model was tuned; not if that failed.

    Args:
        module: the root of the model, tuned.
        strategy: what was asked for.
        report: what was done, as ``enable_fine_tuning`` returns it.
    """
