"""What this strategy promises beyond conformance."""

from __future__ import annotations

import torch
from gift_core import enable_fine_tuning
from torch import nn

from gift_template_plugin import TemplateStrategy


def test_formula() -> None:
    """Each output of a layer without a bias is the base layer's, times ``1 + s``."""
    torch.manual_seed(0)
    layer, inputs = nn.Linear(3, 2, bias=False), torch.randn(5, 3)
    before, scale = layer(inputs).detach(), torch.tensor([0.5, -2.0])

    enable_fine_tuning(layer, TemplateStrategy())
    with torch.no_grad():
        layer.output_scale.copy_(scale)

    torch.testing.assert_close(layer(inputs), before * (1 + scale))
