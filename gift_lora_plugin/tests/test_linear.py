"""`low_rank_linear` against the formula of the effective weight."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gift_lora_plugin import linear
from gift_lora_plugin.fusion import packed, unpacked
from gift_lora_plugin.linear import low_rank_linear

SCALING = 0.7
PATHS = [linear._fused, linear._reference, linear._by_effective_weight]


def draw(*batch: int, dtype: torch.dtype = torch.float64, adapter: torch.dtype | None = None, size: int = 6) -> dict[str, Tensor]:
    """The arguments of a small layer, drawn from one seed."""
    torch.manual_seed(0)
    adapter = adapter or dtype
    return {
        "input": torch.randn(*batch, size, dtype=dtype, requires_grad=True),
        "weight": torch.randn(7, size, dtype=dtype),
        "bias": torch.randn(7, dtype=dtype),
        "lora_A": torch.randn(2, size, dtype=adapter, requires_grad=True),
        "lora_B": torch.randn(7, 2, dtype=adapter, requires_grad=True),
    }


def oracle(input: Tensor, weight: Tensor, bias: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """The formula, word for word."""
    return F.linear(input, weight + SCALING * lora_B @ lora_A, bias)


def with_gradients(output: Tensor, tensors: dict[str, Tensor]) -> list[Tensor]:
    """The output, and the gradients of whatever trains."""
    wanted = [tensor for tensor in tensors.values() if tensor.requires_grad]
    weights = torch.arange(output.numel(), dtype=torch.float64).cos().view(output.shape).to(output.dtype)
    return [output, *torch.autograd.grad((output * weights).sum(), wanted)]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("batch", [(), (5,), (3, 5), (0,), (2, 0, 4)])
def test_every_path_is_the_formula(path, batch):
    """Each path gives the numbers and the gradients of the effective weight, for any number of leading dimensions and none."""
    tensors = draw(*batch)

    got = with_gradients(path(*tensors.values(), SCALING, 0.0), tensors)

    torch.testing.assert_close(got, with_gradients(oracle(**tensors), tensors))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_first_and_second_derivatives_are_right(dropout):
    """The backward pass of the one node agrees with finite differences, and so does its own derivative."""
    tensors = draw(3, 2)

    def tuned(input: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        torch.manual_seed(1)
        return linear._fused(input, tensors["weight"], tensors["bias"], lora_A, lora_B, SCALING, dropout)

    inputs = (tensors["input"], tensors["lora_A"], tensors["lora_B"])

    assert torch.autograd.gradcheck(tuned, inputs)
    assert torch.autograd.gradgradcheck(tuned, inputs)


@pytest.mark.parametrize("wanted", ["input", "lora_A", "lora_B"])
def test_a_gradient_alone_is_that_among_others(wanted):
    """Leaving out the gradients that nobody needs changes none that somebody does."""
    tensors = draw(5)
    expected = dict(zip(("input", "lora_A", "lora_B"), with_gradients(oracle(**tensors), tensors)[1:], strict=True))[wanted]
    for name in ("input", "lora_A", "lora_B"):
        tensors[name].requires_grad_(name == wanted)

    got = with_gradients(linear._fused(*tensors.values(), SCALING, 0.0), tensors)[1]

    torch.testing.assert_close(got, expected)


def test_paths_drop_the_same_numbers():
    """The seed, and not the path, decides what dropout drops."""
    tensors = draw(50)

    torch.manual_seed(3)
    fused = with_gradients(linear._fused(*tensors.values(), SCALING, 0.4), tensors)
    torch.manual_seed(3)
    reference = with_gradients(linear._reference(*tensors.values(), SCALING, 0.4), tensors)

    torch.testing.assert_close(fused, reference)


def test_dropping_everything_leaves_the_frozen_layer():
    """A dropout of 1 leaves what the frozen layer gives."""
    tensors = big()

    got = low_rank_linear(*tensors.values(), SCALING, dropout=1.0)

    torch.testing.assert_close(got, F.linear(tensors["input"], tensors["weight"], tensors["bias"]))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3), (torch.float32, 1e-5)])
@pytest.mark.parametrize("adapter", [None, torch.float32])
def test_low_precision_stays_near_double(dtype, tolerance, adapter):
    """In each dtype, with the adapter in it or in single precision, numbers and gradients stay within a few roundings of double."""
    tensors = draw(40, dtype=dtype, adapter=adapter, size=32)
    exact = {name: tensor.detach().double().requires_grad_(tensor.requires_grad) for name, tensor in tensors.items()}

    got = with_gradients(linear._fused(*tensors.values(), SCALING, 0.0), tensors)

    for mine, right in zip(got, with_gradients(oracle(**exact), exact), strict=True):
        assert (mine.double() - right).norm() <= tolerance * right.norm()


def test_the_input_is_kept_once_in_its_own_dtype():
    """A single-precision adapter on a bfloat16 layer keeps no second copy of the input for the backward pass."""
    tensors = draw(64, dtype=torch.bfloat16, adapter=torch.float32, size=32)
    kept: list[Tensor] = []

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        linear._fused(*tensors.values(), SCALING, 0.0)

    large = [tensor for tensor in kept if tensor.numel() >= tensors["input"].numel()]
    assert [tensor.data_ptr() for tensor in large] == [tensors["input"].data_ptr()]


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_repeats_the_dropout(reentrant):
    """Under both kinds of gradient checkpointing the recomputed pass drops what the first one dropped."""
    tensors = draw(20)

    torch.manual_seed(5)
    again = checkpoint(linear._fused, *tensors.values(), SCALING, 0.4, use_reentrant=reentrant)
    got = [again, *torch.autograd.grad(again.sum(), [tensors["lora_A"]])] if not reentrant else [again]
    if reentrant:  # it allows no torch.autograd.grad
        again.sum().backward()
        got.append(tensors["lora_A"].grad)
    torch.manual_seed(5)
    once = linear._fused(*tensors.values(), SCALING, 0.4)

    torch.testing.assert_close(got, [once, *torch.autograd.grad(once.sum(), [tensors["lora_A"]])])


def big() -> dict[str, Tensor]:
    """Large enough not to be taken for a tiny layer."""
    torch.manual_seed(0)
    shapes = {"input": (6, 130), "weight": (128, 130), "bias": (128,), "lora_A": (2, 130), "lora_B": (128, 2)}
    trains = ("input", "lora_A", "lora_B")
    return {name: torch.randn(shape, dtype=torch.float64, requires_grad=name in trains) for name, shape in shapes.items()}


def test_the_choice_of_a_path():
    """Tiny layers build the weight, others take the one node, and what autograd must see takes the reference formula."""
    frozen_A, trained_weight = big(), big()
    frozen_A["lora_A"].requires_grad_(False)
    trained_weight["weight"].requires_grad_(True)

    def chosen(tensors: dict[str, Tensor]) -> object:
        return linear._path(*tensors.values(), 0.0)

    assert chosen(draw(5)) is linear._by_effective_weight
    assert chosen(big()) is linear._fused
    assert chosen(frozen_A) is chosen(trained_weight) is linear._reference


@pytest.mark.parametrize("shape", [(6, 260), (6, 65), (65,), (2, 3, 260), ()])
def test_a_wrong_width_is_refused(shape):
    """An input whose last size is not the layer's gives torch's own error, never other rows."""
    tensors = big()
    tensors["input"] = torch.randn(shape, dtype=torch.float64)

    with pytest.raises(RuntimeError, match=r"shapes cannot|size mismatch|at least 1D"):
        low_rank_linear(*tensors.values(), SCALING)


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's own, of nested and sparse tensors being young
def test_nested_and_sparse_inputs():
    """What torch's linear map takes besides dense tensors, a layer of any size takes as well."""
    tensors = big()
    rows = torch.randn(5, 130, dtype=torch.float64)
    expected = oracle(**tensors | {"input": rows})

    nested = low_rank_linear(*(tensors | {"input": torch.nested.nested_tensor([rows[:2], rows[2:]])}).values(), SCALING)
    sparse = low_rank_linear(*(tensors | {"input": rows.to_sparse_csr()}).values(), SCALING)

    torch.testing.assert_close(torch.cat(nested.unbind()), expected)
    torch.testing.assert_close(sparse, expected)


