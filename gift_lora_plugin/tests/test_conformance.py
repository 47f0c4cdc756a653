"""LoRA keeps every promise of the conformance kit, on every layer and in every variant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gift_core.testing import ReferenceModel, check_distribution, parametrize_with_checks, reference_models
from gift_lora_plugin import LoRAAllFineTuningStrategy, LoRAConvFineTuningStrategy, LoRALinearFineTuningStrategy


class Experts(nn.Module):
    """Stacked matrices as a raw parameter, and layers that the kit's own models lack."""

    def __init__(self) -> None:
        super().__init__()
        self.bilinear = nn.Bilinear(4, 4, 5)
        self.experts = nn.Parameter(torch.randn(3, 4, 5))
        self.up = nn.ConvTranspose1d(5, 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the experts."""
        mixed = torch.einsum("bi,eoi->bo", self.bilinear(x, x), self.experts)
        return self.up(torch.cat([mixed, mixed[:, :1]], 1)[..., None])  # type: ignore[no-any-return]


def bags() -> nn.Module:
    """A bag of tokens for each row."""
    return nn.Sequential(nn.EmbeddingBag(9, 6), nn.Linear(6, 4))


OWN = [
    ReferenceModel("experts", Experts, lambda: torch.randn(3, 4)),
    ReferenceModel("bags", bags, lambda: torch.randint(0, 8, (3, 5))),
]
ALL = [*reference_models(), *OWN]
EMBEDDED = [model for model in ALL if model.name in ("embedding", "tied", "bags")]

VARIANTS: list[dict[str, Any]] = [
    {"rank": 2, "use_rslora": True, "lora_alpha": 4, "train_bias": True},
    {"rank": 2, "use_dora": True},
    {"rank": 1, "init": "orthogonal", "conv_layout": "out_as_h"},
    {"rank": 1, "init": "pissa"},
    {"rank": 1, "init": "olora", "use_dora": True},
    {"rank": 2, "freeze_A": True},
    {"rank": 1, "rank_pattern": {"type:Module": 2}, "alpha_pattern": {"*": 3}},
    {"rank": 2, "attention": ["q", "v"]},
]


@parametrize_with_checks([LoRAAllFineTuningStrategy(), LoRALinearFineTuningStrategy(rank=2), LoRAConvFineTuningStrategy()], models=ALL)
def test_conformance(check: Callable[[], None]) -> None:
    """Each strategy keeps the promise that the check's docstring states."""
    check()


@parametrize_with_checks([LoRAAllFineTuningStrategy(**params) for params in VARIANTS], models=ALL)
def test_variants(check: Callable[[], None]) -> None:
    """So does each variant, on every kind of layer that is adapted by default."""
    check()


@parametrize_with_checks(
    [LoRAAllFineTuningStrategy(rank=1, targets="*", **params) for params in ({}, {"use_dora": True}, {"init": "pissa"})],
    models=EMBEDDED,
)
def test_embeddings(check: Callable[[], None]) -> None:
    """So do embeddings, tied ones among them."""
    check()


@parametrize_with_checks(
    [LoRAAllFineTuningStrategy(rank=1, parameters="experts", exclude="up", **params) for params in ({}, {"use_dora": True})],
    models=OWN[:1],
)
def test_raw_parameters(check: Callable[[], None]) -> None:
    """So do raw parameters beside layers."""
    check()


def test_packaging() -> None:
    """The distribution is packaged as the kit asks."""
    wrong = [str(result) for result in check_distribution("gift-lora-plugin") if not result.ok]

    assert wrong == []
