"""Random layers x dtype x memory format: training, evaluating, merged and unloaded compute the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from fault_table import RecordFaults
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gift_core import disable_fine_tuning, enable_fine_tuning, merge, merge_and_unload, unmerge
from gift_lora_plugin import LoRAAllFineTuningStrategy

PROFILE = settings(
    max_examples=250, derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
#: How far two ways to compute one output may be apart, in parts of its largest number: some rounding steps of the type.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

Made = tuple[nn.Module, Tensor]


@st.composite
def linears(draw: st.DrawFn) -> Made:
    """A Linear layer and an input of any number of dimensions, also an empty one."""
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    columns = draw(st.integers(1, 9))
    layer = nn.Linear(columns, draw(st.integers(1, 9)), bias=draw(st.booleans()))
    return layer, torch.randn(*shape, columns)


@st.composite
def convolutions(draw: st.DrawFn) -> Made:
    """A convolution, transposed or not, of one to three dimensions."""
    transposed = draw(st.booleans())
    dimensions = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 1, 2]))
    numbers = {
        "kernel_size": tuple(draw(st.integers(1, 3)) for _ in range(dimensions)),
        "stride": tuple(draw(st.integers(1, 2)) for _ in range(dimensions)),
        "dilation": tuple(draw(st.integers(1, 2)) for _ in range(dimensions)),
        "padding": draw(st.integers(0, 1)),
    }
    options: dict[str, Any] = {"groups": groups, "bias": draw(st.booleans())}
    if not transposed:
        options["padding_mode"] = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    kind = (TRANSPOSED if transposed else CONVOLUTIONS)[dimensions - 1]
    channels = groups * draw(st.integers(1, 3))
    layer = kind(channels, groups * draw(st.integers(1, 3)), **numbers, **options)  # type: ignore[arg-type]
    inputs = torch.randn(draw(st.integers(1, 3)), channels, *[6] * dimensions)
    formats = {2: torch.channels_last, 3: torch.channels_last_3d}
    if dimensions in formats and draw(st.booleans()):
        inputs = inputs.to(memory_format=formats[dimensions])
        if draw(st.booleans()):
            layer = layer.to(memory_format=formats[dimensions])
    return layer, inputs


@st.composite
def bilinears(draw: st.DrawFn) -> Made:
    """A layer of two inputs, here both the same."""
    columns = draw(st.integers(1, 5))
    return Twice(nn.Bilinear(columns, columns, draw(st.integers(1, 5)))), torch.randn(draw(st.integers(1, 4)), columns)


class Twice(nn.Module):
    """Gives its input twice."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, inputs: Tensor) -> Tensor:
        return self.inner(inputs, inputs)


VARIANTS = st.fixed_dictionaries(
    {
        "use_rslora": st.booleans(),
        "use_dora": st.booleans(),
        "conv_layout": st.sampled_from(["balanced", "out_as_h"]),
        "init": st.sampled_from(["kaiming", "orthogonal"]),
        "train_bias": st.booleans(),
    }
)


@pytest.mark.filterwarnings("ignore::gift_core.errors.GiftWarning")
@pytest.mark.parametrize("layers", [linears(), convolutions(), bilinears()], ids=["linear", "convolution", "bilinear"])
def test_one_answer_in_every_state(layers: st.SearchStrategy[Made], record_faults: RecordFaults) -> None:
    """A trained layer gives one answer in training, in evaluation, merged, unmerged and unloaded; disabled, the base's bits."""
    counts = {"cases": 0, "silent": 0}

    @PROFILE
    @given(seed=st.integers(0, 9), made=layers, dtype=st.sampled_from(list(TOLERANCES)), variant=VARIANTS, frozen_input=st.booleans())
    def attempt(seed: int, made: Made, dtype: torch.dtype, variant: dict[str, Any], frozen_input: bool) -> None:
        torch.manual_seed(seed)
        layer, inputs = made[0].to(dtype), made[1].to(dtype).requires_grad_(not frozen_input)
        before = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
        counts["cases"] += 1

        enable_fine_tuning(layer, LoRAAllFineTuningStrategy(rank=1, **variant))
        _draw(layer)
        answers = _answers(layer, inputs)

        worst = max(_distance(answers["eval"], answer) for answer in answers.values())
        wrong = worst > TOLERANCES[dtype]
        counts["silent"] += wrong
        assert not wrong, (worst, layer)
        disable_fine_tuning(layer)
        assert all(torch.equal(before[key], tensor) for key, tensor in layer.state_dict().items())

    with torch.random.fork_rng(devices=[]):
        attempt()

    record_faults("layers x dtype x format", **counts)


def _draw(layer: nn.Module) -> None:
    with torch.no_grad():
        for key, parameter in layer.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter * 1.1 + 0.1 if key.endswith("magnitude") else 0.3 * torch.randn_like(parameter))


def _answers(layer: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    answers = {"train": layer(inputs).detach()}
    layer.eval()
    answers["eval"] = layer(inputs).detach()
    merge(layer)
    answers["merged"] = layer(inputs).detach()
    unmerge(layer)
    answers["unmerged"] = layer(inputs).detach()
    answers["unloaded"] = merge_and_unload(copy.deepcopy(layer))(inputs).detach()
    return answers


def _distance(left: Tensor, right: Tensor) -> float:
    if left.numel() == 0:
        return 0.0 if left.shape == right.shape else float("inf")
    return float((left.double() - right.double()).abs().max() / left.double().abs().max().clamp(min=1e-3))
