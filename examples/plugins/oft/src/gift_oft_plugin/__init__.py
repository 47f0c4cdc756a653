"""Orthogonal fine-tuning for GIFt: rotate the features of a layer in blocks, and keep their lengths and angles.

Source: Qiu et al. 2023, arXiv:2306.07280, equations 2 to 4 (the Cayley transform and its block-diagonal form).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gift_core import FineTuningStrategy, Reparameterization
from gift_core.errors import ParameterError, SiteError
from gift_core.factories import is_instance, parameter_name_contains, reparameterize, selects

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, nn.RNNBase, nn.MultiheadAttention)


def cayley(free: Tensor) -> Tensor:
    """Rotations ``(I + Q)(I - Q)^-1`` of the skew-symmetric ``Q = P - P^T``; ``free`` is P, ``(blocks, size, size)``, in float32."""
    skew = free - free.mT
    one = torch.eye(free.shape[-1], dtype=free.dtype, device=free.device).expand_as(free)
    return torch.linalg.solve(one - skew, one + skew)


class OFT(Reparameterization):
    """The weight with its output features rotated, ``R W`` with a block-diagonal orthogonal ``R``.

    Attributes:
        oft_free: ``(blocks, size, size)``, zeros at the start, where every rotation is exactly the identity.
    """

    @classmethod
    def examine(cls, module: nn.Module, name: str, weight: Tensor, **params: Any) -> None:
        if block_size(weight.shape[isinstance(module, nn.Embedding)], params["size"]) < 2:
            raise SiteError(f"no block of 2 to {params['size']} features divides the outputs of {name!r} {tuple(weight.shape)}.")

    def init_parameters(self, weight: Tensor, *, size: int) -> None:
        self.oft_transposed = isinstance(self, nn.Embedding)  # its weight is (tokens, features)
        features = weight.shape[self.oft_transposed]
        size = block_size(features, size)
        self.oft_free = nn.Parameter(weight.new_zeros(features // size, size, size))

    def reparameterize(self, weight: Tensor) -> Tensor:
        # half precision has no solver, and float64 keeps its own
        free = self.oft_free if self.oft_free.dtype == torch.float64 else self.oft_free.float()
        rotations = cayley(free).to(weight.dtype)
        rows = weight.T if self.oft_transposed else weight.flatten(1)
        rotated = (rotations @ rows.reshape(*rotations.shape[:2], -1)).reshape(rows.shape)
        return rotated.T.contiguous() if self.oft_transposed else rotated.view(weight.shape)


def block_size(features: int, most: int) -> int:
    """The largest block of at most ``most`` that divides the features."""
    return max(size for size in range(1, min(most, features) + 1) if features % size == 0)


class OFTFineTuningStrategy(FineTuningStrategy):
    """OFT on the weights of the selected layers.

    Args:
        block_size: features that are rotated together, at most; each layer takes the largest that divides its outputs.
        targets: patterns of the parameters or modules to adapt; None adapts every supported layer.
        exclude: patterns to leave out.
    """

    name = "oft"

    def __init__(
        self, block_size: int = 4, targets: str | Iterable[str] | None = None, exclude: str | Iterable[str] | None = None
    ) -> None:
        if type(block_size) is not int or block_size < 2:
            raise ParameterError(f"block_size must be a whole number from 2 up, got {block_size!r}.")
        check = is_instance(*LAYERS) & parameter_name_contains("weight", optional=True) & selects(targets, exclude)
        super().__init__(para_caps=[(check, reparameterize(OFT), {"size": block_size})])
