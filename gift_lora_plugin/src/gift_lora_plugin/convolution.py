"""The low-rank update of a convolution, as a function of tensors.

Nothing here knows modules, caps or plugins.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from gift_lora_plugin.fusion import as_autocast, draw_mask, kept, may_fuse
from gift_lora_plugin.lowrank import add_low_rank, low_rank_update, own_precision

_CONVOLVE: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class _Geometry(NamedTuple):
    """Where the taps of a convolution with two kernel dimensions fall."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    @property
    def margin(self) -> tuple[int, ...]:
        """How far the taps of an input's border reach beyond the image."""
        return tuple(d * (k - 1) - p for k, p, d in zip(self.kernel, self.padding, self.dilation, strict=True))

    def size_of(self, input: Tensor) -> tuple[int, ...]:
        """The size of the image that an input gives."""
        sides = zip(input.shape[2:], self.stride, self.margin, self.padding, strict=True)
        return tuple((n + p - m - 1) // s + 1 for n, s, m, p in sides)

    def puts_taps_on_input(self, input: Tensor, rank: int) -> bool:
        """Whether the taps multiply fewer numbers on the input than on a thin image, or reach a border that no thin image has."""
        fewer = input.shape[1] * math.prod(self.size_of(input)) <= rank * math.prod(input.shape[2:])
        return fewer or min(self.margin) < 0


def low_rank_conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout: float = 0.0,
    *,
    stride: Sequence[int],
    padding: Sequence[int] | str,
    dilation: Sequence[int],
    groups: int = 1,
    padding_mode: str = "zeros",
) -> Tensor:
    r"""The convolution by the effective weight, :math:`W + s B A` with the product's numbers read in the memory order of ``W``.

    The keywords are the attributes of a `torch.nn.Conv2d` and its kin.

    Args:
        input: ``(batch, in, *space)``, or without the batch.
        weight: ``(out, in / groups, *kernel)`` with one to three kernel dimensions.
        bias: ``(out,)``, or None.
        lora_A: ``(rank, columns)``; the shapes of A and B say how the weight is laid out as a matrix, see `matrix_shape`. Its dtype
            may differ from the weight's, and the update is formed in it.
        lora_B: ``(rows, rank)``, in the dtype of ``lora_A``.
        scaling: :math:`s`, alpha / rank.
        dropout: probability with which a number of the update's input is dropped; 0 outside training.
        stride: one number per kernel dimension.
        padding: one number per kernel dimension, ``"same"`` or ``"valid"``.
        dilation: one number per kernel dimension.
        groups: of the convolution.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.

    Returns:
        ``(batch, out, *space)``, in the dtype that the frozen layer gives.
    """
    kernel = tuple(weight.shape[2:])
    pads: list[int] = []
    if padding_mode != "zeros" or padding == "same":
        pads, padding = _pads(kernel, padding, dilation), "valid"
    margins = (0,) * len(kernel) if isinstance(padding, str) else tuple(padding)
    settings = (tuple(stride), margins, tuple(dilation))

    def padded(image: Tensor) -> Tensor:
        return F.pad(image, pads, mode="constant" if padding_mode == "zeros" else padding_mode) if pads else image

    # dropout comes before padding, so that what is repeated at the border is dropped there too
    two_dimensions = groups == 1 and input.dim() == 4 == weight.dim() and not (pads and dropout) and dropout < 1
    if two_dimensions and may_fuse(input, weight, bias, lora_A, lora_B):
        return _fused(padded(input), weight, bias, lora_A, lora_B, scaling, dropout, _Geometry(kernel, *settings))
    convolve: Callable[..., Tensor] = functools.partial(
        _CONVOLVE[len(kernel)], stride=settings[0], padding=margins, dilation=settings[2], groups=groups
    )
    if not dropout:
        return convolve(padded(input), _effective(weight, lora_A, lora_B, scaling), bias)
    with own_precision(weight.device.type):
        update = low_rank_update(lora_B, lora_A, weight.shape, scaling).to(weight.dtype)
    return convolve(padded(input), weight, bias) + convolve(padded(F.dropout(input, dropout)), update)


