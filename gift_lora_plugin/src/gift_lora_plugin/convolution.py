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

from gift_lora_plugin.fusion import as_autocast, draw_mask, kept, may_fuse, packed, times, unpacked
from gift_lora_plugin.lowrank import add_low_rank, as_dtype, drop, low_rank_update, own_precision

_CONVOLVE: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}

#: Images of no more pixels are multiplied side by side, as one matrix: torch multiplies each apart, and a few columns at a time take
#: up to nine times as long.
_FEW_PIXELS = 256


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
        return _fused(padded(input), weight, bias, lora_A, lora_B, scaling, dropout, settings)
    convolve: Callable[..., Tensor] = functools.partial(
        _CONVOLVE[len(kernel)], stride=settings[0], padding=margins, dilation=settings[2], groups=groups
    )
    if not dropout:
        return convolve(padded(input), _effective(weight, lora_A, lora_B, scaling), bias)
    with own_precision(weight.device.type):
        update = low_rank_update(lora_B, lora_A, weight.shape, scaling).to(weight.dtype)
    return convolve(padded(input), weight, bias) + convolve(padded(drop(input, dropout)), update)


def _effective(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    with own_precision(weight.device.type):
        return as_dtype(add_low_rank(weight, lora_B, lora_A, scaling), weight.dtype)


def _fused(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout: float,
    settings: _Settings,
) -> Tensor:
    mask = draw_mask(input, dropout)
    blocks = lora_B.shape[0] // weight.shape[0]
    if blocks > 1:
        # the balanced layout is the other one at a higher rank
        lora_A, lora_B = torch.block_diag(*[lora_A] * blocks), lora_B.reshape(weight.shape[0], -1)
    tensors = as_autocast(input, weight, bias, lora_A, lora_B)
    trains = torch.is_grad_enabled() and (input.requires_grad or lora_A.requires_grad or lora_B.requires_grad)
    way = _way(input.shape, weight.shape, lora_A.shape[0], settings, trains, mask is not None)
    given: tuple[Any, ...] = (*tensors, scaling / (1 - dropout), mask, way)
    output: Tensor = _LowRankConv.apply(*given) if trains else _convolved(*given)[0]
    return output


def _convolved(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    mask: Tensor | None,
    way: _Way,
) -> tuple[Tensor, Tensor | None]:
    """What the layer gives, and the thin image ``A x`` where there is one."""
    if way.builds_weight:
        return torch.conv2d(input, _effective(weight, lora_A, lora_B, scaling), bias, *way.settings), None
    output = torch.conv2d(input, weight, bias, *way.settings)
    hidden = _thin(input, mask, lora_A, way).hidden()
    _add_product(output, lora_B, hidden, scaling)
    return output, hidden


#: Stride, padding and dilation, as `torch.nn.functional.conv2d` takes them.
_Settings = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


class _Way(NamedTuple):
    """How a convolution of given sizes is computed.

    Attributes:
        settings: of the convolution.
        kernel: its taps.
        margin: how far the taps of an input's border reach beyond the image.
        size: of the image that the input gives; ``dense`` is its size at stride 1.
        taps: where the taps of the thin convolution are multiplied.
        is_pointwise: whether the frozen convolution is a product with each pixel, thinned out by the stride, and nothing else.
        builds_weight: whether the update is added to the weight, rather than to the output and to the input's gradient.
    """

    settings: _Settings
    kernel: tuple[int, ...]
    margin: tuple[int, ...]
    size: tuple[int, ...]
    dense: tuple[int, ...]
    taps: type[_OneTap | _TapsOnInput | _TapsOnImage]
    is_pointwise: bool
    builds_weight: bool


@functools.lru_cache(maxsize=2**12)
def _way(input: tuple[int, ...], weight: tuple[int, ...], rank: int, settings: _Settings, trains: bool, dropout: bool) -> _Way:
    """Choose among ways that give the same numbers, from the shapes of input and weight.

    Adding the update to the weight passes over the weight three times, and again in the backward pass; adding it to the output and to
    the input's gradient passes over the images, and over a thin image for each tap, which costs more than one product does. Hence the
    factors, which were measured. Dropout is of the update's input, and leaves no choice.

    Taps multiply the input or a thin image, whichever has fewer numbers to multiply, unless all taps of a thin image would hold more
    numbers than two inputs; a border that no thin image has is on the input, and so are single taps of which the stride needs few,
    unless the thin image must be spread over the input's gradient.
    """
    stride, padding, dilation = settings
    kernel, image = weight[2:], input[2:]
    margin = tuple(d * (k - 1) - p for k, p, d in zip(kernel, padding, dilation, strict=True))
    dense = tuple(n + p - m for n, p, m in zip(image, padding, margin, strict=True))
    size = tuple((n - 1) // s + 1 for n, s in zip(dense, stride, strict=True))
    is_single = math.prod(kernel) == 1
    images = math.prod(input) + input[0] * weight[0] * math.prod(size)
    builds_weight = not dropout and math.prod(weight) * (3 if is_single else 1) * (1 if trains else 0.5) <= images
    taps = rank * math.prod(kernel)
    on_input = min(margin) < 0 or input[1] * math.prod(size) <= rank * math.prod(image) or taps > 2 * input[1]
    is_pointwise = is_single and not any(padding)
    if on_input or (is_single and builds_weight and size != dense):
        return _Way(settings, kernel, margin, size, dense, _TapsOnInput, is_pointwise, builds_weight)
    return _Way(settings, kernel, margin, size, dense, _OneTap if is_single else _TapsOnImage, is_pointwise, builds_weight)


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
        way: _Way,
    ) -> Tensor:
        output, hidden = _convolved(input, weight, bias, lora_A, lora_B, scaling, mask, way)
        ctx.save_for_backward(input, weight, lora_A, lora_B, packed(mask), hidden)
        ctx.scaling, ctx.way = scaling, way
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        with own_precision(grad.device.type):
            return _gradients(ctx, grad)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    input, weight, lora_A, lora_B, bits, hidden = ctx.saved_tensors
    needs_input, _, _, needs_A, needs_B, *_ = ctx.needs_input_grad
    mask, way = unpacked(bits, input), ctx.way
    taps = _thin(input, mask, lora_A, way)
    grad_thin = as_dtype(_pixels(grad), lora_B.dtype)
    spread = taps.spread(_product(lora_B.t(), grad_thin))
    grad_input = grad_A = grad_B = None
    if needs_B:
        hidden = taps.hidden() if way.builds_weight or torch.is_grad_enabled() else hidden
        grad_B = times(torch.bmm(hidden, grad_thin.transpose(1, 2)).sum(0), ctx.scaling).t()
    if needs_A:
        grad_A = times(taps.grad_A(spread), ctx.scaling)
    if needs_input:
        by = _effective(weight, lora_A, lora_B, ctx.scaling) if way.builds_weight else weight
        grad_input = _grad_input(grad, input, by, way)
        if not way.builds_weight:
            taps.add_grad_input(grad_input, spread, ctx.scaling, mask)
    return grad_input, None, None, grad_A, grad_B, None, None, None


def _grad_input(grad: Tensor, input: Tensor, weight: Tensor, way: _Way) -> Tensor:
    """The gradient of a plain convolution's input.

    On a CPU torch takes up to three times as long for it as for the product with the transposed weight where there is a stride, up to
    nine times where an image has few pixels, and about as long otherwise. Elsewhere it has kernels of its own, as for other orders in
    memory.
    """
    if not (way.is_pointwise and grad.is_cpu and grad.is_contiguous()):
        return _convolution_backward(grad, input, weight, way.settings, of_input=True)
    pixels, matrix = _pixels(grad), weight.reshape(weight.shape[:2]).t()
    images, channels, count = pixels.shape
    if images < 2 or count > _FEW_PIXELS:
        return _image(_spread_out(_product(matrix, pixels), way), way.dense)
    together = matrix @ pixels.transpose(0, 1).reshape(channels, images * count)
    return _image(_spread_out(together.view(len(matrix), images, count).transpose(0, 1), way), way.dense).contiguous()


def _convolution_backward(grad: Tensor, input: Tensor, weight: Tensor, settings: _Settings, *, of_input: bool) -> Tensor:
    """The gradient of a plain convolution's input, or else of its weight."""
    wanted = [of_input, not of_input, False]
    gradients = torch.ops.aten.convolution_backward(grad, input, weight, None, *settings, False, [0, 0], 1, wanted)
    gradient: Tensor = gradients[0 if of_input else 1]
    return gradient


def _pixels(image: Tensor) -> Tensor:
    """An image as ``(batch, channels, pixels)``, a view where memory allows; ``flatten`` cannot be batched in a backward pass."""
    return image.reshape(*image.shape[:2], math.prod(image.shape[2:]))


def _image(pixels: Tensor, size: tuple[int, ...]) -> Tensor:
    """The inverse of `_pixels`."""
    return pixels.reshape(*pixels.shape[:2], *size)


def _spread_out(pixels: Tensor, way: _Way) -> Tensor:
    """Pixels at the places that they have in the image at stride 1, which is zero elsewhere; `_at_stride` is the inverse."""
    if way.size == way.dense:
        return pixels
    dense = pixels.new_zeros(*pixels.shape[:2], *way.dense)
    dense[:, :, :: way.settings[0][0], :: way.settings[0][1]] = _image(pixels, way.size)
    return _pixels(dense)


def _product(matrix: Tensor, images: Tensor) -> Tensor:
    """A matrix times each image, ``(batch, channels, pixels)``; torch's ``@`` would first copy the images."""
    return torch.bmm(matrix.expand(images.shape[0], -1, -1), images)


def _add_product(image: Tensor, matrix: Tensor, thin: Tensor, scaling: float, mask: Tensor | None = None) -> None:
    """Add the scaling times a matrix times each thin image, ``(batch, channels, pixels)``, to an image in place."""
    is_view = image.is_contiguous() or image.is_contiguous(memory_format=torch.channels_last)
    if mask is None and image.dtype == thin.dtype and is_view:
        _pixels(image).baddbmm_(matrix.expand(thin.shape[0], -1, -1), thin, alpha=scaling)
    else:
        image.add_(kept(_product(matrix, thin).view(image.shape), mask), alpha=scaling)


def _thin(input: Tensor, mask: Tensor | None, lora_A: Tensor, way: _Way) -> _OneTap | _TapsOnInput | _TapsOnImage:
    """The thin convolution by A."""
    return way.taps(as_dtype(kept(input, mask), lora_A.dtype), lora_A, way)


class _TapsOnInput:
    """The convolution by A, ``(rank, in * kernel)``, by torch's own."""

    def __init__(self, input: Tensor, lora_A: Tensor, way: _Way) -> None:
        self.input, self.way = input, way
        self.kernel = lora_A.view(lora_A.shape[0], input.shape[1], *way.kernel)

    def hidden(self) -> Tensor:
        """The thin image, ``(batch, rank, pixels)``."""
        image: Tensor = F.conv2d(self.input, self.kernel, None, *self.way.settings)
        return _pixels(image)

    def spread(self, grad_hidden: Tensor) -> Tensor:
        """The gradient of the thin image as the gradients below take it."""
        return _image(grad_hidden, self.way.size)

    def grad_A(self, spread: Tensor) -> Tensor:
        """The gradient of A."""
        kernel = _convolution_backward(spread, self.input, self.kernel, self.way.settings, of_input=False)
        return kernel.reshape(self.kernel.shape[0], -1)

    def add_grad_input(self, grad_input: Tensor, spread: Tensor, scaling: float, mask: Tensor | None) -> None:
        """Add the update's part to the gradient of the input, in place."""
        image = _convolution_backward(spread, self.input, self.kernel, self.way.settings, of_input=True)
        grad_input.add_(kept(image, mask), alpha=scaling)


class _OneTap:
    """The convolution by A where the kernel is a single number: a product with each pixel, thinned out by the stride afterwards."""

    def __init__(self, input: Tensor, lora_A: Tensor, way: _Way) -> None:
        self.pixels, self.taps, self.way = _pixels(input), lora_A, way

    def hidden(self) -> Tensor:
        """The thin image, ``(batch, rank, pixels)``."""
        return self._at_stride(_product(self.taps, self.pixels))

    def spread(self, grad_hidden: Tensor) -> Tensor:
        """The gradient of each product."""
        return _spread_out(grad_hidden, self.way)

    def grad_A(self, spread: Tensor) -> Tensor:
        """The gradient of A."""
        return torch.bmm(spread, self.pixels.transpose(1, 2)).sum(0)

    def add_grad_input(self, grad_input: Tensor, spread: Tensor, scaling: float, mask: Tensor | None) -> None:
        """Add the update's part to the gradient of the input, in place."""
        _add_product(grad_input, self.taps.t(), spread, scaling, mask)

    def _at_stride(self, pixels: Tensor) -> Tensor:
        way = self.way
        if way.size == way.dense:
            return pixels
        return _pixels(_image(pixels, way.dense)[:, :, :: way.settings[0][0], :: way.settings[0][1]])


class _TapsOnImage(_OneTap):
    """The convolution by A as a product with each of its taps, added up where they fall on the thin image.

    `torch.nn.functional.fold` puts a tap on the far side, hence the reversed kernel.
    """

    def __init__(self, input: Tensor, lora_A: Tensor, way: _Way) -> None:
        super().__init__(input, lora_A, way)
        self.shape = (lora_A.shape[0], input.shape[1], *way.kernel)
        self.taps = lora_A.view(self.shape).flip(2, 3).permute(0, 2, 3, 1).reshape(-1, input.shape[1])
        self.folding = (way.kernel, way.settings[2], way.margin)

    def hidden(self) -> Tensor:
        """The thin image, ``(batch, rank, pixels)``."""
        image: Tensor = F.fold(_product(self.taps, self.pixels), self.way.dense, *self.folding)
        return self._at_stride(_pixels(image))

    def spread(self, grad_hidden: Tensor) -> Tensor:
        """The gradient of each tap's product."""
        return F.unfold(_image(super().spread(grad_hidden), self.way.dense), *self.folding)

    def grad_A(self, spread: Tensor) -> Tensor:
        """The gradient of A."""
        rank, channels, *kernel = self.shape
        taps = super().grad_A(spread).view(rank, *kernel, channels)
        return taps.permute(0, 3, 1, 2).flip(2, 3).reshape(rank, -1)


def _pads(kernel: Sequence[int], padding: Sequence[int] | str, dilation: Sequence[int]) -> list[int]:
    """Numbers added before and after each dimension, last dimension first, as `torch.nn.functional.pad` takes them."""
    pads: list[int] = []
    for size, step, amount in zip(kernel, dilation, kernel if isinstance(padding, str) else padding, strict=True):
        total = (size - 1) * step if padding == "same" else 0 if padding == "valid" else 2 * int(amount)
        pads = [total // 2, total - total // 2, *pads]
    return pads
