"""What this strategy promises beyond conformance."""

from __future__ import annotations

import pytest
import torch
from gift_core import disable_fine_tuning, enable_fine_tuning
from gift_core.errors import ParameterError
from torch import nn

from gift_template_plugin import TemplateStrategy


def test_formula() -> None:
    """The output is ``y + up(tanh(down(y)))``, where ``y`` is the base layer's."""
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(3, 2)), torch.randn(5, 3)
    base, before = model[0], model(inputs).detach()

    enable_fine_tuning(model, TemplateStrategy(size=4))
    layer = model[0]
    nn.init.normal_(layer.up.weight)

    hidden = (before @ layer.down.weight.T + layer.down.bias).tanh()
    torch.testing.assert_close(model(inputs), before + hidden @ layer.up.weight.T)
    disable_fine_tuning(model)
    assert model[0] is base


@pytest.mark.parametrize("size", [0, 1.5, True, "8"])
def test_size_is_checked(size: object) -> None:
    """A size that is no whole number from 1 up is an error."""
    with pytest.raises(ParameterError, match="size"):
        TemplateStrategy(size=size)  # type: ignore[arg-type]
