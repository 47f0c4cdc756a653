"""`low_rank_conv` against torch's own layers holding the effective weight."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from gift_lora_plugin import convolution
from gift_lora_plugin.convolution import low_rank_conv
from gift_lora_plugin.lowrank import CONV_LAYOUTS, matrix_shape

SCALING = 0.7
LAYERS = {
    "plain": lambda: nn.Conv2d(4, 6, 3),
    "1x1, strided": lambda: nn.Conv2d(4, 6, 1, stride=2),
    "uneven": lambda: nn.Conv2d(4, 6, (2, 3), stride=(2, 1), padding=(2, 0), dilation=(1, 2)),
    "groups": lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1),
    "no bias": lambda: nn.Conv2d(4, 6, 3, bias=False),
    "same": lambda: nn.Conv2d(4, 6, (2, 3), padding="same"),
    "valid": lambda: nn.Conv2d(4, 6, 3, padding="valid"),
    "circular": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
    "reflect, same": lambda: nn.Conv2d(4, 6, (2, 3), padding="same", padding_mode="reflect"),
    "replicate": lambda: nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="replicate"),
    "one dimension": lambda: nn.Conv1d(4, 6, 3, padding=1),
    "three dimensions": lambda: nn.Conv3d(4, 6, (1, 2, 3), padding=1),
}


def draw(layer: nn.Module, conv_layout: str) -> tuple[Tensor, Tensor, Tensor]:
    """An input and the two factors for the layer, all of them to be trained."""
    rows, columns = matrix_shape(layer.weight.shape, conv_layout)
    shapes = [(2, 4, *[7] * (layer.weight.dim() - 2)), (2, columns), (rows, 2)]
    return tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)


def tuned(layer: nn.Module, input: Tensor, lora_A: Tensor, lora_B: Tensor, dropout: float = 0.0) -> Tensor:
    """The function under test, with the settings of the layer."""
    settings = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups", "padding_mode")}
    return low_rank_conv(input, layer.weight, layer.bias, lora_A, lora_B, SCALING, dropout, **settings)


def oracle(layer: nn.Module, input: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """The layer itself with the effective weight."""
    effective = layer.weight + SCALING * (lora_B @ lora_A).view(layer.weight.shape)
    return torch.func.functional_call(layer, {"weight": effective}, (input,))


def with_gradients(output: Tensor, tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """The output, and the gradients of the tensors."""
    weights = torch.arange(output.numel(), dtype=torch.float64).cos().view(output.shape)
    return [output, *torch.autograd.grad((output * weights).sum(), tensors)]


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")  # torch's own, of its own layer too
@pytest.mark.parametrize("conv_layout", CONV_LAYOUTS)
@pytest.mark.parametrize("build", LAYERS.values(), ids=LAYERS)
def test_it_is_the_layer_with_the_effective_weight(build, conv_layout):
    """For every setting of a convolution, numbers and gradients are those of the layer holding the effective weight."""
    torch.manual_seed(0)
    layer = build().double().requires_grad_(False)
    tensors = draw(layer, conv_layout)

    got = with_gradients(tuned(layer, *tensors), tensors)

    torch.testing.assert_close(got, with_gradients(oracle(layer, *tensors), tensors))


def test_channels_last_and_an_empty_batch():
    """The memory format of the input changes no number, and a batch of none gives none."""
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3).double().requires_grad_(False)
    tensors = draw(layer, "balanced")
    input, *factors = tensors
    channels_last = input.detach().to(memory_format=torch.channels_last).requires_grad_(True)

    got = with_gradients(tuned(layer, channels_last, *factors), (channels_last, *factors))

    torch.testing.assert_close(got, with_gradients(oracle(layer, *tensors), tensors))
    assert tuned(layer, input[:0], *factors).shape == (0, 6, 5, 5)


def test_dropout_is_of_the_input_of_the_update_alone():
    """With everything dropped the layer is the frozen one; the seed decides what is dropped."""
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3).double().requires_grad_(False)
    tensors = draw(layer, "balanced")

    def seeded() -> Tensor:
        torch.manual_seed(1)
        return tuned(layer, *tensors, dropout=0.5)

    torch.testing.assert_close(tuned(layer, *tensors, dropout=1.0), layer(tensors[0]))
    assert torch.equal(seeded(), seeded())
    assert not torch.allclose(seeded(), tuned(layer, *tensors))


# channels in and out, side of the image, settings; where the taps of the thin convolution are, and whether the weight is built
SIZES = {
    "taps on the thin image": (24, 24, 4, {}, "_TapsOnImage", False),
    "weight": (12, 12, 12, {}, "_TapsOnImage", True),
    "taps on the input": (2, 64, 8, {"stride": 4, "kernel_size": 4}, "_TapsOnInput", False),
    "weight, taps on the input": (2, 6, 12, {"stride": 2}, "_TapsOnInput", True),
    "more taps than channels": (4, 24, 3, {}, "_TapsOnInput", False),
    "border beyond the kernel": (24, 24, 4, {"padding": 3}, "_TapsOnInput", False),
    "strided, dilated": (24, 24, 7, {"stride": (2, 1), "dilation": (1, 2), "padding": (1, 2)}, "_TapsOnImage", False),
    "one tap": (24, 24, 3, {"kernel_size": 1}, "_OneTap", False),
    "one tap, strided": (24, 24, 4, {"kernel_size": 1, "stride": (2, 1)}, "_OneTap", False),
    "one tap, weight": (4, 6, 7, {"kernel_size": 1}, "_OneTap", True),
    "one tap, many pixels": (4, 6, 17, {"kernel_size": 1}, "_OneTap", True),
    "one tap, padded": (24, 24, 3, {"kernel_size": 1, "padding": 1}, "_TapsOnInput", False),
    "one tap, strided, weight": (4, 6, 7, {"kernel_size": 1, "stride": 2}, "_TapsOnInput", True),
}


@pytest.mark.parametrize("name", SIZES)
def test_the_choice_of_a_way(name, monkeypatch):
    """The sizes above take every way through the function, which the tests below rely on."""
    ways = []
    node = convolution._LowRankConv
    monkeypatch.setattr(convolution, "_LowRankConv", SimpleNamespace(apply=lambda *given: ways.append(given[-1]) or node.apply(*given)))
    layer, tensors = of_size(name, torch.float32)
    tuned(layer, *tensors)

    assert [(way.taps.__name__, way.builds_weight) for way in ways] == [SIZES[name][4:]]


def of_size(name: str, dtype: torch.dtype) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A layer, and an input and factors for it, of the size that takes one of the ways through the function."""
    channels, out, side, settings, *_ = SIZES[name]
    torch.manual_seed(0)
    layer = nn.Conv2d(channels, out, **({"kernel_size": 3} | settings)).to(dtype).requires_grad_(False)
    rows, columns = matrix_shape(layer.weight.shape, "out_as_h")
    shapes = [(2, channels, side, side), (2, columns), (rows, 2)]
    return layer, tuple(torch.randn(shape).to(dtype).requires_grad_() for shape in shapes)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4), (torch.bfloat16, 6e-2), (torch.float16, 1e-2)]
)
def test_every_way_gives_the_same_numbers(name, dtype, tolerance):
    """Whichever way the sizes choose, numbers and gradients are the oracle's in every precision, relative to the largest."""
    layer, tensors = of_size(name, dtype)
    exact = tuple(tensor.detach().double().requires_grad_() for tensor in tensors)

    got = with_gradients(tuned(layer, *tensors), tensors)
    expected = with_gradients(oracle(layer.double(), *exact), exact)

    for mine, theirs in zip(got, expected, strict=True):
        assert (mine.double() - theirs).abs().max() <= tolerance * theirs.abs().max()


