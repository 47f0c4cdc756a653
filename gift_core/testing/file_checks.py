"""Checks of what a tuned model saves and loads."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gift_core.adapter_file import load_adapter, save_adapter
from gift_core.errors import AdapterFileError, GiftError
from gift_core.testing.results import CheckFailed, demand
from gift_core.testing.subject import Subject, all_bits, bits, trainable
from gift_core.testing.table import check
from gift_core.tuning import enable_fine_tuning


@check("files")
def state_dict_round_trip(subject: Subject) -> None:
    """``state_dict()`` holds what trains, bit for bit, and a copy that loads it has the same."""
    model, copy = subject.moved(), subject.tuned(seed=6)
    state = model.state_dict()
    missing = [name for name, _ in trainable(model) if name not in state]
    demand(not missing, f"state_dict() lacks the trained {', '.join(missing)}")
    copy.load_state_dict(state)
    mine = {name: bits(parameter) for name, parameter in trainable(model)}
    differing = [name for name, parameter in trainable(copy) if mine.get(name) != bits(parameter)]
    demand(not differing, f"a copy that loaded the state dict differs in {', '.join(differing)}")


@check("files")
def state_dict_is_strict(subject: Subject) -> None:
    """A state dict with a missing, an unexpected or a misshapen tensor is refused, and nothing of it is loaded."""
    state = dict(subject.moved().state_dict())
    first = trainable(subject.tuned())[0][0]
    for what, broken in _broken(state, first):
        model = subject.tuned(seed=6)
        before = all_bits(model)
        _refused(functools.partial(model.load_state_dict, broken), RuntimeError, f"a state dict with {what}")
        demand(all_bits(model) == before, f"a state dict with {what} was refused, and yet loaded in part")


@check("files")
def prefixed_state_dict(subject: Subject) -> None:
    """As a part of a larger model, the tuned model saves and loads under the same keys with a prefix, and is as strict."""
    alone = subject.moved()
    hosts = [nn.ModuleDict({"inner": model}) for model in (subject.moved(), subject.tuned(seed=6))]
    wanted, given = {f"inner.{key}" for key in alone.state_dict()}, set(hosts[0].state_dict())
    demand(wanted == given, f"inside a larger model its keys differ: {', '.join(sorted(wanted ^ given))}")
    hosts[1].load_state_dict({f"inner.{key}": value for key, value in alone.state_dict().items()})
    key = f"inner.{trainable(alone)[0][0]}"
    broken = {other: value for other, value in hosts[0].state_dict().items() if other != key}
    _refused(lambda: hosts[1].load_state_dict(broken), RuntimeError, f"inside a larger model, a state dict without {key!r}")


@check("files")
def adapter_file(subject: Subject) -> None:
    """An adapter file loads into a fresh copy, which then gives the same answer; a damaged file is refused."""
    model = subject.moved()
    wanted = subject.answer(model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        save_adapter(model, path)
        for copy in _fresh_copies(subject):
            torch.manual_seed(7)
            load_adapter(copy, path)
            demand(torch.equal(subject.answer(copy.eval()), wanted), "a fresh copy that loaded the file gives another answer")
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        other = subject.tuned(seed=6)
        before = all_bits(other)
        _refused(lambda: load_adapter(other, path), AdapterFileError, "a damaged file")
        demand(all_bits(other) == before, "a damaged file was refused, and yet loaded in part")


def _fresh_copies(subject: Subject) -> list[nn.Module]:
    tuned = subject.plain()
    torch.manual_seed(6)
    enable_fine_tuning(tuned, subject.strategy)
    # only a registered name leads from the file alone back to the strategy
    return [tuned, subject.plain()] if subject.candidate.is_registered else [tuned]


def _broken(state: dict[str, Tensor], key: str) -> list[tuple[str, dict[str, Any]]]:
    shape = (*state[key].shape, 2) if key in state else (2,)
    return [
        (f"{key!r} missing", {other: value for other, value in state.items() if other != key}),
        ("an unexpected key", state | {"not.a.key": torch.zeros(1)}),
        (f"{key!r} misshapen", state | {key: torch.zeros(shape)}),
    ]


def _refused(load: Callable[[], object], kind: type[Exception], what: str) -> None:
    try:
        load()
    except (GiftError, kind):
        return
    raise CheckFailed(f"{what} was accepted")
