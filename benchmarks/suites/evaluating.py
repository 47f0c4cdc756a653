"""Inference: unmerged, merged and unloaded, over the base model that nobody touched."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.formula import NotEqual, differs_by, effective_weights, fill, setting_for, with_weights
from benchmarks.models import TABLE, Model, mlp
from benchmarks.plan import Record, Settings, Task
from benchmarks.systems import Gift, GiftBalanced, LoraLib, Lycoris, Peft, System, Unsupported
from benchmarks.timing import Case, interleave

BASE = "base"

#: Which states each system can be in; loralib's layers merge themselves in eval.
STATES: tuple[tuple[type[System], tuple[str, ...]], ...] = (
    (Gift, ("unmerged", "merged", "unloaded")),
    (GiftBalanced, ("unmerged",)),
    (Peft, ("unmerged", "merged", "unloaded")),
    (Lycoris, ("unmerged", "merged")),
    (LoraLib, ("merged",)),
)

#: The largest difference allowed in float32, over the largest number: these sums are taken in other orders.
TOLERANCE = 2e-3


def tasks(settings: Settings) -> list[Task]:
    """One task per model."""
    models = (mlp(20), TABLE[0]) if settings.quick else TABLE[:4]
    return [Task(f"eval {model.name}", 15, partial(measure, model, 4.0, settings)) for model in models]


def measure(model: Model, seconds: float, settings: Settings, record: Record) -> None:
    """Time the answers of every system in every state that it has; each is compared with the formula first."""
    reasons: dict[str, str] = {}
    modules: dict[str, nn.Module] = {BASE: model.make().eval()}
    with torch.no_grad():
        for kind, states in STATES:
            expected: Tensor | None = None  # by the formula, once for all states
            for state in states:
                label = f"{kind.name} {state}"
                try:
                    modules[label], expected = in_state(model, kind, state, expected)
                except (Unsupported, NotEqual) as error:
                    reasons[label] = str(error)
        record.leave_out(f"eval/{model.name}", reasons)
        cases = {label: Case(_answering(model, module)) for label, module in modules.items()}
        judged = {BASE, *(f"{Gift.name} {state}" for state in dict(STATES)[Gift])}
        record.add(f"eval/{model.name}", "s", interleave(cases, settings.budget(seconds, least=8), cases.keys() - judged))


def in_state(model: Model, kind: type[System], state: str, expected: Tensor | None) -> tuple[nn.Module, Tensor]:
    """A system in a state, whose answer is the formula's, and that answer.

    Args:
        model: the model.
        kind: the system.
        state: one of its `STATES`.
        expected: the formula's answer for this system, if another state of it gave it already.

    Raises:
        NotEqual: if it is not.
    """
    base = model.make()
    system = kind(base, setting_for(model, base))
    factors = {name: (A.float(), B.float()) for name, (A, B) in fill(system.pairs()).items()}
    module = system.module.eval()
    if state == "merged":
        system.merge()
    elif state == "unloaded":
        module = system.unload().eval()
    if expected is None:
        plain = model.make().eval()
        expected = model.loss(with_weights(plain, effective_weights(plain, factors, system.setting)), model.draw())
    difference = differs_by(model.loss(module, model.draw()), expected)
    if not difference <= TOLERANCE:
        raise NotEqual(f"{state}: the answer differs from the formula's by {difference:.1e}")
    return module, expected


def _answering(model: Model, module: nn.Module) -> Callable[[object], Tensor]:
    batch = model.draw()
    return lambda _: model.loss(module, batch)