@pytest.mark.parametrize("name", SIZES)
def test_dropout_is_that_of_two_convolutions(name):
    """With one seed, numbers and gradients are those of the frozen layer plus the update of what torch's dropout leaves."""
    layer, tensors = of_size(name, torch.float64)
    input, lora_A, lora_B = tensors

    torch.manual_seed(1)
    got = with_gradients(tuned(layer, *tensors, dropout=0.3), tensors)
    torch.manual_seed(1)
    dropped = nn.functional.dropout(input, 0.3)
    update = SCALING * (lora_B @ lora_A).view(layer.weight.shape)
    given = torch.func.functional_call(layer, {"weight": update, "bias": torch.zeros_like(layer.bias)}, (dropped,))
    expected = with_gradients(layer(input) + given, tensors)

    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", SIZES)
def test_factors_in_single_precision_on_a_layer_in_half(name):
    """Numbers and gradients are the oracle's within the rounding of the layer's precision, those of the factors in their own dtype."""
    layer, (input, *factors) = of_size(name, torch.bfloat16)
    tensors = (input, *(factor.detach().float().requires_grad_() for factor in factors))
    exact = tuple(tensor.detach().double().requires_grad_() for tensor in tensors)

    got = with_gradients(tuned(layer, *tensors), tensors)
    expected = with_gradients(oracle(layer.double(), *exact), exact)

    assert [each.dtype for each in got] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    for mine, theirs in zip(got, expected, strict=True):
        assert (mine.double() - theirs).abs().max() <= 2e-2 * theirs.abs().max()


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("name", SIZES)
def test_an_empty_batch(name, dropout):
    """Of no samples every way gives none, and gradients that are zero in the shapes of the factors."""
    layer, (input, *factors) = of_size(name, torch.float32)
    empty = input.detach()[:0].requires_grad_()

    got = with_gradients(tuned(layer, empty, *factors, dropout=dropout), (empty, *factors))

    assert torch.equal(got[0], layer(empty))
    assert [gradient.shape for gradient in got[1:]] == [empty.shape, *(factor.shape for factor in factors)]
    assert not any(gradient.any() for gradient in got[1:])


