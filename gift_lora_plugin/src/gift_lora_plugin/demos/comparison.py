"""What the demos share: three methods on one split, a table, a picture, and an adapter file that is proven to be enough.

A demo says what the base model is, what the data are and how to train; the rest is here.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gift_core import (
    FineTuningStrategy,
    FullFineTuningStrategy,
    enable_fine_tuning,
    load_adapter,
    merge_strategies,
    merged,
    save_adapter,
)
from gift_core.errors import GiftError
from gift_core.info import Report, table_info
from gift_lora_plugin.demos.data import Labelled
from gift_lora_plugin.demos.output import say
from gift_lora_plugin.demos.picture import draw
from gift_lora_plugin.demos.training import Recipe, Run, predict, train, train_head

PROBE, LORA, FULL = "frozen probe", "LoRA + head", "full fine-tuning"
_FILE = {PROBE: "probe", LORA: "lora", FULL: "full"}


class DemoError(GiftError, RuntimeError):
    """A demo cannot run, or did not show what it is there to show."""


@dataclasses.dataclass(frozen=True)
class Task:
    """What is compared, for one seed.

    Attributes:
        name: begins the names of the files.
        title: what is adapted to what, for people.
        build_base: gives a new copy of the base model, its new head drawn with the given seed.
        head: the head's full name.
        lora: what is tuned beside the head in the second method.
        train: what is trained on.
        validation: what choices are made on, and the accuracy per epoch is measured on.
        test: what the accuracy in the table is measured on; nothing is chosen with it.
        images: the test digits to draw, ``(n, height, width)``.
        classes: the name of each class.
        recipes: how to train, by method.
        weight_decays: what the probe's weight decay is chosen from.
    """

    name: str
    title: str
    build_base: Callable[[int], nn.Module]
    head: str
    lora: FineTuningStrategy
    train: Labelled
    validation: Labelled
    test: Labelled
    images: Tensor
    classes: Sequence[str]
    recipes: dict[str, Recipe]
    weight_decays: Sequence[float]


class Options(NamedTuple):
    """What a task is built for: the seed, the epochs of LoRA and full fine-tuning, and whether it only has to run through."""

    seed: int
    epochs: int
    quick: bool


class Outcome(NamedTuple):
    """What one method gave: its counts, how it learnt, its logits and the truth on the test part, and its file."""

    method: str
    report: Report
    run: Run
    logits: Tensor
    labels: Tensor
    file: Path
    file_bytes: int

    @property
    def answers(self) -> Tensor:
        """The class it gives each test digit, ``(n,)``."""
        return self.logits.argmax(1)

    @property
    def accuracy(self) -> float:
        """The share of test digits that it gets right."""
        return (self.answers == self.labels).double().mean().item()


@dataclasses.dataclass(frozen=True)
class Demo:
    """A demo: its name, what it shows, its epochs, and the task for given options."""

    name: str
    description: str
    epochs: int
    task: Callable[[Options], Task]


def run(demo: Demo, argv: list[str] | None = None) -> int:
    """Run a demo with command line arguments; the process's own if None.

    Returns:
        The exit code, 0.

    Raises:
        DemoError: if a reloaded adapter gives other answers than the model that was trained, or the folder cannot be made.
    """
    options = _read_arguments(demo, argv)
    torch.set_num_threads(options.threads)
    _make_folder(options.output)
    outcomes = [
        _run_seed(demo, Options(seed, options.epochs, options.quick), options.output)
        for seed in range(options.seed, options.seed + options.seeds)
    ]
    say(comparison_table(outcomes))
    spread = f"; mean and standard deviation of {len(outcomes)} seeds" if len(outcomes) > 1 else ""
    say(f"accuracy: on test digits that no choice was made with{spread}")
    say(f"adapter files and pictures: {options.output}")
    return 0


def compare(task: Task, seed: int, folder: Path) -> list[Outcome]:
    """Train the three methods, each on a copy of the same base and the same split, and save what each has learnt."""
    head = FullFineTuningStrategy(targets=task.head)
    strategies = {PROBE: head, LORA: merge_strategies([head, task.lora]), FULL: FullFineTuningStrategy()}
    return [_run_method(task, method, strategy, seed, folder) for method, strategy in strategies.items()]


def _run_method(task: Task, method: str, strategy: FineTuningStrategy, seed: int, folder: Path) -> Outcome:
    model = task.build_base(seed)
    report = enable_fine_tuning(model, strategy)
    trained = _train(task, model, method, seed)
    file = folder / f"{task.name}-{_FILE[method]}-seed{seed}.safetensors"
    info = save_adapter(model, file)
    outcome = Outcome(method, report, trained, predict(model, task.test.inputs), task.test.labels, file, info.file_bytes)
    if method == LORA:
        check_reload(task, model, outcome, seed)
    return outcome


def check_reload(task: Task, model: nn.Module, outcome: Outcome, seed: int) -> None:
    """Check that the file alone turns a new copy of the base into the trained model, merged or not.

    Raises:
        DemoError: if one answer to a test digit differs.
    """
    fresh = task.build_base(seed + 1)  # with another head, which the file must replace
    load_adapter(fresh, outcome.file)
    found = {"reloaded": predict(fresh, task.test.inputs)}
    for name, tuned in (("merged", model), ("reloaded and merged", fresh)):
        with merged(tuned):
            found[name] = predict(tuned, task.test.inputs)
    for name, logits in found.items():
        differing = int((logits.argmax(1) != outcome.answers).sum())
        if differing:
            raise DemoError(f"{outcome.method}, {name}: {differing} of {len(logits)} answers differ from the trained model's.")
    gap = max((logits - outcome.logits).abs().max().item() for logits in found.values())
    say(f"  {outcome.file.name}, loaded into a new copy of the base: all {len(outcome.logits)} test answers are equal,")
    say(f"  unmerged and merged (the largest difference of a logit is {gap:.1g})")


def comparison_table(seeds: Sequence[Sequence[Outcome]]) -> str:
    """The table of one run, or of the means of several, as text."""
    header = ["method", "numbers trained", "of all", "accuracy", "seconds", "file"]
    return table_info([_row(outcomes) for outcomes in zip(*seeds, strict=True)], header)


def _row(outcomes: Sequence[Outcome]) -> list[str]:
    first = outcomes[0]
    trained = first.report.trainable_after
    return [
        first.method,
        f"{trained:,}",
        f"{trained / first.report.total_after:.1%}",
        _percent([outcome.accuracy for outcome in outcomes]),
        f"{statistics.mean(outcome.run.seconds for outcome in outcomes):.1f}",
        f"{first.file_bytes / 1024:,.0f} KiB",
    ]


def _percent(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.1%}"
    return mean if len(values) == 1 else f"{mean} ± {100 * statistics.stdev(values):.1f}"


def _run_seed(demo: Demo, options: Options, folder: Path) -> list[Outcome]:
    task = demo.task(options)
    say(f"{task.title}, seed {options.seed}: {len(task.train.labels)} labels, {len(task.test.labels)} test digits")
    outcomes = compare(task, options.seed, folder)
    _draw(task, outcomes, folder / f"{task.name}-seed{options.seed}.png")
    return outcomes


def _train(task: Task, model: nn.Module, method: str, seed: int) -> Run:
    recipe = task.recipes[method]
    if method == PROBE:
        return train_head(model, task.head, task.train, task.validation, recipe, task.weight_decays, seed)
    return train(model, task.train, task.validation, recipe, seed, method)


def _draw(task: Task, outcomes: Sequence[Outcome], path: Path) -> None:
    curves = {outcome.method: outcome.run.curve for outcome in outcomes}
    answers = {outcome.method: outcome.answers for outcome in outcomes}
    before, after = ("probe", answers[PROBE]), ("LoRA", answers[LORA])
    try:
        draw(path, task.title, curves, task.images, task.test.labels, before, after, task.classes)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "matplotlib":
            raise
        say("no picture: matplotlib is not installed (pip install matplotlib)")


def _read_arguments(demo: Demo, argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"gift demo {demo.name}", description=demo.description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="the first seed: of the split, the new head, LoRA and the order")
    parser.add_argument("--seeds", type=_positive, default=1, help="how many seeds; several print mean and standard deviation")
    parser.add_argument("--epochs", type=_positive, default=demo.epochs, help="epochs of LoRA and of full fine-tuning")
    parser.add_argument("--threads", type=_positive, default=1, help="threads of torch; more can be slower on busy cores")
    parser.add_argument("--output", type=Path, default=Path("gift-demo"), help="folder for adapter files and pictures")
    parser.add_argument("--quick", action="store_true", help="few labels and epochs, to see it run; the accuracies mean nothing")
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoError(f"the folder {folder} cannot be made: {error}. Choose another with --output.") from error
