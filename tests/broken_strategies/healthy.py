"""A small strategy that keeps every promise; the broken ones differ from it in one thing each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gift_core import FineTuningStrategy, Reparameterization
from gift_core.capabilities import Capabilities
from gift_core.errors import SiteError
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


class ShiftInSingle(Shift):
    """A shift that is kept in float32 or wider, and is weakened by chance in training."""

    def init_parameters(self, weight: Tensor) -> None:
        self.delta = nn.Parameter(torch.zeros_like(weight, dtype=torch.promote_types(torch.float32, weight.dtype)))

    def reparameterize(self, weight: Tensor) -> Tensor:
        kept = torch.rand((), dtype=self.delta.dtype.to_real(), device=weight.device) if self.training else 1
        return weight + self.delta * kept


class Outspoken(Healthy):
    """Declares whatever one can declare beside the defaults, and keeps it."""

    method = ShiftInSingle
    capabilities = Capabilities(layers=("Linear",), refuses=("Embedding",), random_in_training=True, adapter_dtype="float32")

    def __init__(self) -> None:
        refuse = (is_instance(nn.Embedding), reparameterize(Refusing))
        FineTuningStrategy.__init__(self, module_caps=[(is_instance(nn.Linear), self.act), refuse])


class Refusing(Reparameterization):
    """Takes no layer at all."""

    @classmethod
    def examine(cls, module: nn.Module, name: str, weight: Tensor, **params: Any) -> str | None:
        raise SiteError("it is none that I know: exclude it.")
