"""Strategies that do not go through what torch does with models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from broken_strategies.healthy import Healthy, Shift
from gift_core import FineTuningStrategy


class Holder:
    """Holds a tensor, and is the same in every copy."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __deepcopy__(self, memo: dict[int, Any]) -> Holder:
        return self


class ReadsTheOriginal(Healthy):
    """Reads its tensor where a deep copy finds the original's."""

    class Method(Shift):
        """A shift that reads around the copy."""

        def init_parameters(self, weight: Tensor) -> None:
            super().init_parameters(weight)
            self.holder = Holder(self.delta)

        def reparameterize(self, weight: Tensor) -> Tensor:
            return weight + (self.delta if torch.compiler.is_compiling() else self.holder.tensor)

    method = Method


class HoldsAFunction(Healthy):
    """Leaves a function in the model that cannot be pickled."""

    class Method(Shift):
        """A shift with a scaling function."""

        def init_parameters(self, weight: Tensor) -> None:
            super().init_parameters(weight)
            self.scaled = lambda tensor: 1 * tensor

        def reparameterize(self, weight: Tensor) -> Tensor:
            return weight + self.scaled(self.delta)  # type: ignore[no-any-return]

    method = Method


class BreaksTheGraph(Healthy):
    """Needs Python in the middle of the graph."""

    class Method(Shift):
        """A shift with a break in its graph."""

        def reparameterize(self, weight: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return weight + self.delta

    method = Method


class RefusesExport(Healthy):
    """Cannot be exported."""

    class Method(Shift):
        """A shift that refuses."""

        def reparameterize(self, weight: Tensor) -> Tensor:
            if torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling():  # is_exporting came with torch 2.7
                raise RuntimeError("this weight cannot be exported")
            return weight + self.delta

    method = Method


BROKEN: dict[str, tuple[type[FineTuningStrategy], str]] = {
    "deep_copies": (ReadsTheOriginal, "a deep copy"),
    "pickles": (HoldsAFunction, "pickle"),
    "compiles": (BreaksTheGraph, "graph"),
    "exports": (RefusesExport, "this weight cannot be exported"),
}
