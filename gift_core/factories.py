"""Ready-made checks and actions.

A check from here is data: it prints as it was written, can be pickled and compared, and composes with ``&``, ``|`` and ``~``. So are
the actions.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from gift_core.caps import describe
from gift_core.errors import SiteError, StrategyError
from gift_core.iterator import join_name, named_parameters_below
from gift_core.reparameterization import Reparameterization, adopt, adoptable_parameter
from gift_core.selection import as_patterns, compile_pattern, layer_index_of

# --- checks


@dataclasses.dataclass(frozen=True)
class Check:
    """A check as data: the name of a factory and its arguments.

    Attributes:
        kind: the factory, or ``and``, ``or``, ``not``.
        arguments: what it was given; checks for the three operators.
        optional: whether it may match nothing. A check that names something in the model must match somewhere, because a name that
            matches nothing is a mistake; code that knows several architectures says ``optional=True``.
    """

    kind: str
    arguments: tuple[Any, ...] = ()
    optional: bool = False

    def __call__(self, *site: Any) -> bool:
        return _TESTS[self.kind](self.arguments, site)

    def __and__(self, other: Callable[..., bool]) -> Check:
        joined: Check = self._join("and", other)
        return joined

    def __or__(self, other: Callable[..., bool]) -> Check:
        joined: Check = self._join("or", other)
        return joined

    def __invert__(self) -> Check:
        return Check("not", (self,))

    def _join(self, kind: str, other: Any) -> Any:
        if not callable(other):
            return NotImplemented
        if kind == "and" and isinstance(other, Check) and _EVERYTHING in (self, other):
            return other if self == _EVERYTHING else self
        return Check(kind, (self, other))

    def __repr__(self) -> str:
        if self.kind in _OPERATORS:
            return "(" + _OPERATORS[self.kind].join(describe(part) for part in self.arguments) + ")"
        if self.kind == "not":
            return f"~{describe(self.arguments[0])}"
        return f"{self.kind}({', '.join(_show(argument) for argument in self.arguments)})"

    def to_config(self) -> dict[str, Any]:
        """The check as plain JSON data.

        Raises:
            StrategyError: if an argument has no such form (a function of yours, a class from outside torch.nn).
        """
        config: dict[str, Any] = {"check": self.kind, "arguments": [_plain(argument) for argument in self.arguments]}
        return config | {"optional": True} if self.optional else config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Check:
        """Build a check from `to_config`'s data.

        Raises:
            StrategyError: if the data names no check of this module, or has other keys.
        """
        readable = isinstance(config, dict) and isinstance(config.get("check"), str) and isinstance(config.get("arguments"), list)
        if not readable or config["check"] not in _TESTS:
            raise StrategyError(f"{config!r} describes no check; known: {', '.join(sorted(_TESTS))}.")
        if extra := set(config) - {"check", "arguments", "optional"}:
            raise StrategyError(f"a check has no {sorted(extra)[0]!r}: give it check, arguments and optional alone.")
        kind, arguments = config["check"], config["arguments"]
        if kind in ("and", "or", "not"):
            if len(arguments) != (1 if kind == "not" else 2):
                raise StrategyError(f"{config!r} describes no check: give 'not' one check, 'and' and 'or' two.")
            return cls(kind, tuple(cls.from_config(part) for part in arguments))
        optional = {"optional": True} if config.get("optional") else {}
        try:
            inspect.signature(_FACTORIES[kind]).bind(*arguments, **optional)
        except TypeError as error:
            raise StrategyError(
                f"{config!r} describes no check: {kind} has {error}. Give it what gift_core.factories.{kind} takes."
            ) from error
        return _FACTORIES[kind](*arguments, **optional)

    def naming_parts(self, negated: bool = False) -> Iterator[tuple[Check, bool]]:
        """The parts that name something in the model and so must match somewhere, each with whether it excludes."""
        if self.kind in ("and", "or", "not"):
            for part in self.arguments:
                if isinstance(part, Check):
                    yield from part.naming_parts(negated ^ (self.kind == "not"))
        elif self.kind in _NAMING and not self.optional:
            yield self, negated


def _show(argument: Any) -> str:
    return argument.__name__ if isinstance(argument, type) else repr(argument)


def _plain(argument: Any) -> Any:
    if isinstance(argument, Check):
        return argument.to_config()
    if isinstance(argument, type) and vars(nn).get(argument.__name__) is argument:
        return argument.__name__  # type: ignore[union-attr]
    if argument is None or isinstance(argument, (str, int, float, bool)):
        return argument
    raise StrategyError(f"{describe(argument)} has no form as plain data: use a check of gift_core.factories with plain arguments.")


_OPERATORS = {"and": " & ", "or": " | "}
_NAMING = {"name_is", "name_contains", "name_matches", "lies_in", "layer_index", "parameter_name_is", "parameter_name_contains"}


def _full_name(site: tuple[Any, ...]) -> str:
    return join_name(site[2], site[5]) if len(site) == 7 else site[2]


#: What each kind asks of its arguments and of a site, which is the positional arguments of a check.
_TESTS: dict[str, Callable[[tuple[Any, ...], tuple[Any, ...]], bool]] = {
    "and": lambda parts, site: all(part(*site) for part in parts),
    "or": lambda parts, site: any(part(*site) for part in parts),
    "not": lambda parts, site: not parts[0](*site),
    "everything": lambda _, site: True,
    "is_root": lambda _, site: site[0] is None,
    "class_is": lambda names, site: site[3] in names,
    "is_instance": lambda types, site: isinstance(site[4], types),
    "name_is": lambda names, site: site[1] in names,
    "name_contains": lambda parts, site: any(part in site[1] for part in parts),
    "name_matches": lambda patterns, site: any(compile_pattern(text)(_full_name(site), site[4]) for text in patterns),
    "lies_in": lambda patterns, site: any(_covers(text, site) for text in patterns),
    "layer_index": lambda indices, site: layer_index_of(_full_name(site)) in indices,
    "parameter_name_is": lambda names, site: len(site) == 7 and site[5] in names,
    "parameter_name_contains": lambda parts, site: len(site) == 7 and any(part in site[5] for part in parts),
}


_EVERYTHING = Check("everything")


def everything() -> Check:
    """True for every site."""
    return _EVERYTHING


def is_root() -> Check:
    """True for the root of the model, and for its own parameters."""
    return Check("is_root")


def class_is(*names: str) -> Check:
    """True where the class is called one of ``names``; subclasses do not count."""
    return Check("class_is", _strings("class_is", names))


def is_instance(*types: type | str) -> Check:
    """True for instances of the types, subclasses included. A string names a class of `torch.nn`."""
    if not types:
        raise StrategyError("is_instance takes one or more classes, got none.")
    return Check("is_instance", tuple(_module_type(item) for item in types))


def name_is(*names: str, optional: bool = False) -> Check:
    """True where the last part of the module's name is one of ``names``."""
    return Check("name_is", _strings("name_is", names), optional)


