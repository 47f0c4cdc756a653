"""The denoising networks of diffusers, small and with random weights: unconditional, and conditioned on a text's hidden states."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from whole_way import PROMISES, Subject

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

SMALL = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "in_channels": 3,
    "out_channels": 3,
}


def unet() -> nn.Module:
    """A U-Net with attention on its lower level."""
    return diffusers.UNet2DModel(  # type: ignore[no-any-return]
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        **SMALL,
    )


def conditioned_unet() -> nn.Module:
    """A U-Net with cross-attention to 4 states of 12 numbers."""
    return diffusers.UNet2DConditionModel(  # type: ignore[no-any-return]
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
        **SMALL,
    )


def subject(name: str) -> Subject:
    """A network that predicts the noise in two images at two times."""
    generator = torch.Generator().manual_seed(0)
    noisy, noise = torch.randn(2, 2, 3, 8, 8, generator=generator)
    inputs = {"sample": noisy, "timestep": torch.tensor([3, 700])}
    if name == "conditioned_unet":
        inputs["encoder_hidden_states"] = torch.randn(2, 4, 12, generator=generator)

    def build() -> nn.Module:
        torch.manual_seed(0)
        return {"unet": unet, "conditioned_unet": conditioned_unet}[name]().eval()

    def predicted(model: nn.Module) -> Tensor:
        return model(**inputs).sample  # type: ignore[no-any-return]

    return Subject(build, predicted, lambda model: nn.functional.mse_loss(predicted(model), noise))


@pytest.mark.parametrize("promise", PROMISES)
@pytest.mark.parametrize("name", ["unet", "conditioned_unet"])
def test_every_network_keeps_every_promise(name: str, promise: str, tmp_path: Path) -> None:
    """Training, files, merging, unloading and undoing work on both networks."""
    PROMISES[promise](subject(name), tmp_path)
