"""When a backward pass written by hand may stand in for autograd's own.

The fast path of `low_rank_linear` is for plain training and inference. Whatever transforms, traces or differentiates
the computation in another way gets the reference formula, which torch understands.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

# private to torch, so that a version without it must not break us: it then always gets the reference formula
_under_functorch: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)

_PLAIN = (Tensor, nn.Parameter)


def may_fuse(input: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor) -> bool:
    """Whether plain eager torch runs, on plain real tensors, with everything frozen but the input and the factors.

    It does not under `torch.compile` and `torch.export` (the compiler fuses better than we do), `torch.jit.trace`, `torch.func`
    transforms, and forward-mode differentiation, on a device without kernels, on nested and sparse inputs, and on tensor subclasses
    such as a DTensor.
    """
    if torch.compiler.is_compiling() or _under_functorch() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return False
    if getattr(forward_ad, "_current_level", 0) >= 0 or input.is_nested or input.layout is not torch.strided or input.is_meta:
        return False
    if not (type(input) in _PLAIN and type(weight) in _PLAIN and type(lora_A) in _PLAIN and type(lora_B) in _PLAIN):
        return False
    if not (input.is_floating_point() and weight.is_floating_point()):
        return False
    return not (weight.requires_grad or (bias is not None and bias.requires_grad))


def as_autocast(input: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """The tensors in the dtype in which autocast would multiply them, or as they are outside autocast."""
    tensors, device = (input, *others), input.device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(tensor if tensor is None or tensor.dtype is torch.float64 else tensor.to(dtype) for tensor in tensors)


def draw_mask(input: Tensor, dropout: float) -> Tensor | None:
    """Which numbers of the input dropout keeps, a byte each, drawn as `torch.nn.functional.dropout` draws on a CPU; None for all."""
    return torch.empty_like(input, dtype=torch.bool).bernoulli_(1 - dropout) if dropout else None


#: One bit in each byte, nine apart, as a signed number: it brings eight bytes of 0 or 1 together in the highest, and apart again.
_DIAGONAL, _ONES = 0x8040201008040201 - 2**64, 0x0101010101010101


def packed(mask: Tensor | None) -> Tensor | None:
    """A mask, of which a backward pass keeps eight numbers in a byte."""
    if mask is None:
        return None
    numbers = F.pad(mask.flatten(), (0, -mask.numel() % 8)).view(torch.int64)
    return (numbers * _DIAGONAL >> 56).to(torch.uint8)


def unpacked(bits: Tensor | None, like: Tensor) -> Tensor | None:
    """The mask that `packed` was given, for a tensor of the same shape."""
    if bits is None:
        return None
    numbers = (bits.to(torch.int64) * _DIAGONAL >> 7) & _ONES
    return numbers.view(torch.bool)[: like.numel()].view(like.shape)


def kept(tensor: Tensor, mask: Tensor | None) -> Tensor:
    """The tensor with zeros where the mask has them."""
    return tensor if mask is None else tensor * mask


def times(gradient: Tensor, scaling: float) -> Tensor:
    """The gradient of a factor, which nobody else holds, times the scaling, in place; the call costs more than its numbers."""
    return gradient if scaling == 1 else gradient.mul_(scaling)


def add_product(out: Tensor, left: Tensor, right: Tensor, scaling: float, mask: Tensor | None = None) -> None:
    """Add ``scaling * left @ right`` to ``out`` in place, where the mask keeps it, if possible without a temporary of its size."""
    if mask is None and out.dtype == left.dtype:
        out.addmm_(left, right, alpha=scaling)
    else:
        out.add_(kept(left @ right, mask), alpha=scaling)


def scaled_product(left: Tensor, right: Tensor, scaling: float, like: Tensor) -> Tensor:
    """``scaling * left @ right`` in one call; ``like`` is any tensor of its shape, of which nothing is read."""
    return torch.addmm(like, left, right, beta=0, alpha=scaling)
