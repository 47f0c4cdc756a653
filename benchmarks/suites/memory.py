"""Bytes saved for backward, and the most bytes held in a step; one step each, because bytes do not vary."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch

from benchmarks.formula import fill, setting_for
from benchmarks.memory import peak_bytes, saved_bytes
from benchmarks.models import TABLE, Model, mlp
from benchmarks.plan import Record, Settings, Task
from benchmarks.suites.training import LIMIT, limit_forward, limit_step, step
from benchmarks.systems import PEERS, Gift, GiftBalanced, Peft, System, Unsupported, without_adapter

LLAMA = TABLE[3]


def tasks(settings: Settings) -> list[Task]:
    """One task per model and condition."""
    models = (mlp(20), LLAMA) if settings.quick else TABLE
    return [
        *(Task(f"bytes of a step, {model.name}", 5, partial(measure, model)) for model in models),
        Task("bytes saved, bf16 base with fp32 adapter", 3, partial(mixed, LLAMA)),
        Task("bytes saved with dropout", 5, partial(dropout, LLAMA)),
    ]


def measure(model: Model, record: Record) -> None:
    """Saved and most bytes of every system, in float32."""
    kinds: tuple[type[System], ...] = (*PEERS, GiftBalanced) if model in TABLE[:2] else PEERS
    saved = _saved(model, kinds, record)
    record.add(f"memory/saved/{model.name}", "bytes", saved | {LIMIT: [limit_saved(model, torch.float32)]})
    most: dict[str, list[float]] = {}
    for kind in (Gift, GiftBalanced, Peft):  # each takes a second or more, and no bar speaks of the others
        if kind.name in saved:
            most[kind.name] = [_peak(step(model, kind))]
    record.add(f"memory/peak/{model.name}", "bytes", most | {LIMIT: [_peak(limit_step(model))]})


def mixed(model: Model, record: Record) -> None:
    """Saved bytes of an adapter in float32 on a base in bfloat16."""
    saved = _saved(model, (Gift, Peft), record, torch.bfloat16, float32_adapter=True)
    record.add(f"memory/saved/{model.name}/bf16 base, fp32 adapter", "bytes", saved | {LIMIT: [limit_saved(model, torch.bfloat16)]})


def dropout(model: Model, record: Record) -> None:
    """Saved bytes with dropout 0.05, and without."""
    without = _saved(model, (Gift, Peft), record)
    with_it = _saved(model, (Gift, Peft), record, dropout=0.05)
    record.add(f"memory/saved/{model.name}/dropout", "bytes", with_it | {f"{name} without": value for name, value in without.items()})


def limit_saved(model: Model, dtype: torch.dtype) -> float:
    """What the base alone saves on the way back to its input."""
    base = without_adapter(model.make().to(dtype), model.embedding)
    return float(saved_bytes(limit_forward(model, base, dtype), [base]))


def _saved(
    model: Model, kinds: Iterable[type[System]], record: Record, dtype: torch.dtype = torch.float32, **changes: Any
) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    reasons: dict[str, str] = {}
    for kind in kinds:
        base = model.make().to(dtype)
        try:
            system = kind(base, setting_for(model, base, **changes))
        except Unsupported as error:
            reasons[kind.name] = str(error)
            continue
        fill(system.pairs())
        batch = model.draw(dtype)
        owned = [system.module, *([system.network] if hasattr(system, "network") else [])]
        found[kind.name] = [float(saved_bytes(partial(model.loss, system.module, batch), owned))]
    record.leave_out(f"memory/{model.name}", reasons)
    return found


def _peak(run: Any) -> float:
    run(None)  # the optimizer makes its state in the first step
    return float(peak_bytes(lambda: run(None)))
