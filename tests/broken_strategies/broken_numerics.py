"""Strategies that compute two different things."""

from __future__ import annotations

import secrets
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from broken_strategies.healthy import Healthy, Shift
from gift_core import FineTuningStrategy
from gift_core.capabilities import Capabilities


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


class ClaimsSingle(Healthy):
    """Claims to keep its tensors in float32, and keeps them in the model's type."""

    capabilities = Capabilities(adapter_dtype="float32")


class AnswersInSingle(Healthy):
    """Keeps its tensors in float32, as it says, and lets the answer have that type too."""

    capabilities = Capabilities(adapter_dtype="float32", identity_at_start=False)

    class Method(Shift):
        """A shift in float32 that forward adds to the output."""

        bias: Tensor | None

        def init_parameters(self, weight: Tensor) -> None:
            self.delta = nn.Parameter(torch.zeros(weight.shape, dtype=torch.promote_types(torch.float32, weight.dtype)))

        def forward(self, input: Tensor) -> Tensor:
            shifted: Tensor = self._parameters["weight"] + self.delta
            bias = None if self.bias is None else self.bias.to(shifted.dtype)
            return functional.linear(input.to(shifted.dtype), shifted, bias)

    method = Method


class Draws(Healthy):
    """Draws a random number at each use outside training."""

    class Method(Shift):
        """A shift that draws, to no effect."""

        def reparameterize(self, weight: Tensor) -> Tensor:
            return weight + self.delta + (0 if self.training else 0 * torch.rand(1, dtype=weight.dtype))

    method = Method


class DrawsInTraining(Healthy):
    """Draws a random number at each use in training, and does not say so."""

    class Method(Shift):
        """A shift that draws, to no effect."""

        def reparameterize(self, weight: Tensor) -> Tensor:
            return weight + self.delta + (0 * torch.rand(1, dtype=weight.dtype) if self.training else 0)

    method = Method


class ClaimsToDraw(Healthy):
    """Says that it draws random numbers in training, and draws none."""

    capabilities = Capabilities(random_in_training=True)


class DrawsUnseeded(Healthy):
    """Draws in training from torch's generator, as it says, and from another one."""

    capabilities = Capabilities(random_in_training=True)

    class Method(Shift):
        """A shift with noise that no seed governs."""

        def reparameterize(self, weight: Tensor) -> Tensor:
            if not self.training:
                return weight + self.delta
            noise = torch.rand(1, generator=torch.Generator().manual_seed(secrets.randbits(32)))
            return weight + self.delta * (torch.rand(1, dtype=weight.dtype) + noise.to(weight.dtype))

    method = Method


BROKEN: dict[str, tuple[type[FineTuningStrategy], str]] = {
    "train_equals_eval": (LouderInTraining, "training mode gives another answer"),
    "merged_equals_tuned": (TwoFormulas, "merged weights give another answer"),
    "unloaded_equals_merged": (ClaimsToMerge, "a replaced module has no merged form"),
    "dtype_and_device_kept": (AlwaysSingle, "torch.float32"),
    "draws_no_random_numbers": (Draws, "a forward pass drew from torch's generator"),
    "random_as_declared": (DrawsInTraining, "declare random_in_training=True"),
}
#: Further ones, by the name of the check that they fail: their capabilities are a lie.
LIARS: tuple[tuple[str, type[FineTuningStrategy], str], ...] = (
    ("dtype_and_device_kept", ClaimsSingle, "where what is added is torch.float32, not so: 0.delta (torch.bfloat16"),
    ("dtype_and_device_kept", AnswersInSingle, "a model of torch.bfloat16 answers in torch.float32"),
    ("random_as_declared", ClaimsToDraw, "training mode draws no random number in any model"),
    ("train_equals_eval", DrawsUnseeded, "torch.manual_seed does not govern training mode"),
)
