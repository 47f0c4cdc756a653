"""Checks that every way to the answer gives the same answer."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from gift_core.adapter_file import load_adapter, save_adapter
from gift_core.merging import merge, merge_and_unload, unmerge
from gift_core.testing.models import cast
from gift_core.testing.results import demand
from gift_core.testing.subject import Candidate, Subject, all_bits, distance, tolerance, trainable
from gift_core.testing.table import check
from gift_core.tuning import disable_fine_tuning, enable_fine_tuning


@check("numerics")
def train_equals_eval(subject: Subject) -> None:
    """Training mode computes what eval mode does, or what the seed governs if ``random_in_training``; normalisation stays in eval."""
    for dtype in subject.dtypes:
        model = subject.moved(dtype)
        wanted = subject.answer(model)
        _train(model)
        if subject.candidate.capabilities.random_in_training:
            first, second = _seeded_answer(subject, model), _seeded_answer(subject, model)
            demand(torch.equal(first, second), "torch.manual_seed does not govern training mode: draw from torch's own generator")
        else:
            _close(wanted, subject.answer(model), dtype, "training mode gives another answer than eval mode")


@check("numerics", scope="strategy")
def random_as_declared(candidate: Candidate) -> None:
    """A pass in training mode draws random numbers if ``random_in_training`` is declared, and otherwise does not."""
    subjects = [subject for subject in candidate.subjects if not subject.refusal]
    drawing = [one.model.name for one in subjects if _draws(one, one.moved()) and not _draws(one, one.plain())]
    if candidate.capabilities.random_in_training:
        demand(bool(drawing), "it declares random_in_training, and training mode draws no random number in any model")
    else:
        demand(not drawing, f"training mode draws random numbers in {', '.join(drawing)}: declare random_in_training=True")


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
    """What is added has the declared dtype; weights, merged ones too, and the answer have the model's; all are on its device."""
    for dtype in subject.dtypes:
        _kept(subject, subject.tuned(dtype), dtype, torch.device("cpu"))
        moved = cast(subject.tuned(torch.float32), dtype)
        demand(subject.answer(moved).dtype == dtype, f"a model moved to {dtype} answers in another type")
    if torch.cuda.is_available():
        model = subject.plain().to("cuda")
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
    base = dict(subject.model.fresh(dtype).named_parameters())
    added = subject.added_dtype(dtype)
    other = [
        f"{name} ({p.dtype}, {p.device})"
        for name, p in trainable(model)
        if (p.dtype.to_real(), p.device) != (dtype if name in base else added, device)
    ]
    demand(not other, f"in a model of {dtype} on {device}, where what is added is {added}, not so: {', '.join(other)}")
    _typed_as(base, subject, model, dtype)
    merge(model)
    _typed_as(base, subject, model, dtype)


def _typed_as(base: dict[str, nn.Parameter], subject: Subject, model: nn.Module, dtype: torch.dtype) -> None:
    wrong = [f"{name} ({weight.dtype})" for name, weight in _weights(model, base) if weight.dtype != base[name].dtype]
    demand(not wrong, f"in a model of {dtype} these weights have another type: {', '.join(wrong)}")
    answer = subject.answer(model).dtype
    demand(answer == dtype, f"a model of {dtype} answers in {answer}")


def _weights(model: nn.Module, names: Iterable[str]) -> list[tuple[str, Tensor]]:
    """What the modules of a tuned model compute with under the base's names, as far as these are still there."""
    modules = dict(model.named_modules(remove_duplicate=False))
    split = ((name, *name.rpartition(".")[::2]) for name in names)
    found = ((name, getattr(modules.get(holder), own, None)) for name, holder, own in split)
    return [(name, weight) for name, weight in found if isinstance(weight, Tensor)]


def _train(model: nn.Module) -> None:
    # normalisation stays in eval, because its training is another function
    for module in model.modules():
        module.training = not isinstance(module, nn.modules.batchnorm._NormBase)


def _draws(subject: Subject, model: nn.Module) -> bool:
    _train(model)
    before = torch.get_rng_state()
    subject.answer(model)
    return not torch.equal(before, torch.get_rng_state())


def _seeded_answer(subject: Subject, model: nn.Module) -> Tensor:
    torch.manual_seed(4)
    return subject.answer(model)


def _close(wanted: Tensor, given: Tensor, dtype: torch.dtype, reason: str) -> None:
    allowed = tolerance(dtype)
    demand(wanted.shape == given.shape, f"{reason}: {tuple(given.shape)} instead of {tuple(wanted.shape)}")
    off = distance(wanted, given)
    demand(off <= allowed, f"{reason}: off by {off:.2g} in {dtype}, {allowed:.0e} is allowed")
