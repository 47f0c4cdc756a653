"""What is done with an adapter besides training: state dicts, files, merging, switching; 600 small layers."""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from benchmarks.formula import NotEqual, differs_by, fill, setting_for
from benchmarks.models import TABLE, Model, mlp, named
from benchmarks.plan import Record, Settings, Task
from benchmarks.systems import BESIDE, PEERS, Gift, Peft, System, Unsupported
from benchmarks.timing import Case, interleave

#: How many adapters one model holds.
ADAPTERS = 10

#: The bytes of an adapter's numbers, and nothing else.
PAYLOAD = "payload"


def tasks(settings: Settings) -> list[Task]:
    """One task per verb."""
    model = mlp(60 if settings.quick else 600)
    timed = {
        "state_dict + load_state_dict": (round_trip, 12),
        "save + load file": (file_round_trip, 17),
        "merge + unmerge": (merge_round_trip, 13),
        f"switch {ADAPTERS} adapters": (switch, 28),
    }
    return [
        *(
            Task(f"{verb}, {model.name}", seconds, partial(measure, f"state/{verb}/{model.name}", case, model, settings))
            for verb, (case, seconds) in timed.items()
        ),
        *(
            Task(f"file size, {model.name}", 1, partial(measure_file, model))
            for model in ((mlp(60),) if settings.quick else (mlp(60), TABLE[1], TABLE[2]))
        ),
        *([] if settings.quick else [Task("merge + unmerge, resnet50", 15, partial(_merge_resnet, settings))]),
    ]


def measure(name: str, make: Callable[[System, Path], Case], model: Model, settings: Settings, record: Record) -> None:
    """Time one verb of every system; the model's answer is the same before and after."""
    reasons: dict[str, str] = {}
    cases: dict[str, Case] = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in PEERS:
            try:
                system = tuned(model, kind)
                cases[kind.name] = make(system, Path(folder) / kind.name)
                _check(model, system, cases[kind.name])
            except (Unsupported, NotEqual) as error:
                cases.pop(kind.name, None)
                reasons[kind.name] = str(error)
        record.leave_out(name, reasons)
        record.add(name, "s", interleave(cases, settings.budget(4), BESIDE))


def round_trip(system: System, path: Path) -> Case:
    """Take the adapter out as a state dict, and put it back."""
    return Case(lambda _: system.load_state_dict(system.state_dict()))


def file_round_trip(system: System, path: Path) -> Case:
    """Write the adapter to disk, over the last one, and read it into the same model."""

    def run(_: object) -> None:
        system.save(path)
        system.load(path)

    return Case(run)


def merge_round_trip(system: System, path: Path) -> Case:
    """Merge, and undo it."""

    def run(_: object) -> None:
        system.merge()
        system.unmerge()

    return Case(run)


def switch(system: System, path: Path) -> Case:
    """Go to the next of ten adapters, each with numbers of its own; the last is in use."""
    use = system.switcher(ADAPTERS)
    for i in range(ADAPTERS):
        use(i)
        with torch.no_grad():
            for _, B in system.pairs().values():
                B.add_(0.001 * i)
    use(ADAPTERS - 1)  # what holds one adapter at a time has lost what was written into it
    turn = itertools.cycle(range(ADAPTERS))
    return Case(lambda _: use(next(turn)))


def measure_file(model: Model, record: Record) -> None:
    """Compare the bytes on disk with the bytes of the adapter's numbers."""
    sizes: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in (Gift, Peft):
            system = tuned(model, kind)
            path = Path(folder) / kind.name
            system.save(path)
            sizes[kind.name] = [float(_bytes_at(path))]
            sizes[PAYLOAD] = [float(sum(factor.nbytes for pair in system.pairs().values() for factor in pair))]
            shutil.rmtree(path, ignore_errors=True)
    record.add(f"state/file/{model.name}", "bytes", sizes)


def tuned(model: Model, kind: type[System]) -> System:
    """A system on a fresh copy of a model, its adapter filled with numbers."""
    base = model.make()
    system = kind(base, setting_for(model, base))
    fill(system.pairs())
    return system


def _merge_resnet(settings: Settings, record: Record) -> None:
    measure("state/merge + unmerge/resnet50", merge_round_trip, named("resnet50"), settings, record)


def _check(model: Model, system: System, case: Case) -> None:
    """Ten calls lead back to the first answer, for a verb with its inverse and for a round of ten adapters alike."""
    before = _answer(model, system.module)
    for _ in range(ADAPTERS):
        case.run(None)
    difference = differs_by(_answer(model, system.module), before)
    if not difference <= 1e-3:
        raise NotEqual(f"the model's answer changed by {difference:.1e} of its largest number")


def _answer(model: Model, module: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.loss(module, model.draw())


def _bytes_at(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.is_dir() else path.stat().st_size
