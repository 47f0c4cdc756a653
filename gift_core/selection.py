r"""The one language for choosing sites, from Python and from the command line.

========================  ==================================================================================
``layer4.*``              a glob over the full dotted name; ``*`` also crosses dots, case counts
``re:layer[34]\..*``      a regular expression that must cover the full name
``type:Conv2d``           a class name (a glob), subclasses included
``layer:0-3`` ``layer:7`` the first number in the full name, as in ``blocks.7.attn``; comma separates several
========================  ==================================================================================

A plain name is a glob without wildcards. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from fnmatch import fnmatchcase

from gift_core.errors import PatternError

#: A regular expression longer than this is refused: patterns come from files too, and no honest one is this long.
MAX_REGEX_LENGTH = 1000

Matcher = Callable[[str, object], bool]

_regex_refusal: ContextVar[str | None] = ContextVar("_regex_refusal", default=None)


@contextlib.contextmanager
def no_regular_expressions(advice: str) -> Iterator[None]:
    """Within the context, in this thread, ``re:`` patterns are refused, because one from a file may never end.

    Args:
        advice: what to do instead, for the message.
    """
    token = _regex_refusal.set(advice)
    try:
        yield
    finally:
        _regex_refusal.reset(token)


def compile_pattern(pattern: str) -> Matcher:
    """Turn a pattern into a function of a site's full name and its module.

    Raises:
        PatternError: if the pattern is empty, an unreadable regular expression or an unreadable layer range.
    """
    if not isinstance(pattern, str) or not pattern:
        raise PatternError(f"a pattern is a non-empty string, got {pattern!r}: write a name, a glob, 're:', 'type:' or 'layer:'.")
    if pattern.startswith("re:") and (advice := _regex_refusal.get()) is not None:
        raise PatternError(f"the pattern {pattern[:100]!r} comes from a file, and regular expressions from files are not run. {advice}")
    return _compile(pattern)


@functools.lru_cache(maxsize=1024)
def _compile(pattern: str) -> Matcher:
    kind, colon, rest = pattern.partition(":")
    make = {"re": _regex, "type": _type, "layer": _layer}.get(kind) if colon else None
    if make is None:
        return lambda name, module: fnmatchcase(name, pattern)
    if not rest:
        raise PatternError(f"pattern {pattern!r} has nothing after the colon: write what it should match.")
    return make(rest)


def _regex(text: str) -> Matcher:
    if len(text) > MAX_REGEX_LENGTH:
        raise PatternError(
            f"a regular expression of {len(text)} characters is refused; {MAX_REGEX_LENGTH} are allowed: write a shorter one."
        )
    try:
        compiled = re.compile(text)
    except re.error as error:
        raise PatternError(f"pattern 're:{text}' is no regular expression: {error}. Correct it, or write a glob.") from error
    return lambda name, module: compiled.fullmatch(name) is not None


def _type(text: str) -> Matcher:
    return lambda name, module: any(fnmatchcase(cls.__name__, text) for cls in type(module).__mro__)


def _layer(text: str) -> Matcher:
    ranges = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:(-)\s*(\d*))?\s*", part, re.ASCII)
        if match is None:
            raise PatternError(f"pattern 'layer:{text}' is no layer range: write layer:3, layer:0-5, layer:8- or layer:0,2,4.")
        first = int(match[1])
        last = first if match[2] is None else int(match[3]) if match[3] else None
        ranges.append((first, last))

    def matches(name: str, module: object) -> bool:
        index = layer_index_of(name)
        return index is not None and any(first <= index and (last is None or index <= last) for first, last in ranges)

    return matches


def layer_index_of(name: str) -> int | None:
    """The first part of a dotted name that is a number: 7 for ``blocks.7.attn.2``; None where there is none."""
    return next((int(part) for part in name.split(".") if part.isascii() and part.isdigit()), None)


def as_patterns(patterns: str | Iterable[str] | None, argument: str) -> tuple[str, ...] | None:
    """Read ``targets`` or ``exclude`` as a user writes it: None, one pattern or several; each is checked.

    Raises:
        PatternError: if one is malformed, or an empty list was given.
    """
    if patterns is None:
        return None
    if not isinstance(patterns, (str, Iterable)):
        raise PatternError(f"{argument} takes a pattern or a list of patterns, got {patterns!r}.")
    result = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    if not result:
        raise PatternError(f"{argument} is empty: leave it out to select everything, or name a pattern.")
    for pattern in result:
        compile_pattern(pattern)
    return result
