"""LoRA's numbers against the formula, built by hand from index arithmetic and plain functions."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gift_core import adopt, enable_fine_tuning, plan_fine_tuning
from gift_core.errors import SiteError
from gift_core.reparameterization import set_merged
from gift_lora_plugin import CONV_LAYOUTS, LoRA, LoRAAllFineTuningStrategy, add_low_rank, low_rank_update, matrix_shape

#: The largest difference from the formula in double precision, as a part of the largest number in the answer. The sums here have
#: fewer than 200 terms, so that a few units in the last place of each format are enough.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}
KERNELS = {1: (3,), 2: (3, 2), 3: (2, 3, 2)}
SIZES = {1: (9,), 2: (8, 7), 3: (6, 7, 5)}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "one by one": {"kernel_size": 1},
    "groups": {"groups": 2},
    "depthwise": {"groups": 4, "out_channels": 8},
    "stride": {"stride": (2, 3, 1)},
    "dilation": {"dilation": (2, 1, 2)},
    "same": {"padding": "same", "kernel_size": 3, "dilation": 2},
    "same circular": {"padding": "same", "kernel_size": 3, "padding_mode": "circular"},
    "everything": {"groups": 2, "stride": 2, "dilation": (1, 2, 1), "padding": (2, 1, 1), "padding_mode": "replicate"},
    **{mode: {"padding": (1, 2, 0), "padding_mode": mode} for mode in ("zeros", "reflect", "replicate", "circular")},
}


# --- the formula in plain tensors


def convolution(dimensions: int, variant: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A convolution with seeded values; options of three dimensions are cut to those it has."""
    options = {"in_channels": 4, "out_channels": 6, "kernel_size": KERNELS[dimensions], "dtype": dtype} | {
        key: value[:dimensions] if isinstance(value, tuple) else value for key, value in VARIANTS[variant].items()
    }
    torch.manual_seed(0)
    layer: nn.Module = getattr(nn, f"Conv{dimensions}d")(**options)
    return layer


