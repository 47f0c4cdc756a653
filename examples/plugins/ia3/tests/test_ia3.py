"""(IA)3 against its formula."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from gift_ia3_plugin import IA3FineTuningStrategy
from torch import Tensor, nn
from torch.func import functional_call

from gift_core import disable_fine_tuning, enable_fine_tuning
from gift_core.errors import ParameterError

LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]]]] = {
    "linear": (lambda: nn.Linear(4, 6), lambda: (torch.randn(2, 4),)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, groups=2, dilation=2), lambda: (torch.randn(2, 4, 7, 7),)),
    "embedding": (lambda: nn.Embedding(7, 6), lambda: (torch.tensor([0, 3, 6]),)),
    "lstm": (lambda: nn.LSTM(4, 6, 2, bidirectional=True), lambda: (torch.randn(3, 2, 4),)),
    "attention": (lambda: nn.MultiheadAttention(6, 2), lambda: (torch.randn(3, 2, 6),) * 3),
}


def first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The output of a layer that may give more."""
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("side", ["output", "input"])
def test_layer_computes_with_rescaled_weights(kind: str, dtype: torch.dtype, tolerance: float, side: str) -> None:
    """A tuned layer equals the plain one whose every weight is multiplied along the chosen side; at the start, by one."""
    torch.manual_seed(0)
    make, inputs = LAYERS[kind]
    layer = make().to(dtype)
    given = tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs())
    before = first(layer(*given))
    plain = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
    enable_fine_tuning(layer, IA3FineTuningStrategy(side=side))
    started = first(layer(*given))
    expected = {}
    for name, weight in plain.items():
        expected[name] = weight
        if "weight" in name:
            prefix, _, last = name.rpartition(".")
            scope = "" if last == "weight" else f"{last}_"
            factors = layer.get_parameter(f"{prefix}.{scope}ia3_factors" if prefix else f"{scope}ia3_factors")
            with torch.no_grad():
                factors.uniform_(0.5, 1.5)
            along_rows = (side == "output") != (kind == "embedding")
            ones = [1] * (weight.dim() - 1)
            expected[name] = weight * (factors.view(-1, *ones) if along_rows else factors.view(1, -1, *ones[1:]))
    tuned = first(layer(*given))

    assert torch.equal(started, before)
    disable_fine_tuning(layer)
    torch.testing.assert_close(tuned, first(functional_call(layer, expected, given)), rtol=tolerance, atol=tolerance)
    assert torch.equal(first(layer(*given)), before)


def test_unknown_side_is_refused() -> None:
    """A side that does not exist is named."""
    with pytest.raises(ParameterError, match="'left'"):
        IA3FineTuningStrategy(side="left")
