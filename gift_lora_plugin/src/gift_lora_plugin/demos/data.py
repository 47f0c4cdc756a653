"""Scikit-learn's real handwritten digits, and how they are divided."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class Labelled(NamedTuple):
    """Inputs of a model and the class of each, ``(n, ...)`` and ``(n,)``."""

    inputs: Tensor
    labels: Tensor


class Split(NamedTuple):
    """Indices of three disjoint parts: one to train on, one to make choices on, one to report on."""

    train: Tensor
    validation: Tensor
    test: Tensor


def load_digits(classes: Iterable[int] = range(10)) -> Labelled:
    """Load the digits of the given classes, ``(n, 8, 8)`` from 0 to 1; labels count from 0 within ``classes``."""
    from sklearn.datasets import load_digits as load

    data = load()
    images, digits = torch.tensor(data.images, dtype=torch.float32) / 16, torch.tensor(data.target, dtype=torch.long)
    wanted = torch.tensor(list(classes))
    chosen = torch.isin(digits, wanted)
    return Labelled(images[chosen], torch.searchsorted(wanted, digits[chosen]))


def split(labels: Tensor, seed: int, *, train: int, validation: int, test: int | None = None) -> Split:
    """Divide examples into three parts in which every class has its share; ``test`` None takes all that is left."""
    from sklearn.model_selection import train_test_split

    indices = torch.arange(len(labels)).numpy()
    first, rest = train_test_split(indices, train_size=train, stratify=labels, random_state=seed)
    second, third = train_test_split(rest, train_size=validation, stratify=labels[rest], random_state=seed)
    return Split(*(torch.from_numpy(part) for part in (first, second, third[:test])))
