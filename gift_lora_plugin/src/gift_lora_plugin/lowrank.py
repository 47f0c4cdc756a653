"""Low-rank updates as pure functions of tensors and shapes.

Nothing here knows modules, caps or plugins. Weights keep torch's layout, ``(out, in / groups, *kernel)``.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

#: How a convolution's weight is laid out as a matrix; the first is the default.
CONV_LAYOUTS = ("balanced", "out_as_h")


def matrix_shape(shape: Sequence[int], conv_layout: str = "balanced") -> tuple[int, int]:
    """The rows of B and the columns of A for a weight.

    ``out_as_h`` has ``out`` rows and ``in / groups * k0 * k1 * ...`` columns. ``balanced`` moves the first kernel dimension to the
    rows, ``out * k0`` and ``in / groups * k1 * ...``, which takes fewer numbers for the same rank; with fewer than two kernel
    dimensions the two are the same.

    Args:
        shape: of the weight, ``(out, in / groups, *kernel)``.
        conv_layout: one of `CONV_LAYOUTS`.
    """
    if conv_layout == "balanced" and len(shape) > 3:
        return shape[0] * shape[2], shape[1] * math.prod(shape[3:])
    return shape[0], math.prod(shape[1:])


def low_rank_update(lora_B: Tensor, lora_A: Tensor, shape: Sequence[int], scaling: float) -> Tensor:
    """The update ``scaling * B A`` in the shape of the weight: the product's numbers in memory order.

    Args:
        lora_B: ``(rows, rank)``.
        lora_A: ``(rank, columns)``.
        shape: of the weight; it has ``rows * columns`` numbers.
        scaling: alpha / rank.
    """
    return (lora_B @ lora_A).mul(scaling).view(torch.Size(shape))


def add_low_rank(weight: Tensor, lora_B: Tensor, lora_A: Tensor, scaling: float) -> Tensor:
    """The effective weight ``W + scaling * B A``, in one product that adds as it goes, in the dtype of the factors."""
    matrix = as_dtype(weight.reshape(lora_B.shape[0], lora_A.shape[1]), lora_B.dtype)
    return in_memory_as(weight, torch.addmm(matrix, lora_B, lora_A, alpha=scaling).view(weight.shape))


def as_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)``, without the call where there is nothing to do: a small layer costs what its calls cost."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def in_memory_as(weight: Tensor, values: Tensor) -> Tensor:
    """Values of the weight's shape, with their axes in memory in the order of the weight's: torch chooses its kernels by that."""
    if values.stride() == weight.stride():
        return values
    order = sorted(range(weight.dim()), key=weight.stride().__getitem__, reverse=True)
    ordered = values.permute(order).contiguous().permute(sorted(range(weight.dim()), key=order.__getitem__))
    same = (size == 1 or mine == its for size, mine, its in zip(weight.shape, ordered.stride(), weight.stride(), strict=True))
    # the stride of an axis of one element says nothing of memory, but counts in that choice too
    return ordered.as_strided(weight.shape, weight.stride()) if all(same) else ordered


def drop(input: Tensor, dropout: float) -> Tensor:
    """`torch.nn.functional.dropout` in training; a complex number, which that does not take, is dropped or kept as one."""
    if not input.is_complex():
        return F.dropout(input, dropout)
    return input * F.dropout(torch.ones_like(input.real), dropout)


def own_precision(device: str) -> contextlib.AbstractContextManager[Any]:
    """A context without autocast, in which a weight is built, so that merged and unmerged weights agree."""
    if device == "meta" or not torch.is_autocast_enabled(device):
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)
