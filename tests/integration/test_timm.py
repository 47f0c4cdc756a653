"""Architectures of timm, with random weights: convolutional nets with and without BatchNorm, transformers, mixers, hybrids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from whole_way import PROMISES, Subject

timm = pytest.importorskip("timm", reason="timm is not installed")

#: Each model with the size of an image and options. A block whose last scale starts at zero gives its layers no gradient, hence
#: ``zero_init_last``.
MODELS: dict[str, tuple[int, dict[str, Any]]] = {
    "resnet18": (32, {"zero_init_last": False}),
    "efficientnet_b0": (64, {}),
    "mobilenetv3_small_050": (64, {}),
    "regnetx_002": (64, {"zero_init_last": False}),
    "convnext_atto": (64, {}),
    "vit_tiny_patch16_224": (32, {"img_size": 32, "depth": 4}),
    "deit_tiny_distilled_patch16_224": (32, {"img_size": 32, "depth": 4}),
    "swin_tiny_patch4_window7_224": (64, {"img_size": 64, "window_size": 2, "depths": (1, 1, 1, 1), "embed_dim": 24}),
    "mixer_s16_224": (32, {"img_size": 32}),
    "cait_xxs24_224": (32, {"img_size": 32, "depth": 2}),
    "edgenext_xx_small": (64, {}),
}


def subject(name: str) -> Subject:
    """A model of timm for five classes."""
    size, options = MODELS[name]
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))

    def build() -> nn.Module:
        torch.manual_seed(0)
        return timm.create_model(name, pretrained=False, num_classes=5, **options).eval()  # type: ignore[no-any-return]

    def logits(model: nn.Module) -> Tensor:
        output = model(images)
        # a distilled network answers with two heads while it trains
        return output if isinstance(output, Tensor) else torch.cat(output)

    def loss(model: nn.Module) -> Tensor:
        output = logits(model)
        return nn.functional.cross_entropy(output, torch.arange(len(output)) % 5)

    return Subject(build, logits, loss)


@pytest.mark.parametrize("promise", PROMISES)
@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_keeps_every_promise(name: str, promise: str, tmp_path: Path) -> None:
    """Training, files, merging, unloading and undoing work on every architecture of the list."""
    PROMISES[promise](subject(name), tmp_path)
