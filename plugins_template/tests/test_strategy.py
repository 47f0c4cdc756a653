"""What this strategy promises beyond conformance."""

from __future__ import annotations

from gift_core import enable_fine_tuning
from torch import nn

from gift_template_plugin import TemplateStrategy


def test_norms_and_biases_train() -> None:
    """Both parameters of a normalization layer train, and of any other layer the bias alone."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))

    enable_fine_tuning(model, TemplateStrategy())

    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable == ["0.bias", "1.weight", "1.bias", "3.bias"]


def test_targets_choose() -> None:
    """Only what the targets choose trains."""
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))

    enable_fine_tuning(model, TemplateStrategy(targets="2"))

    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == ["2.bias"]
