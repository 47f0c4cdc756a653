"""LoRA keeps every promise of the conformance kit, on every layer and in every variant."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gift_core import enable_fine_tuning
from gift_core.errors import SiteError
from gift_core.testing import ReferenceModel, check_distribution, parametrize_with_checks, reference_models
from gift_lora_plugin import LoRAAllFineTuningStrategy, LoRAConvFineTuningStrategy, LoRALinearFineTuningStrategy

MODELS = {model.name: model for model in reference_models()}
#: A subclass with a forward of its own refuses dropout as the layers that are named do, and its class is nobody's to declare.
WITHOUT_SUBCLASSES = [model for name, model in MODELS.items() if name != "subclassed"]
CONVOLUTIONS = [MODELS[name] for name in ("cnn", "convolutions", "signals", "transposed", "subclassed")]
ATTENTION = [MODELS[name] for name in ("attention", "cross_attention", "encoder")]
EMBEDDINGS = [MODELS[name] for name in ("embedding", "bags", "tied")]


class Mixed(nn.Module):
    """Stacked matrices as a raw parameter, between layers."""

    def __init__(self) -> None:
        super().__init__()
        self.bilinear = nn.Bilinear(4, 4, 5)
        self.experts = nn.Parameter(torch.randn(3, 4, 5))
        self.up = nn.ConvTranspose1d(5, 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the experts."""
        mixed = torch.einsum("bi,eoi->bo", self.bilinear(x, x), self.experts)
        return self.up(torch.cat([mixed, mixed[:, :1]], 1)[..., None])  # type: ignore[no-any-return]


MIXED = ReferenceModel("mixed", Mixed, lambda: torch.randn(3, 4))

#: What runs other code in a layer: each alone, and what they have to do with one another.
VARIANTS: list[dict[str, Any]] = [
    {"rank": 2, "use_dora": True},
    {"rank": 1, "init": "pissa"},
    {"rank": 2, "freeze_A": True, "train_bias": True},
    {"rank": 2, "adapter_dtype": "float32"},
    {"rank": 1, "init": "pissa", "use_dora": True, "adapter_dtype": "float32"},
]
#: What draws in training alone, so that what torch compiles and exports, in eval mode, is what it was without.
DROPPING: list[dict[str, Any]] = [
    {"rank": 2, "lora_dropout": 0.5},
    {"rank": 2, "lora_dropout": 0.3, "use_dora": True, "use_rslora": True},
    {"rank": 1, "lora_dropout": 0.3, "init": "pissa", "adapter_dtype": "float32"},
]
#: What only sets other numbers, so that the same holds: once made, an orthogonal start runs no other code than the default one, nor
#: ``olora`` than ``pissa``, which meet every check above; for these two that would take most of a minute more.
NUMBERS: list[dict[str, Any]] = [
    {"rank": 1, "init": "olora", "use_dora": True, "use_rslora": True},
    {"rank": 2, "use_rslora": True, "lora_alpha": 4, "train_bias": True},
    {"rank": 1, "init": "orthogonal"},
    {"rank": 1, "rank_pattern": {"type:Module": 2}, "alpha_pattern": {"*": 3}},
    {"rank": 1, "dropout_pattern": {"type:Linear": 0.5}},
]
ON_EMBEDDINGS: list[dict[str, Any]] = [
    {},
    {"use_dora": True},
    {"init": "pissa", "use_dora": True},
    {"init": "olora", "adapter_dtype": "float32"},
    {"init": "orthogonal", "use_rslora": True, "lora_alpha": 4},
    {"freeze_A": True, "use_dora": True, "lora_dropout": 0.2},
]
ON_PARAMETERS: list[dict[str, Any]] = [
    {},
    {"use_dora": True},
    {"init": "pissa", "use_dora": True},
    {"init": "olora"},
    {"init": "orthogonal", "use_rslora": True, "lora_alpha": 4},
    {"adapter_dtype": "float32", "freeze_A": True},
]


