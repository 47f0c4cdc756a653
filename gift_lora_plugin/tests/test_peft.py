"""PEFT as an independent oracle: the same A and B give the same numbers in both libraries.

Tolerances are relative to the largest number compared: 1e-12 in double precision; 1e-5 in single precision, where the two libraries
add the same terms in different orders.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gift_core import enable_fine_tuning, merge, merge_and_unload
from gift_lora_plugin import LoRAAllFineTuningStrategy

with warnings.catch_warnings():
    # what PEFT imports may warn about itself
    warnings.simplefilter("ignore")
    peft = pytest.importorskip("peft")

RANK, ALPHA = 4, 6.0
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
#: A layer, the conv_layout whose matrices are PEFT's, and the shape of an input.
LAYERS: dict[str, tuple[Any, str, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(9, 7), "balanced", (3, 9)),
    "linear without bias": (lambda: nn.Linear(9, 7, bias=False), "balanced", (2, 3, 9)),
    "1x1": (lambda: nn.Conv2d(9, 7, 1), "balanced", (2, 9, 5, 4)),
    "1x1 stride": (lambda: nn.Conv2d(9, 7, 1, stride=2), "balanced", (2, 9, 5, 4)),
    "1x1 out_as_h": (lambda: nn.Conv2d(9, 7, 1), "out_as_h", (2, 9, 5, 4)),
    "3x3": (lambda: nn.Conv2d(9, 7, 3, padding=1), "out_as_h", (2, 9, 5, 4)),
    # no dilation: PEFT 0.21 forgets it in the adapter's convolution
    "3x2 stride, padding": (lambda: nn.Conv2d(9, 7, (3, 2), stride=2, padding=(0, 1)), "out_as_h", (2, 9, 8, 8)),
    "1d": (lambda: nn.Conv1d(9, 7, 3), "balanced", (2, 9, 6)),
    "3d": (lambda: nn.Conv3d(9, 7, 2), "out_as_h", (2, 9, 3, 4, 5)),
}


@pytest.fixture(params=LAYERS)
def name(request: pytest.FixtureRequest) -> str:
    """Each kind of layer."""
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(params=TOLERANCE, ids=str)
def dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """Each precision."""
    yield request.param


def pair(name: str, dtype: torch.dtype, dropout: float = 0.0) -> tuple[nn.Module, nn.Module, Tensor]:
    """One layer tuned by each library, with equal A and B, and an input."""
    build, conv_layout, shape = LAYERS[name]
    torch.manual_seed(0)
    base = nn.Sequential(build()).to(dtype)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules=["0"], bias="none")
    theirs = peft.get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False).to(dtype)
    enable_fine_tuning(base, LoRAAllFineTuningStrategy(RANK, ALPHA, dropout, conv_layout=conv_layout))
    layer = theirs.base_model.model[0]
    with torch.no_grad():
        base[0].lora_B.normal_()  # type: ignore[union-attr, operator]
        for ours, other in ((base[0].lora_A, layer.lora_A["default"]), (base[0].lora_B, layer.lora_B["default"])):
            other.weight.copy_(ours.reshape(other.weight.shape))  # type: ignore[operator, union-attr]
    return base, theirs, torch.randn(shape, dtype=dtype)


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    """Within the tolerance of the dtype."""
    assert ours.dtype is theirs.dtype
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= TOLERANCE[ours.dtype] * theirs.abs().max()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_outputs_and_gradients_are_pefts(name: str, dtype: torch.dtype, training: bool) -> None:
    """Outputs, and gradients of A, B and the input, are PEFT's."""
    ours, theirs, x = pair(name, dtype)
    layer = theirs.base_model.model[0]
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    outputs = [model.train(training)(given) for model, given in zip((ours, theirs), inputs, strict=True)]
    for output in outputs:
        output.sin().sum().backward()

    assert_close(*outputs)
    assert_close(inputs[0].grad, inputs[1].grad)
    for mine, other in ((ours[0].lora_A, layer.lora_A["default"]), (ours[0].lora_B, layer.lora_B["default"])):
        assert_close(mine.grad, other.weight.grad.reshape(mine.shape))


def test_dropout_is_pefts(name: str, dtype: torch.dtype) -> None:
    """With the same random numbers, dropout drops what PEFT's does."""
    ours, theirs, x = pair(name, dtype, dropout=0.4)
    outputs = []
    for model in (ours, theirs):
        torch.manual_seed(5)
        outputs.append(model.train()(x))

    assert_close(*outputs)


def test_merged_outputs_are_pefts(name: str, dtype: torch.dtype) -> None:
    """Merged models answer alike."""
    ours, theirs, x = pair(name, dtype)
    merge(ours.eval())
    theirs.eval().merge_adapter()

    assert_close(ours(x), theirs(x))


def test_unloaded_weights_are_pefts(name: str, dtype: torch.dtype) -> None:
    """The plain models that both libraries leave behind have the same weights under the same keys."""
    ours, theirs, _ = pair(name, dtype)
    mine, other = merge_and_unload(ours).state_dict(), theirs.merge_and_unload().state_dict()

    assert list(mine) == list(other)
    for key in mine:
        assert_close(mine[key], other[key])


def test_what_trains_is_as_much(name: str) -> None:
    """Both libraries train the same number of numbers."""
    ours, theirs, _ = pair(name, torch.float32)

    assert sum(p.numel() for p in ours.parameters()) == theirs.get_nb_trainable_parameters()[0]


# --- variants

