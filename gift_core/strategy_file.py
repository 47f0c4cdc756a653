"""A strategy written as a file, TOML or JSON, without Python.

::

    [[module_caps]]
    check = 'is_instance("Linear") & ~name_is("head")'
    strategy = "some-strategy"
    params = { rank = 8 }

    [[module_caps]]
    check = 'name_is("head")'
    action = "keep_trainable"

Or ``strategy = "name"`` and a table ``parameters`` alone. A file names checks, actions and strategies that are registered: those of
`gift_core.factories`, and what plugins register. It can name no module, and nothing in it is run as code.
"""

from __future__ import annotations

import ast
import bisect
import inspect
import json
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gift_core import factories
from gift_core.caps import Cap
from gift_core.errors import StrategyError, StrategyFileError, StrategyFileNotFoundError, UnknownPluginError, UnknownStrategyError
from gift_core.factories import Check
from gift_core.plugins import did_you_mean, find_thing, load_strategy
from gift_core.plugins.hook_plugins import CORE_NAMES
from gift_core.reading import as_path, open_regular
from gift_core.strategy import FineTuningStrategy, strategy_from_config

#: A larger file is refused before it is parsed.
MAX_FILE_BYTES = 2**20
#: A longer check expression is refused before it is parsed.
MAX_EXPRESSION_LENGTH = 4000

#: How the name of a strategy file ends.
SUFFIXES = (".toml", ".json")

Place = tuple[str | int, ...]


def strategy_from_file(path: str | os.PathLike[str]) -> FineTuningStrategy:
    """Read a strategy from a TOML or JSON file.

    Raises:
        StrategyFileError: if the file is not there, cannot be read, or says something that is not allowed; the message has the line and
            the nearest valid key or name.
        PluginError: if a plugin that it names cannot be used.
    """
    file = as_path(path)
    text = _text(file)
    document, lines = (_toml if file.suffix == ".toml" else _json)(text, file)
    try:
        return _strategy(document)
    except _At as problem:
        raise StrategyFileError(f"{file}, line {_line(lines, problem.path)}: {problem}") from problem.__cause__
    except RecursionError as error:
        raise StrategyFileError(f"{file}: its values are nested too deep: write the strategy flatter.") from error


def parse_check(expression: str) -> Callable[..., bool]:
    """Read a check expression: calls of checks by name with constant arguments, joined by ``&``, ``|``, ``~`` and parentheses.

    A name that is no Python name is quoted, as in ``"my-package:is_wide"(3)``.

    Raises:
        StrategyError: if it is anything else, or names no check; the message has the part and the nearest names.
    """
    if not isinstance(expression, str) or len(expression) > MAX_EXPRESSION_LENGTH:
        raise StrategyError(f"a check is text of at most {MAX_EXPRESSION_LENGTH} characters: write one such as 'name_is(\"head\")'.")
    try:
        return _check(ast.parse(expression.strip(), mode="eval").body, expression.strip())
    except SyntaxError as error:
        raise StrategyError(f"check {expression!r} cannot be read: {error.msg} at column {error.offset}.") from error
    except (RecursionError, MemoryError, ValueError) as error:
        if isinstance(error, StrategyError):
            raise
        raise StrategyError(f"check {expression[:40]!r}... cannot be read: {type(error).__name__}.") from error


class _At(Exception):
    """What is wrong, and where in the document."""

    def __init__(self, message: str, *path: str | int) -> None:
        super().__init__(message)
        self.path = path


# --- the document


def _strategy(document: Mapping[str, Any]) -> FineTuningStrategy:
    if "strategy" in document:
        _only(document, ("strategy", "parameters"), ())
        return _named(document["strategy"], document.get("parameters", {}), ("strategy",), ("parameters",))
    _only(document, ("module_caps", "para_caps", "strategy", "parameters"), ())
    if "parameters" in document:
        raise _At("'parameters' belong to a strategy: add strategy = \"name\".", "parameters")
    caps = {kind: _caps(document, kind) for kind in ("module_caps", "para_caps")}
    if not any(caps.values()):
        raise _At('there is no cap: write [[module_caps]] with a check and an action, or strategy = "name".')
    return FineTuningStrategy(caps["module_caps"], caps["para_caps"])


