"""Cap and Caps: what to do, and where.

A check decides where, an action decides what. The first cap whose check is true wins. Everything is validated here, at
construction, so that a malformed cap never reaches a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import nn

from gift_core.errors import StrategyError


class ModuleCheck(Protocol):
    """Tells whether a cap wants a module. Called with positional arguments."""

    def __call__(
        self, parent_module: nn.Module | None, current_name: str, global_name: str, class_name: str, current_module: nn.Module, /
    ) -> bool: ...


class ParameterCheck(Protocol):
    """Tells whether a cap wants a parameter. Called with positional arguments."""

    def __call__(
        self,
        parent_module: nn.Module | None,
        current_name: str,
        global_name: str,
        class_name: str,
        current_module: nn.Module,
        parameter_name: str,
        parameter: nn.Parameter,
        /,
    ) -> bool: ...


@runtime_checkable
class HasCaps(Protocol):
    """What makes an object usable as a nested strategy."""

    module_caps: Caps
    para_caps: Caps
    constraint_type: tuple[type, ...]


class _CapFields(NamedTuple):
    check: Callable[..., bool]
    action: Callable[..., None] | HasCaps
    params: Mapping[str, Any]


class Cap(_CapFields):
    """One rule of a strategy: where (``check``), what (``action``) and with which keyword arguments (``params``).

    Args:
        check: a `ModuleCheck` or a `ParameterCheck`.
        action: called with the same arguments plus ``**params``; or a strategy, applied to the module that matched.
        params: keyword arguments of the action; names must be strings.

    Raises:
        StrategyError: if a part is not of its kind.
    """

    __slots__ = ()

    def __new__(cls, check: Callable[..., bool], action: Callable[..., None] | HasCaps, params: Mapping[str, Any] | None = None) -> Cap:
        if not callable(check):
            raise StrategyError(f"the check of a cap must be callable, got {check!r}.")
        if not callable(action) and not isinstance(action, HasCaps):
            raise StrategyError(f"the action of a cap must be callable or a strategy, got {action!r}.")
        if params is not None and not (isinstance(params, Mapping) and all(isinstance(key, str) for key in params)):
            raise StrategyError(f"the params of a cap must be a mapping from names to values, got {params!r}.")
        if params and isinstance(action, HasCaps):
            raise StrategyError(f"a strategy used as an action takes no params, got {dict(params)!r}: give them to the strategy.")
        return super().__new__(cls, check, action, dict(params or {}))

    def __repr__(self) -> str:
        params = "".join(f", {name}={value!r}" for name, value in self.params.items())
        return f"{describe(self.check)} -> {describe(self.action)}{params}"


class Caps(tuple[Cap, ...]):
    """Caps in order of precedence, from caps or plain ``(check, action)`` and ``(check, action, params)`` tuples.

    Raises:
        StrategyError: if an item is none of these; the message gives its position.
    """

    __slots__ = ()

    def __new__(cls, caps: Iterable[Cap | tuple[Any, ...]] = ()) -> Caps:
        if isinstance(caps, Cap) or not isinstance(caps, Iterable):
            raise StrategyError(f"caps come as a list, got {caps!r}: write [cap].")
        return super().__new__(cls, tuple(_as_cap(position, item) for position, item in enumerate(caps)))


def _as_cap(position: int, item: Any) -> Cap:
    if isinstance(item, Cap):
        return item
    if not isinstance(item, tuple) or len(item) not in (2, 3):
        raise StrategyError(f"cap {position} must be a tuple (check, action) or (check, action, params), got {item!r}.")
    try:
        return Cap(*item)
    except StrategyError as error:
        raise StrategyError(f"cap {position}: {error}") from error


def describe(thing: object) -> str:
    """A callable's name as a reader knows it, or its ``repr`` where that says more."""
    if type(thing).__repr__ is not object.__repr__ and not hasattr(thing, "__qualname__"):
        return repr(thing)
    return getattr(thing, "__qualname__", type(thing).__qualname__)
