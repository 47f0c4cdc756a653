"""One picture of a run: what a training step costs on top of the base model, and how the other verbs compare with PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.bars import OURS, PEFT
from benchmarks.report import from_data
from benchmarks.suites.training import LIMIT
from benchmarks.timing import Measurement, Summary

COLOURS = {OURS: "#0b6e4f", "GIFt (balanced)": "#7fb69e", PEFT: "#c8553d", "loralib": "#8d99ae", "LyCORIS": "#5c677d"}


def draw(data: dict[str, Any], path: Path) -> None:
    """Write the picture; the ending of the path says the format."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    measurements = from_data(data).measurements
    steps = [one for one in measurements if one.name.startswith("train/") and one.name.endswith("/1 thread")]
    others = [one for one in measurements if one.name.startswith(("enable/", "state/")) and {OURS, PEFT} <= set(one.samples)]
    others = [one for one in others if not one.name.endswith("/each") and "/file/" not in one.name]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5.2), width_ratios=(3, 2), layout="constrained")
    _steps(left, steps)
    _verbs(right, others)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _steps(axes: Any, measurements: list[Measurement]) -> None:
    axes.set_title("Training step over the limit, one thread (1 = no adapter at all)")
    labels = [one.name.split("/")[1] for one in measurements]
    for system, colour in COLOURS.items():
        places = [i for i, one in enumerate(measurements) if {system, LIMIT} <= set(one.samples)]
        summaries = [measurements[i].ratio(system, LIMIT) for i in places]
        _dots(axes, summaries, places, system, colour)
    _label(axes, labels)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xticks([1, 1.25, 1.5, 2, 3, 4, 6], ["1", "1.25", "1.5", "2", "3", "4", "6"])
    axes.minorticks_off()
    if labels:
        axes.legend(loc="lower right", fontsize=9)


def _verbs(axes: Any, measurements: list[Measurement]) -> None:
    axes.set_title("Other verbs, time over PEFT's (log)")
    for system, colour in COLOURS.items():
        if system == PEFT:
            continue
        places = [i for i, one in enumerate(measurements) if system in one.samples]
        _dots(axes, [measurements[i].ratio(system, PEFT) for i in places], places, system, colour)
    _label(axes, [one.name.partition("/")[2] if one.name.startswith("state") else one.name.replace("/", " ") for one in measurements])
    axes.axvline(1, color=COLOURS[PEFT], linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xticks([0.001, 0.01, 0.1, 1], ["0.001", "0.01", "0.1", "1"])
    axes.minorticks_off()


def _dots(axes: Any, summaries: list[Summary], places: list[int], label: str, colour: str) -> None:
    if not summaries:
        return
    below = [one.median - one.q1 for one in summaries]
    above = [one.q3 - one.median for one in summaries]
    axes.errorbar([one.median for one in summaries], places, xerr=[below, above], fmt="o", color=colour, label=label, capsize=2)


def _label(axes: Any, labels: list[str]) -> None:
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