def _caps(document: Mapping[str, Any], kind: str) -> list[Cap]:
    caps = document.get(kind, [])
    if not isinstance(caps, list):
        raise _At(f"{kind!r} is a list of tables: write [[{kind}]].", kind)
    return [_cap(cap, kind, (kind, index)) for index, cap in enumerate(caps)]


def _cap(cap: Any, kind: str, at: Place) -> Cap:
    if not isinstance(cap, dict):
        raise _At(f"a cap is a table with a check and an action, got {cap!r}.", *at)
    _only(cap, ("check", "action", "strategy", "params"), at)
    if "check" not in cap:
        raise _At("the cap has no 'check': write check = 'everything()' to match all.", *at)
    if ("action" in cap) == ("strategy" in cap):
        raise _At("a cap has an 'action' or a 'strategy': write one of them.", *at)
    params = cap.get("params", {})
    _plain(params, (*at, "params"))
    check = _guard(lambda: parse_check(cap["check"]), (*at, "check"))
    if "strategy" not in cap:
        return Cap(check, _action(cap["action"], params, 5 if kind == "module_caps" else 7, at), params)
    if kind == "para_caps":
        raise _At("a strategy acts on modules: use it in [[module_caps]].", *at, "strategy")
    return Cap(check, _named(cap["strategy"], params, (*at, "strategy"), (*at, "params")))


def _named(name: Any, parameters: Any, at: Place, parameters_at: Place) -> FineTuningStrategy:
    _plain(parameters, parameters_at)
    if not isinstance(name, str):
        raise _At(f"a strategy's name is text, got {name!r}.", *at)
    try:
        _refuse_unknown(name, parameters, parameters_at)
        return strategy_from_config({"name": name, "parameters": parameters})
    except UnknownStrategyError as error:
        raise _At(str(error), *at) from error
    except StrategyError as error:
        key = next((key for key in parameters if repr(key) in str(error)), None)
        raise _At(str(error), *parameters_at, *([] if key is None else [key])) from error


def _refuse_unknown(name: str, parameters: Mapping[str, Any], at: Place) -> None:
    factory = load_strategy(name)
    known = inspect.signature(factory).parameters if callable(factory) else {}
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        return
    for key in parameters:
        if key not in known:
            allowed = f" Its parameters are {', '.join(known) or 'none'}."
            raise _At(f"strategy {name!r} has no parameter {key!r}{did_you_mean(key, known)}{allowed}", *at, key)


def _action(name: Any, params: Mapping[str, Any], arguments: int, at: Place) -> Callable[..., None]:
    if not isinstance(name, str):
        raise _At(f"an action's name is text, got {name!r}.", *at, "action")
    if name in CORE_NAMES["action"]:
        action: Callable[..., None] = getattr(factories, name)()
    else:
        action = _guard(lambda: find_thing("action", name), (*at, "action"))
    try:
        inspect.signature(action).bind(*[None] * arguments, **params)
    except TypeError as error:
        raise _At(
            f"action {name!r}: {error}. Change what stands under 'params'.", *at, *(["params"] if params else ["action"])
        ) from error
    return action


def _only(table: Mapping[str, Any], keys: tuple[str, ...], at: Place) -> None:
    for key in table:
        if key not in keys:
            raise _At(f"there is no key {key!r}{did_you_mean(key, keys)} The keys here are {', '.join(keys)}.", *at, key)


def _plain(params: Any, at: Place) -> None:
    if not isinstance(params, dict):
        raise _At(f"parameters are a table of names and values, got {params!r}.", *at)
    for key, value in params.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise _At(
                f"{key!r} is {value!r}: a value is text, a number, a truth value, a list or a table of these, so write one of them.",
                *at,
                key,
            ) from error


def _guard(make: Callable[[], Callable[..., Any]], at: Place) -> Callable[..., Any]:
    try:
        return make()
    except (StrategyError, UnknownPluginError) as error:
        raise _At(str(error), *at) from error


