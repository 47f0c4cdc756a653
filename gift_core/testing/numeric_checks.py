"""Checks that every way to the answer gives the same answer."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from gift_core.adapter_file import load_adapter, save_adapter
from gift_core.merging import merge, merge_and_unload, unmerge
from gift_core.testing.results import demand
from gift_core.testing.subject import TOLERANCES, Subject, all_bits, distance, trainable
from gift_core.testing.table import check
from gift_core.tuning import disable_fine_tuning, enable_fine_tuning


@check("numerics")
def train_equals_eval(subject: Subject) -> None:
    """Training mode computes what eval mode computes; normalisation stays in eval, because its training is another function."""
    for dtype in subject.dtypes:
        model = subject.moved(dtype)
        wanted = subject.answer(model)
        for module in model.modules():
            module.training = not isinstance(module, nn.modules.batchnorm._NormBase)
        _close(wanted, subject.answer(model), dtype, "training mode gives another answer than eval mode")


@check("numerics")
def merged_equals_tuned(subject: Subject) -> None:
    """Merged weights give the tuned model's answer, within the tolerance of each type; unmerging restores every bit."""
    for dtype in subject.dtypes:
        model = subject.moved(dtype)
        wanted = subject.answer(model)
        before = all_bits(model)
        merge(model)
        _close(wanted, subject.answer(model), dtype, "merged weights give another answer than the tuned model")
        unmerge(model)
        after = all_bits(model)
        changed = [name for name in before if before[name] != after.get(name)]
        demand(not changed, f"after unmerge {', '.join(changed)} differs")


@check("numerics", needs="mergeable")
def unloaded_equals_merged(subject: Subject) -> None:
    """``merge_and_unload`` gives a plain model, with the base's keys and classes, that answers as the merged one does."""
    for dtype in subject.dtypes:
        model, plain = subject.moved(dtype), subject.model.fresh(dtype)
        merge(model)
        wanted = subject.answer(model)
        merge_and_unload(model)
        classes = [[_class_name(module) for module in one.modules()] for one in (plain, model)]
        demand(classes[0] == classes[1], "the unloaded model has other classes than the base model")
        demand(list(plain.state_dict()) == list(model.state_dict()), "the unloaded model has other keys than the base model")
        _close(wanted, subject.answer(model), dtype, "the unloaded model gives another answer than the merged one")


@check("numerics")
def dtype_and_device_kept(subject: Subject) -> None:
    """What trains has the dtype and the device of the model, and so has the answer; also after the model is moved."""
    for dtype in subject.dtypes:
        _kept(subject, subject.tuned(dtype), dtype, torch.device("cpu"))
        moved = subject.tuned(torch.float32).to(dtype)
        demand(subject.answer(moved).dtype == dtype, f"a model moved to {dtype} answers in another type")
    if torch.cuda.is_available():
        model = subject.model.fresh().to("cuda")
        enable_fine_tuning(model, subject.strategy)
        foreign = [name for name, p in trainable(model) if p.device.type != "cuda"]
        demand(not foreign, f"on cuda, {', '.join(foreign)} is elsewhere")


@check("numerics")
def draws_no_random_numbers(subject: Subject) -> None:
    """Nothing but initialisation draws random numbers: no forward pass in eval mode, no merging, saving, loading or disabling."""
    model = subject.moved()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        steps: dict[str, Callable[[], object]] = {
            "a forward pass": lambda: subject.answer(model),
            "merge": lambda: merge(model),
            "unmerge": lambda: unmerge(model),
            "state_dict": lambda: model.load_state_dict(model.state_dict()),
            "save_adapter": lambda: save_adapter(model, path),
            "load_adapter": lambda: load_adapter(model, path),
            "disable_fine_tuning": lambda: disable_fine_tuning(model),
        }
        for name, step in steps.items():
            before, mine = torch.get_rng_state(), random.getstate()
            step()
            demand(torch.equal(before, torch.get_rng_state()), f"{name} drew from torch's generator")
            demand(mine == random.getstate(), f"{name} drew from Python's generator")


def _class_name(module: nn.Module) -> str:
    # by name, because torch makes a class for each module that it parametrises
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _kept(subject: Subject, model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    other = [f"{name} ({p.dtype}, {p.device})" for name, p in trainable(model) if (p.dtype, p.device) != (dtype, device)]
    demand(not other, f"in a model of {dtype} on {device}, not so: {', '.join(other)}")
    answer = subject.answer(model).dtype
    demand(answer == dtype, f"a model of {dtype} answers in {answer}")


def _close(wanted: Tensor, given: Tensor, dtype: torch.dtype, reason: str) -> None:
    allowed = TOLERANCES.get(str(dtype).removeprefix("torch."), 0.0)
    demand(wanted.shape == given.shape, f"{reason}: {tuple(given.shape)} instead of {tuple(wanted.shape)}")
    off = distance(wanted, given)
    demand(off <= allowed, f"{reason}: off by {off:.2g} in {dtype}, {allowed:.0e} is allowed")
