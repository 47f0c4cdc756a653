"""A small strategy that keeps every promise; the broken ones differ from it in one thing each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gift_core import FineTuningStrategy, Reparameterization
from gift_core.factories import is_instance, reparameterize


class Shift(Reparameterization):
    """The weight plus a trainable tensor of its shape, zero at first."""

    delta: nn.Parameter

    def init_parameters(self, weight: Tensor) -> None:
        self.delta = nn.Parameter(torch.zeros_like(weight))

    def reparameterize(self, weight: Tensor) -> Tensor:
        return weight + self.delta


class Healthy(FineTuningStrategy):
    """`Shift`, or another method, on every Linear layer; a subclass may do something more at each site."""

    name = "healthy"
    method: type[Reparameterization] = Shift

    def __init__(self) -> None:
        super().__init__(module_caps=[(is_instance(nn.Linear), self.act)])

    @classmethod
    def act(cls, *site: Any) -> None:
        """Adapt the layer, then do what the subclass adds."""
        reparameterize(cls.method)(*site)
        cls.more(*site)

    @classmethod
    def more(cls, *site: Any) -> None:
        """Nothing more."""
