"""Rules alone: which parts of the model train, and nothing is added to it."""

from __future__ import annotations

from collections.abc import Iterable

from gift_core import FineTuningStrategy
from gift_core.factories import is_instance, keep_trainable, parameter_name_contains, selects
from torch import nn

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm, nn.LayerNorm)


class TemplateStrategy(FineTuningStrategy):
    """Trains every normalization layer and every bias; all other parameters stay frozen.

    Args:
        targets: patterns of what may train (see `gift_core.selection`); None means all of the model.
        exclude: patterns of what is left out.
    """

    name = "template"
    plugin_api = 1

    def __init__(self, targets: str | Iterable[str] | None = None, exclude: str | Iterable[str] | None = None) -> None:
        chosen = selects(targets, exclude)
        super().__init__(
            module_caps=[(is_instance(*NORMS) & chosen, keep_trainable())],
            para_caps=[(parameter_name_contains("bias") & chosen, keep_trainable())],
        )
