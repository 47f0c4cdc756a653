"""Orthogonal fine-tuning against its formula."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from gift_oft_plugin import OFTFineTuningStrategy, cayley
from torch import Tensor, nn
from torch.func import functional_call

from gift_core import disable_fine_tuning, enable_fine_tuning
from gift_core.errors import ParameterError, SiteError

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


def rotate(weight: Tensor, free: Tensor, along_rows: bool) -> Tensor:
    """The formula with dense matrices: ``R = (I + Q)(I - Q)^-1`` from the whole block-diagonal Q, in float64."""
    skew = torch.block_diag(*(block - block.T for block in free.double()))
    one = torch.eye(len(skew), dtype=torch.float64)
    rotation = (one + skew) @ torch.linalg.inv(one - skew)
    rows = weight.double().flatten(1) if along_rows else weight.double().T
    rotated = rotation @ rows
    return (rotated.view(weight.shape) if along_rows else rotated.T).to(weight.dtype)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
def test_layer_computes_with_rotated_weights(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    """A tuned layer equals the plain one with every weight rotated by the dense formula; at the start, by nothing."""
    torch.manual_seed(0)
    make, inputs = LAYERS[kind]
    layer = make().to(dtype)
    given = tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs())
    before = first(layer(*given))
    plain = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
    enable_fine_tuning(layer, OFTFineTuningStrategy())
    started = first(layer(*given))
    expected = {}
    for name, weight in plain.items():
        expected[name] = weight
        if "weight" in name:
            prefix, _, last = name.rpartition(".")
            scope = "" if last == "weight" else f"{last}_"
            free = layer.get_parameter(f"{prefix}.{scope}oft_free" if prefix else f"{scope}oft_free")
            with torch.no_grad():
                free.normal_(std=0.3)
            expected[name] = rotate(weight, free, kind != "embedding")
    tuned = first(layer(*given))

    assert torch.equal(started, before)
    disable_fine_tuning(layer)
    torch.testing.assert_close(tuned, first(functional_call(layer, expected, given)), rtol=tolerance, atol=tolerance)
    assert torch.equal(first(layer(*given)), before)


def test_cayley_gives_rotations() -> None:
    """Whatever the free numbers, the transform is orthogonal with determinant one."""
    torch.manual_seed(0)
    rotations = cayley(torch.randn(5, 4, 4, dtype=torch.float64))

    torch.testing.assert_close(rotations @ rotations.mT, torch.eye(4, dtype=torch.float64).expand(5, 4, 4))
    torch.testing.assert_close(torch.linalg.det(rotations), torch.ones(5, dtype=torch.float64))


def test_layer_without_blocks_is_refused_by_name() -> None:
    """A layer with one output has nothing to rotate, and the error names it."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    with pytest.raises(SiteError, match=r"1\.weight"):
        enable_fine_tuning(model, OFTFineTuningStrategy())


def test_block_size_is_checked() -> None:
    """A block of one feature cannot rotate."""
    with pytest.raises(ParameterError, match="block_size"):
        OFTFineTuningStrategy(block_size=1)
