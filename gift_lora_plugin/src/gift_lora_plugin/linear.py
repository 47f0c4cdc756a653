"""The low-rank update of a linear map, as a function of tensors.

Nothing here knows modules, caps or plugins.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gift_lora_plugin.fusion import add_product, as_autocast, draw_mask, kept, may_fuse, packed, scaled_product, unpacked
from gift_lora_plugin.lowrank import as_dtype, drop, own_precision

#: Below these sizes a layer costs what its calls cost, not its arithmetic: numbers in the weight, and those times the tokens.
_TINY_WEIGHT, _TINY_PRODUCT = 2**14, 2**20


def low_rank_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout: float = 0.0
) -> Tensor:
    r"""The linear map of the effective weight, :math:`x (W + s B A)^T + b`.

    Args:
        input: ``(..., in)``.
        weight: ``(out, in)``.
        bias: ``(out,)``, or None.
        lora_A: ``(rank, in)``; its dtype may differ from the weight's, and the update is formed in it.
        lora_B: ``(out, rank)``, in the dtype of ``lora_A``.
        scaling: :math:`s`, alpha / rank.
        dropout: probability with which a number of the update's input is dropped; 0 outside training.

    Returns:
        ``(..., out)``, in the dtype that the frozen layer gives.

    Source: Hu et al. 2022, arXiv:2106.09685, equation 3.
    """
    path = _path(input, weight, bias, lora_A, lora_B, dropout)
    return path(input, weight, bias, lora_A, lora_B, scaling, dropout)


def _path(input: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, dropout: float) -> Callable[..., Tensor]:
    """Choose among the functions below, which give the same numbers.

    The effective weight takes the fewest calls, and is best where calls are what costs. Elsewhere its gradient would cost as much
    as the whole backward pass of the frozen layer, and one node for the layer beats autograd's many.
    """
    # with A frozen autograd keeps only the thin product, and both other paths would keep the input
    if not lora_A.requires_grad and torch.is_grad_enabled():
        return _reference
    if (
        not dropout
        and not torch.compiler.is_compiling()  # a program for every batch cannot ask for the size of one
        and weight.is_contiguous()  # the effective weight is, and a transposed one runs other kernels
        and weight.numel() <= _TINY_WEIGHT
        and input.numel() * weight.shape[0] <= _TINY_PRODUCT
        and lora_A.dtype == weight.dtype
    ):
        return _by_effective_weight
    # what survives dropout is scaled by 1 / (1 - dropout), which has no value where nothing does; and torch refuses a wrong width
    fuses = dropout < 1 and may_fuse(input, weight, bias, lora_A, lora_B) and input.shape[-1:] == weight.shape[1:]
    return _fused if fuses else _reference


def _reference(
    input: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout: float
) -> Tensor:
    base = F.linear(input, weight, bias)
    thin = drop(input, dropout) if dropout else input
    update = F.linear(F.linear(thin.to(lora_A.dtype), lora_A), lora_B)
    return torch.add(base, update, alpha=scaling).to(base.dtype)


def _by_effective_weight(
    input: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout: float
) -> Tensor:
    return F.linear(input, torch.addmm(weight, lora_B, lora_A, alpha=scaling), bias)


def _fused(
    input: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout: float
) -> Tensor:
    mask = draw_mask(input, dropout)
    given: tuple[Any, ...] = (*as_autocast(input, weight, bias, lora_A, lora_B), scaling / (1 - dropout), mask)
    trains = torch.is_grad_enabled() and (input.requires_grad or lora_A.requires_grad or lora_B.requires_grad)
    output: Tensor = _LowRankLinear.apply(*given) if trains else _mapped(*given)[0]
    return output


def _mapped(
    input: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What the layer gives, and the thin product ``A x^T``."""
    output = F.linear(input, weight, bias)
    hidden = F.linear(lora_A, _thin_rows(input, mask, lora_A))
    add_product(_rows(output), hidden.t(), lora_B.t(), scaling)
    return output, hidden


class _LowRankLinear(torch.autograd.Function):
    """One node for the layer, which keeps the input and the thin product ``A x^T``.

    A thin product is several times faster with its few rows first than with its few columns last, hence the transposes; what has full
    size is added to in place. The scaling comes with the sums: to multiply by it takes a call more, and in half precision ``s A x^T``
    may be beyond all numbers where ``s B A x^T`` is not. Where the backward pass is itself differentiated, the thin product is computed
    again, because a kept one has no history.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        mask: Tensor | None,
    ) -> Tensor:
        output, hidden = _mapped(input, weight, bias, lora_A, lora_B, scaling, mask)
        ctx.save_for_backward(input, weight, lora_A, lora_B, packed(mask), hidden)
        ctx.scaling = scaling
        return output.data  # torch may have made it a view, and an activation in place could not write into a view from a node

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        with own_precision(grad.device.type):
            return _gradients(ctx, _rows(grad))


def _gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    input, weight, lora_A, lora_B, bits, hidden = ctx.saved_tensors
    needs_input, _, _, needs_A, needs_B, _, _ = ctx.needs_input_grad
    mask = unpacked(bits, input)
    grad_thin = as_dtype(grad, lora_B.dtype)
    grad_hidden = F.linear(lora_B.t(), grad_thin)
    grad_input = grad_A = grad_B = None
    if needs_input:
        grad_input = grad @ weight
        add_product(grad_input, grad_hidden.t(), lora_A, ctx.scaling, None if mask is None else _rows(mask))
        grad_input = grad_input if input.dim() == 2 else grad_input.view(input.shape)
    if needs_A:
        grad_A = scaled_product(grad_hidden, _thin_rows(input, mask, lora_A), ctx.scaling, lora_A)
    if needs_B:
        if torch.is_grad_enabled():
            hidden = F.linear(lora_A, _thin_rows(input, mask, lora_A))
        grad_B = scaled_product(hidden, grad_thin, ctx.scaling, lora_B.t()).t()
    return grad_input, None, None, grad_A, grad_B, None, None


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])


def _thin_rows(input: Tensor, mask: Tensor | None, lora_A: Tensor) -> Tensor:
    """What the update reads: the input as ``(tokens, in)``, without what dropout dropped, in the adapter's dtype."""
    return as_dtype(_rows(input if mask is None else kept(input, mask)), lora_A.dtype)
