"""Each variant on each kind of layer, against the papers' equations written in plain tensors, number by number.

The oracle knows no layout: for every parameter it says by hand which matrices the weight holds and which numbers belong to an output.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gift_core import adopt, disable_fine_tuning, enable_fine_tuning, load_adapter, merge, save_adapter, unmerge
from gift_core.errors import GiftError, SiteError
from gift_core.reparameterization import effective_weight, set_merged
from gift_lora_plugin import LoRA, LoRAAllFineTuningStrategy
from gift_lora_plugin.settings import scaling_of

RANK, ALPHA = 2, 3.0
#: The largest difference from the equation in double precision, relative to the largest number compared.
TOLERANCE = {torch.float64: 1e-12, torch.complex128: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}

# --- the layers


class HFConv1D(nn.Module):
    """As transformers' Conv1D, by whose name and module it is recognised."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., nx)`` to ``(..., nf)``."""
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.size()[:-1], self.nf)


HFConv1D.__name__ = HFConv1D.__qualname__ = "Conv1D"
HFConv1D.__module__ = HFConv1D.forward.__module__ = "transformers.pytorch_utils"


class OwnForward(nn.Linear):
    """A Linear layer with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        """Read the weight."""
        return input @ self.weight.T + 1


class Experts(nn.Module):
    """A stack of matrices, applied as ``input @ weight``."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5, 4))

    def forward(self, x: Tensor) -> Tensor:
        """Sum over the experts."""
        return torch.einsum("bi,eio->bo", x, self.weight)


