"""What the parameters of the strategies may be, and those that go by pattern."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from typing import Any

from gift_core.errors import ParameterError
from gift_core.factories import Check, everything, lies_in
from gift_core.selection import as_patterns, compile_pattern
from gift_lora_plugin.initialization import INITIALIZATIONS
from gift_lora_plugin.layouts import ATTENTION_PARTS, PARAMETER_LAYOUTS
from gift_lora_plugin.lowrank import CONV_LAYOUTS

#: In which type an adapter is kept; None is the weight's own.
ADAPTER_DTYPES = (None, "float32")

#: The largest number of single precision, to which torch converts what a tensor of less than double precision is multiplied by.
LARGEST = 3.4028234663852886e38

#: Rules of the form pattern -> value, as JSON data; the first pattern that matches a site wins.
PatternRules = Mapping[str, Any]


def check_parameters(given: Mapping[str, Any]) -> None:
    """Refuse a value that a parameter cannot have; names that are no parameters are passed over.

    Raises:
        ParameterError: names the parameter, the value and what is allowed.
        PatternError: if a pattern is malformed.
    """
    for name, value in given.items():
        if name in _BY_PATTERN:
            _check_rules(name, value)
        elif name in _ALLOWED:
            _check(name, name, value)
        elif name in _PATTERNS:
            as_patterns(value, name)


def _check(name: str, shown: str, value: object) -> None:
    allowed, says = _ALLOWED[name]
    if not allowed(value):
        raise ParameterError(f"{shown} must be {says}, got {value!r}.")


def _check_rules(name: str, rules: object) -> None:
    if rules is None:
        return
    if not isinstance(rules, Mapping) or not rules:
        raise ParameterError(f"{name} must map one or more patterns to values, such as {{'layer4': 8}}, or be None, got {rules!r}.")
    for pattern, value in rules.items():
        compile_pattern(pattern)
        _check(_BY_PATTERN[name], f"{name}[{pattern!r}]", value)


def is_number(value: Any) -> bool:
    """Whether a value is a number by which torch can multiply a tensor of any dtype; no NaN, no infinity."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= LARGEST


def _one_of(choices: Sequence[str | None]) -> tuple[Callable[[Any], bool], str]:
    return lambda value: (value is None or isinstance(value, str)) and value in choices, f"one of {', '.join(map(str, choices))}"


def _is_selection(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) > 0
        and all(isinstance(part, str) and part in ATTENTION_PARTS for part in value)
        and len(set(value)) == len(value)
    )


_TRUTH: tuple[Callable[[Any], bool], str] = (lambda value: isinstance(value, bool), "True or False")

_ALLOWED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "rank": (lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 1, "a whole number from 1 up"),
    "lora_alpha": (lambda value: value is None or is_number(value), "a finite number of at most 3.4e38, or None for the rank"),
    "lora_dropout": (lambda value: is_number(value) and 0 <= value < 1, "a number in [0, 1)"),
    "train_bias": _TRUTH,
    "conv_layout": _one_of(CONV_LAYOUTS),
    "use_rslora": _TRUTH,
    "use_dora": _TRUTH,
    "init": _one_of(INITIALIZATIONS),
    "freeze_A": _TRUTH,
    "adapter_dtype": _one_of(ADAPTER_DTYPES),
    "attention": (_is_selection, f"a list of one or more of {', '.join(ATTENTION_PARTS)}, each once"),
    "parameter_layout": _one_of(PARAMETER_LAYOUTS),
}

_PATTERNS = ("targets", "exclude", "parameters")
_BY_PATTERN = {"rank_pattern": "rank", "alpha_pattern": "lora_alpha", "dropout_pattern": "lora_dropout"}


# --- values by pattern


@dataclasses.dataclass(frozen=True)
class PerSite:
    """An action whose params depend on the site's name.

    Attributes:
        action: what is done.
        rules: for each param its patterns and values, in order.
    """

    action: Callable[..., None]
    rules: tuple[tuple[str, tuple[tuple[Check, Any], ...]], ...]

    def __call__(self, *site: Any, **params: Any) -> None:
        self.action(*site, **self._params_at(site, params))

    def examine(self, *site: Any, **params: Any) -> str | None:
        """What the action says of the site, with the params that it will have there."""
        caution: str | None = self.action.examine(*site, **self._params_at(site, params))  # type: ignore[attr-defined]
        return caution

    def __repr__(self) -> str:
        return repr(self.action)

    def _params_at(self, site: tuple[Any, ...], params: dict[str, Any]) -> dict[str, Any]:
        return params | {param: next((value for check, value in rules if check(*site)), params[param]) for param, rules in self.rules}


def per_site(action: Callable[..., None], **rules: PatternRules | None) -> Callable[..., None]:
    """Let ``rules`` choose the params of an action by the site's name, in the language of `gift_core.selection`.

    A pattern chooses what it matches and everything inside it, as ``targets`` does; a site that none matches keeps the cap's own.
    """
    given = {param: tuple((lies_in(pattern), value) for pattern, value in by.items()) for param, by in rules.items() if by}
    return PerSite(action, tuple(given.items())) if given else action


def literal_pattern(name: str) -> str:
    """A pattern that matches this very name: nothing in it is a wildcard or the kind of a pattern."""
    return "".join(f"[{character}]" if character in "*?[:" else character for character in name)


def mentions(patterns: Iterable[str]) -> Check:
    """A check that is true everywhere, and whose patterns must each match a site that is adapted, so that a typo is an error."""
    return reduce(Check.__or__, [lies_in(pattern) for pattern in dict.fromkeys(patterns)], everything())