def test_a_tiny_layer_exports_for_any_batch():
    """A program for every batch size can be made of a layer whose way depends on the batch, and gives the same numbers."""
    tensors = {name: tensor.detach() for name, tensor in draw(5).items()}
    layer = torch.nn.Linear(6, 6).double()
    layer.forward = lambda input: low_rank_linear(input, *list(tensors.values())[1:], SCALING)

    program = torch.export.export(layer, (tensors["input"],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    many = torch.randn(3000, tensors["input"].shape[1], dtype=torch.float64)

    torch.testing.assert_close(program.module()(many), oracle(**tensors | {"input": many}))


@pytest.mark.parametrize("backward_inside", [False, True])
@pytest.mark.parametrize("forward_inside", [False, True])
def test_autocast_around_either_pass(forward_inside, backward_inside):
    """Autocast around forward, backward or both gives float32 gradients near the formula's."""
    tensors = {name: tensor.detach().float().requires_grad_(tensor.requires_grad) for name, tensor in big().items()}
    wanted = [tensor for tensor in tensors.values() if tensor.requires_grad]
    expected = torch.autograd.grad(oracle(**tensors).sum(), wanted)
    with torch.autocast("cpu", torch.bfloat16, enabled=forward_inside):
        output = low_rank_linear(*tensors.values(), SCALING)
    with torch.autocast("cpu", torch.bfloat16, enabled=backward_inside):
        gradients = torch.autograd.grad(output.float().sum(), wanted)

    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    for mine, theirs in zip(gradients, expected, strict=True):
        assert (mine - theirs).abs().max() <= 6e-2 * theirs.abs().max()


def test_a_trained_weight_gets_its_gradient():
    """A weight and a bias that train after all get the gradients of the effective weight."""
    tensors = big()
    for name in ("weight", "bias"):
        tensors[name].requires_grad_(True)

    got = with_gradients(low_rank_linear(*tensors.values(), SCALING), tensors)

    torch.testing.assert_close(got, with_gradients(oracle(**tensors), tensors))


def tuned_of(tensors: dict[str, Tensor]):
    """The function under test and the formula, both of what may train, and its arguments."""

    def tuned(input: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        return low_rank_linear(input, tensors["weight"], tensors["bias"], lora_A, lora_B, SCALING)

    def expected(input: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        return oracle(input, tensors["weight"], tensors["bias"], lora_A, lora_B)

    return tuned, expected, tuple(tensors[name] for name in ("input", "lora_A", "lora_B"))


TRANSFORMS = {
    "vmap": lambda function, inputs: torch.vmap(function, in_dims=(0, None, None))(*inputs),
    "per-sample gradients": lambda function, inputs: torch.vmap(
        torch.func.grad(lambda A, x, B: function(x, A, B).sum()), in_dims=(None, 0, None)
    )(inputs[1], inputs[0], inputs[2]),
    "jvp": lambda function, inputs: torch.func.jvp(function, inputs, tuple(torch.ones_like(tensor) for tensor in inputs))[1],
    "jacrev": lambda function, inputs: torch.func.jacrev(function, argnums=2)(*inputs),
    "dual numbers": lambda function, inputs: tangent(function, inputs),
    "compile": lambda function, inputs: torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs),
}


def tangent(function, inputs):
    """The derivative along A, by dual numbers."""
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(inputs[1].detach(), torch.ones_like(inputs[1]))
        return torch.autograd.forward_ad.unpack_dual(function(inputs[0].detach(), dual, inputs[2].detach())).tangent


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # torch's own, at the first forward-mode pass
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms_give_what_they_give_of_the_formula(transform):
    """What torch.func, forward-mode differentiation and the compiler make of the function is what they make of the formula."""
    tuned, expected, inputs = tuned_of(big())

    torch.testing.assert_close(transform(tuned, inputs), transform(expected, inputs))


def test_autocast_multiplies_in_its_dtype():
    """Under autocast the output has autocast's dtype, gradients keep their tensors' own, and both are near the exact ones."""
    tensors = {name: tensor.detach().float().requires_grad_(tensor.requires_grad) for name, tensor in big().items()}
    exact = big()

    with torch.autocast("cpu", torch.bfloat16):
        output = low_rank_linear(*tensors.values(), SCALING)
    got = with_gradients(output, tensors)

    assert output.dtype is torch.bfloat16 and {gradient.dtype for gradient in got[1:]} == {torch.float32}
    for mine, right in zip(got, with_gradients(oracle(**exact), exact), strict=True):
        assert (mine.double() - right).norm() <= 3e-2 * right.norm()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_inference_gives_the_same_numbers(context):
    """Without gradients the numbers are those of training."""
    tensors = big()

    with context():
        got = low_rank_linear(*tensors.values(), SCALING)

    torch.testing.assert_close(got, oracle(**tensors).detach())


def test_the_output_may_be_written_in_place():
    """An activation that works in place may follow, with one leading dimension or several."""
    tensors = big()
    tensors["input"] = tensors["input"].detach().view(2, 3, -1).requires_grad_(True)

    got = nn.ReLU(inplace=True)(low_rank_linear(*tensors.values(), SCALING))

    torch.testing.assert_close(with_gradients(got, tensors), with_gradients(torch.relu(oracle(**tensors)), tensors))


def test_any_strides_are_welcome():
    """Transposed inputs, and a gradient that is one number expanded, give what contiguous ones give."""
    tensors = big()
    tensors["input"] = torch.randn(3, 130, 2, dtype=torch.float64).transpose(1, 2).requires_grad_(True)

    got = torch.autograd.grad(low_rank_linear(*tensors.values(), SCALING).sum(), [tensors["input"], tensors["lora_B"]])

    torch.testing.assert_close(got, torch.autograd.grad(oracle(**tensors).sum(), [tensors["input"], tensors["lora_B"]]))


@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5), (64,), (2, 3, 4, 5)])
def test_a_kept_mask_takes_a_bit_a_number(shape):
    """A mask comes back as it was from an eighth of its bytes, in any memory format."""
    torch.manual_seed(0)
    mask = torch.rand(shape) < 0.5
    formats = [mask] if mask.dim() != 4 else [mask, mask.to(memory_format=torch.channels_last)]

    for one in formats:
        bits = packed(one)
        assert bits.nbytes == -(-mask.numel() // 8)
        assert torch.equal(unpacked(bits, one), mask)
    assert unpacked(packed(None), mask) is None