def signal(dimensions: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """An input for `convolution`."""
    return torch.randn(2, 4, *SIZES[dimensions], generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def matrix_columns(shape: torch.Size, conv_layout: str) -> int:
    """How many numbers of a weight share a row of B: all of an output's, or all of one first-kernel row's."""
    kernel = shape[2:]
    taken = kernel[0] if conv_layout == "balanced" and len(kernel) > 1 else 1
    return math.prod(shape[1:]) // taken


def update_by_index(shape: torch.Size, lora_B: Tensor, lora_A: Tensor, scaling: float, conv_layout: str) -> Tensor:
    """The update number by number: the n-th in memory order is row n // columns of B times column n % columns of A."""
    n = torch.arange(math.prod(shape)).reshape(shape)
    columns = matrix_columns(shape, conv_layout)
    return scaling * sum(lora_B[n // columns, r] * lora_A[r, n % columns] for r in range(lora_A.shape[0]))  # type: ignore[return-value]


def convolve(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve an input that was padded by hand."""
    pads = []
    for axis, size in enumerate(layer.kernel_size):
        total = layer.dilation[axis] * (size - 1)
        before, after = (total // 2, total - total // 2) if layer.padding == "same" else (layer.padding[axis],) * 2
        pads = [before, after, *pads]  # F.pad counts from the last axis
    padded = F.pad(x, pads, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)
    function = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(layer.kernel_size)]
    return function(padded, weight, bias, layer.stride, 0, layer.dilation, layer.groups)


def formula(layer: Any, x: Tensor, lora_B: Tensor, lora_A: Tensor, scaling: float, conv_layout: str) -> Tensor:
    """What the layer must give, by hand, from frozen numbers and the adapter's."""
    frozen = layer._parameters["weight"].detach().to(x.dtype)
    weight = frozen + update_by_index(frozen.shape, lora_B, lora_A, scaling, conv_layout)
    bias = None if layer.bias is None else layer.bias.detach().to(x.dtype)
    if isinstance(layer, nn.Linear):
        out = torch.einsum("...i,oi->...o", x, weight)
        return out if bias is None else out + bias
    return convolve(layer, x, weight, bias)


def adapt(layer: nn.Module, **params: Any) -> nn.Module:
    """Adopt a layer with LoRA and move B away from zero."""
    adopt(layer, LoRA, **{"rank": 2, "alpha": 3.0} | params)
    with torch.no_grad():
        layer.lora_B.copy_(torch.randn(layer.lora_B.shape))  # type: ignore[union-attr, operator, arg-type]
    return layer


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Within the tolerance that is stated for the dtype."""
    scale = expected.abs().max().clamp_min(1e-3)

    assert actual.shape == expected.shape
    assert (actual.double() - expected.double()).abs().max() <= TOLERANCE[actual.dtype] * scale


def convolutions() -> list[Any]:
    """Every number of dimensions with every variant."""
    return [pytest.param(d, variant, id=f"{d}d {variant}") for d, variant in itertools.product((1, 2, 3), VARIANTS)]


# --- outputs


@pytest.mark.parametrize("conv_layout", CONV_LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("dimensions", "variant"), convolutions())
def test_every_convolution_follows_the_formula(dimensions: int, variant: str, dtype: torch.dtype, conv_layout: str) -> None:
    """A convolution gives what the formula gives in plain tensors, in train and eval mode, merged and not."""
    layer = adapt(convolution(dimensions, variant, dtype), conv_layout=conv_layout)
    x = signal(dimensions, dtype)
    expected = formula(layer, x.double(), layer.lora_B.detach().double(), layer.lora_A.detach().double(), 1.5, conv_layout)

    assert_close(layer(x), expected)
    assert torch.equal(layer(x), layer.eval()(x))
    set_merged(layer, True)
    assert_close(layer(x), expected)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_follows_the_formula(dtype: torch.dtype, shape: tuple[int, ...], bias: bool) -> None:
    """A Linear layer gives what the formula gives for any number of leading axes, merged and not."""
    torch.manual_seed(0)
    layer = adapt(nn.Linear(5, 7, bias=bias, dtype=dtype))
    x = torch.randn(shape, dtype=torch.float64).to(dtype)
    expected = formula(layer, x.double(), layer.lora_B.detach().double(), layer.lora_A.detach().double(), 1.5, "balanced")

    assert_close(layer(x), expected)
    assert torch.equal(layer(x), layer.eval()(x))
    set_merged(layer, True)
    assert_close(layer(x), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("variant", ["plain", "groups", "reflect"])
def test_half_precision_convolutions_follow_the_formula(dimensions: int, variant: str, dtype: torch.dtype) -> None:
    """In half precision a convolution is within that format's rounding of the formula, and its output has its dtype."""
    layer = adapt(convolution(dimensions, variant, dtype))
    x = signal(dimensions, dtype)
    expected = formula(layer, x.double(), layer.lora_B.detach().double(), layer.lora_A.detach().double(), 1.5, "balanced")

    assert_close(layer(x), expected)
    assert layer.lora_A.dtype is layer.lora_B.dtype is layer(x).dtype is dtype


@pytest.mark.parametrize("conv_layout", CONV_LAYOUTS)
@pytest.mark.parametrize(("dimensions", "variant"), convolutions())
def test_a_fresh_convolution_is_unchanged(dimensions: int, variant: str, conv_layout: str) -> None:
    """Before training, every convolution gives the original's exact bits."""
    layer, x = convolution(dimensions, variant, torch.float32), signal(dimensions, torch.float32)
    expected = layer(x)

    adopt(layer, LoRA, rank=2, conv_layout=conv_layout)

    assert torch.equal(layer(x), expected)
    assert torch.equal(layer.eval()(x), expected)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_fresh_layers_are_unchanged_in_every_dtype(dtype: torch.dtype, dropout: float) -> None:
    """Before training the bits are the original's in every dtype, with dropout too."""
    torch.manual_seed(0)
    for layer, x in ((nn.Linear(5, 7), torch.randn(3, 5)), (nn.Conv2d(4, 6, 3), torch.randn(2, 4, 5, 5))):
        layer, x = layer.to(dtype), x.to(dtype)
        expected = layer(x)

        adopt(layer, LoRA, rank=2, dropout=dropout)

        assert torch.equal(layer(x), expected)
        assert torch.equal(layer.eval()(x), expected)


# --- gradients


def gradients(layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Gradients of one number made of the outputs, with respect to A, B and the input."""
    x = x.clone().requires_grad_()
    leaves = {"lora_A": layer.lora_A, "lora_B": layer.lora_B, "input": x}
    return dict(zip(leaves, torch.autograd.grad(layer(x).sin().sum(), list(leaves.values())), strict=True))  # type: ignore[arg-type]


def gradients_by_formula(layer: nn.Module, x: Tensor, conv_layout: str) -> dict[str, Tensor]:
    """The same, by autograd through the plain formula in double precision."""
    x, A, B = (tensor.detach().double().requires_grad_() for tensor in (x, layer.lora_A, layer.lora_B))  # type: ignore[union-attr]
    found = torch.autograd.grad(formula(layer, x, B, A, 1.5, conv_layout).sin().sum(), (A, B, x))
    return dict(zip(("lora_A", "lora_B", "input"), found, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("conv_layout", CONV_LAYOUTS)
@pytest.mark.parametrize(("dimensions", "variant"), convolutions())
def test_convolution_gradients_are_the_formulas(dimensions: int, variant: str, conv_layout: str, dtype: torch.dtype) -> None:
    """The gradients of A, B and the input are autograd's through the formula, and the same in train and eval mode."""
    layer = adapt(convolution(dimensions, variant, dtype), conv_layout=conv_layout)
    x = signal(dimensions, dtype)
    found = gradients(layer, x)

    for name, expected in gradients_by_formula(layer, x, conv_layout).items():
        assert_close(found[name], expected)
    for name, gradient in gradients(layer.eval(), x).items():
        assert torch.equal(gradient, found[name])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_linear_gradients_are_the_formulas(dtype: torch.dtype) -> None:
    """The gradients of A, B and the input are autograd's through the formula, and the same in train and eval mode."""
    torch.manual_seed(0)
    layer, x = adapt(nn.Linear(5, 7, dtype=dtype)), torch.randn(3, 4, 5, dtype=torch.float64).to(dtype)
    found = gradients(layer, x)

    for name, expected in gradients_by_formula(layer, x, "balanced").items():
        assert_close(found[name], expected)
    for name, gradient in gradients(layer.eval(), x).items():
        assert torch.equal(gradient, found[name])


@pytest.mark.parametrize(
    "layer", [nn.Linear(3, 4), nn.Conv1d(3, 4, 2), nn.Conv2d(3, 4, 2, padding=1, padding_mode="circular")], ids=str
)
def test_gradients_are_the_finite_differences(layer: nn.Module) -> None:
    """Numerical differentiation agrees, so that the oracle of the other tests is not wrong with the code."""
    layer = adapt(copy.deepcopy(layer).double())
    x = torch.randn(2, 3, *[4] * (layer._parameters["weight"].dim() - 2), dtype=torch.float64)  # type: ignore[union-attr]

    def output(lora_A: Tensor, lora_B: Tensor, x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"lora_A": lora_A, "lora_B": lora_B}, x)

    leaves = (layer.lora_A.detach().requires_grad_(), layer.lora_B.detach().requires_grad_(), x.requires_grad_())

    assert torch.autograd.gradcheck(output, leaves)


def test_only_the_adapter_gets_gradients() -> None:
    """The frozen weight gets no gradient."""
    layer = adapt(nn.Linear(5, 7))

    layer(torch.randn(3, 5)).sum().backward()

    assert layer._parameters["weight"].grad is None  # type: ignore[union-attr]
    assert layer.lora_A.grad is not None
    assert layer.lora_B.grad is not None


# --- dropout


def dropped(layer: Any, x: Tensor, mask: Tensor) -> Tensor:
    """The formula with a dropped-out input of the update."""
    frozen = layer._parameters["weight"].detach()
    update = update_by_index(frozen.shape, layer.lora_B.detach(), layer.lora_A.detach(), 1.5, "balanced")
    if isinstance(layer, nn.Linear):
        return F.linear(x, frozen, layer.bias) + F.linear(mask, update)
    return convolve(layer, x, frozen, layer.bias) + convolve(layer, mask, update, None)


@pytest.mark.parametrize("name", ["linear", *(f"{d}d {variant}" for d in (1, 2, 3) for variant in ("groups", "same", "reflect"))])
def test_dropout_is_on_the_updates_input(name: str) -> None:
    """With dropout, training gives the frozen output plus the update of the dropped-out input, for the same random numbers."""
    torch.manual_seed(0)
    plain = nn.Linear(5, 7).double() if name == "linear" else convolution(int(name[0]), name[3:])
    layer = adapt(plain, dropout=0.4)
    x = torch.randn(3, 5, dtype=torch.float64) if name == "linear" else signal(int(name[0]))

    torch.manual_seed(7)
    actual = layer(x)
    torch.manual_seed(7)
    expected = dropped(layer, x, F.dropout(x, 0.4))

    assert_close(actual, expected)
    assert not torch.allclose(actual, layer.eval()(x))


@pytest.mark.parametrize("layer", [nn.Linear(5, 7), nn.Conv2d(5, 7, 2)], ids=["linear", "conv"])
def test_dropout_keeps_the_expectation(layer: nn.Module) -> None:
    """Over many draws the mean of the training output is the output without dropout."""
    torch.manual_seed(0)
    layer = adapt(copy.deepcopy(layer), dropout=0.5)
    x = torch.randn(1, 5) if isinstance(layer, nn.Linear) else torch.randn(1, 5, 2, 2)
    draws = layer(x.expand(20_000, *x.shape[1:]).contiguous()).flatten(1).double()
    error = draws.std(0) / len(draws) ** 0.5

    assert ((draws.mean(0) - layer.eval()(x).flatten().double()).abs() < 5 * error).all()
    assert (error > 0).all()


def test_dropout_draws_nothing_in_eval() -> None:
    """In eval mode dropout changes nothing and draws no random number."""
    layer, x = adapt(nn.Linear(5, 7), dropout=0.5).eval(), torch.randn(3, 5)
    expected = formula(layer, x.double(), layer.lora_B.detach().double(), layer.lora_A.detach().double(), 1.5, "balanced")
    before = torch.get_rng_state()

    assert_close(layer(x), expected)
    assert torch.equal(torch.get_rng_state(), before)


# --- parameters of the method


@pytest.mark.parametrize(
    ("shape", "conv_layout", "expected"),
    [
        ((7, 5), "balanced", (7, 5)),
        ((7, 5), "out_as_h", (7, 5)),
        ((6, 4, 3), "balanced", (6, 12)),
        ((6, 4, 3), "out_as_h", (6, 12)),
        ((6, 4, 3, 2), "balanced", (18, 8)),
        ((6, 4, 3, 2), "out_as_h", (6, 24)),
        ((6, 4, 3, 2, 5), "balanced", (18, 40)),
        ((6, 4, 3, 2, 5), "out_as_h", (6, 120)),
    ],
)
def test_matrix_shapes(shape: tuple[int, ...], conv_layout: str, expected: tuple[int, int]) -> None:
    """The rows of B and the columns of A are those that the layouts define, and hold every number of the weight."""
    assert matrix_shape(shape, conv_layout) == expected
    assert math.prod(expected) == math.prod(shape)


@pytest.mark.parametrize("rank", [1, 3, 6])
@pytest.mark.parametrize("conv_layout", CONV_LAYOUTS)
def test_parameters_at_the_start(rank: int, conv_layout: str) -> None:
    """B is zero; A is Kaiming uniform with a = sqrt(5), that is, uniform within 1 / sqrt(columns)."""
    torch.manual_seed(0)
    layer = nn.Conv2d(64, 32, (3, 5))
    adopt(layer, LoRA, rank=rank, conv_layout=conv_layout)
    rows, columns = matrix_shape(layer._parameters["weight"].shape, conv_layout)  # type: ignore[union-attr]
    bound = 1 / math.sqrt(columns)

    assert layer.lora_B.shape == (rows, rank)
    assert not layer.lora_B.any()
    assert layer.lora_A.shape == (rank, columns)
    assert 0.95 * bound < layer.lora_A.abs().max() <= bound
    # the standard deviation of a uniform distribution is bound / sqrt(3); five times the spread of its estimate is allowed
    assert abs(layer.lora_A.std() * math.sqrt(3) / bound - 1) < 5 / math.sqrt(2 * layer.lora_A.numel())


def test_the_seed_governs_the_start() -> None:
    """The same seed of torch's global generator gives the same A, and another seed another."""
    starts = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        layer = nn.Linear(5, 7)
        adopt(layer, LoRA, rank=2)
        starts.append(layer.lora_A.detach())

    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


@pytest.mark.parametrize(
    ("rank", "alpha", "scaling"), [(4, None, 1.0), (1, None, 1.0), (4, 2, 0.5), (2, 5.0, 2.5), (3, 0.0, 0.0), (2, -1, -0.5)]
)
def test_scaling_is_alpha_over_rank(rank: int, alpha: float | None, scaling: float) -> None:
    """The update is scaled by alpha / rank, and by 1 where no alpha is given."""
    torch.manual_seed(0)
    for layer, x in ((nn.Linear(5, 7).double(), torch.randn(3, 5).double()), (convolution(2, "plain"), signal(2))):
        adapt(layer, rank=rank, alpha=alpha)
        expected = formula(layer, x, layer.lora_B.detach(), layer.lora_A.detach(), scaling, "balanced")

        assert layer.lora_scaling == scaling
        assert_close(layer(x), expected)


def test_an_update_is_the_product_in_memory_order() -> None:
    """The public functions give the scaled product, read back into the weight's shape, and the weight plus it."""
    torch.manual_seed(0)
    weight, B, A = (torch.randn(*shape, dtype=torch.float64) for shape in ((6, 4, 3, 2), (18, 2), (2, 8)))
    expected = update_by_index(weight.shape, B, A, 0.5, "balanced")

    assert_close(low_rank_update(B, A, weight.shape, 0.5), expected)
    assert_close(add_low_rank(weight, B, A, 0.5), weight + expected)


# --- inputs and weights of unusual memory


def test_channels_last_is_right() -> None:
    """Memory formats of the weight and the input change nothing of the answer."""
    layer, x = adapt(convolution(2, "everything")), signal(2)
    expected = layer(x)
    last = copy.deepcopy(layer).to(memory_format=torch.channels_last)

    for candidate, image in itertools.product((layer, last), (x, x.to(memory_format=torch.channels_last))):
        assert_close(candidate(image), expected)
    set_merged(last.eval(), True)
    assert_close(last(x), expected)


def test_adopting_a_channels_last_weight_is_right() -> None:
    """A weight that was channels-last when it was adopted has the same formula."""
    layer = adapt(convolution(2, "plain").to(memory_format=torch.channels_last))
    x = signal(2)
    expected = formula(layer, x, layer.lora_B.detach(), layer.lora_A.detach(), 1.5, "balanced")

    assert_close(layer(x), expected)
    for name, gradient in gradients_by_formula(layer, x, "balanced").items():
        assert_close(gradients(layer, x)[name], gradient)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_inputs_need_not_be_contiguous(dropout: float) -> None:
    """A transposed, expanded or strided input gives what its contiguous copy gives."""
    torch.manual_seed(0)
    linear, conv = adapt(nn.Linear(5, 7).double(), dropout=dropout), adapt(convolution(2, "groups"), dropout=dropout)
    wide = torch.randn(5, 6, dtype=torch.float64)
    cases = [(linear, wide.T), (linear, wide[:, :1].T.expand(4, 5)), (linear, torch.randn(3, 10, dtype=torch.float64)[:, ::2])]
    cases += [(conv, torch.randn(2, 8, 7, 4, dtype=torch.float64).permute(0, 3, 1, 2)), (conv, signal(2)[:1].expand(3, -1, -1, -1))]
    for layer, x in cases:
        assert not x.is_contiguous()
        assert_close(layer.eval()(x), layer(x.contiguous()))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_an_empty_batch_is_answered(dropout: float) -> None:
    """No examples in, no examples out, and gradients that are zero."""
    for layer, x in ((nn.Linear(5, 7), torch.empty(0, 5)), (nn.Conv2d(4, 6, 3), torch.empty(0, 4, 5, 5))):
        adapt(layer, dropout=dropout)
        expected = copy.deepcopy(layer).eval()(x).shape

        output = layer(x)
        output.sum().backward()

        assert output.shape == expected
        assert not layer.lora_A.grad.any()  # type: ignore[union-attr, operator]


def test_an_unbatched_image_is_answered() -> None:
    """A convolution without a batch axis gives the one image's answer."""
    layer, x = adapt(convolution(2, "same")), signal(2)

    assert_close(layer(x[0]), layer(x)[0])


def test_autocast_agrees_merged_and_not() -> None:
    """Under autocast a convolution gives the same merged and unmerged, in the autocast dtype."""
    layer, x = adapt(convolution(2, "plain", torch.float32)).eval(), signal(2, torch.float32)

    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        unmerged = layer(x)
        set_merged(layer, True)
        merged = layer(x)

    assert unmerged.dtype is torch.bfloat16
    assert torch.equal(merged, unmerged)


def test_a_linear_under_autocast_is_within_its_rounding() -> None:
    """Under autocast a Linear layer is within the format's rounding of the formula."""
    torch.manual_seed(0)
    layer, x = adapt(nn.Linear(32, 16)), torch.randn(4, 32)
    expected = formula(layer, x.double(), layer.lora_B.detach().double(), layer.lora_A.detach().double(), 1.5, "balanced")

    with torch.autocast("cpu", torch.bfloat16):
        actual = layer(x)

    assert actual.dtype is torch.bfloat16
    assert_close(actual, expected)


# --- refusals


class OwnForward(nn.Linear):
    """A Linear layer with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        """Read the weight."""
        return input @ self.weight.T


class OwnConvForward(nn.Conv2d):
    """A convolution that standardises its weight, as several architectures do."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight - weight.mean(), bias)


def _enable(layer: nn.Module, **params: Any) -> None:
    from gift_core import enable_fine_tuning

    enable_fine_tuning(nn.Sequential(layer), LoRAAllFineTuningStrategy(**params))


@pytest.mark.parametrize("layer", [OwnForward(4, 3), OwnConvForward(4, 3, 2)], ids=lambda layer: type(layer).__name__)
def test_dropout_into_an_own_forward_is_refused(layer: nn.Module) -> None:
    """Dropout that could not be applied is refused, not forgotten; without dropout the layer is adapted."""
    layer = copy.deepcopy(layer)

    with pytest.raises(SiteError, match="set lora_dropout=0"):
        _enable(layer, lora_dropout=0.1)
    assert not isinstance(layer, LoRA)

    _enable(layer)
    assert isinstance(layer, LoRA)


def test_an_own_forward_is_kept() -> None:
    """Subclasses with a forward of their own, or a convolution's inner one, keep it and read the effective weight."""
    torch.manual_seed(0)
    linear, conv = OwnForward(4, 3).double(), OwnConvForward(4, 6, (3, 2)).double()
    x, image = torch.randn(2, 4).double(), signal(2)
    for layer in (linear, conv):
        adapt(layer)
    weights = [
        layer._parameters["weight"] + update_by_index(layer._parameters["weight"].shape, layer.lora_B, layer.lora_A, 1.5, "balanced")
        for layer in (linear, conv)
    ]

    assert_close(linear(x), x @ weights[0].T)
    assert_close(conv(image), F.conv2d(image, weights[1] - weights[1].mean(), conv.bias))


@pytest.mark.parametrize("params", [{}, {"adapter_dtype": "float32"}, {"init": "orthogonal"}, {"use_dora": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_a_dtype_without_arithmetic_is_refused(dtype: torch.dtype, params: dict[str, Any]) -> None:
    """A weight in a dtype that torch only stores is refused at planning, by name and with a way out that works."""
    model = nn.Sequential(nn.ReLU(), nn.Linear(4, 3).to(dtype))
    strategy = LoRAAllFineTuningStrategy(rank=2, **params)

    with pytest.raises(SiteError, match=rf"'1' \(Linear\): its 'weight' is in {dtype}, .*call to\(torch.bfloat16\) first, or exclude"):
        plan_fine_tuning(model, strategy)

    enable_fine_tuning(model.to(torch.bfloat16), strategy)
    assert model(torch.ones(2, 4, dtype=torch.bfloat16)).dtype is torch.bfloat16


def test_an_empty_weight_is_refused() -> None:
    """A weight without numbers has no low-rank update."""
    with pytest.warns(UserWarning, match="zero-element"):
        layer = nn.Linear(0, 3)

    with pytest.raises(SiteError, match=r"shape \(3, 0\)"):
        _enable(layer)


@pytest.mark.parametrize("dropout", [0.0, 0.01])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: nn.Linear(512, 256), (64, 512)),
        (lambda: nn.Linear(512, 32), (4, 512)),
        (lambda: nn.Conv2d(256, 512, 3, padding=1), (2, 256, 4, 4)),
        (lambda: nn.Conv2d(256, 512, 1), (2, 256, 4, 4)),
        (lambda: nn.Conv2d(64, 8, 3), (2, 64, 24, 24)),
        (lambda: nn.Conv1d(256, 512, 3), (2, 256, 8)),
    ],
    ids=["Linear", "small Linear", "Conv2d", "pointwise", "large images", "Conv1d"],
)
def test_a_large_scaling_leaves_half_precision_finite(layer: Callable[[], nn.Module], shape: tuple[int, ...], dropout: float) -> None:
    """What float16 has no room for, the scaling times the thin product, is never formed: B is zero, and the layer as it was."""
    torch.manual_seed(0)
    base = layer().half()
    x = (torch.randn(shape) * 300).half()
    expected = base(x)
    model = nn.Sequential(base)
    enable_fine_tuning(model, LoRAAllFineTuningStrategy(rank=1, lora_alpha=4096, lora_dropout=dropout))

    given = model(x.requires_grad_())
    gradients = torch.autograd.grad(given.float().mean(), [x, *model.parameters()])

    assert expected.isfinite().all()
    assert torch.equal(given, expected)
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_a_conv1d_of_transformers_keeps_the_name_of_its_input() -> None:
    """Its input is called ``x``, and a model may say so."""
    utils = pytest.importorskip("transformers.pytorch_utils", reason="transformers is not installed")
    layer, x = utils.Conv1D(3, 4), torch.randn(2, 4)
    expected = layer(x=x)
    _enable(layer)

    assert torch.equal(layer(x=x), expected)
