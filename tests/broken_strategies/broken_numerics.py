"""Strategies that compute two different things."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from broken_strategies.healthy import Healthy, Shift
from gift_core import FineTuningStrategy


class LouderInTraining(Healthy):
    """Counts the shift twice in training."""

    class Method(Shift):
        """A shift that depends on the mode."""

        def reparameterize(self, weight: Tensor) -> Tensor:
            return weight + self.delta * (2 if self.training else 1)

    method = Method


class TwoFormulas(Healthy):
    """Has a ``forward`` that is not the formula of its weight."""

    class Method(Shift):
        """A shift that counts twice in forward."""

        bias: Tensor | None

        def forward(self, input: Tensor) -> Tensor:
            return functional.linear(input, self._parameters["weight"] + 2 * self.delta, self.bias)  # type: ignore[operator]

    method = Method


class Bottleneck(nn.Module):
    """A layer and a small network beside it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        as_layer = {"dtype": layer.weight.dtype, "device": layer.weight.device}
        self.layer = layer.requires_grad_(False)
        self.down = nn.Linear(layer.in_features, 2, **as_layer)  # type: ignore[arg-type]
        self.up = nn.Linear(2, layer.out_features, **as_layer)  # type: ignore[arg-type]
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.up(self.down(x).tanh())  # type: ignore[no-any-return]


class ClaimsToMerge(Healthy):
    """Puts bottlenecks into the model, which no weight can hold, and does not declare mergeable=False."""

    @classmethod
    def act(cls, *site: Any) -> None:
        parent, module = site[0], site[4]
        bottleneck = Bottleneck(module)
        for name, child in list(parent.named_children()) + [(name, c) for name, c in parent._modules.items()]:
            if child is module:
                setattr(parent, name, bottleneck)


class AlwaysSingle(Healthy):
    """Makes its tensors in float32, whatever the model is in."""

    class Method(Shift):
        """A shift in float32."""

        def init_parameters(self, weight: Tensor) -> None:
            self.delta = nn.Parameter(torch.zeros(weight.shape, dtype=torch.float32))

    method = Method


class Draws(Healthy):
    """Draws a random number at each use."""

    class Method(Shift):
        """A shift that draws, to no effect."""

        def reparameterize(self, weight: Tensor) -> Tensor:
            return weight + self.delta + 0 * torch.rand(1, dtype=weight.dtype)

    method = Method


BROKEN: dict[str, tuple[type[FineTuningStrategy], str]] = {
    "train_equals_eval": (LouderInTraining, "training mode gives another answer"),
    "merged_equals_tuned": (TwoFormulas, "merged weights give another answer"),
    "unloaded_equals_merged": (ClaimsToMerge, "a replaced module has no merged form"),
    "dtype_and_device_kept": (AlwaysSingle, "torch.float32"),
    "draws_no_random_numbers": (Draws, "a forward pass drew from torch's generator"),
}
