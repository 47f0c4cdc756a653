"""LoRA as a reparameterization, with a forward of its own where that beats building the weight."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gift_core import Reparameterization
from gift_core.errors import SiteError
from gift_lora_plugin.lowrank import add_low_rank, low_rank_update, matrix_shape

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class LoRA(Reparameterization):
    r"""A frozen weight plus a trainable low-rank update.

    The effective weight is :math:`W + \frac{\alpha}{r} B A`, with the product's numbers read in the memory order of ``W``. ``B``
    starts at zero, so a fresh adapter changes nothing.

    Args of `init_parameters`:
        rank: :math:`r`, at least 1.
        alpha: numerator of the scaling; ``None`` means ``rank``, so that the scaling is 1.
        dropout: probability with which a number of the update's input is dropped in training.
        conv_layout: how a convolution's weight is laid out as a matrix, see `matrix_shape`.

    Attributes:
        lora_B: ``(rows, rank)``, zeros; ``(out, rank)`` for a Linear layer. Dtype and device of the weight.
        lora_A: ``(rank, columns)``, Kaiming uniform with ``a = sqrt(5)``; ``(rank, in)`` for a Linear layer.
        lora_scaling: alpha / rank.
        lora_dropout: the dropout probability.

    Source: Hu et al. 2022, arXiv:2106.09685, section 4.1.
    """

    lora_B: nn.Parameter
    lora_A: nn.Parameter
    lora_scaling: float
    lora_dropout: float

    @classmethod
    def specialize(cls, module: nn.Module) -> type[Reparameterization]:
        # a subclass with a forward of its own must keep it: it reads the effective weight
        if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
            return LinearLoRA
        plain: Any = next((kind for kind in _CONVOLUTIONS if isinstance(module, kind)), None)
        if plain and type(module).forward is plain.forward and getattr(type(module), "_conv_forward", None) is plain._conv_forward:
            return ConvLoRA
        return cls

    @classmethod
    def examine(cls, module: nn.Module, name: str, weight: Tensor, **params: Any) -> str | None:
        if weight.is_complex():
            raise SiteError(f"its {name!r} is complex, and LoRA is implemented for real weights: exclude it.")
        if weight.dim() < 2 or not weight.numel():
            raise SiteError(f"its {name!r} has shape {tuple(weight.shape)}, and a low-rank update needs a matrix: exclude it.")
        if params.get("dropout") and cls is LoRA:
            raise SiteError("it has a forward of its own, into which no dropout can be put: set lora_dropout=0, or exclude it.")
        if params.get("dropout") and isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
            return "lora_dropout has no effect where attention reads the weight itself"
        if params["rank"] > min(matrix_shape(weight.shape, params.get("conv_layout", "balanced"))):
            return f"rank {params['rank']} is more than these layers can use; it works, and wastes numbers"
        return None

    def init_parameters(
        self, weight: Tensor, *, rank: int, alpha: float | None = None, dropout: float = 0.0, conv_layout: str = "balanced"
    ) -> None:
        rows, columns = matrix_shape(weight.shape, conv_layout)
        self.lora_B = nn.Parameter(weight.new_zeros(rows, rank))
        self.lora_A = nn.Parameter(weight.new_empty(rank, columns))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.lora_scaling = (rank if alpha is None else alpha) / rank
        self.lora_dropout = dropout

    def reparameterize(self, weight: Tensor) -> Tensor:
        return add_low_rank(weight, self.lora_B, self.lora_A, self.lora_scaling)


def _refuse_tracing(input: object) -> None:
    if isinstance(input, torch.fx.Proxy):
        raise SiteError(
            "torch.fx traces into an adapted layer, where it would take the weight for a constant: make the layer a leaf of the "
            "tracer, as layers of torch.nn inside a model are, or merge_and_unload(model) first."
        )


class LinearLoRA(LoRA):
    """LoRA on `torch.nn.Linear`: two thin products on the input instead of a weight of full size."""

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(..., in)`` to ``(..., out)``."""
        _refuse_tracing(input)
        frozen = self._parameters["weight"]
        assert frozen is not None  # it is adapted
        thin = F.dropout(input, self.lora_dropout, self.training) if self.lora_dropout else input
        update = F.linear(F.linear(thin, self.lora_A), self.lora_B)
        return torch.add(F.linear(input, frozen, self.bias), update, alpha=self.lora_scaling)  # type: ignore[arg-type]


class ConvLoRA(LoRA):
    """LoRA on a convolution: the effective weight, and a second convolution where dropout makes the update's input its own."""

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(batch, in, *space)`` to ``(batch, out, *space)``."""
        _refuse_tracing(input)
        if not (self.training and self.lora_dropout):
            return super().forward(input)  # type: ignore[no-any-return]
        frozen = self._parameters["weight"]
        assert frozen is not None  # it is adapted
        update = low_rank_update(self.lora_B, self.lora_A, frozen.shape, self.lora_scaling)
        dropped = F.dropout(input, self.lora_dropout)
        return self._conv_forward(input, frozen, self.bias) + self._conv_forward(dropped, update, None)  # type: ignore[operator, no-any-return]