def _effective(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    with own_precision(weight.device.type):
        return add_low_rank(weight, lora_B, lora_A, scaling).to(weight.dtype)


def _fused(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout: float,
    geometry: _Geometry,
) -> Tensor:
    mask = draw_mask(input, dropout)
    blocks = lora_B.shape[0] // weight.shape[0]
    if blocks > 1:
        # the balanced layout is the other one at a higher rank
        lora_A, lora_B = torch.block_diag(*[lora_A] * blocks), lora_B.reshape(weight.shape[0], -1)
    tensors = as_autocast(input, weight, bias, lora_A, lora_B)
    builds = mask is None and _builds_weight(input, weight, len(lora_A), geometry)
    output: Tensor = _LowRankConv.apply(*tensors, scaling / (1 - dropout), mask, geometry, builds)
    return output


def _builds_weight(input: Tensor, weight: Tensor, rank: int, geometry: _Geometry) -> bool:
    """Whether to add the update to the weight, rather than to the output and to the input's gradient.

    That moves fewer numbers where both images are larger than the weight, which is read, written and read again, and keeps no thin
    image; unless the thin convolution costs next to nothing, or has a single tap and is one product.
    """
    outputs = len(input) * weight.shape[0] * math.prod(geometry.size_of(input))
    is_cheap = math.prod(geometry.kernel) == 1 or geometry.puts_taps_on_input(input, rank)
    return not is_cheap and 3 * weight.numel() < min(input.numel(), outputs)


class _LowRankConv(torch.autograd.Function):
    """One node for the layer, which keeps the input and never a weight of full size.

    The gradients of the factors take thin products only; through the gradient of the effective weight they would cost as much as
    the backward pass of the frozen layer. Where the backward pass is itself differentiated, the thin image is computed again, because
    a kept one has no history.
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
        geometry: _Geometry,
        builds_weight: bool,
    ) -> Tensor:
        hidden = None
        if builds_weight:
            output = F.conv2d(input, _effective(weight, lora_A, lora_B, scaling), bias, *geometry[1:])
        else:
            output = F.conv2d(input, weight, bias, *geometry[1:])
            hidden = _thin(input, mask, lora_A, geometry).hidden()
            _add_products(output, lora_B, hidden, scaling)
        ctx.save_for_backward(input, weight, lora_A, lora_B, mask, hidden)
        ctx.scaling, ctx.geometry = scaling, geometry
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        input, weight, lora_A, lora_B, mask, hidden = ctx.saved_tensors
        needs_input, _, _, needs_A, needs_B, *_ = ctx.needs_input_grad
        builds_weight = hidden is None
        taps = _thin(input, mask, lora_A, ctx.geometry)
        grad_thin = grad.flatten(2).to(lora_B.dtype)
        spread = taps.spread(_times(lora_B.t() * ctx.scaling, grad_thin))
        grad_input = grad_A = grad_B = None
        if needs_B:
            hidden = taps.hidden() if builds_weight or torch.is_grad_enabled() else hidden
            grad_B = torch.bmm(hidden, grad_thin.transpose(1, 2)).sum(0).mul(ctx.scaling).t()
        if needs_A:
            grad_A = taps.grad_A(spread)
        if needs_input:
            by = _effective(weight, lora_A, lora_B, ctx.scaling) if builds_weight else weight
            grad_input = _convolution_backward(grad, input, by, ctx.geometry, of_input=True)
            if not builds_weight:
                taps.add_grad_input(grad_input, spread, mask)
        return grad_input, None, None, grad_A, grad_B, None, None, None, None


def _convolution_backward(grad: Tensor, input: Tensor, weight: Tensor, geometry: _Geometry, *, of_input: bool) -> Tensor:
    """The gradient of a plain convolution's input, or else of its weight."""
    settings = (geometry.stride, geometry.padding, geometry.dilation, False, [0, 0], 1, [of_input, not of_input, False])
    gradients = torch.ops.aten.convolution_backward(grad, input, weight, None, *settings)
    gradient: Tensor = gradients[0 if of_input else 1]
    return gradient


def _times(matrix: Tensor, images: Tensor) -> Tensor:
    """A matrix times each image, ``(batch, channels, space)``; torch's ``@`` would first copy the images."""
    return torch.bmm(matrix.expand(len(images), -1, -1), images)


def _add_products(image: Tensor, left: Tensor, right: Tensor, scaling: float, mask: Tensor | None = None) -> None:
    """Add ``scaling * left @ right``, ``(batch, channels, space)``, to an image in place."""
    if mask is None and image.dtype == right.dtype and image.is_contiguous():
        image.flatten(2).baddbmm_(left.expand(len(image), -1, -1), right, alpha=scaling)
    else:
        image.add_(kept(_times(left, right).view(image.shape), mask), alpha=scaling)


def _thin(input: Tensor, mask: Tensor | None, lora_A: Tensor, geometry: _Geometry) -> _TapsOnInput | _TapsOnImage:
    """The thin convolution with its taps where they multiply fewer numbers: on the input, or on the thin image."""
    kind = _TapsOnInput if geometry.puts_taps_on_input(input, len(lora_A)) else _TapsOnImage
    return kind(kept(input, mask).to(lora_A.dtype), lora_A, geometry)


class _TapsOnInput:
    """The convolution by A, ``(rank, in * kernel)``, by torch's own."""

    def __init__(self, input: Tensor, lora_A: Tensor, geometry: _Geometry) -> None:
        self.input, self.geometry = input, geometry
        self.kernel = lora_A.view(len(lora_A), input.shape[1], *geometry.kernel)
        self.size = geometry.size_of(input)

    def hidden(self) -> Tensor:
        """The thin image, ``(batch, rank, space)``."""
        image: Tensor = F.conv2d(self.input, self.kernel, None, *self.geometry[1:])
        return image.flatten(2)

    def spread(self, grad_hidden: Tensor) -> Tensor:
        """The gradient of the thin image as the gradients below take it."""
        image: Tensor = grad_hidden.unflatten(2, self.size)
        return image

    def grad_A(self, spread: Tensor) -> Tensor:
        """The gradient of A."""
        return _convolution_backward(spread, self.input, self.kernel, self.geometry, of_input=False).flatten(1)

    def add_grad_input(self, grad_input: Tensor, spread: Tensor, mask: Tensor | None) -> None:
        """Add the update's part to the gradient of the input, in place."""
        image = _convolution_backward(spread, self.input, self.kernel, self.geometry, of_input=True)
        grad_input.add_(kept(image, mask))


class _TapsOnImage:
    """The convolution by A as a product with each of its taps, added up where they fall on the thin image.

    The image is made at stride 1 and thinned out. `torch.nn.functional.fold` puts a tap on the far side, hence the reversed kernel.
    """

    def __init__(self, input: Tensor, lora_A: Tensor, geometry: _Geometry) -> None:
        self.geometry = geometry
        self.shape = (len(lora_A), input.shape[1], *geometry.kernel)
        self.pixels = input.flatten(2)
        self.taps = lora_A.view(self.shape).flip(2, 3).permute(0, 2, 3, 1).reshape(-1, input.shape[1])
        self.size, self.dense = geometry.size_of(input), geometry._replace(stride=(1, 1)).size_of(input)

    @property
    def _folding(self) -> tuple[Any, ...]:
        return self.geometry.kernel, self.geometry.dilation, self.geometry.margin

    def hidden(self) -> Tensor:
        """The thin image, ``(batch, rank, space)``."""
        image: Tensor = F.fold(_times(self.taps, self.pixels), self.dense, *self._folding)
        return image[:, :, :: self.geometry.stride[0], :: self.geometry.stride[1]].flatten(2)

    def spread(self, grad_hidden: Tensor) -> Tensor:
        """The gradient of each tap's product."""
        image = grad_hidden.unflatten(2, self.size)
        if self.geometry.stride != (1, 1):
            dense = image.new_zeros(*image.shape[:2], *self.dense)
            dense[:, :, :: self.geometry.stride[0], :: self.geometry.stride[1]] = image
            image = dense
        return F.unfold(image, *self._folding)

    def grad_A(self, spread: Tensor) -> Tensor:
        """The gradient of A."""
        rank, channels, *kernel = self.shape
        taps: Tensor = torch.bmm(spread, self.pixels.transpose(1, 2)).sum(0)
        return taps.view(rank, *kernel, channels).permute(0, 3, 1, 2).flip(2, 3).reshape(rank, -1)

    def add_grad_input(self, grad_input: Tensor, spread: Tensor, mask: Tensor | None) -> None:
        """Add the update's part to the gradient of the input, in place."""
        _add_products(grad_input, self.taps.t(), spread, 1.0, mask)


def _pads(kernel: Sequence[int], padding: Sequence[int] | str, dilation: Sequence[int]) -> list[int]:
    """Numbers added before and after each dimension, last dimension first, as `torch.nn.functional.pad` takes them."""
    pads: list[int] = []
    for size, step, amount in zip(kernel, dilation, kernel if isinstance(padding, str) else padding, strict=True):
        total = (size - 1) * step if padding == "same" else 0 if padding == "valid" else 2 * int(amount)
        pads = [total // 2, total - total // 2, *pads]
    return pads
