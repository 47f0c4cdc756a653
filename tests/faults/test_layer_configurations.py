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
    """A Linear layer, tiny or not, and an input of any number of dimensions, also an empty one."""
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    columns = draw(st.sampled_from([*range(1, 10), 130]))
    layer = nn.Linear(columns, 128 if columns == 130 else draw(st.integers(1, 9)), bias=draw(st.booleans()))
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
    channels = groups * draw(st.sampled_from([1, 2, 3, 24]))  # with many, the weight is larger than the images
    layer = kind(channels, channels if channels >= 24 else groups * draw(st.integers(1, 3)), **numbers, **options)  # type: ignore[arg-type]
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


@st.composite
def embeddings(draw: st.DrawFn) -> Made:
    """A table of vectors, or of bags of them, and tokens; some bags may be of padding alone."""
    rows, columns = draw(st.integers(2, 9)), draw(st.integers(1, 6))
    options: dict[str, Any] = {"padding_idx": draw(st.sampled_from([None, 0]))}
    if draw(st.booleans()):
        layer: nn.Module = nn.Embedding(rows, columns, scale_grad_by_freq=draw(st.booleans()), **options)
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
    else:
        layer = nn.EmbeddingBag(rows, columns, mode=draw(st.sampled_from(["sum", "mean", "max"])), **options)
        shape = [draw(st.integers(1, 4)), draw(st.integers(1, 4))]
    return layer, torch.randint(rows, shape)


@st.composite
def attentions(draw: st.DrawFn) -> Made:
    """Attention of a sequence to itself, or to narrower keys and values, with and without a mask and weights."""
    width = 2 * draw(st.integers(1, 3))
    sides = [draw(st.integers(1, width)) for _ in range(2)] if draw(st.booleans()) else [width, width]
    keywords = ("bias", "add_bias_kv", "add_zero_attn", "batch_first")
    options: dict[str, Any] = {key: draw(st.booleans()) for key in keywords}
    layer = nn.MultiheadAttention(width, draw(st.sampled_from([1, 2])), kdim=sides[0], vdim=sides[1], **options)
    shape = [draw(st.integers(1, 4)) for _ in range(draw(st.integers(1, 2)))]
    return Attends(layer, masked=draw(st.booleans()), need_weights=draw(st.booleans())), torch.randn(*shape, width)


@st.composite
def recurrents(draw: st.DrawFn) -> Made:
    """A recurrent layer of some depth and direction, or a cell."""
    columns, hidden, bias = draw(st.integers(1, 5)), draw(st.integers(2, 5)), draw(st.booleans())
    kind = draw(st.sampled_from([nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell]))
    if issubclass(kind, nn.RNNCellBase):
        return First(kind(columns, hidden, bias=bias)), torch.randn(draw(st.integers(1, 3)), columns)
    options: dict[str, Any] = {key: draw(st.booleans()) for key in ("bidirectional", "batch_first")}
    if kind is nn.LSTM:
        options["proj_size"] = draw(st.sampled_from([0, 1]))
    layer = kind(columns, hidden, num_layers=draw(st.integers(1, 2)), bias=bias, **options)
    return First(layer), torch.randn(draw(st.integers(1, 4)), draw(st.integers(1, 3)), columns)


class Twice(nn.Module):
    """Gives its input twice."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, inputs: Tensor) -> Tensor:
        return self.inner(inputs, inputs)


class First(nn.Module):
    """Takes the first of several outputs."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = self.inner(inputs)
        return outputs[0] if isinstance(outputs, tuple) else outputs


class Attends(nn.Module):
    """Lets a sequence attend to itself, or to what is left of it in the narrower sides."""

    def __init__(self, inner: nn.MultiheadAttention, masked: bool, need_weights: bool) -> None:
        super().__init__()
        self.inner = inner
        self.masked = masked
        self.need_weights = need_weights

    def forward(self, inputs: Tensor) -> Tensor:
        key, value = inputs[..., : self.inner.kdim].tanh(), inputs[..., : self.inner.vdim].sin()
        length = inputs.shape[1 if self.inner.batch_first and inputs.dim() == 3 else 0]
        mask = torch.ones(length, length, dtype=torch.bool).triu(1) if self.masked else None
        return self.inner(inputs, key, value, attn_mask=mask, need_weights=self.need_weights)[0]


VARIANTS = st.fixed_dictionaries(
    {
        "use_rslora": st.booleans(),
        "use_dora": st.booleans(),
        "conv_layout": st.sampled_from(["balanced", "out_as_h"]),
        "init": st.sampled_from(["kaiming", "orthogonal"]),
        "train_bias": st.booleans(),
        "attention": st.sampled_from([("q", "k", "v", "out"), ("q", "v"), ("k", "out"), ("out",)]),
    }
)
KINDS = {
    "linear": linears(),
    "convolution": convolutions(),
    "bilinear": bilinears(),
    "embedding": embeddings(),
    "attention": attentions(),
    "recurrent": recurrents(),
}


@pytest.mark.filterwarnings("ignore::gift_core.errors.GiftWarning")
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("layers", KINDS.values(), ids=KINDS)
def test_one_answer_in_every_state(layers: st.SearchStrategy[Made], record_faults: RecordFaults) -> None:
    """A trained layer gives one answer in training, in evaluation, merged, unmerged and unloaded; disabled, the base's bits."""
    counts = {"cases": 0, "silent": 0}

    @PROFILE
    @given(seed=st.integers(0, 9), made=layers, dtype=st.sampled_from(list(TOLERANCES)), variant=VARIANTS, frozen_input=st.booleans())
    def attempt(seed: int, made: Made, dtype: torch.dtype, variant: dict[str, Any], frozen_input: bool) -> None:
        torch.manual_seed(seed)
        layer, inputs = made[0].to(dtype), made[1]
        if inputs.is_floating_point():
            inputs = inputs.to(dtype).requires_grad_(not frozen_input)
        before = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
        counts["cases"] += 1

        enable_fine_tuning(layer, LoRAAllFineTuningStrategy(rank=1, targets="*", **variant))
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
    with torch.no_grad():
        answers["without gradients"] = layer(inputs)
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
