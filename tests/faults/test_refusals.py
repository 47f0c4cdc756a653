"""Every kind of refusal, as a table: a GiftError that names the subject and says what to do, and nothing has changed.

The table is in the modules ``refusals_*``, by area. It has to reach every ``raise`` of both packages.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import itertools
import re
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_table import RecordFaults
from faults.refusals_commands import COMMAND_CASES
from faults.refusals_common import Case
from faults.refusals_enabling import ENABLE_CASES
from faults.refusals_exceptions import NOT_REACHED
from faults.refusals_files import FILE_CASES
from faults.refusals_lora import LORA_CASES
from faults.refusals_peft import PEFT_CASES
from faults.refusals_plugins import PLUGIN_CASES
from faults.refusals_sets import SET_CASES
from faults.refusals_states import STATE_CASES
from faults.refusals_strategies import STRATEGY_CASES, parameter_cases
from faults.refusals_strategy_files import STRATEGY_FILE_CASES
from low_rank import LowRankStrategy
from models import fingerprint
from torch import nn

import gift_core
import gift_lora_plugin
from gift_core.errors import GiftError
from gift_core.plugins import register_strategy, unregister_strategy

CASES: list[Case] = [
    *(*parameter_cases(), *STRATEGY_CASES, *STRATEGY_FILE_CASES, *ENABLE_CASES, *STATE_CASES, *FILE_CASES, *SET_CASES),
    *(*LORA_CASES, *PEFT_CASES, *PLUGIN_CASES, *COMMAND_CASES),
]

_VERBS = (
    "adapt|add|annotate|attach|build|call|change|check|choose|combine|compute|convert|copy|correct|declare|disable|do|enable|exclude|free|get|give|"
    "install|join|keep|leave|let|load|lower|make|mark|merge|move|name|nest|open|overwrite|pass|plan|pip|put|register|reinstall|release|remove|"
    "rename|repair|replace|return|run|save|say|see|set|start|store|switch|take|tell|train|tune|turn|uninstall|unload|unmerge|upgrade|use|"
    "wait|write|wrap"
)
#: What to do, as an imperative: at the start of a sentence or of a part of one, never a verb somewhere in between.
IMPERATIVE = re.compile(rf"(?:^|[:;.,?(]|\b(?:or|and|so)|\n)\s*(?:then |first )?(?:{_VERBS})\b[ (]", re.IGNORECASE)
#: What is allowed, before what was given.
ALLOWED = re.compile(r"\b(?:is|are|must (?:be|map|name)|takes?|expected)\b[^\n]{3,}, got \S", re.DOTALL)
#: What there is instead, by name.
INSTEAD = re.compile(
    r"\b(?:did you mean|there are|known|installed|its parameters are|the keys here are|the checks are|its own)\b:? \S", re.IGNORECASE
)
#: What went wrong in a user's own code, or in the system: the message has the site and the cause, and the traceback the rest.
OWN = re.compile(r"\b(?:raised|cannot be planned)\b.*\b[A-Z]\w+: |\[Errno \d+\]", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a case did: the error's text or the foreign error, and which lines of the packages raised something on the way."""

    said: str | None
    foreign: Exception | None
    half: bool
    lines: frozenset[tuple[str, int]]


@functools.cache
def outcome_of(name: str) -> Outcome:
    """Run a case of the table, once."""
    _, build, call, _ = next(case for case in CASES if case[0] == name)
    error: Exception | None = None
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        register_strategy(LowRankStrategy.name, LowRankStrategy)
        try:
            model = build()
            before, random = state_of(model), torch.get_rng_state()
            call(model, Path(folder))
        except Exception as raised:
            error = raised
        finally:
            unregister_strategy(LowRankStrategy.name)
        half = state_of(model) != before or not torch.equal(torch.get_rng_state(), random)
    ours = isinstance(error, GiftError)
    return Outcome(str(error) if ours else None, None if ours else error, half, frozenset(_lines_of(error)))


def state_of(model: nn.Module) -> Any:
    """All that may be compared, also of what has no bytes or is no Python."""
    return None if isinstance(model, torch.jit.ScriptModule) else fingerprint(model)