def lora(variants: list[dict[str, Any]], **params: Any) -> list[LoRAAllFineTuningStrategy]:
    """The strategy in several variants, all of which have ``params``."""
    return [LoRAAllFineTuningStrategy(**params, **variant) for variant in variants]


@parametrize_with_checks([LoRAAllFineTuningStrategy(), LoRALinearFineTuningStrategy(rank=2), LoRAConvFineTuningStrategy()])
def test_conformance(check: Callable[[], None]) -> None:
    """Each strategy keeps the promise that the check's docstring states."""
    check()


@parametrize_with_checks(lora(VARIANTS))
def test_variants(check: Callable[[], None]) -> None:
    """So does each variant, on every kind of layer that is adapted by default."""
    check()


@parametrize_with_checks(lora(DROPPING), models=WITHOUT_SUBCLASSES, level="numerics")
def test_dropout(check: Callable[[], None]) -> None:
    """So does dropout, which is refused, as declared, where no place is for it."""
    check()


@parametrize_with_checks(lora(NUMBERS), level="numerics")
def test_numbers(check: Callable[[], None]) -> None:
    """So do other ranks, scalings and starts, by pattern too."""
    check()


@parametrize_with_checks(
    [
        *lora([{}, {"use_dora": True}, {"init": "pissa"}], rank=1, conv_layout="out_as_h"),
        LoRAConvFineTuningStrategy(rank=2, conv_layout="out_as_h", adapter_dtype="float32"),
    ],
    models=CONVOLUTIONS,
)
def test_layouts(check: Callable[[], None]) -> None:
    """So does the other layout of convolutions."""
    check()


@parametrize_with_checks(
    [
        *lora([{"attention": part} for part in (["q", "v"], ["k", "out"], ["out"])], rank=2),
        *lora([{"attention": ["v"], "use_dora": True}, {"attention": ["q", "k"], "init": "olora"}], rank=1),
    ],
    models=ATTENTION,
)
def test_attention(check: Callable[[], None]) -> None:
    """So does a part of attention's projections."""
    check()


@parametrize_with_checks(lora(ON_EMBEDDINGS, rank=1, targets="*"), models=EMBEDDINGS)
def test_embeddings(check: Callable[[], None]) -> None:
    """So do embeddings, tied ones among them."""
    check()


@parametrize_with_checks(
    [
        *lora(ON_PARAMETERS, rank=2, parameters=["gate", "experts"]),
        *lora([{}, {"use_dora": True}], rank=2, parameters=["gate", "experts"], parameter_layout="in_out"),
    ],
    models=[MODELS["experts"]],
)
def test_raw_parameters(check: Callable[[], None]) -> None:
    """So do raw parameters, a matrix and a stack of them."""
    check()


@parametrize_with_checks(lora([{}, {"use_dora": True}], rank=1, parameters="experts", exclude="up"), models=[MIXED])
def test_raw_parameters_between_layers(check: Callable[[], None]) -> None:
    """So do raw parameters of a model whose layers are adapted as well."""
    check()


@pytest.mark.parametrize(
    ("model", "layer", "params"),
    [
        (MODELS["subclassed"], "'0' (_Standardised)", {}),
        (MODELS["subclassed"], "'3' (_Halved)", {"exclude": "0"}),
        (MODELS["bags"], "'0' (EmbeddingBag)", {"targets": "0"}),
        (MODELS["experts"], "'experts' (_Experts)", {"parameters": "experts"}),
    ],
    ids=["convolution", "linear", "bag", "parameter"],
)
def test_dropout_without_a_place_is_refused(model: ReferenceModel, layer: str, params: dict[str, Any]) -> None:
    """What patterns and foreign classes bring, and no declaration names, refuses dropout by the name of the layer, too."""
    with pytest.raises(SiteError, match=rf"at {re.escape(layer)}: .* no dropout can be put into it"):
        enable_fine_tuning(model.fresh(), LoRAAllFineTuningStrategy(lora_dropout=0.1, **params))


def test_packaging() -> None:
    """The distribution is packaged as the kit asks."""
    wrong = [str(result) for result in check_distribution("gift-lora-plugin") if not result.ok]

    assert wrong == []