#: What the strategy calls a variant, and what PEFT does; PEFT decomposes in single precision, and no double-precision weights.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "rslora": ({"use_rslora": True}, {"use_rslora": True}),
    "dora": ({"use_dora": True}, {"use_dora": True}),
    "pissa": ({"init": "pissa"}, {"init_lora_weights": "pissa"}),
    "olora": ({"init": "olora"}, {"init_lora_weights": "olora"}),
    "rslora, dora": ({"use_rslora": True, "use_dora": True}, {"use_rslora": True, "use_dora": True}),
    "rslora, pissa": ({"use_rslora": True, "init": "pissa"}, {"use_rslora": True, "init_lora_weights": "pissa"}),
}
VARIANT_LAYERS = {name: LAYERS[name] for name in ("linear", "linear without bias", "3x3", "1d")}


def variant_pair(layer: str, variant: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """One layer tuned by each library with one variant in single precision, both at their start, and an input."""
    build, conv_layout, shape = LAYERS[layer]
    ours, theirs = VARIANTS[variant]
    torch.manual_seed(0)
    base = nn.Sequential(build())
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"], bias="none", **theirs)
    other = peft.get_peft_model(copy.deepcopy(base), config)
    enable_fine_tuning(base, LoRAAllFineTuningStrategy(RANK, ALPHA, conv_layout=conv_layout, **ours))
    return base, other, torch.randn(shape)


def tensor_pairs(ours: nn.Module, theirs: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """The tensors that train, ours and PEFT's."""
    mine, layer = ours[0], theirs.base_model.model[0]  # type: ignore[index, union-attr]
    pairs = [(mine.lora_A, layer.lora_A["default"].weight), (mine.lora_B, layer.lora_B["default"].weight)]
    if hasattr(mine, "lora_magnitude"):
        pairs.append((mine.lora_magnitude, layer.lora_magnitude_vector["default"].weight))
    return pairs


@pytest.mark.parametrize("layer", VARIANT_LAYERS)
@pytest.mark.parametrize("variant", [name for name in VARIANTS if "olora" not in name and "pissa" not in name])
def test_variants_are_pefts(variant: str, layer: str) -> None:
    """With the same numbers moved by the same amounts, outputs, gradients and merged weights of a variant are PEFT's."""
    ours, theirs, x = variant_pair(layer, variant)
    with torch.no_grad():
        for mine, other in tensor_pairs(ours, theirs):
            mine.add_(torch.randn(mine.shape) * 0.3)
            other.copy_(mine.reshape(other.shape))
    compare(ours, theirs, x)


@pytest.mark.parametrize("variant", ["pissa", "olora", "rslora, pissa"])
@pytest.mark.parametrize("layer", ["linear", "linear without bias"])
def test_starts_from_the_weight_are_pefts(variant: str, layer: str) -> None:
    """The factors start as PEFT's do, and moved by the same amounts they give PEFT's outputs, without writing into the base."""
    ours, theirs, x = variant_pair(layer, variant)
    before = ours[0]._parameters["weight"].clone()  # type: ignore[index, union-attr]
    for mine, other in tensor_pairs(ours, theirs):
        assert_close(mine.detach(), other.detach())
    with torch.no_grad():
        for mine, other in tensor_pairs(ours, theirs):
            step = torch.randn(mine.shape) * 0.3
            mine.add_(step)
            other.add_(step)

    assert torch.equal(ours[0]._parameters["weight"], before)  # type: ignore[index, union-attr]
    compare(ours, theirs, x)


def compare(ours: nn.Module, theirs: nn.Module, x: Tensor) -> None:
    """Outputs, gradients and merged weights agree."""
    outputs = [model(x) for model in (ours, theirs)]
    for output in outputs:
        output.sin().sum().backward()

    assert_close(*outputs)
    for mine, other in tensor_pairs(ours, theirs):
        assert mine.grad is not None
        assert other.grad is not None
        assert_close(mine.grad, other.grad.reshape(mine.shape))
    weights = [merge_and_unload(ours)[0].weight, theirs.merge_and_unload()[0].weight]  # type: ignore[index, operator]
    assert_close(weights[0].detach(), weights[1].detach())


def test_dora_of_an_embedding_is_pefts() -> None:
    """A table's magnitudes are one per dimension in both libraries, whose factors are each other's transposes."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Embedding(9, 7))
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"], use_dora=True)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    enable_fine_tuning(base, LoRAAllFineTuningStrategy(RANK, ALPHA, targets="0", use_dora=True))
    mine: Any = base[0]
    layer = theirs.base_model.model[0]
    x = torch.tensor([[1, 2, 2], [0, 3, 8]])
    with torch.no_grad():
        for tensor in (mine.lora_A, mine.lora_B, mine.lora_magnitude):
            tensor.add_(torch.randn(tensor.shape) * 0.3)
        layer.lora_embedding_A["default"].copy_(mine.lora_B.T)
        layer.lora_embedding_B["default"].copy_(mine.lora_A.T)
        layer.lora_magnitude_vector["default"].weight.copy_(mine.lora_magnitude)

    assert_close(base(x), theirs(x))


@pytest.mark.parametrize("layer", ["linear", "linear without bias"])
def test_dropout_of_dora_is_pefts(layer: str) -> None:
    """With the same random numbers, DoRA drops what PEFT's does: the input of the whole change, the magnitude's included."""
    build, _, shape = LAYERS[layer]
    torch.manual_seed(0)
    base = nn.Sequential(build())
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.4, target_modules=["0"], use_dora=True)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    enable_fine_tuning(base, LoRAAllFineTuningStrategy(RANK, ALPHA, 0.4, use_dora=True))
    with torch.no_grad():
        for mine, other in tensor_pairs(base, theirs):
            mine.add_(torch.randn(mine.shape) * 0.3)
            other.copy_(mine)
    outputs, x = [], torch.randn(shape)
    for model in (base, theirs):
        torch.manual_seed(5)
        outputs.append(model.train()(x))

    assert_close(*outputs)