@pytest.mark.parametrize("stride", [1, (2, 3)])
@pytest.mark.parametrize("side", [3, 17, 50], ids="{0} x {0}".format)
@pytest.mark.parametrize("images", [0, 1, 3])
def test_a_pointwise_convolution_goes_back_to_its_input_by_products(images, side, stride, monkeypatch):
    """Without torch's own backward pass for the input, which is slower, for few and for many pixels, images and strides."""
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 1, stride=stride).double().requires_grad_(False)
    tensors = (torch.randn(images, 4, side, side, dtype=torch.float64, requires_grad=True), *draw(layer, "out_as_h")[1:])
    expected = with_gradients(oracle(layer, *tensors), tensors)

    def of_thin_images_alone(grad, input, kernel, settings, *, of_input):
        assert not of_input or len(kernel) == 2
        return torchs_own(grad, input, kernel, settings, of_input=of_input)

    torchs_own = convolution._convolution_backward
    monkeypatch.setattr(convolution, "_convolution_backward", of_thin_images_alone)
    got = with_gradients(tuned(layer, *tensors), tensors)

    torch.testing.assert_close(got, expected)
    assert got[1].is_contiguous()


def test_a_gradient_in_another_order_goes_back_by_torchs_own():
    """So that the gradient of an input in channels-last order is in that order, as torch's kernels for it give it."""
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 1).double().requires_grad_(False)
    input, *factors = draw(layer, "out_as_h")
    tensors = (input.detach().to(memory_format=torch.channels_last).requires_grad_(), *factors)
    last = torch.randn(2, 6, 7, 7, dtype=torch.float64).to(memory_format=torch.channels_last)

    got, expected = (torch.autograd.grad(made(layer, *tensors), tensors, last) for made in (tuned, oracle))

    torch.testing.assert_close(got, expected)
    assert got[0].stride() == expected[0].stride()
    assert got[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", SIZES)
def test_gradients_of_gradients(name):
    """The backward pass can be differentiated again, whichever way was taken."""
    layer, tensors = of_size(name, torch.float64)
    small = tuple(tensor.detach()[..., :8, :8].clone().requires_grad_() if tensor.dim() == 4 else tensor for tensor in tensors)

    assert torch.autograd.gradcheck(lambda *given: tuned(layer, *given), small, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda *given: tuned(layer, *given), small, fast_mode=True)


@pytest.mark.parametrize("name", SIZES)
def test_no_weight_of_full_size_is_kept(name):
    """For the backward pass the layer keeps its input, its parameters, and at most a thin image."""
    layer, tensors = of_size(name, torch.float32)
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.data_ptr()) or tensor, lambda tensor: tensor):
        output = tuned(layer, *tensors)
    own = {tensor.data_ptr() for tensor in (layer.weight, *tensors)}
    extra = [pointer for pointer in kept if pointer not in own]

    assert output.requires_grad
    assert len(extra) <= 1


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("backward_inside", [False, True])
@pytest.mark.parametrize("forward_inside", [False, True])
def test_autocast(name, forward_inside, backward_inside):
    """Autocast around forward, backward or both: the layer gives the frozen layer's dtype, and float32 gradients near the oracle's."""
    layer, tensors = of_size(name, torch.float32)
    expected = with_gradients(oracle(layer, *tensors), tensors)
    with torch.autocast("cpu", torch.bfloat16, enabled=forward_inside):
        output = tuned(layer, *tensors)
        plain = layer(tensors[0])
    weights = torch.arange(output.numel(), dtype=torch.float64).cos().view(output.shape)
    with torch.autocast("cpu", torch.bfloat16, enabled=backward_inside):
        gradients = torch.autograd.grad((output * weights).sum(), tensors)

    assert output.dtype == plain.dtype
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    for mine, theirs in zip([output, *gradients], expected, strict=True):
        assert (mine - theirs).abs().max() <= 6e-2 * theirs.abs().max()


@pytest.mark.parametrize("name", SIZES)
def test_batched_gradients(name):
    """Several backward passes at once, as `torch.autograd.functional.jacobian` batches them, give what one after another gives."""
    layer, tensors = of_size(name, torch.float64)
    output = tuned(layer, *tensors)
    given = torch.randn(3, *output.shape, dtype=torch.float64)

    batched = torch.autograd.grad(output, tensors, given, is_grads_batched=True, retain_graph=True)

    each = [torch.autograd.grad(output, tensors, one, retain_graph=True) for one in given]
    torch.testing.assert_close(batched, tuple(torch.stack(parts) for parts in zip(*each, strict=True)))


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("of_input", [torch.contiguous_format, torch.channels_last])
def test_a_channels_last_weight_starts_as_the_layer(name, of_input):
    """With B at zero the layer gives the frozen layer's bits in its strides, whatever the memory formats of input and weight."""
    layer, (input, lora_A, lora_B) = of_size(name, torch.float32)
    layer = layer.to(memory_format=torch.channels_last)
    input = input.detach().contiguous(memory_format=of_input)
    with torch.no_grad():
        got, expected = tuned(layer, input, lora_A, torch.zeros_like(lora_B)), layer(input)

    assert torch.equal(got, expected)
    assert got.stride() == expected.stride()
