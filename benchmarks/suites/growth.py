"""How cost grows: GIFt alone, with layers and with adapted numbers, from some to ten times as many."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.models import mlp
from benchmarks.plan import Record, Settings, Task
from benchmarks.suites.enabling import enabling_case
from benchmarks.suites.states import file_round_trip, round_trip, tuned
from benchmarks.systems import Gift, System
from benchmarks.timing import Case, interleave

#: Layers of 16 x 16: hardly any numbers, so that what is counted per layer shows.
LAYERS = (300, 3000)
#: The rank of 40 layers of 256 x 256: hardly any layers, so that what is counted per number shows.
RANKS = (16, 160)


def tasks(settings: Settings) -> list[Task]:
    """One task per verb and per kind of growth."""
    layers = (20, 200) if settings.quick else LAYERS
    verbs: dict[str, Callable[[System, Path], Case]] = {"state_dict + load_state_dict": round_trip, "save + load file": file_round_trip}
    return [
        *(Task(f"growth of {verb} with layers", 6, partial(with_layers, verb, case, layers, settings)) for verb, case in verbs.items()),
        *(Task(f"growth of {verb} with numbers", 4, partial(with_numbers, verb, case, settings)) for verb, case in verbs.items()),
        Task("growth of enabling with layers", 8, partial(enabling, layers, settings)),
    ]


def with_layers(verb: str, make: Callable[[System, Path], Case], sizes: tuple[int, int], settings: Settings, record: Record) -> None:
    """Time a verb on few layers and on ten times as many."""
    systems = [tuned(mlp(size, width=16, rank=2), Gift) for size in sizes]
    _measure(f"growth/{verb}/layers", systems, make, settings, record)


def with_numbers(verb: str, make: Callable[[System, Path], Case], settings: Settings, record: Record) -> None:
    """Time a verb on adapters of a small rank and of one ten times as large."""
    systems = [tuned(mlp(40, width=256, rank=rank), Gift) for rank in RANKS]
    _measure(f"growth/{verb}/numbers", systems, make, settings, record)


def enabling(sizes: tuple[int, int], settings: Settings, record: Record) -> None:
    """Time enabling on few layers and on ten times as many."""
    cases = {name: enabling_case(mlp(size, width=16, rank=2), Gift) for name, size in zip(("few", "many"), sizes, strict=True)}
    _record("growth/enable/layers", cases, settings, record)


def _measure(name: str, systems: list[System], make: Callable[[System, Path], Case], settings: Settings, record: Record) -> None:
    with tempfile.TemporaryDirectory() as folder:
        cases = {size: make(system, Path(folder) / size) for size, system in zip(("few", "many"), systems, strict=True)}
        _record(name, cases, settings, record)


def _record(name: str, cases: dict[str, Case], settings: Settings, record: Record) -> None:
    samples = interleave(cases, settings.budget(2))
    record.add(name, "s", samples | {"ten times few": [seconds and 10 * seconds for seconds in samples["few"]]})