def vectors(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    """An input of numbers."""
    return lambda: (torch.randn(*shape),)


def tokens() -> tuple[Tensor, ...]:
    """An input of tokens, one of them padding."""
    return (torch.tensor([[1, 2, 2], [0, 3, 8]]),)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A layer, its input, and how its weight is read.

    Attributes:
        build: gives the layer.
        inputs: gives what it is called with.
        split: the weight as a stack of matrices ``(blocks, rows, columns)``.
        join: the inverse of ``split``.
        outputs: the weight as ``(outputs, rest)``.
        rescale: multiplies the weight by one number per output.
        name: of the parameter.
        params: handed to the method.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    split: Callable[[Tensor], Tensor]
    join: Callable[[Tensor, torch.Size], Tensor]
    outputs: Callable[[Tensor], Tensor]
    rescale: Callable[[Tensor, Tensor], Tensor]
    name: str = "weight"
    params: dict[str, Any] = dataclasses.field(default_factory=dict)


def first_axis(weight: Tensor, gain: Tensor) -> Tensor:
    """Rescale where the outputs are the first axis."""
    return weight * gain.reshape(-1, *[1] * (weight.dim() - 1))


def in_order(build: Callable[[], nn.Module], inputs: Callable[[], tuple[Tensor, ...]], **given: Any) -> Kind:
    """A layer whose weight is one matrix in memory order with the outputs first."""
    defaults: dict[str, Any] = {
        "split": lambda w: w.flatten(1)[None],
        "join": lambda m, shape: m[0].reshape(shape),
        "outputs": lambda w: w.flatten(1),
        "rescale": first_axis,
    }
    return Kind(build, inputs, **defaults | given)


def transposed_outputs(weight: Tensor) -> Tensor:
    """The numbers of each output channel of a transposed convolution with two groups and four inputs."""
    return torch.stack([weight[2 * group : 2 * group + 2, channel].flatten() for group in range(2) for channel in range(3)])


def transposed_rescale(weight: Tensor, gain: Tensor) -> Tensor:
    """Each output channel of the same, times its number."""
    weight = weight.clone()
    for group, channel in itertools.product(range(2), range(3)):
        weight[2 * group : 2 * group + 2, channel] *= gain[3 * group + channel]
    return weight


balanced = {
    "split": lambda w: torch.cat([w.flatten(1, 1).reshape(w.shape[0], -1)]).reshape(1, w.shape[0] * w.shape[2], -1),
}
KINDS: dict[str, Kind] = {
    "linear": in_order(lambda: nn.Linear(5, 6), vectors(3, 5)),
    "linear without bias": in_order(lambda: nn.Linear(5, 6, bias=False), vectors(2, 3, 5)),
    "own forward": in_order(lambda: OwnForward(5, 6), vectors(3, 5)),
    "conv1d": in_order(lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"), vectors(2, 4, 7)),
    "conv2d": in_order(lambda: nn.Conv2d(4, 6, (3, 2), groups=2, stride=2), vectors(2, 4, 7, 6), **balanced),
    "conv2d out_as_h": in_order(lambda: nn.Conv2d(4, 6, 3, dilation=2), vectors(2, 4, 7, 6), params={"conv_layout": "out_as_h"}),
    "conv3d": in_order(lambda: nn.Conv3d(4, 6, 2, bias=False), vectors(2, 4, 4, 3, 5), **balanced),
    "transposed conv2d": in_order(
        lambda: nn.ConvTranspose2d(4, 6, (3, 2), groups=2, stride=2),
        vectors(2, 4, 4, 3),
        outputs=transposed_outputs,
        rescale=transposed_rescale,
        **balanced,
    ),
    "embedding": in_order(lambda: nn.Embedding(9, 5, padding_idx=0), tokens, outputs=lambda w: w.T, rescale=lambda w, gain: w * gain),
    "embedding bag": in_order(
        lambda: nn.EmbeddingBag(9, 5, mode="mean"), tokens, outputs=lambda w: w.T, rescale=lambda w, gain: w * gain
    ),
    "bilinear": in_order(lambda: nn.Bilinear(3, 4, 5), lambda: (torch.randn(2, 3), torch.randn(2, 4))),
    "attention": in_order(
        lambda: nn.MultiheadAttention(4, 2, batch_first=True),
        lambda: (torch.randn(2, 3, 4),) * 3,
        split=lambda w: w.reshape(3, 4, 4),
        join=lambda m, shape: m.reshape(shape),
        name="in_proj_weight",
    ),
    "lstm": in_order(
        lambda: nn.LSTM(5, 3, 2, batch_first=True),
        vectors(2, 4, 5),
        split=lambda w: w.reshape(4, 3, 5),
        join=lambda m, shape: m.reshape(shape),
        name="weight_ih_l0",
    ),
    "conv1d of transformers": in_order(
        lambda: HFConv1D(6, 5),
        vectors(2, 3, 5),
        split=lambda w: w.T[None],
        join=lambda m, shape: m[0].T,
        outputs=lambda w: w.T,
        rescale=lambda w, gain: w * gain,
    ),
    "experts": in_order(
        Experts,
        vectors(2, 5),
        split=lambda w: w.mT,
        join=lambda m, shape: m.mT,
        outputs=lambda w: w.mT.reshape(12, 5),
        rescale=lambda w, gain: w * gain.reshape(3, 1, 4),
        params={"parameter_layout": "in_out"},
    ),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "orthogonal": {"init": "orthogonal"},
    "pissa": {"init": "pissa"},
    "olora": {"init": "olora"},
    "frozen A": {"freeze_A": True},
    "rslora dora pissa frozen A": {"rslora": True, "dora": True, "init": "pissa", "freeze_A": True},
}


def every_case() -> list[Any]:
    """Every kind of layer with every variant."""
    return [pytest.param(kind, variant, id=f"{kind}, {variant}") for kind, variant in itertools.product(KINDS, VARIANTS)]


every = pytest.mark.parametrize(("kind", "variant"), every_case())


def build(kind: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A plain layer with seeded values."""
    torch.manual_seed(0)
    return KINDS[kind].build().to(dtype)


def inputs_of(kind: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """What the layer is called with, the same every time."""
    torch.manual_seed(1)
    return tuple(given.to(dtype) if given.is_floating_point() else given for given in KINDS[kind].inputs())


def adapted(kind: str, variant: str, dtype: torch.dtype = torch.float64, /, **more: Any) -> nn.Module:
    """A fresh adapted layer, of which only the adapter trains."""
    layer = build(kind, dtype).requires_grad_(False)
    adopt(layer, LoRA, [KINDS[kind].name], rank=RANK, alpha=ALPHA, **KINDS[kind].params | VARIANTS[variant] | more)
    return layer


def part(layer: nn.Module, kind: str, name: str) -> Tensor | None:
    """A tensor that the method registered for the kind's parameter."""
    prefix = "" if KINDS[kind].name == "weight" else f"{KINDS[kind].name}_"
    found: Tensor | None = getattr(layer, prefix + name, None)
    return found


def move(layer: nn.Module) -> None:
    """Move what trains; the row of a padding token has no gradient, so that it stays."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape).to(parameter) * 0.3)
        if isinstance(layer, nn.Embedding):
            layer.lora_B[layer.padding_idx] = 0


def equation(kind: str, variant: str, weight: Tensor, tensors: dict[str, Tensor | None]) -> Tensor:
    """The effective weight by the papers, for factors as ``(blocks, rows, rank)`` and ``(blocks, rank, columns)``."""
    scaling = ALPHA / RANK**0.5 if "rslora" in variant else ALPHA / RANK
    start = KINDS[kind].split(weight)
    direction = torch.zeros_like(start)
    for block in range(len(start)):
        B, A, B0, A0 = (stacked(tensors[name])[block] for name in ("lora_B", "lora_A", "lora_B_init", "lora_A_init"))
        direction[block] = start[block] + scaling * (B @ A - B0 @ A0)
    direction = KINDS[kind].join(direction, weight.shape)
    magnitude = tensors["lora_magnitude"]
    if magnitude is None:
        return direction
    # section 4.3 of the paper: the norm is no part of the gradient
    norms = KINDS[kind].outputs(direction.detach()).abs().square().sum(1).sqrt()
    return KINDS[kind].rescale(direction, magnitude / norms)


def stacked(tensor: Tensor | None) -> Any:
    """With an axis of blocks; zeros where there is no such tensor."""
    if tensor is None:
        return _Zeros()
    return tensor if tensor.dim() == 3 else tensor[None]


class _Zeros:
    """The start of a variant that starts from zero."""

    def __getitem__(self, block: int) -> _Zeros:
        return self

    def __matmul__(self, other: object) -> float:
        return 0.0


NAMES = ("lora_B", "lora_A", "lora_B_init", "lora_A_init", "lora_magnitude")


def tensors_of(layer: nn.Module, kind: str) -> dict[str, Tensor | None]:
    """What the method registered, in double precision."""
    found = {name: part(layer, kind, name) for name in NAMES}
    return {name: None if t is None else precise(t.detach()) for name, t in found.items()}


def precise(tensor: Tensor) -> Tensor:
    """In double precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float64))


def frozen(layer: nn.Module, kind: str) -> Tensor:
    """The frozen weight."""
    weight = layer._parameters[KINDS[kind].name]
    assert weight is not None
    return weight.detach()


def plain_answer(kind: str, weight: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
    """What a plain layer in double precision gives with this weight."""
    layer = build(kind).to(weight.dtype)
    return answer(lambda *given: torch.func.functional_call(layer, {KINDS[kind].name: weight}, given), inputs)


def answer(layer: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Tensor:
    """The output alone where a layer gives more."""
    output = layer(*inputs)
    return output[0] if isinstance(output, tuple) else output


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Within the tolerance of the dtype."""
    assert actual.shape == expected.shape
    assert (precise(actual) - precise(expected)).abs().max() <= TOLERANCE[dtype] * expected.abs().max().clamp_min(1.0)


# --- the start


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("adapter_dtype", [None, "float32"])
def test_the_start_is_the_base_bit_for_bit(kind: str, variant: str, dtype: torch.dtype, adapter_dtype: str | None) -> None:
    """Every variant of every layer starts as the layer was, in train and eval mode, merged and not, in every precision."""
    inputs, plain = inputs_of(kind, dtype), build(kind, dtype).requires_grad_(False)
    layer = adapted(kind, variant, dtype, dtype=adapter_dtype)

    assert torch.equal(effective_weight(layer, KINDS[kind].name), frozen(layer, kind))
    with torch.no_grad():  # torch chooses kernels by requires_grad
        assert torch.equal(answer(layer, inputs), answer(plain, inputs))
        assert torch.equal(answer(layer.eval(), inputs), answer(plain.eval(), inputs))
        set_merged(layer, True)
        assert torch.equal(answer(layer, inputs), answer(plain, inputs))


@every
def test_the_weight_is_not_touched(kind: str, variant: str) -> None:
    """No variant writes the frozen weight, at the start, when it moves, or in a forward pass."""
    layer, before = adapted(kind, variant), build(kind)._parameters[KINDS[kind].name]
    move(layer)
    answer(layer, inputs_of(kind)).sum().backward()

    assert before is not None
    assert torch.equal(frozen(layer, kind), before)


# --- the equation


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_answer_is_the_equations(kind: str, variant: str, dtype: torch.dtype) -> None:
    """The effective weight and the output are the equation's, in train and eval mode, merged and not."""
    layer, inputs = adapted(kind, variant, dtype), inputs_of(kind, dtype)
    move(layer)
    exact = tuple(precise(given) if given.is_floating_point() else given for given in inputs)
    weight = equation(kind, variant, precise(frozen(layer, kind)), tensors_of(layer, kind))
    expected = plain_answer(kind, weight, exact)

    assert_close(effective_weight(layer, KINDS[kind].name), weight, dtype)
    assert_close(answer(layer, inputs), expected, dtype)
    assert answer(layer, inputs).dtype is dtype
    set_merged(layer.eval(), True)
    assert_close(answer(layer, inputs), expected, dtype)


@every
def test_gradients_are_the_equations(kind: str, variant: str) -> None:
    """The gradients of everything that trains, and of the input, are autograd's through the equation."""
    layer, inputs = adapted(kind, variant), inputs_of(kind)
    move(layer)
    tensors = tensors_of(layer, kind)
    leaves = {name: t.requires_grad_() for name, t in tensors.items() if t is not None and not name.endswith("_init")}
    given = tuple(x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs)
    plain_answer(kind, equation(kind, variant, frozen(layer, kind), tensors), given).sin().sum().backward()
    found = tuple(x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs)
    answer(layer, found).sin().sum().backward()

    for name, leaf in leaves.items():
        mine: Any = part(layer, kind, name)
        if name == "lora_A" and "frozen A" in variant:
            assert mine.grad is None
        else:
            assert leaf.grad is not None
            assert_close(mine.grad, leaf.grad, torch.float64)
    for mine, theirs in zip(found, given, strict=True):
        assert mine.grad is None if theirs.grad is None else torch.allclose(mine.grad, theirs.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rank", [1, 2, 4, 9])
@pytest.mark.parametrize("alpha", [None, 3.0])
def test_rslora_divides_by_the_root(rank: int, alpha: float | None) -> None:
    """The scaling is alpha / sqrt(rank), and alpha / rank without rsLoRA."""
    numerator = rank if alpha is None else alpha

    assert scaling_of(rank, alpha, True) == pytest.approx(numerator * rank**-0.5, rel=1e-15)
    assert scaling_of(rank, alpha) == numerator / rank


@pytest.mark.parametrize("kind", KINDS)
def test_doras_magnitude_is_the_norm_of_each_output(kind: str) -> None:
    """The magnitude starts as the norms, one for each output, and an update that scales an output is taken back by it."""
    layer = adapted(kind, "dora")
    magnitude = part(layer, kind, "lora_magnitude")
    norms = KINDS[kind].outputs(frozen(layer, kind)).norm(dim=1)

    assert magnitude is not None
    assert_close(magnitude.detach(), norms, torch.float64)
    move(layer)
    after = KINDS[kind].outputs(effective_weight(layer, KINDS[kind].name)).norm(dim=1)
    assert_close(after, magnitude.abs(), torch.float64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_from_the_weight_trains_its_part(kind: str, init: str) -> None:
    """The factors start as a part of the weight: with them at zero, the effective weight is the rest of it."""
    layer = adapted(kind, init)
    with torch.no_grad():
        part(layer, kind, "lora_B").zero_()  # type: ignore[union-attr]
    weight = frozen(layer, kind)
    rest = KINDS[kind].split(effective_weight(layer, KINDS[kind].name).detach())

    before, after = torch.linalg.svdvals(KINDS[kind].split(weight)), torch.linalg.svdvals(rest)
    rank = torch.linalg.matrix_rank(KINDS[kind].split(weight) - rest)

    assert (rank == RANK).all()
    if init == "pissa" and kind != "embedding":  # of which one row, padding, stays as it is
        assert_close(after[:, : before.shape[1] - RANK], before[:, RANK:], torch.float64)


# --- LoRA-FA


@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_A_is_saved_and_does_not_train(kind: str) -> None:
    """With a frozen A only B trains, and A is in the state dict and no parameter."""
    layer = adapted(kind, "frozen A")
    prefix = "" if KINDS[kind].name == "weight" else f"{KINDS[kind].name}_"

    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {f"{prefix}lora_B"}
    assert f"{prefix}lora_A" in dict(layer.named_buffers())
    assert f"{prefix}lora_A" in layer.state_dict()


def test_a_frozen_A_saves_the_input() -> None:
    """LoRA-FA's point: the wide input of the update is not kept for the backward pass, only its thin image."""

    def kept(freeze_A: bool) -> set[tuple[int, ...]]:
        layer = nn.Linear(64, 32)
        adopt(layer, LoRA, rank=2, freeze_A=freeze_A)
        shapes: set[tuple[int, ...]] = set()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (shapes.add(tuple(t.shape)), t)[1], lambda t: t):
            layer.bias.requires_grad_(False)
            layer(torch.randn(7, 64))
        return shapes

    assert (7, 64) in kept(False)
    assert (7, 64) not in kept(True)


# --- copies, files, merging


@every
def test_copies_and_pickles_compute_the_same(kind: str, variant: str) -> None:
    """A deep copy and a pickle of an adapted layer give the same bits, and are their own."""
    layer, inputs = adapted(kind, variant), inputs_of(kind)
    move(layer)
    expected = answer(layer, inputs)
    copies = [copy.deepcopy(layer)]
    if kind not in ("own forward", "experts", "conv1d of transformers"):  # classes of this file, which pickle does not find
        copies.append(pickle.loads(pickle.dumps(layer)))
    move(layer)

    for twin in copies:
        assert torch.equal(answer(twin, inputs), expected)


@every
def test_a_state_dict_brings_the_variant_over(kind: str, variant: str) -> None:
    """The state dict of a moved layer makes a fresh one compute the same bits, the start that it counts from included."""
    layer, inputs = adapted(kind, variant), inputs_of(kind)
    move(layer)
    torch.manual_seed(5)
    fresh = adapted(kind, variant)
    with torch.no_grad():
        for tensor in (*fresh.parameters(), *fresh.buffers()):
            tensor.normal_()

    fresh.load_state_dict(layer.state_dict())

    assert torch.equal(answer(fresh, inputs), answer(layer, inputs))


# --- complex weights

COMPLEX = ["linear", "linear without bias", "own forward", "conv1d", "conv2d", "conv3d", "transposed conv2d", "experts"]


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", COMPLEX)
def test_complex_weights_follow_the_equation(kind: str, variant: str) -> None:
    """A complex weight has complex factors and a real magnitude; start, answer and gradients are the equation's."""
    layer, inputs = adapted(kind, variant, torch.complex128), tuple(x.to(torch.complex128) for x in inputs_of(kind))
    plain = build(kind).to(torch.complex128)
    magnitude = part(layer, kind, "lora_magnitude")

    assert torch.equal(answer(layer, inputs), answer(plain, inputs))
    assert layer.lora_A.is_complex()  # type: ignore[operator, union-attr]
    assert magnitude is None or not magnitude.is_complex()
    move(layer)
    tensors = tensors_of(layer, kind)
    leaves = {name: t.requires_grad_() for name, t in tensors.items() if t is not None and not name.endswith("_init")}
    expected = plain_answer(kind, equation(kind, variant, frozen(layer, kind), tensors), inputs)
    found = answer(layer, inputs)
    assert_close(found.detach(), expected.detach(), torch.complex128)
    found.abs().sum().backward()
    expected.abs().sum().backward()
    for name, leaf in leaves.items():
        mine: Any = part(layer, kind, name)
        assert mine.grad is None if "frozen A" in variant and name == "lora_A" else (mine.grad - leaf.grad).abs().max() < 1e-9


# --- dropout


DROPS = ["linear", "linear without bias", "conv1d", "conv2d", "conv3d", "conv1d of transformers"]


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("kind", "dtype"), [*((kind, torch.float64) for kind in DROPS), ("linear", torch.complex128), ("conv2d", torch.complex128)]
)
def test_dropout_is_on_the_updates_input(kind: str, dtype: torch.dtype, variant: str) -> None:
    """Training with dropout gives the frozen answer plus the whole update's answer to the dropped input, of DoRA as of the others."""
    layer, (x,) = adapted(kind, variant, dtype, dropout=0.4), inputs_of(kind, dtype)
    move(layer)
    with torch.no_grad():
        torch.manual_seed(7)
        actual = answer(layer, (x,))
        torch.manual_seed(7)
        kept = x * F.dropout(torch.ones(x.shape, dtype=torch.float64), 0.4)
    weight = frozen(layer, kind)
    changed = equation(kind, variant, weight, tensors_of(layer, kind))
    # what was not adapted, the bias, may have moved
    plain = build(kind, dtype)
    plain.load_state_dict({name: layer.state_dict()[name] for name in plain.state_dict()})

    def by(weight: Tensor, x: Tensor) -> Tensor:
        return torch.func.functional_call(plain, {"weight": weight}, (x,))  # type: ignore[no-any-return]

    expected = by(weight, x) + by(changed, kept) - by(weight, kept)

    assert_close(actual, expected.detach(), dtype)
    assert_close(answer(layer.eval(), (x,)), by(changed, x), dtype)


@pytest.mark.parametrize("variant", VARIANTS)
def test_dropout_of_an_embedding_drops_tokens(variant: str) -> None:
    """An embedding's input is one number per token: dropout drops the whole update of a token, and keeps the expectation."""
    layer, (x,) = adapted("embedding", variant, dropout=0.25), inputs_of("embedding")
    move(layer)
    base = F.embedding(x, frozen(layer, "embedding"))
    full = answer(layer.eval(), (x,)) - base
    torch.manual_seed(0)
    draws = torch.stack([answer(layer.train(), (x,)).detach() - base for _ in range(200)])
    dropped = (draws == 0).all(-1)
    changes = (full != 0).any(-1)

    assert torch.allclose(draws[~dropped], (full / 0.75).expand_as(draws)[~dropped], atol=1e-12)
    assert abs(dropped[:, changes].double().mean() - 0.25) < 5 * (0.25 * 0.75 / dropped[:, changes].numel()) ** 0.5


# --- DoRA at its edges


@pytest.mark.parametrize("adapter_dtype", [None, "float32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dora_takes_outputs_that_are_zero(dtype: torch.dtype, adapter_dtype: str | None) -> None:
    """An output whose weights are all zero starts as it is, gives finite gradients, and trains once its weights have moved."""
    layer = nn.Linear(5, 6, dtype=dtype)
    with torch.no_grad():
        layer.weight[2] = 0
    x = torch.randn(3, 5).to(dtype)
    expected = layer(x)
    adopt(layer, LoRA, rank=2, dora=True, dtype=adapter_dtype)
    layer.bias.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1)

    assert torch.equal(layer(x), expected)
    for _ in range(3):
        optimizer.zero_grad()
        (layer(x) - 1).float().square().sum().backward()
        assert all(p.grad.isfinite().all() for p in layer.parameters() if p.grad is not None)
        optimizer.step()
    assert layer.weight[2].any()


@pytest.mark.parametrize("kind", ["linear", "conv2d", "embedding", "conv1d of transformers", "transposed conv2d"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_autocast_starts_as_the_base(kind: str, variant: str) -> None:
    """Under autocast, too, the start is the frozen layer's answer bit for bit, and a moved layer is within the format's rounding."""
    layer, plain = adapted(kind, variant, torch.float32), build(kind, torch.float32).requires_grad_(False)
    inputs = inputs_of(kind, torch.float32)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(answer(layer, inputs), answer(plain, inputs))
    move(layer)
    # anew, because autocast keeps what it has cast until it ends
    with torch.autocast("cpu", torch.bfloat16):
        found = answer(layer, inputs)

    assert_close(found, answer(layer, inputs), torch.bfloat16)


@pytest.mark.parametrize("variant", VARIANTS)
def test_autocast_leaves_embeddings_alone(variant: str) -> None:
    """A frozen table is read in its own precision under autocast, and so is an adapted one."""
    layer, inputs = adapted("embedding", variant, torch.float32), inputs_of("embedding")
    move(layer)
    expected = answer(layer, inputs)

    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(answer(layer, inputs), expected)


# --- the type of the adapter


@every
def test_a_single_precision_adapter_on_a_half_precision_base(kind: str, variant: str) -> None:
    """The adapter is float32, the effective weight is formed in float32 and rounded once, and the answer has the base's type."""
    layer, inputs = adapted(kind, variant, torch.bfloat16, dtype="float32"), inputs_of(kind, torch.bfloat16)
    move(layer)
    registered = {name: t for name in NAMES if (t := part(layer, kind, name)) is not None}
    exact = equation(kind, variant, frozen(layer, kind).double(), tensors_of(layer, kind))
    found = effective_weight(layer, KINDS[kind].name)

    assert {t.dtype for t in registered.values()} == {torch.float32}
    assert found.dtype is answer(layer, inputs).dtype is torch.bfloat16
    # one rounding to eight bits, and the rounding of single precision before it
    assert ((found - exact).abs() <= exact.abs() * 2**-8 + exact.abs().max() * 1e-5).all()


def test_an_adapter_is_never_narrower_than_its_weight() -> None:
    """``float32`` means at least that: a double-precision weight keeps a double-precision adapter."""
    assert adapted("linear", "plain", torch.float64, dtype="float32").lora_A.dtype is torch.float64


# --- embeddings' own settings


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "settings", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"padding_idx": -7}, {"padding_idx": 2, "max_norm": 1.5}], ids=str
)
def test_embeddings_keep_their_settings(settings: dict[str, Any], variant: str) -> None:
    """With each setting an embedding gives the answers and gradients that a plain one gives through the effective weight."""
    torch.manual_seed(0)
    layer = nn.Embedding(9, 5, **settings).double()
    with torch.no_grad():
        layer.weight.add_(0.5)  # torch makes padding zero, which would hide a gradient
    before = layer.weight.detach().clone()
    (x,) = tokens()
    adopt(layer, LoRA, rank=RANK, alpha=ALPHA, **VARIANTS[variant])
    move(layer)
    trained = [p for name, p in layer.named_parameters() if "lora" in name and p.requires_grad]
    effective = layer.weight
    plain = nn.Embedding(9, 5, **settings)
    expected = F.embedding(
        x, effective.clone(), plain.padding_idx, settings.get("max_norm"), 2.0, settings.get("scale_grad_by_freq", False)
    )
    found = layer(x)

    assert_close(found.detach(), expected.detach(), torch.float64)
    for mine, theirs in zip(
        torch.autograd.grad(found.sin().sum(), trained), torch.autograd.grad(expected.sin().sum(), trained), strict=True
    ):
        assert_close(mine, theirs, torch.float64)
    assert torch.equal(frozen(layer, "embedding"), before)


@pytest.mark.parametrize("init", ["kaiming", "pissa", "olora"])
@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_padding_stays_as_it_is(kind: Any, init: str) -> None:
    """Training never moves the row of padding, whatever the factors started from."""
    torch.manual_seed(0)
    layer = kind(9, 5, padding_idx=2)
    with torch.no_grad():
        layer.weight[2] = 1.0
    adopt(layer, LoRA, rank=RANK, init=init)
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        layer(torch.tensor([[1, 2, 3], [2, 2, 5]])).sin().sum().backward()
        optimizer.step()

    assert (layer.weight[2] == 1.0).all()
    assert not torch.equal(layer.weight[1], frozen(layer, "embedding")[1])


def test_sparse_gradients_become_dense() -> None:
    """An embedding with sparse gradients trains its factors with dense ones."""
    layer = nn.Embedding(9, 5, sparse=True)
    adopt(layer, LoRA, rank=2)

    layer(torch.tensor([1, 2])).sum().backward()

    assert layer.lora_B.grad.layout is layer.lora_A.grad.layout is torch.strided  # type: ignore[operator, union-attr]


# --- refusals


@pytest.mark.parametrize(
    ("layer", "params", "says"),
    [
        (lambda: nn.EmbeddingBag(9, 5, sparse=True), {}, "its sparse gradients cannot pass through an effective weight"),
        (lambda: nn.Embedding(9, 5, sparse=True, max_norm=1.0), {}, "its sparse gradients cannot pass"),
        (lambda: nn.Embedding(9, 5, max_norm=1.0), {"lora_dropout": 0.1}, "no dropout can be put into it"),
        (lambda: nn.ConvTranspose2d(4, 4, 2), {"lora_dropout": 0.1}, "no dropout can be put into it"),
        (lambda: nn.Linear(3, 8), {"rank": 4, "init": "pissa"}, "a 8 x 3 matrix has 3, and rank 4 asks for more"),
        (lambda: nn.Linear(3, 8), {"rank": 2, "init": "pissa", "lora_alpha": 0}, "set lora_alpha above zero"),
        (lambda: nn.Linear(3, 8), {"rank": 4, "init": "olora"}, "a 8 x 3 matrix has 3, and rank 4 asks for more"),
    ],
)
def test_what_a_layer_cannot_do_is_refused(layer: Callable[[], nn.Module], params: dict[str, Any], says: str) -> None:
    """What a layer cannot do is refused by name, with the reason, before anything changes."""
    model = nn.Sequential(layer())

    with pytest.raises(SiteError, match=f"'0'.*{says}"):
        enable_fine_tuning(model, LoRAAllFineTuningStrategy(**{"rank": 2, "targets": "0"} | params))
    assert not isinstance(model[0], LoRA)


def test_a_weight_that_is_not_finite_is_refused_and_nothing_changes() -> None:
    """A NaN in a later layer stops a start from the weights, and the layers before it are put back."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        model[1].weight[0, 0] = float("nan")

    with pytest.raises(GiftError, match=r"'1'.*holds a NaN or an infinity"):
        enable_fine_tuning(model, LoRAAllFineTuningStrategy(rank=2, init="pissa"))
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear]


# --- as strategies

AS_STRATEGY: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "orthogonal": {"init": "orthogonal"},
    "pissa": {"init": "pissa"},
    "olora": {"init": "olora"},
    "frozen A": {"freeze_A": True},
    "everything": {"use_rslora": True, "use_dora": True, "init": "pissa", "freeze_A": True, "adapter_dtype": "float32"},
}


class Mixed(nn.Module):
    """Layers of several kinds in one model; takes tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 8)
        self.convolution = nn.Conv1d(8, 8, 3, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.recurrent = nn.GRU(8, 6, batch_first=True)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(batch, length)`` to ``(batch, length, 4)``."""
        seen = self.convolution(self.table(x).mT).mT
        seen = seen + self.attention(seen, seen, seen, need_weights=False)[0]
        return self.head(self.recurrent(seen)[0])  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", AS_STRATEGY)
def test_every_verb_works_with_every_variant(variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """A tuned model starts as the base, learns, merges and unmerges, loads into a plain one, and gives the base back bit for bit."""
    torch.manual_seed(0)
    model, (x,) = Mixed().to(dtype).eval(), tokens()
    original, fresh = copy.deepcopy(model).requires_grad_(False), copy.deepcopy(model)
    names = ["table", "convolution", "attention", "recurrent", "head"]
    enable_fine_tuning(model, LoRAAllFineTuningStrategy(rank=2, lora_alpha=5, targets=names, **AS_STRATEGY[variant]))
    with torch.no_grad():
        assert torch.equal(model(x), original(x))
    losses = train(model, x)

    assert losses[-1] < losses[0]
    with torch.no_grad():
        tuned = model(x)
        merge(model)
        torch.testing.assert_close(model(x), tuned, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        unmerge(model)
        assert torch.equal(model(x), tuned)
        save_adapter(model, tmp_path / "adapter.safetensors")
        before = torch.get_rng_state()
        load_adapter(fresh, tmp_path / "adapter.safetensors")
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(fresh.eval()(x), tuned)
        disable_fine_tuning(model)
        # torch chooses kernels by requires_grad
        assert torch.equal(model.requires_grad_(False)(x), original(x))
    assert {key: t.tolist() for key, t in model.state_dict().items()} == {key: t.tolist() for key, t in original.state_dict().items()}


def train(model: nn.Module, x: Tensor) -> list[float]:
    """A few steps, and the losses."""
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=0.02), []
    for _ in range(8):
        optimizer.zero_grad()
        loss = (model(x).float() - 0.5).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
