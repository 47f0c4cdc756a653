"""The figures that matter, as data: what is compared with what, what it must not exceed, and what it should reach."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.models import MODELS
from benchmarks.suites.evaluating import BASE
from benchmarks.suites.states import ADAPTERS, PAYLOAD
from benchmarks.suites.training import LIMIT

OURS, PEFT = "GIFt", "PEFT"

#: Where a bar comes from.
REACHED = "a prototype reached it"
NO_WORSE = "no slower than PEFT"
LINEAR = "no more than linear, with a tenth for noise"
BY_DESIGN = "it is the base model's own arithmetic"


@dataclass(frozen=True)
class Bar:
    """One figure.

    Attributes:
        what: for the reader.
        measurement: whose samples.
        system: the one that is judged.
        reference: the one it is divided by, round by round; None judges the samples as they are.
        bar: the most that the median may be.
        goal: what it should be; None where the bar is all there is to reach.
        source: where the bar comes from.
    """

    what: str
    measurement: str
    system: str
    reference: str | None
    bar: float
    goal: float | None
    source: str = REACHED


_STEP_OVER_PEFT = {
    "resnet18": (0.94, 0.80),
    "resnet50": (0.91, 0.80),
    "ViT-S": (0.89, 0.84),
    "Llama 4x512": (0.92, 0.88),
    "mlp600": (0.76, 0.50),
}
_STEP_OVER_LIMIT = {
    "resnet18": (1.25, 1.10),
    "resnet50": (1.10, 1.05),
    "ViT-S": (1.11, 1.05),
    "Llama 4x512": (1.09, 1.05),
    "mlp600": (3.8, 2.5),
}
_STEP_AT_TWO_THREADS = {"resnet50": (0.93, 0.80), "ViT-S": (0.92, 0.84)}


def _step(model: str, threads: int, reference: str, bar: float, goal: float | None, source: str = REACHED) -> Bar:
    over = "the limit" if reference == LIMIT else reference
    threads_text = f"{threads} thread{'s' * (threads > 1)}"
    return Bar(
        f"training step over {over}, {model}, {threads_text}", f"train/{model}/{threads_text}", OURS, reference, bar, goal, source
    )


def _others(threads: int, judged: dict[str, tuple[float, float]]) -> list[Bar]:
    models = [model.name for model in MODELS if model.name not in judged]
    return [_step(name, threads, PEFT, 1.0, None, NO_WORSE) for name in models]


#: Every judged figure, in the order of the table.
BARS: tuple[Bar, ...] = (
    *(_step(name, 1, PEFT, *pair) for name, pair in _STEP_OVER_PEFT.items()),
    *(_step(name, 1, LIMIT, *pair) for name, pair in _STEP_OVER_LIMIT.items()),
    *(_step(name, 2, PEFT, *pair) for name, pair in _STEP_AT_TWO_THREADS.items()),
    *_others(1, _STEP_OVER_PEFT),
    *_others(2, _STEP_AT_TWO_THREADS),
    Bar("enabling 6,000 layers over PEFT", "enable/6000 layers", OURS, PEFT, 0.03, 0.015),
    Bar("enabling 6,000 layers, us a layer", "enable/6000 layers/each", OURS, None, 25, 15),
    Bar("state_dict + load_state_dict over PEFT", "state/state_dict + load_state_dict/mlp600", OURS, PEFT, 0.03, 0.02),
    Bar("save + load file over PEFT", "state/save + load file/mlp600", OURS, PEFT, 0.05, 0.03),
    Bar("switching ten adapters over PEFT", f"state/switch {ADAPTERS} adapters/mlp600", OURS, PEFT, 0.02, 0.01),
    *(
        Bar(f"adapter file over its payload, {name}", f"state/file/{name}", OURS, PAYLOAD, 1.10, 1.05)
        for name in ("mlp60", "resnet50", "ViT-S")
    ),
    *(
        Bar(f"bytes saved for backward over the limit, {name}", f"memory/saved/{name}", OURS, LIMIT, 1.05, None)
        for name in ("resnet18", "resnet50")
    ),
    Bar(
        "bytes saved, bf16 base with fp32 adapter, over the limit",
        "memory/saved/Llama 4x512/bf16 base, fp32 adapter",
        OURS,
        LIMIT,
        1.30,
        None,
    ),
    Bar("bytes saved with dropout 0.05 over without", "memory/saved/Llama 4x512/dropout", OURS, f"{OURS} without", 1.10, None),
    *(
        Bar(f"eval over base, unmerged, {name}", f"eval/{name}", f"{OURS} unmerged", BASE, 1.08, 1.05)
        for name in ("resnet18", "resnet50")
    ),
    *(
        Bar(f"eval over base, {state}, {name}", f"eval/{name}", f"{OURS} {state}", BASE, 1.02, None, BY_DESIGN)
        for name in ("resnet18", "resnet50", "ViT-S", "Llama 4x512")
        for state in ("merged", "unloaded")
    ),
    Bar("import of core and LoRA after torch, ms", "import/after torch", OURS, None, 60, None),
    *(
        Bar(f"growth of {verb} with {what}, over linear", f"growth/{verb}/{what}", "many", "ten times few", 1.10, None, LINEAR)
        for verb, what in (
            ("enable", "layers"),
            ("state_dict + load_state_dict", "layers"),
            ("save + load file", "layers"),
            ("state_dict + load_state_dict", "numbers"),
            ("save + load file", "numbers"),
        )
    ),
)