def name_contains(*parts: str, optional: bool = False) -> Check:
    """True where the last part of the module's name contains one of ``parts``."""
    return Check("name_contains", _strings("name_contains", parts), optional)


def name_matches(*patterns: str, optional: bool = False) -> Check:
    """True where the full name matches one of ``patterns`` (see `gift_core.selection`)."""
    return Check("name_matches", as_patterns(patterns, "name_matches") or (), optional)


def lies_in(*patterns: str, optional: bool = False) -> Check:
    """True for what one of ``patterns`` matches and for everything inside it; ``type:`` looks at the site's own module."""
    return Check("lies_in", as_patterns(patterns, "lies_in") or (), optional)


def layer_index(*indices: int, optional: bool = False) -> Check:
    """True where the first number in the full name is one of ``indices``: 7 for ``blocks.7.attn``."""
    if not indices or not all(type(index) is int and index >= 0 for index in indices):
        raise StrategyError(f"layer_index takes numbers from 0 up, got {indices!r}.")
    return Check("layer_index", indices, optional)


def parameter_name_is(*names: str, optional: bool = False) -> Check:
    """True for parameters called one of ``names`` in their module."""
    return Check("parameter_name_is", _strings("parameter_name_is", names), optional)


def parameter_name_contains(*parts: str, optional: bool = False) -> Check:
    """True for parameters whose own name contains one of ``parts``."""
    return Check("parameter_name_contains", _strings("parameter_name_contains", parts), optional)


def selects(targets: str | Iterable[str] | None = None, exclude: str | Iterable[str] | None = None) -> Check:
    """True for the sites that a user's ``targets`` choose and ``exclude`` does not; no targets choose everything.

    A pattern chooses what it matches and everything inside it, so that ``layer4`` means all of it. Each pattern must
    match somewhere, so that a typo is an error.

    Raises:
        PatternError: if a pattern is malformed or a list is empty.
    """
    wanted, unwanted = as_patterns(targets, "targets"), as_patterns(exclude, "exclude")
    chosen = everything() if wanted is None else _joined(Check.__or__, [lies_in(pattern) for pattern in wanted])
    return chosen if unwanted is None else chosen & _joined(Check.__and__, [~lies_in(pattern) for pattern in unwanted])


def _joined(join: Callable[[Check, Check], Check], checks: list[Check]) -> Check:
    # as a tree: a chain of a thousand would be deeper than Python follows
    if len(checks) == 1:
        return checks[0]
    half = (len(checks) + 1) // 2
    return join(_joined(join, checks[:half]), _joined(join, checks[half:]))


_FACTORIES: dict[str, Callable[..., Check]] = {
    factory.__name__: factory
    for factory in (
        everything,
        is_root,
        class_is,
        is_instance,
        name_is,
        name_contains,
        name_matches,
        lies_in,
        layer_index,
        parameter_name_is,
        parameter_name_contains,
    )
}


