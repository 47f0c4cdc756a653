"""Refusals of strategy files; each message has the file and the line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults.refusals_common import Case, bystander, write_then

from gift_core import strategy_from_file
from gift_core.plugins.hook_plugins import register_plugin, unregister_plugin
from gift_core.plugins.hooks import hookimpl
from gift_core.strategy_file import parse_check

CAP = "[[module_caps]]\n"
KEEPS = "action = 'keep_trainable'\n"

#: Files that are refused, with what has to be named, by what is wrong.
TOML = {
    "no caps": ("", "there is no cap"),
    "caps that are a number": ("module_caps = 3", "line 1: 'module_caps'"),
    "a cap that is a number": ("module_caps = [3]", "got 3"),
    "no check": (CAP + KEEPS, "'check'"),
    "an action and a strategy": (CAP + KEEPS + "strategy = 'full'\ncheck = 'everything()'", "'action' or a 'strategy'"),
    "no action": (CAP + "check = 'everything()'", "'action' or a 'strategy'"),
    "a strategy for a parameter": ("[[para_caps]]\ncheck = 'everything()'\nstrategy = 'full'", "line 3: a strategy acts on modules"),
    "a strategy that is a number": ("strategy = 3", "line 1: a strategy's name"),
    "parameters of nothing": ("[parameters]\nrank = 2", "'parameters'"),
    "an unknown strategy": ("strategy = 'loar'", "line 1: no strategy named 'loar'"),
    "an unknown parameter": ("strategy = 'lora'\n[parameters]\nrnak = 2", "line 3: strategy 'lora' has no parameter 'rnak'"),
    "a parameter that is not allowed": ("strategy = 'lora'\n[parameters]\nrank = 0", "rank must be"),
    "a parameter that is a date": ("strategy = 'lora'\n[parameters]\nrank = 2020-01-01", "line 3: 'rank'"),
    "an action that is a number": (CAP + "check = 'everything()'\naction = 3", "line 3: an action's name"),
    "an unknown action": (CAP + "check = 'everything()'\naction = 'keep'", "line 3: no action named 'keep'"),
    "params of an action that has none": (
        CAP + KEEPS + "check = 'everything()'\nparams = { a = 1 }",
        "line 4: action 'keep_trainable'",
    ),
    "params that are a number": (CAP + KEEPS + "check = 'everything()'\nparams = 3", "got 3"),
    "an unknown key": (CAP + KEEPS + "check = 'everything()'\nchekc = 1", "line 4: there is no key 'chekc'"),
    "a check that is a number": (CAP + KEEPS + "check = 5", "line 3: a check is text"),
    "a check that is cut off": (CAP + KEEPS + "check = 'name_is('", "line 3: check 'name_is('"),
    "a check that is too deep": (CAP + KEEPS + f"check = '{'~' * 3900}everything()'", "line 3: check '~~~~"),
    "a check that is not called": (CAP + KEEPS + "check = 'everything'", "'everything' is not called"),
    "a check that is a sum": (CAP + KEEPS + "check = 'everything() + everything()'", "'everything() + everything()'"),
    "a check of a list": (CAP + KEEPS + "check = 'layer_index([1])'", "'[1]'"),
    "a check of unnamed keywords": (CAP + KEEPS + "check = 'name_is(**1)'", "'1' is not allowed"),
    "a check of an unknown keyword": (CAP + KEEPS + "check = 'name_is(nmae=1)'", "check 'name_is'"),
    "a check of a value that is not allowed": (CAP + KEEPS + "check = 'layer_index(-1)'", "line 3: layer_index takes numbers"),
    "an unknown check": (CAP + KEEPS + "check = 'name_si(1)'", "name_is"),
    "a check that gives none": (CAP + KEEPS + "check = 'gives_none()'", "'gives_none' gave None"),
    "no TOML": ("[[", "line 1: it is no TOML"),
    "a key of many parts": ("a." * 60 + "a = 1", "line 1: a key has more than 50 parts"),
    "text without end": ("# " + "x" * 2**20, "1,048,576 bytes"),
}

NESTED = '{"name": "merged", "parameters": {"strategies": ['
JSON = {
    "no JSON": ("{", "line 1: it is no JSON"),
    "a list": ("[]", "line 1"),
    "a key twice": ('{"strategy": 1, "strategy": 2}', "a key occurs twice"),
    "too deep": (f'{{"strategy": "merged", "parameters": {{"strategies": [{NESTED * 300}{"]}}" * 301}', "nested too deep"),
}


class _Checks:
    """A plugin whose check makes no check."""

    @hookimpl
    def gift_register_checks(self, registry: Any) -> None:
        registry.add("gives_none", lambda: None)


def _with_checks(call: Callable[[Any, Path], Any]) -> Callable[[Any, Path], Any]:
    def run(model: Any, folder: Path) -> Any:
        register_plugin(_Checks(), "checks of the tests")
        try:
            return call(model, folder)
        finally:
            unregister_plugin("checks of the tests")

    return run


def _reads(text: str, name: str) -> Callable[[Any, Path], Any]:
    return _with_checks(write_then(text, lambda _, path: strategy_from_file(path), name))


STRATEGY_FILE_CASES: list[Case] = [
    *((f"a TOML strategy: {name}", bystander, _reads(text, "s.toml"), says) for name, (text, says) in TOML.items()),
    *((f"a JSON strategy: {name}", bystander, _reads(text, "s.json"), says) for name, (text, says) in JSON.items()),
    ("a strategy file of bytes", bystander, lambda _, folder: strategy_from_file(_binary(folder)), "s.toml"),
    ("a strategy file that is a folder", bystander, lambda _, folder: strategy_from_file(_folder(folder)), "s.toml"),
    ("a strategy file that is a number", bystander, lambda _, folder: strategy_from_file(3), "got 3"),  # type: ignore[arg-type]
    ("a check that is no text", bystander, lambda _, folder: parse_check(3), "name_is"),  # type: ignore[arg-type]
]


def _binary(folder: Path) -> Path:
    (folder / "s.toml").write_bytes(b"\xff\xfe")
    return folder / "s.toml"


def _folder(folder: Path) -> Path:
    (folder / "s.toml").mkdir()
    return folder / "s.toml"