# --- check expressions


def _check(node: ast.expr, text: str) -> Callable[..., bool]:
    match node:
        case ast.BinOp(left, ast.BitAnd() | ast.BitOr() as operator, right):
            return Check("and" if isinstance(operator, ast.BitAnd) else "or", (_check(left, text), _check(right, text)))
        case ast.UnaryOp(ast.Invert(), operand):
            return Check("not", (_check(operand, text),))
        case ast.Call(ast.Name(name) | ast.Constant(str(name)), arguments, keywords):
            values = [_constant(argument, text) for argument in arguments]
            return _called(name, values, {_keyword(one, text): _constant(one.value, text) for one in keywords})
        case ast.Name(name):
            raise StrategyError(f"{name!r} is not called: write {name}().")
    raise StrategyError(f'{_source(node, text)} is not allowed: join calls such as name_is("head") by &, | and ~.')


def _called(name: str, values: list[Any], keywords: dict[str, Any]) -> Callable[..., bool]:
    factory = getattr(factories, name) if name in CORE_NAMES["check"] else find_thing("check", name)
    try:
        check = factory(*values, **keywords)
    except StrategyError:
        raise
    except Exception as error:  # the factory may be a plugin's
        raise StrategyError(f"check {name!r} cannot be made: {type(error).__name__}: {error}.") from error
    if not callable(check):
        raise StrategyError(f"check {name!r} gave {check!r}, which cannot be called.")
    return check  # type: ignore[no-any-return]


def _keyword(keyword: ast.keyword, text: str) -> str:
    if keyword.arg is None:
        raise StrategyError(f"{_source(keyword.value, text)} is not allowed: name each argument.")
    return keyword.arg


def _constant(node: ast.expr, text: str) -> str | int | float | bool | None:
    match node:
        case ast.Constant(str() | int() | float() | None as value):
            return value
        case ast.UnaryOp(ast.USub(), ast.Constant(int() | float() as value)):
            return -value
    raise StrategyError(f"{_source(node, text)} is not allowed: write text, a number, True, False or None.")


def _source(node: ast.expr, text: str) -> str:
    return repr(ast.get_source_segment(text, node) or type(node).__name__)


# --- the file, and its lines


def _text(file: Path) -> str:
    if file.suffix not in SUFFIXES:
        raise StrategyFileError(f"{file} is no strategy file: name one that ends in {' or '.join(SUFFIXES)}.")
    try:
        with open_regular(file) as stream:
            data = stream.read(MAX_FILE_BYTES + 1)
        text = data.decode("utf-8")
    except FileNotFoundError as error:
        raise StrategyFileNotFoundError(f"there is no strategy file at {file}: check the path.") from error
    except (OSError, ValueError) as error:  # a ValueError is about the encoding
        raise StrategyFileError(f"{file} cannot be read: {error}. Name a text file in UTF-8.") from error
    if len(data) > MAX_FILE_BYTES:
        raise StrategyFileError(f"{file} has more than {MAX_FILE_BYTES:,} bytes: make it shorter, no strategy is that long.")
    return text.replace("\r\n", "\n")


def _toml(text: str, file: Path) -> tuple[dict[str, Any], dict[Place, int]]:
    if deep := next((token for token in _TOKEN.finditer(text) if token["deep"]), None):
        number = text.count("\n", 0, deep.start()) + 1
        raise StrategyFileError(
            f"{file}, line {number}: a key has more than {MAX_KEY_PARTS} parts: nest it less, no strategy is that deep."
        )
    try:
        return tomllib.loads(text), _toml_lines(text)
    except (ValueError, RecursionError) as error:  # not only TOML's own error: Python limits the digits of a number
        line = re.search(r"at line (\d+)", str(error))
        where = f", line {line[1] if line else len(text.splitlines())}"  # without a number it is the end
        raise StrategyFileError(f"{file}{where}: it is no TOML: {error}. Correct that line.") from error