def _covers(pattern: str, site: tuple[Any, ...]) -> bool:
    matches, name = compile_pattern(pattern), _full_name(site)
    ends = [at for at, character in enumerate(name) if character == "."]
    return any(matches(name[:end], site[4]) for end in (len(name), *ends))


def _strings(factory: str, values: tuple[Any, ...]) -> tuple[str, ...]:
    if not values or not all(isinstance(value, str) and value for value in values):
        raise StrategyError(f"{factory} takes one or more non-empty strings, got {values!r}.")
    return values


def _module_type(item: type | str) -> type:
    found = getattr(nn, item, None) if isinstance(item, str) else item
    if not isinstance(found, type):
        raise StrategyError(f"is_instance takes classes or names of classes in torch.nn, got {item!r}.")
    return found


# --- actions


@dataclasses.dataclass(frozen=True)
class _Reparameterize:
    method: type[Reparameterization]
    names: tuple[str, ...]
    keep: tuple[str, ...]

    def __call__(self, *site: Any, **params: Any) -> None:
        module: nn.Module = site[4]
        if len(site) == 5:
            parameters = named_parameters_below(module)
            for _, parameter in parameters:
                parameter.requires_grad_(False)
            for kept in [parameter for name, parameter in parameters if name in self.keep] if self.keep else ():
                kept.requires_grad_(True)
        adopt(module, self.method, self._names(site), **params)

    def examine(self, *site: Any, **params: Any) -> str | None:
        module: nn.Module = site[4]
        method = self.method.specialize(module)
        cautions = [method.examine(module, name, adoptable_parameter(module, name), **params) for name in self._names(site)]
        return "; ".join(caution for caution in cautions if caution) or None

    def _names(self, site: tuple[Any, ...]) -> tuple[str, ...]:
        return self.names if len(site) == 5 else (site[5],)

    def __repr__(self) -> str:
        return f"reparameterize({self.method.__name__})"


def reparameterize(
    method: type[Reparameterization], names: Iterable[str] = ("weight",), keep: Iterable[str] = ()
) -> Callable[..., None]:
    """Adopt a module's weights, or the parameter of a parameter cap, with ``method``; the rest of the module is frozen.

    Args:
        method: a subclass of `Reparameterization`; the cap's params are handed to its ``init_parameters``.
        names: the parameters that a module cap adapts.
        keep: parameters of the module that stay trainable, such as ``("bias",)``; a name that it lacks is passed over.
    """
    if not (isinstance(method, type) and issubclass(method, Reparameterization)):
        raise StrategyError(f"reparameterize takes a subclass of Reparameterization, got {method!r}.")
    return _Reparameterize(method, tuple(names), tuple(keep))


@dataclasses.dataclass(frozen=True)
class _ReplaceModule:
    replacement: Callable[[nn.Module], nn.Module]

    def __call__(self, *site: Any, **params: Any) -> None:
        parent, name, module = site[0], site[1], site[4]
        new = self.replacement(module, **params)
        if not isinstance(new, nn.Module):
            raise SiteError(f"{describe(self.replacement)} gave {type(new).__name__}, not a module: return one.")
        setattr(parent, name, new)

    def examine(self, *site: Any, **params: Any) -> str | None:
        if site[0] is None:
            raise SiteError("the root cannot be replaced, because nobody holds it: put it in a parent, or match its children.")
        if len(site) != 5:
            raise SiteError("replace_module belongs to a module cap, this is a parameter cap: move it there.")
        return None

    def __repr__(self) -> str:
        return f"replace_module({describe(self.replacement)})"


def replace_module(replacement: Callable[..., nn.Module]) -> Callable[..., None]:
    """Put ``replacement(module, **params)`` in the place of a module; whether its parts train is the replacement's choice."""
    if not callable(replacement):
        raise StrategyError(f"replace_module takes a function from module to module, got {replacement!r}.")
    return _ReplaceModule(replacement)


def writes_no_value(action: object) -> bool:
    """Whether an action is known to change flags alone, so that the values around it need no watching."""
    return isinstance(action, _SetTrainable)


@dataclasses.dataclass(frozen=True)
class _SetTrainable:
    trainable: bool

    def __call__(self, *site: Any) -> None:
        for parameter in (site[5:] and (site[6],)) or site[4].parameters():
            if parameter.is_floating_point() or parameter.is_complex():
                parameter.requires_grad_(self.trainable)

    def __repr__(self) -> str:
        return "keep_trainable()" if self.trainable else "freeze()"


def keep_trainable() -> Callable[..., None]:
    """Train the module or parameter itself, also where it was frozen before."""
    return _SetTrainable(True)


def freeze() -> Callable[..., None]:
    """Keep a module or parameter from training and from later caps."""
    return _SetTrainable(False)


def site_name(*site: Any) -> str:
    """A site as messages name it: its full name and class, or ``the root``."""
    name = join_name(site[2], site[5]) if len(site) == 7 else site[2]
    return f"{name!r} ({site[3]})" if name else f"the root ({site[3]})"
