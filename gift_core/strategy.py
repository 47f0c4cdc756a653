"""Strategies: caps in order, as data that can be named, written down and read back.

A strategy says what to do to any model and holds no model. Subclasses add only ``__init__``.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from torch import nn

from gift_core.capabilities import Capabilities
from gift_core.caps import Cap, Caps
from gift_core.errors import InvalidPluginError, StrategyError
from gift_core.factories import is_root, keep_trainable, selects
from gift_core.plugins import PLUGIN_API, load_strategy


class FineTuningStrategy:
    """Which modules and parameters of a model are tuned, and how.

    Args:
        module_caps: rules for modules, the first match wins; a module that matches belongs to its action.
        para_caps: rules for the parameters of modules that no module cap took.
        constraint_type: a type, or types, of which the root must be an instance; empty allows any.

    Attributes:
        name: the registered name, the same as the entry point's; None for a strategy that is not registered.
        plugin_api: the generation of the plugin API it was written for.
        capabilities: what it promises beyond what every strategy does; an instance whose parameters promise otherwise sets its own.

    Raises:
        StrategyError: if a cap or a constraint is malformed.
    """

    name: ClassVar[str | None] = None
    plugin_api: ClassVar[int] = PLUGIN_API
    capabilities: Capabilities = Capabilities()

    def __new__(cls, *args: Any, **kwargs: Any) -> FineTuningStrategy:
        # the arguments are the strategy's form as data; kept here, so that no subclass has to remember it
        self = super().__new__(cls)
        try:
            bound = inspect.signature(cls.__init__).bind(self, *args, **kwargs)
        except TypeError:
            return self  # __init__ is about to say what is wrong; unpickling restores the attribute
        bound.apply_defaults()
        self._parameters = dict(list(bound.arguments.items())[1:])
        return self

    _parameters: dict[str, Any]

    def __init__(
        self,
        module_caps: Iterable[Cap | tuple[Any, ...]] = (),
        para_caps: Iterable[Cap | tuple[Any, ...]] = (),
        constraint_type: type[nn.Module] | Iterable[type[nn.Module]] = (),
    ) -> None:
        self.module_caps = Caps(module_caps)
        self.para_caps = Caps(para_caps)
        self.constraint_type = _types(constraint_type)

    def to_config(self) -> dict[str, Any]:
        """The strategy as JSON data: its registered name and its parameters.

        Raises:
            StrategyError: if it is not registered, or a parameter is no JSON data.
        """
        if self.name is None:
            raise StrategyError(
                f"{type(self).__name__} has no registered name, so it has no form as data: give its class a `name` and an entry "
                "point in the group 'gift.strategies'."
            )
        return {"name": self.name, "parameters": {key: _json_value(key, value) for key, value in self._parameters.items()}}

    def __repr__(self) -> str:
        if type(self) is not FineTuningStrategy:
            defaults = inspect.signature(type(self).__init__).parameters
            said = [f"{key}={value!r}" for key, value in self._parameters.items() if value != defaults[key].default]
            return f"{type(self).__name__}({', '.join(said)})"
        caps = [f"module: {cap!r}" for cap in self.module_caps] + [f"parameter: {cap!r}" for cap in self.para_caps]
        return f"FineTuningStrategy({'; '.join(caps)})"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self._parameters == other._parameters

    __hash__ = object.__hash__


class FullFineTuningStrategy(FineTuningStrategy):
    """Trains the selected modules in full, by default all of the model.

    Args:
        targets: patterns over full names (see `gift_core.selection`); None selects the whole model.
        exclude: patterns that are left out.
    """

    name = "full"

    def __init__(self, targets: str | Iterable[str] | None = None, exclude: str | Iterable[str] | None = None) -> None:
        if targets is None and exclude is None:
            super().__init__(module_caps=[(is_root(), keep_trainable())])
        else:
            # parameter by parameter, because what is left out may lie inside what is selected
            super().__init__(para_caps=[(selects(targets, exclude), keep_trainable())])


class MergedFineTuningStrategy(FineTuningStrategy):
    """Several strategies as one: the caps of the first come before the caps of the second, and so on.

    Args:
        strategies: two or more strategies, or their configs.

    Raises:
        StrategyError: if no type satisfies the constraints of all of them.
    """

    name = "merged"

    def __init__(self, strategies: Iterable[FineTuningStrategy | Mapping[str, Any]]) -> None:
        parts = [part if isinstance(part, FineTuningStrategy) else strategy_from_config(part) for part in _listed(strategies)]
        if not parts:
            raise StrategyError("merge_strategies needs at least one strategy, got none: pass one.")
        self._parameters = {"strategies": parts}
        super().__init__(
            module_caps=[cap for part in parts for cap in part.module_caps],
            para_caps=[cap for part in parts for cap in part.para_caps],
            constraint_type=_intersection([part.constraint_type for part in parts]),
        )

    def to_config(self) -> dict[str, Any]:
        return {"name": "merged", "parameters": {"strategies": [part.to_config() for part in self._parameters["strategies"]]}}


def merge_strategies(strategies: Iterable[FineTuningStrategy | str], *more: FineTuningStrategy | str) -> FineTuningStrategy:
    """Combine strategies into one; where two want the same site, the earlier has it.

    Args:
        strategies: instances or registered names.
        *more: further ones, so that ``merge_strategies(a, b)`` works too.

    Raises:
        StrategyError: if none is given, or no type satisfies all their constraints.
    """
    if isinstance(strategies, (FineTuningStrategy, str)):
        strategies = [strategies]
    return MergedFineTuningStrategy([as_strategy(strategy) for strategy in (*_listed(strategies), *more)])


def as_strategy(strategy: FineTuningStrategy | str) -> FineTuningStrategy:
    """Take a strategy as users give it: an instance, or the name of a registered one with its default parameters.

    Raises:
        UnknownStrategyError: if no strategy of that name is installed.
        StrategyError: if it is neither.
    """
    if isinstance(strategy, str):
        return strategy_from_config({"name": strategy, "parameters": {}})
    if isinstance(strategy, type) and issubclass(strategy, FineTuningStrategy):
        raise StrategyError(f"{strategy.__name__} is a class: pass an instance, {strategy.__name__}().")
    if not isinstance(strategy, FineTuningStrategy):
        raise StrategyError(f"a strategy is a FineTuningStrategy or a registered name, got {strategy!r}.")
    return strategy


def strategy_from_config(config: Mapping[str, Any]) -> FineTuningStrategy:
    """Build a strategy from `FineTuningStrategy.to_config`'s data, by its registered name.

    Raises:
        PluginError: if the name is unknown or its plugin cannot be used.
        StrategyError: if the config is malformed, or the strategy has no such parameter.
    """
    if not isinstance(config, Mapping) or set(config) != {"name", "parameters"} or not isinstance(config["parameters"], Mapping):
        raise StrategyError(f"a strategy config is {{'name': ..., 'parameters': {{...}}}}, got {config!r}.")
    name, parameters = config["name"], config["parameters"]
    if not isinstance(name, str):
        raise StrategyError(f"a strategy's name is text, got {name!r}.")
    factory = load_strategy(name)
    if not callable(factory):
        raise InvalidPluginError(f"strategy {name!r} is {factory!r}, neither a class nor a function that returns one.", name=name)
    try:
        inspect.signature(factory).bind(**parameters)
    except TypeError as error:
        allowed = ", ".join(inspect.signature(factory).parameters)
        raise StrategyError(f"strategy {name!r}: {error}; its parameters are {allowed or 'none'}.") from error
    strategy = factory(**parameters)
    if not isinstance(strategy, FineTuningStrategy):
        raise InvalidPluginError(
            f"strategy {name!r} gave {type(strategy).__name__}, not a FineTuningStrategy.", name=name, hint="Return a strategy."
        )
    return strategy


def _types(constraint: Any) -> tuple[type, ...]:
    types = (constraint,) if isinstance(constraint, type) else tuple(_listed(constraint))
    for item in types:
        if not isinstance(item, type):
            raise StrategyError(f"constraint_type takes types, got {item!r}.")
    return types


def _listed(value: Any) -> Iterable[Any]:
    if not isinstance(value, Iterable) or isinstance(value, (str, Mapping)):
        raise StrategyError(f"expected a list, got {value!r}.")
    return value


def _intersection(constraints: list[tuple[type, ...]]) -> tuple[type, ...]:
    result: tuple[type, ...] = ()
    for types in filter(None, constraints):
        # of two related types the narrower one satisfies both
        both = [a if issubclass(a, b) else b for a in result for b in types if issubclass(a, b) or issubclass(b, a)]
        if result and not both:
            names = [" or ".join(item.__name__ for item in group) for group in (result, types)]
            raise StrategyError(f"no model satisfies both constraints, {names[0]} and {names[1]}: merge strategies for one type.")
        result = tuple(dict.fromkeys(both)) if result else types
    return result


def _json_value(key: str, value: Any) -> Any:
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise StrategyError(
            f"parameter {key!r} is no plain JSON data: {value!r} ({error}). Give text, numbers, truth values, lists or tables."
        ) from error
