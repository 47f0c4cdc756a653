"""The picture of a comparison: how each method learnt, and what it answers to single digits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: How many test digits the strip shows.
STRIP = 12


def draw(
    path: Path,
    title: str,
    curves: Mapping[str, Sequence[float]],
    images: Tensor,
    truth: Tensor,
    before: tuple[str, Tensor],
    after: tuple[str, Tensor],
    classes: Sequence[str],
) -> None:
    """Write a PNG: accuracy per epoch of each method above, a strip of test digits with two answers each below.

    Args:
        path: the file to write.
        title: what was adapted to what.
        curves: accuracy on the validation part after each epoch, by method.
        images: the test digits, ``(n, height, width)``.
        truth: their classes, ``(n,)``.
        before: a method and its answers, ``(n,)``.
        after: the method to compare it with, likewise.
        classes: the name of each class.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
    """
    # without pyplot nothing global is touched, and no display is looked for: a figure saved as PNG is drawn by Agg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    grid = figure.add_gridspec(2, STRIP, height_ratios=[3, 1.4])
    _draw_curves(figure.add_subplot(grid[0, :]), title, curves)
    for place, index in enumerate(_telling(before[1], after[1])):
        answers = [(name, int(answer[index]), int(truth[index])) for name, answer in (before, after)]
        _draw_digit(figure.add_subplot(grid[1, place]), images[index], answers, classes)
    figure.supxlabel(f"test digits, first those on which {before[0]} and {after[0]} differ", fontsize=9)
    figure.savefig(path, dpi=120)


def _draw_curves(axes: Axes, title: str, curves: Mapping[str, Sequence[float]]) -> None:
    for name, curve in curves.items():
        axes.plot(range(1, len(curve) + 1), [100 * value for value in curve], marker=".", label=name)
    longest = max(map(len, curves.values()))
    axes.set_xscale("log")  # a probe's epochs are many and cheap
    axes.set_xticks([tick for tick in (1, 2, 5, 10, 20, 50, 100, 200) if tick <= longest], minor=False)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.xaxis.set_minor_formatter("")
    axes.set(title=title, xlabel="epoch", ylabel="validation accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")


def _draw_digit(axes: Axes, image: Tensor, answers: Sequence[tuple[str, int, int]], classes: Sequence[str]) -> None:
    axes.imshow(image.numpy(), cmap="gray_r")
    axes.set_axis_off()
    for line, (name, answer, truth) in enumerate(answers):
        colour = "tab:green" if answer == truth else "tab:red"
        text = f"{name}: {classes[answer]}"
        axes.text(0.5, -0.08 - 0.22 * line, text, transform=axes.transAxes, ha="center", va="top", fontsize=8, color=colour)


def _telling(before: Tensor, after: Tensor) -> list[int]:
    # where the answers differ there is something to see
    return torch.argsort((before == after).long(), stable=True)[:STRIP].tolist()
