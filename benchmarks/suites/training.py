"""A training step: zero_grad, forward, backward, AdamW; over PEFT, and over the limit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.formula import check, fill, setting_for
from benchmarks.models import LARGE, SEEN, TABLE, UNSEEN, Model, mlp
from benchmarks.plan import Record, Settings, Task
from benchmarks.systems import BESIDE, PEERS, Gift, GiftBalanced, Peft, System, without_adapter
from benchmarks.timing import Case, interleave

#: The frozen base's forward pass plus its backward pass to the input.
LIMIT = "limit"


def tasks(settings: Settings) -> list[Task]:
    """One task per model: check, then time at each number of threads."""
    if settings.quick:
        return [_task(mlp(20), 2, 0.5, settings), *(_task(model, 8, 1.0, settings) for model in (TABLE[0], TABLE[3]))]
    plan = [(TABLE, 14.0, 10.0), (UNSEEN, 10.0, 5.0), (SEEN, 4.0, 4.0), (LARGE, 25.0, 8.0)]
    return [_task(model, before + 1.5 * seconds, seconds, settings) for models, before, seconds in plan for model in models]


def _task(model: Model, expected: float, seconds: float, settings: Settings) -> Task:
    return Task(f"train {model.name}", expected, partial(measure, model, seconds, settings))


def kinds_for(model: Model) -> tuple[type[System], ...]:
    """The systems timed on a model: all, and the default layout where a model has convolutions; on some PEFT alone."""
    if model in (*SEEN, *LARGE):
        return (Gift, Peft)
    convolutional = any(isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) for layer in model.make().modules())
    return (*PEERS, GiftBalanced) if convolutional else PEERS


def measure(model: Model, seconds: float, settings: Settings, record: Record) -> None:
    """Time the steps of one model, every system in turn; at more threads than one those of which a bar speaks."""
    agree, refused = check(model.checked or model, kinds_for(model))
    record.leave_out(f"train/{model.name}", refused)
    cases = {kind.name: Case(step(model, kind)) for kind in agree} | {LIMIT: Case(limit_step(model))}
    before = torch.get_num_threads()
    try:
        for threads in settings.threads:
            torch.set_num_threads(threads)
            chosen = cases if threads == 1 else {name: case for name, case in cases.items() if name not in BESIDE}
            samples = interleave(chosen, settings.budget(seconds if threads == 1 else seconds / 2), BESIDE)
            record.add(f"train/{model.name}/{threads} thread{'s' * (threads > 1)}", "s", samples)
    finally:
        torch.set_num_threads(before)


def step(model: Model, kind: type[System]) -> Callable[[object], None]:
    """A training step of a system on a fresh copy of a model."""
    base = model.make()
    system = kind(base, setting_for(model, base))
    fill(system.pairs())
    optimizer = torch.optim.AdamW(system.parameters(), lr=1e-4)
    batch = model.draw()

    def run(_: object) -> None:
        optimizer.zero_grad(set_to_none=True)
        model.loss(system.module, batch).backward()
        optimizer.step()

    return run


def limit_step(model: Model) -> Callable[[object], None]:
    """The step of no adapter."""
    forward = limit_forward(model, without_adapter(model.make(), model.embedding), torch.float32)
    return lambda _: forward().backward()


def limit_forward(model: Model, base: nn.Module, dtype: torch.dtype) -> Callable[[], Tensor]:
    """The forward pass of a frozen base whose input asks for a gradient."""
    batch = model.draw(dtype)
    inputs = [batch[name] for name in ("x",) if name in batch]

    def forward() -> Tensor:
        for value in inputs:
            value.grad = None
            value.requires_grad_()
        return model.loss(base, batch)

    return forward
