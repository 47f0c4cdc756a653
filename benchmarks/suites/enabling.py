"""Putting the adapters on: models of 60, 600 and 6,000 small layers."""

from __future__ import annotations

from functools import partial

from benchmarks.formula import check, setting_for
from benchmarks.models import Model, mlp
from benchmarks.plan import Record, Settings, Task
from benchmarks.systems import BESIDE, PEERS, Gift, Peft, System
from benchmarks.timing import Case, interleave

SIZES = (60, 600, 6000)


def tasks(settings: Settings) -> list[Task]:
    """One task per size."""
    seconds = {60: 1.5, 600: 4.0, 6000: 25.0}
    sizes = SIZES[:1] if settings.quick else SIZES
    return [Task(f"enable {size} layers", 4 + 1.5 * seconds[size], partial(measure, size, seconds[size], settings)) for size in sizes]


def measure(layers: int, seconds: float, settings: Settings, record: Record) -> None:
    """Time enabling on a model of so many layers, a fresh one each time."""
    # what is put on is checked on the small one: the large ones are more of the same, and of the peers one is enough there
    agree, refused = check(mlp(min(layers, 60)), PEERS if layers < SIZES[-1] else (Gift, Peft))
    record.leave_out(f"enable/{layers} layers", refused)
    samples = interleave({kind.name: enabling_case(mlp(layers), kind) for kind in agree}, settings.budget(seconds, least=3), BESIDE)
    record.add(f"enable/{layers} layers", "s", samples)
    record.add(
        f"enable/{layers} layers/each", "us", {name: [s and 1e6 * s / layers for s in values] for name, values in samples.items()}
    )


def enabling_case(model: Model, kind: type[System]) -> Case:
    """Enable a system on a fresh model; making the model is not timed."""
    setting = setting_for(model, model.make())
    return Case(lambda base: kind(base, setting), model.make)
