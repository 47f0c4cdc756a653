"""The low-rank update of a convolution, as a function of tensors.

Nothing here knows modules, caps or plugins.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from gift_lora_plugin.lowrank import add_low_rank, low_rank_update, own_precision

_CONVOLVE: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


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
    kernel = weight.shape[2:]
    pads = [] if padding_mode == "zeros" else _pads(kernel, padding, dilation)
    settings = (stride, [0] * len(kernel) if pads else padding, dilation, groups)

    def convolve(image: Tensor, by: Tensor, bias: Tensor | None) -> Tensor:
        padded = F.pad(image, pads, mode=padding_mode) if pads else image
        return _CONVOLVE[len(kernel)](padded, by, bias, *settings)  # type: ignore[no-any-return]

    if dropout:
        with own_precision(weight.device.type):
            update = low_rank_update(lora_B, lora_A, weight.shape, scaling).to(weight.dtype)
        return convolve(input, weight, bias) + convolve(F.dropout(input, dropout), update, None)
    with own_precision(weight.device.type):
        effective = add_low_rank(weight, lora_B, lora_A, scaling).to(weight.dtype)
    return convolve(input, effective, bias)


def _pads(kernel: Sequence[int], padding: Sequence[int] | str, dilation: Sequence[int]) -> list[int]:
    """Numbers added before and after each dimension, last dimension first, as `torch.nn.functional.pad` takes them."""
    pads: list[int] = []
    for size, step, amount in zip(kernel, dilation, kernel if isinstance(padding, str) else padding, strict=True):
        total = (size - 1) * step if padding == "same" else 0 if padding == "valid" else 2 * int(amount)
        pads = [total // 2, total - total // 2, *pads]
    return pads
