"""LoRA as strategies: which layers, and with which parameters."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import nn

from gift_core import FineTuningStrategy
from gift_core.capabilities import Capabilities
from gift_core.errors import ParameterError
from gift_core.factories import is_instance, reparameterize, selects
from gift_lora_plugin.lora import LoRA
from gift_lora_plugin.lowrank import CONV_LAYOUTS

Patterns = str | Iterable[str] | None

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class _LoRAStrategy(FineTuningStrategy):
    """What the strategies of this file share: everything but the types they match."""

    _types: tuple[type[nn.Module], ...] = ()

    def __init__(
        self,
        rank: int = 3,
        lora_alpha: float | None = None,
        lora_dropout: float = 0.0,
        train_bias: bool = False,
        targets: Patterns = None,
        exclude: Patterns = None,
        conv_layout: str = "balanced",
    ) -> None:
        _check_parameters(rank, lora_alpha, lora_dropout, train_bias, conv_layout)
        check = is_instance(*self._types) & selects(targets, exclude)
        action = reparameterize(LoRA, keep=("bias",) if train_bias else ())
        params = {"rank": rank, "alpha": lora_alpha, "dropout": lora_dropout, "conv_layout": conv_layout}
        super().__init__(module_caps=[(check, action, params)])


class LoRAAllFineTuningStrategy(_LoRAStrategy):
    """LoRA on every Linear layer and every convolution of one, two or three dimensions, subclasses included.

    Args:
        rank: the rank of the update, at least 1.
        lora_alpha: numerator of the scaling alpha / rank; None means rank.
        lora_dropout: probability, in [0, 1), of dropping a number of the update's input in training.
        train_bias: train the biases of the adapted layers too; they are frozen otherwise.
        targets: patterns of the layers to adapt (see `gift_core.selection`); None adapts all of the types.
        exclude: patterns of layers to leave out.
        conv_layout: ``balanced`` or ``out_as_h``, see `gift_lora_plugin.matrix_shape`.

    Raises:
        ParameterError: if a value is not allowed.

    Source: Hu et al. 2022, arXiv:2106.09685.
    """

    name = "lora"
    capabilities = Capabilities(layers=("Linear", "Conv1d", "Conv2d", "Conv3d"))
    _types = (nn.Linear, *_CONVOLUTIONS)


class LoRALinearFineTuningStrategy(_LoRAStrategy):
    """LoRA on every Linear layer; takes what `LoRAAllFineTuningStrategy` takes."""

    name = "lora-linear"
    capabilities = Capabilities(layers=("Linear",))
    _types = (nn.Linear,)


class LoRAConvFineTuningStrategy(_LoRAStrategy):
    """LoRA on every convolution; takes what `LoRAAllFineTuningStrategy` takes."""

    name = "lora-conv"
    capabilities = Capabilities(layers=("Conv1d", "Conv2d", "Conv3d"))
    _types = _CONVOLUTIONS


def _check_parameters(rank: object, alpha: object, dropout: object, train_bias: object, conv_layout: object) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ParameterError(f"rank must be a whole number from 1 up, got {rank!r}.")
    if alpha is not None and (not _is_number(alpha) or not math.isfinite(alpha)):  # type: ignore[arg-type]
        raise ParameterError(f"lora_alpha must be a finite number or None for the rank, got {alpha!r}.")
    if not _is_number(dropout) or not 0 <= dropout < 1:  # type: ignore[operator]
        raise ParameterError(f"lora_dropout must be a number in [0, 1), got {dropout!r}.")
    if not isinstance(train_bias, bool):
        raise ParameterError(f"train_bias must be True or False, got {train_bias!r}.")
    if conv_layout not in CONV_LAYOUTS:
        raise ParameterError(f"conv_layout must be one of {', '.join(CONV_LAYOUTS)}, got {conv_layout!r}.")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