def _lines_of(error: BaseException | None) -> Iterator[tuple[str, int]]:
    """Where an error, and each that it came from, was raised and passed."""
    seen: set[int] = set()
    pending = [error]
    while pending:
        if (one := pending.pop()) is not None and id(one) not in seen:
            seen.add(id(one))
            pending += [one.__cause__, one.__context__]
            place = one.__traceback__
            while place is not None:
                yield place.tb_frame.f_code.co_filename, place.tb_lineno
                place = place.tb_next


@pytest.mark.parametrize(("name", "subject"), [(name, subject) for name, _, _, subject in CASES], ids=[case[0] for case in CASES])
def test_a_refusal(name: str, subject: str, record_faults: RecordFaults) -> None:
    """What cannot be done is a GiftError that names the subject and the remedy, and model and generator are as they were."""
    outcome = outcome_of(name)
    if outcome.foreign is not None:
        raise outcome.foreign
    record_faults("refusals", 1, silent=int(outcome.said is None), half=int(outcome.half))
    said = outcome.said or ""

    assert subject and subject in said
    assert any(rule.search(said) for rule in (IMPERATIVE, ALLOWED, INSTEAD, OWN)), said


def test_the_rule_for_a_remedy_is_strict() -> None:
    """A verb that is no imperative, a statement without what was given, and a fact alone tell nobody what to do."""
    rules = (IMPERATIVE, ALLOWED, INSTEAD, OWN)
    for text in (
        "the model could not load it.",
        "its use is wrong; it lets go of the rest.",
        "it is broken.",
        "rank must be a number.",
        "no such save",
    ):
        assert not any(rule.search(text) for rule in rules), text
    for text in (
        "it is merged: unmerge(model) first.",
        "rank must be 1 or more, got 0.",
        "no 'a'; did you mean 'b'?",
        "Try: pip install x",
    ):
        assert any(rule.search(text) for rule in rules), text


def test_the_table_is_long() -> None:
    """There are hundreds of kinds, each with a name of its own."""
    assert len(CASES) == len({case[0] for case in CASES}) > 400


# --- every raise is in it


@dataclasses.dataclass(frozen=True)
class Raise:
    """A ``raise`` in the packages: its file, from which line to which, and what it raises."""

    file: str
    first: int
    last: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.first} {self.text}"


ROOTS = [Path(str(package.__file__)).parent for package in (gift_core, gift_lora_plugin)]
#: What ends a check of the conformance kit, an argument parser or a program is no refusal.
NO_REFUSALS = ("CheckFailed", "CheckSkipped", "click.", "argparse.", "SystemExit")


@functools.cache
def raises() -> tuple[Raise, ...]:
    """Every ``raise`` of something in the sources of both packages, but for what is no refusal."""
    found = []
    for file in (file for package in ROOTS for file in sorted(package.rglob("*.py")) if "_template" not in file.parts):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and node.exc is not None and not ast.unparse(node.exc).startswith(NO_REFUSALS):
                found.append(Raise(_named(file), node.lineno, node.end_lineno or node.lineno, ast.unparse(node.exc)))
    return tuple(found)


@functools.cache
def reached() -> set[Raise]:
    """Those that some case of the table came by."""
    lines: dict[str, set[int]] = {}
    for place, line in itertools.chain.from_iterable(outcome_of(case[0]).lines for case in CASES):
        lines.setdefault(place, set()).add(line)
    files = {_named(Path(place)): found for place, found in lines.items()}
    return {one for one in raises() if files.get(one.file, set()) & set(range(one.first, one.last + 1))}


def _named(file: Path) -> str:
    """A file of one of the packages below its package; any other as it is."""
    package = next((package for package in ROOTS if file.is_relative_to(package)), None)
    return str(file) if package is None else f"{package.name}/{file.relative_to(package).as_posix()}"


@pytest.mark.timeout(600)
def test_every_raise_is_in_the_table() -> None:
    """Every refusal in the sources is met by a case, but for the exceptions that are listed with their reason."""
    left = [one for one in raises() if one not in reached()]
    excused = {one for one in left for file, text, _ in NOT_REACHED if one.file == file and text in one.text}

    assert not [str(one) for one in left if one not in excused]


def test_the_exceptions_are_needed() -> None:
    """Each exception stands for a raise that the table does not reach, and gives a reason."""
    left = [one for one in raises() if one not in reached()]
    for file, text, reason in NOT_REACHED:
        assert any(one.file == file and text in one.text for one in left), (file, text)
        assert len(reason) > 20
