"""A method that is no function of a weight: a layer is replaced by one that holds more."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from gift_core import FineTuningStrategy
from gift_core.capabilities import Capabilities
from gift_core.errors import ParameterError
from gift_core.factories import replace_module, selects
from torch import Tensor, nn


class TemplateLinear(nn.Linear):
    """A linear layer and a bottleneck behind it: ``y + up(tanh(down(y)))``, where ``y`` is what the layer gave.

    ``up`` starts at zero, so a fresh adapter changes nothing. The layer's own parameters keep their names, and are frozen.

    Args:
        layer: the layer to replace, with ``out`` outputs.
        size: the width of the bottleneck.

    Attributes:
        down: from ``out`` to ``size`` features, dtype and device of the layer.
        up: from ``size`` to ``out`` features, likewise.

    Source: Houlsby et al. 2019, arXiv:1902.00751, section 2.1.
    """

    def __init__(self, layer: nn.Linear, size: int) -> None:
        # on meta, because its own weight is about to be replaced and must neither cost memory nor draw random numbers
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        for parameter in layer.parameters():
            parameter.requires_grad_(False)
        like: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        self.down = nn.Linear(layer.out_features, size, **like)
        self.up = nn.Linear(size, layer.out_features, **like)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        self.train(layer.training)

    def forward(self, input: Tensor) -> Tensor:
        """Give ``(..., out)`` for an input of ``(..., in)``."""
        output = super().forward(input)
        adapted: Tensor = output + self.up(torch.tanh(self.down(output)))
        return adapted


def can_be_replaced(
    parent_module: nn.Module | None, current_name: str, global_name: str, class_name: str, current_module: nn.Module
) -> bool:
    """True for linear layers that are called, and that their parent holds once."""
    if parent_module is None or type(current_module) is not nn.Linear:
        return False
    # torch's encoder layers read the weights of theirs and may never call them
    held = sum(module is current_module for module in parent_module._modules.values())
    return held == 1 and not isinstance(parent_module, nn.TransformerEncoderLayer)


class TemplateStrategy(FineTuningStrategy):
    """Puts a bottleneck behind every linear layer.

    Args:
        size: the width of the bottleneck, at least 1.
        targets: patterns of the layers to adapt (see `gift_core.selection`); None means all linear layers.
        exclude: patterns of layers to leave out.

    Raises:
        ParameterError: if ``size`` is not allowed.
    """

    name = "template"
    plugin_api = 1
    # what a bottleneck adds is no linear function, so no weight can hold it
    capabilities = Capabilities(layers=("Linear",), mergeable=False)

    def __init__(
        self, size: int = 8, targets: str | Iterable[str] | None = None, exclude: str | Iterable[str] | None = None
    ) -> None:
        if type(size) is not int or size < 1:
            raise ParameterError(f"size must be a whole number from 1 up, got {size!r}.")
        check = selects(targets, exclude) & can_be_replaced
        super().__init__(module_caps=[(check, replace_module(TemplateLinear), {"size": size})])
