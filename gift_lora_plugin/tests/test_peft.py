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