def _json(text: str, file: Path) -> tuple[dict[str, Any], dict[Place, int]]:
    try:
        document, lines = json.loads(text, object_pairs_hook=_unique), _json_lines(text)
    except (ValueError, RecursionError) as error:
        where = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise StrategyFileError(f"{file}{where}: it is no JSON: {error}. Correct it there.") from error
    if not isinstance(document, dict):
        raise StrategyFileError(f"{file}, line 1: a strategy is an object with caps, got {type(document).__name__}.")
    return document, lines


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key occurs twice")
    return dict(pairs)


def _line(lines: Mapping[Place, int], path: Place) -> int:
    """The line of the place, or of the nearest place around it that has one."""
    return next((lines[path[:length]] for length in range(len(path), 0, -1) if path[:length] in lines), 1)


#: The TOML parser takes time by the square of a key's parts.
MAX_KEY_PARTS = 50
_PART = r"""(?:[\w-]++|"(?:\\[^\n]|[^"\\\n])*+"?|'[^'\n]*+'?)"""
_NEXT_PART = rf"[ \t]*+\.[ \t]*+{_PART}"
# Long strings, comments and keys, so that none is sought in another; short strings are as the parts of keys. Nothing backtracks.
_TOKEN = re.compile(
    r'''"""(?:[^"\\]|\\.|"(?!""))*+(?:"""|\\?\Z)'''
    r"""|'''(?:[^']|'(?!''))*+(?:'''|\Z)"""
    rf"|\#[^\n]*+|{_PART}(?:{_NEXT_PART}){{0,{MAX_KEY_PARTS - 1}}}+(?P<deep>{_NEXT_PART})?",
    re.DOTALL,
)
_HEADER = re.compile(r"\[(\[?)\s*([\w.-]+)\s*\]\]?\s*(#.*)?")
_KEY = re.compile(r"([\"']?)([\w-]+)\1\s*(\.[^=]+)?=")


def _toml_lines(text: str) -> dict[Place, int]:
    """The line of each table and key that begins a line; the parser does not tell them."""
    lines: dict[Place, int] = {}
    lengths: dict[str, int] = {}
    table: Place = ()
    quote = ""
    for number, line in enumerate(map(str.strip, text.splitlines()), 1):
        if not quote and (header := _HEADER.fullmatch(line)):
            first, *rest = header[2].split(".")
            if header[1] and not rest:
                lengths[first] = lengths.get(first, 0) + 1
            table = (first, *([lengths[first] - 1] if first in lengths else []), *rest)
            lines.setdefault(table, number)
        elif not quote and (key := _KEY.match(line)):
            lines.setdefault((*table, key[2]), number)
        for mark in ('"""', "'''"):
            if quote in ("", mark) and line.count(mark) % 2:
                quote = "" if quote else mark
    return lines


def _json_lines(text: str) -> dict[Place, int]:
    """The line of each value and key of a valid document."""
    starts: dict[Place, int] = {}
    _json_starts(text, 0, (), starts)
    ends = [match.start() for match in re.finditer("\n", text)]
    return {path: bisect.bisect_left(ends, at) + 1 for path, at in starts.items()}


def _json_starts(text: str, at: int, path: Place, starts: dict[Place, int]) -> int:
    """Note where each value begins, or its key if it has one; gives the place behind the value."""
    at = _behind_space(text, at)
    starts.setdefault(path, at)
    if text[at] not in "{[":
        return json.JSONDecoder().raw_decode(text, at)[1]
    closing, index = {"{": "}", "[": "]"}[text[at]], 0
    at = _behind_space(text, at + 1)
    while text[at] != closing:
        key: str | int = index
        if closing == "}":
            start = at
            key, at = json.JSONDecoder().raw_decode(text, at)
            starts[(*path, key)] = start
            at = _behind_space(text, at) + 1
        at = _behind_space(text, _json_starts(text, at, (*path, key), starts))
        at = _behind_space(text, at + 1) if text[at] == "," else at
        index += 1
    return at + 1


def _behind_space(text: str, at: int) -> int:
    while text[at] in " \t\r\n":
        at += 1
    return at
