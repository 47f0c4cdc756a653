"""Whole layers through the strategy, against a plain copy of the layer that is given its effective weights.

The weights are made by hand, block by block, from the frozen weight and the adapter; the plain layer's own code then says what the
answer and the gradients are.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from gift_core import (
    disable_fine_tuning,
    enable_fine_tuning,
    load_adapter,
    merge,
    merge_and_unload,
    plan_fine_tuning,
    save_adapter,
    tuning_disabled,
    unmerge,
)
from gift_core.errors import GiftError, NoMatchError, SiteError
from gift_lora_plugin import LoRAAllFineTuningStrategy

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def floats(*shape: int) -> Callable[[torch.dtype], tuple[Any, ...]]:
    """One input of numbers."""
    return lambda dtype: (torch.randn(*shape).to(dtype),)


def several(*shapes: tuple[int, ...], **keywords: Any) -> Callable[[torch.dtype], tuple[Any, ...]]:
    """Several inputs of numbers, and keywords, by a dictionary at the end."""
    return lambda dtype: (*(torch.randn(*shape).to(dtype) for shape in shapes), keywords)


def tokens(dtype: torch.dtype) -> tuple[Any, ...]:
    """An input of tokens; 0 is padding."""
    return (torch.tensor([[1, 2, 2, 0], [5, 3, 8, 8]]),)


def bags(dtype: torch.dtype) -> tuple[Any, ...]:
    """Tokens in bags that start at given places, the last one empty."""
    return torch.tensor([1, 2, 2, 0, 5, 3]), torch.tensor([0, 2, 6])


def weighted_bags(dtype: torch.dtype) -> tuple[Any, ...]:
    """The same, with a weight for each token."""
    return (*bags(dtype), torch.linspace(-1, 1, 6).to(dtype))


def packed(dtype: torch.dtype) -> tuple[Any, ...]:
    """Sequences of several lengths, packed."""
    return (pack_padded_sequence(torch.randn(5, 3, 4).to(dtype), torch.tensor([5, 3, 2])),)


def masked(dtype: torch.dtype) -> tuple[Any, ...]:
    """Attention with a causal mask, padding, and the weights of every head."""
    x = torch.randn(4, 3, 8).to(dtype)
    causal = torch.ones(4, 4, dtype=torch.bool).triu(1)
    padding = torch.tensor([[False, False, False, False], [False, False, False, True], [False, False, True, True]])
    return x, x, x, {"attn_mask": causal, "key_padding_mask": padding, "average_attn_weights": False}


class Experts(nn.Module):
    """Stacked matrices and a single one, as raw parameters; one takes the output axis last."""

    def __init__(self, in_out: bool) -> None:
        super().__init__()
        self.in_out = in_out
        self.experts = nn.Parameter(torch.randn(3, 6, 4) if in_out else torch.randn(3, 4, 6))
        self.gate = nn.Parameter(torch.randn(6, 3) if in_out else torch.randn(3, 6))
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        """Mix the experts' answers."""
        experts, gate = (self.experts, self.gate) if self.in_out else (self.experts.mT, self.gate.mT)
        return torch.einsum("bi,eio,be->bo", x, experts, (x @ gate).softmax(-1)) * self.scale


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer, its input, and the strategy's parameters."""

    build: Callable[[], nn.Module]
    inputs: Callable[[torch.dtype], tuple[Any, ...]]
    params: dict[str, Any] = dataclasses.field(default_factory=dict)


def own(**params: Any) -> dict[str, Any]:
    """Parameters that name embeddings, which are adapted where they are named."""
    return {"targets": "type:Embedding*", **params}


MHA, LSTM = nn.MultiheadAttention, nn.LSTM
SELF = several((4, 3, 8), (4, 3, 8), (4, 3, 8))
CROSS = several((4, 3, 8), (5, 3, 6), (5, 3, 10))
CASES = {
    "linear": Case(lambda: nn.Linear(5, 4), floats(2, 3, 5)),
    "conv1d": Case(lambda: nn.Conv1d(4, 6, 3, groups=2, padding="same"), floats(2, 4, 7)),
    "conv2d circular": Case(lambda: nn.Conv2d(4, 6, 3, dilation=2, padding=2, padding_mode="circular"), floats(2, 4, 7, 6)),
    "conv3d": Case(lambda: nn.Conv3d(2, 4, (1, 2, 3), stride=2, bias=False), floats(2, 2, 4, 5, 6)),
    "conv transpose1d": Case(lambda: nn.ConvTranspose1d(4, 6, 3, groups=2, stride=2, output_padding=1), floats(2, 4, 5)),
    "conv transpose2d": Case(lambda: nn.ConvTranspose2d(4, 6, (3, 2), padding=1, dilation=2), floats(2, 4, 5, 6)),
    "conv transpose2d out_as_h": Case(lambda: nn.ConvTranspose2d(4, 6, 3), floats(2, 4, 5, 5), {"conv_layout": "out_as_h"}),
    "conv transpose3d": Case(lambda: nn.ConvTranspose3d(4, 2, 2, bias=False), floats(2, 4, 3, 3, 3)),
    "bilinear": Case(lambda: nn.Bilinear(3, 4, 5), several((2, 3), (2, 4))),
    "embedding": Case(lambda: nn.Embedding(9, 4, padding_idx=0), tokens, own()),
    "embedding by frequency": Case(lambda: nn.Embedding(9, 4, scale_grad_by_freq=True), tokens, own()),
    "bag sum": Case(lambda: nn.EmbeddingBag(9, 4, mode="sum", padding_idx=0), bags, own()),
    "bag mean": Case(lambda: nn.EmbeddingBag(9, 4, mode="mean"), bags, own()),
    "bag max": Case(lambda: nn.EmbeddingBag(9, 4, mode="max"), bags, own()),
    "bag with weights": Case(lambda: nn.EmbeddingBag(9, 4, mode="sum", include_last_offset=True), weighted_bags, own()),
    "attention": Case(lambda: MHA(8, 2), SELF),
    "attention batch first": Case(lambda: MHA(8, 2, batch_first=True, add_bias_kv=True), SELF),
    "attention masked": Case(lambda: MHA(8, 2), masked),
    "attention without weights": Case(lambda: MHA(8, 2, bias=False), several((4, 8), (4, 8), (4, 8), need_weights=False)),
    "attention q, v": Case(lambda: MHA(8, 2), SELF, {"attention": ("q", "v")}),
    "attention k, out": Case(lambda: MHA(8, 2), SELF, {"attention": ["out", "k"]}),
    "attention out": Case(lambda: MHA(8, 2), SELF, {"attention": ("out",)}),
    "cross attention": Case(lambda: MHA(8, 2, kdim=6, vdim=10), CROSS),
    "cross attention batch first": Case(
        lambda: MHA(8, 2, kdim=6, vdim=10, batch_first=True), several((3, 4, 8), (3, 5, 6), (3, 5, 10))
    ),
    "cross attention k": Case(lambda: MHA(8, 2, kdim=6, vdim=10), CROSS, {"attention": ("k",)}),
    "encoder": Case(lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True), 2), floats(3, 4, 8)),
    "rnn": Case(lambda: nn.RNN(4, 5, 2, nonlinearity="relu", batch_first=True), floats(3, 6, 4)),
    "gru": Case(lambda: nn.GRU(4, 5, bidirectional=True), floats(6, 3, 4)),
    "lstm": Case(lambda: LSTM(4, 5, 2, bidirectional=True, bias=False), floats(6, 3, 4)),
    "lstm projected": Case(lambda: LSTM(4, 5, 2, proj_size=3), floats(6, 3, 4)),
    "lstm packed": Case(lambda: LSTM(4, 5, 2), packed),
    "lstm packed, both directions": Case(lambda: LSTM(4, 5, 2, bidirectional=True), packed),
    "gru packed, both directions": Case(lambda: nn.GRU(4, 5, bidirectional=True), packed),
    "lstm cell": Case(lambda: nn.LSTMCell(4, 5), floats(3, 4)),
    "gru cell": Case(lambda: nn.GRUCell(4, 5), floats(3, 4)),
    "rnn cell": Case(lambda: nn.RNNCell(4, 5), floats(3, 4)),
    "raw out_in": Case(lambda: Experts(False), floats(5, 6), {"parameters": ["experts", "gate"]}),
    "raw in_out": Case(lambda: Experts(True), floats(5, 6), {"parameters": ["experts", "gate"], "parameter_layout": "in_out"}),
}


def tuned(case: Case, dtype: torch.dtype = torch.float64, **more: Any) -> tuple[nn.Module, nn.Module]:
    """The plain layer, and a tuned copy whose adapter has moved, both in eval mode."""
    torch.manual_seed(0)
    plain = case.build().to(dtype).eval()
    model = copy.deepcopy(plain)
    enable_fine_tuning(model, LoRAAllFineTuningStrategy(**{"rank": 2, "lora_alpha": 3.0, **case.params, **more}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape))
        if getattr(plain, "padding_idx", None) is not None:
            model.lora_B[0] = 0  # type: ignore[operator, index]  # where it starts and, without a gradient, stays
    return plain, model


def run(model: nn.Module, inputs: tuple[Any, ...], weights: dict[str, Tensor] | None = None) -> list[Tensor]:
    """All tensors that a model answers with, by its own weights or by others."""
    given, keywords = (inputs[:-1], inputs[-1]) if isinstance(inputs[-1], dict) else (inputs, {})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "LSTM with projections is not supported with oneDNN")
        out = model(*given, **keywords) if weights is None else functional_call(model, weights, given, keywords)
    return [part for part in flat(out) if part.is_floating_point()]


def flat(out: Any) -> list[Tensor]:
    """The tensors of an answer."""
    if isinstance(out, PackedSequence):
        return [out.data]
    if isinstance(out, (tuple, list)):
        return [tensor for part in out for tensor in flat(part)]
    return [] if out is None else [out]


def update_of(case: Case, name: str, weight: Tensor, lora_B: Tensor, lora_A: Tensor) -> Tensor:
    """The update in the weight's shape, one matrix at a time."""
    if lora_A.dim() == 2:
        product = lora_B @ lora_A
        return (product.T if case.params.get("parameter_layout") == "in_out" else product).reshape(weight.shape)
    products = [B @ A for B, A in zip(lora_B, lora_A, strict=True)]
    if weight.dim() == 3:
        return torch.stack([product.T if case.params.get("parameter_layout") == "in_out" else product for product in products])
    if name.endswith("in_proj_weight"):
        chosen = [part for part in ("q", "k", "v") if part in case.params.get("attention", "qkv")]
        return torch.cat([products.pop(0) if part in chosen else weight.new_zeros(8, 8) for part in ("q", "k", "v")])
    return torch.cat(products)


def effective(case: Case, plain: nn.Module, adapter: dict[str, Tensor]) -> dict[str, Tensor]:
    """The effective weights of a plain layer, by hand."""
    weights = {name: parameter.detach() for name, parameter in plain.named_parameters()}
    for key, lora_A in adapter.items():
        if not key.endswith("lora_A"):
            continue
        stem = key.removesuffix("lora_A").rstrip("_")
        name = f"{stem}weight" if stem in ("",) or stem.endswith(".") else stem
        lora_B = adapter[f"{key.removesuffix('lora_A')}lora_B"]
        weights[name] = weights[name] + 1.5 * update_of(case, name, weights[name], lora_B, lora_A)
    return weights


def adapter_of(model: nn.Module) -> dict[str, Tensor]:
    """What trains, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def close(given: list[Tensor], wanted: list[Tensor], dtype: torch.dtype) -> None:
    """Within the tolerance of the dtype, relative to the largest number or to 1."""
    assert len(given) == len(wanted)
    for ours, theirs in zip(given, wanted, strict=True):
        off = (ours.double() - theirs.double()).nan_to_num().abs().max() / max(1.0, theirs.double().nan_to_num().abs().max())
        assert ours.shape == theirs.shape
        assert off <= TOLERANCE[dtype], f"off by {off:.2g}"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_every_way_gives_the_layers_own_answer(name: str, dtype: torch.dtype) -> None:
    """In training, eval, without gradients, merged, unmerged and unloaded, a layer answers as the plain one with W + s B A does."""
    case = CASES[name]
    plain, model = tuned(case, dtype)
    inputs = case.inputs(dtype)
    with torch.no_grad():
        wanted = run(plain, inputs, effective(case, plain, adapter_of(model)))
        base = run(plain, inputs)

    answers = [run(model.train(), inputs), run(model.eval(), inputs)]
    with torch.no_grad():
        answers.append(run(model, inputs))
        with tuning_disabled(model):
            close(run(model, inputs), base, dtype)
        merge(model)
        answers.append(run(model, inputs))
        unmerge(model)
        answers += [run(model, inputs), run(merge_and_unload(model), inputs)]

    assert not all(torch.equal(ours, theirs) for ours, theirs in zip(wanted, base, strict=True))
    for answer in answers:
        close([tensor.detach() for tensor in answer], wanted, dtype)


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_plain_layer(name: str) -> None:
    """The gradients of every A and B are autograd's through the plain layer with effective weights."""
    case = CASES[name]
    plain, model = tuned(case)
    inputs = case.inputs(torch.float64)
    leaves = {key: value.detach().clone().requires_grad_() for key, value in adapter_of(model).items()}
    weights = effective(case, plain, leaves)

    run(model.train(), inputs)[0].pow(2).sum().backward()
    run(plain, inputs, weights)[0].pow(2).sum().backward()

    assert all(leaf.grad is not None for leaf in leaves.values())
    close([p.grad for p in adapter_of(model).values()], [leaf.grad for leaf in leaves.values()], torch.float64)  # type: ignore[misc]


@pytest.mark.parametrize("name", CASES)
def test_files_and_disable_are_exact(name: str, tmp_path: Path) -> None:
    """An adapter file brings a plain layer to the same bits, and disable brings the tuned one back."""
    case = CASES[name]
    plain, model = tuned(case, torch.float32, train_bias=True)
    fresh, inputs = copy.deepcopy(plain), case.inputs(torch.float32)

    save_adapter(model, tmp_path / "adapter.safetensors")
    load_adapter(fresh, tmp_path / "adapter.safetensors")
    with torch.no_grad():
        pairs = zip(run(model, inputs), run(fresh.eval(), inputs), strict=True)
        assert all(torch.equal(ours.nan_to_num(), theirs.nan_to_num()) for ours, theirs in pairs)
    disable_fine_tuning(model)

    assert type(model) is type(plain)
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    before, after = plain.state_dict(), model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[key], after[key]) for key in before)


# --- what is chosen, and what trains


@pytest.mark.parametrize(
    ("attention", "expected"),
    [
        (("q", "k", "v", "out"), ["in_proj_weight_lora_A", "out_proj.lora_A"]),
        (("v",), ["in_proj_weight_lora_A"]),
        (("out",), ["out_proj.lora_A"]),
    ],
)
def test_attention_parts_are_chosen(attention: tuple[str, ...], expected: list[str]) -> None:
    """``attention`` says which projections get an adapter; a packed one holds a block for each that is chosen."""
    model = nn.MultiheadAttention(8, 2)
    enable_fine_tuning(model, LoRAAllFineTuningStrategy(rank=1, attention=attention))

    assert sorted(key for key in adapter_of(model) if key.endswith("lora_A")) == expected
    blocks = [parameter.shape[0] for key, parameter in adapter_of(model).items() if key.startswith("in_proj_weight_lora_A")]
    assert blocks == [len(set(attention) - {"out"})][: len(blocks)]


def test_a_part_that_is_left_alone_keeps_its_bits() -> None:
    """Where k is not chosen, its rows of the packed weight are the frozen ones, bit for bit."""
    plain, model = tuned(CASES["attention q, v"], torch.float32)

    assert torch.equal(model.in_proj_weight[8:16], plain.in_proj_weight[8:16])  # type: ignore[index]
    assert not torch.equal(model.in_proj_weight[:8], plain.in_proj_weight[:8])  # type: ignore[index]


@pytest.mark.parametrize(
    ("build", "params", "expected"),
    [
        (lambda: MHA(8, 2), {}, {"in_proj_bias", "out_proj.bias"}),
        (lambda: MHA(8, 2, kdim=4), {"attention": ("k",)}, {"in_proj_bias"}),
        (lambda: MHA(8, 2, add_bias_kv=True), {"attention": ("out",)}, {"out_proj.bias"}),
        (lambda: LSTM(4, 5), {}, {"bias_ih_l0", "bias_hh_l0"}),
        (lambda: LSTM(4, 5), {"targets": "weight_ih_l0"}, {"bias_ih_l0"}),
        (lambda: nn.GRUCell(4, 5), {}, {"bias_ih", "bias_hh"}),
        (lambda: nn.Bilinear(2, 3, 4), {}, {"bias"}),
        (lambda: nn.ConvTranspose1d(4, 2, 3), {}, {"bias"}),
    ],
)
def test_biases_of_adapted_weights_train(build: Callable[[], nn.Module], params: dict[str, Any], expected: set[str]) -> None:
    """``train_bias`` trains the biases that belong to adapted weights, and no other; without it none."""
    model, frozen = build(), build()
    enable_fine_tuning(model, LoRAAllFineTuningStrategy(rank=1, train_bias=True, **params))
    enable_fine_tuning(frozen, LoRAAllFineTuningStrategy(rank=1, **params))

    assert {name for name in adapter_of(model) if "lora" not in name} == expected
    assert {name for name in adapter_of(frozen) if "lora" not in name} == set()


def test_gates_have_a_matrix_each() -> None:
    """An LSTM's weight has four low-rank updates, a GRU's three, an RNN's one."""
    for build, gates in ((nn.LSTM, (4,)), (nn.GRU, (3,)), (nn.RNN, ())):
        model: nn.Module = build(4, 5)  # type: ignore[abstract, arg-type]
        enable_fine_tuning(model, LoRAAllFineTuningStrategy(rank=2))

        assert model.weight_ih_l0_lora_A.shape == (*gates, 2, 4)  # type: ignore[union-attr, operator]
        assert model.weight_hh_l0_lora_B.shape == (*gates, 5, 2)  # type: ignore[union-attr, operator]


def test_raw_parameters_come_beside_the_layers() -> None:
    """``parameters`` adds to what is adapted, and what it names alone may be excluded; nothing else of the module trains."""
    model = nn.Sequential(nn.Linear(6, 6), Experts(False))
    enable_fine_tuning(model, LoRAAllFineTuningStrategy(rank=1, parameters="1.*", exclude=["1.scale", "1.gate"]))

    assert set(adapter_of(model)) == {f"{stem}lora_{part}" for stem in ("0.", "1.experts_") for part in "AB"}


@pytest.mark.parametrize(
    ("parameters", "error", "says"),
    [
        ("1.scale", SiteError, "'1.scale'.*needs a matrix"),
        ("1.expert", NoMatchError, "1.experts"),
        ("0.weight", NoMatchError, "earlier cap took"),
    ],
)
def test_raw_parameters_that_cannot_be_adapted_are_refused(parameters: str, error: type[GiftError], says: str) -> None:
    """A vector, a name that nothing has and a weight that belongs to a layer are errors that name the place."""
    model = nn.Sequential(nn.Linear(6, 6), Experts(False))

    with pytest.raises(error, match=says):
        enable_fine_tuning(model, LoRAAllFineTuningStrategy(rank=1, parameters=parameters))
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.ConvTranspose1d(4, 2, 3),
        lambda: nn.Bilinear(2, 3, 4),
        lambda: LSTM(4, 5),
        lambda: nn.GRUCell(4, 5),
    ],
)
def test_dropout_that_has_no_place_is_refused_by_name(build: Callable[[], nn.Module]) -> None:
    """A layer whose forward reads the weight refuses dropout, by name; excluded, or with dropout 0 by pattern, the rest is adapted."""
    model = nn.Sequential(nn.Linear(4, 4), build())
    with pytest.raises(SiteError, match=r"at '1.*set lora_dropout=0, or exclude it"):
        plan_fine_tuning(model, LoRAAllFineTuningStrategy(rank=1, lora_dropout=0.1))

    assert plan_fine_tuning(model, LoRAAllFineTuningStrategy(rank=1, lora_dropout=0.1, exclude="1")).actions
    assert len(plan_fine_tuning(model, LoRAAllFineTuningStrategy(rank=1, lora_dropout=0.1, dropout_pattern={"1": 0})).actions) > 1


def test_dora_on_a_part_of_attention() -> None:
    """With DoRA on q and v each output of these has a magnitude, and k stays the frozen rows, bit for bit."""
    case = Case(lambda: MHA(8, 2), SELF, {"attention": ("q", "v"), "use_dora": True})
    plain, model = tuned(case)
    own = {name.removeprefix("in_proj_weight_"): value for name, value in adapter_of(model).items()}
    inputs, weight = SELF(torch.float64), plain.in_proj_weight.detach()
    own["lora_magnitude"].data.abs_()

    q, k, v = weight.chunk(3)  # type: ignore[operator]
    directions = [W + 1.5 * B @ A for W, B, A in zip((q, v), own["lora_B"], own["lora_A"], strict=True)]
    q, v = (
        m[:, None] * V / V.norm(dim=1, keepdim=True).detach() for m, V in zip(own["lora_magnitude"].chunk(2), directions, strict=True)
    )
    weights = {name: parameter.detach() for name, parameter in plain.named_parameters()}
    expected = run(plain, inputs, weights | {"in_proj_weight": torch.cat([q, k, v])})
    answers = run(model, inputs)

    close(answers, expected, torch.float64)
    assert torch.equal(model.in_proj_weight[8:16], k)  # type: ignore[index]
    gradients = [torch.autograd.grad(sum(part.sin().sum() for part in parts), own.values()) for parts in (answers, expected)]
    close(*map(list, gradients), torch.float64)


# --- embeddings, alone and tied


class Tied(nn.Module):
    """A language model in small: its output layer is its table of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 6)
        self.middle = nn.Linear(6, 6)
        self.head = nn.Linear(6, 9, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens to scores."""
        return self.head(self.middle(self.embedding(x)))  # type: ignore[no-any-return]


def test_embeddings_are_adapted_where_they_are_named() -> None:
    """By default an embedding stays frozen and is listed so; a target that covers it adapts it."""
    model = nn.Sequential(nn.Embedding(9, 6), nn.EmbeddingBag(9, 6), nn.Linear(6, 4))

    assert plan_fine_tuning(model, "lora").report.frozen == ("0.weight", "1.weight")
    assert len(plan_fine_tuning(model, LoRAAllFineTuningStrategy(targets=["0", "1"])).actions) == 2


def test_a_tied_model_works_as_it_is() -> None:
    """By default the output layer is adapted and the table it is tied to stays frozen; the report names the pair."""
    torch.manual_seed(0)
    model, x = Tied(), torch.tensor([[1, 2, 3]])
    plain = copy.deepcopy(model)
    report = enable_fine_tuning(model, LoRAAllFineTuningStrategy(rank=2))
    with torch.no_grad():
        model.head.lora_B.normal_()  # type: ignore[operator, union-attr]

    assert "head.weight = embedding.weight" in str(report)
    assert torch.equal(model.embedding(x), plain.embedding(x))
    head: Any = model.head
    wanted = nn.functional.linear(plain.middle(plain.embedding(x)), plain.head.weight + head.lora_B @ head.lora_A)
    torch.testing.assert_close(model(x), wanted)


def test_both_of_a_tied_pair_have_adapters_of_their_own() -> None:
    """Named, both are adapted, which the report says; unloading gives each its weight and disable the one tensor of both."""
    torch.manual_seed(0)
    model, x = Tied(), torch.tensor([[1, 2, 3]])
    report = enable_fine_tuning(model, LoRAAllFineTuningStrategy(rank=2, targets="*"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    twin = copy.deepcopy(model)
    wanted = model(x)

    assert "embedding" in next(line for line in report.shared if "=" in line)
    torch.testing.assert_close(merge_and_unload(model)(x), wanted)
    assert model.head.weight is not model.embedding.weight
    assert disable_fine_tuning(twin).head.weight is twin.embedding.weight  # type: ignore[union-attr]


# --- attention's fast path, and layers of libraries


def test_the_fast_path_of_the_encoder_runs_tuned() -> None:
    """Without gradients torch's fused encoder layer runs on the effective weights, merged and not, as the slow path answers."""
    case = CASES["encoder"]
    plain, model = tuned(case, torch.float32)
    (x,) = case.inputs(torch.float32)
    padding = torch.zeros(3, 4, dtype=torch.bool)
    padding[1, 3] = True
    slow = model(x, src_key_padding_mask=padding).detach()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's own, of nested tensors
        fast = model(x, src_key_padding_mask=padding)
        merge(model)
        fast_merged = model(x, src_key_padding_mask=padding)

    seen = ~padding
    close([fast[seen], fast_merged[seen]], [slow[seen]] * 2, torch.float32)
    assert not torch.allclose(plain(x), model(x).detach())


def test_transformers_conv1d_is_a_linear_layer() -> None:
    """GPT-2's Conv1D, whose weight is (in, out), is adapted as the Linear layer that it is, by both strategies that take these."""
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils", reason="transformers is not installed")
    torch.manual_seed(0)
    plain, x = nn.Sequential(pytorch_utils.Conv1D(4, 6)), torch.randn(2, 3, 6)
    for name in ("lora", "lora-linear"):
        model = copy.deepcopy(plain)
        enable_fine_tuning(model, name)
        layer: Any = model[0]
        with torch.no_grad():
            layer.lora_B.normal_()
        wanted = x @ (plain[0].weight + (layer.lora_B @ layer.lora_A).T) + plain[0].bias

        assert (layer.lora_A.shape, layer.lora_B.shape) == ((3, 6), (4, 3))
        torch.testing.assert_close(model(x), wanted)
        torch.testing.assert_close(merge_and_unload(model)(x), wanted)
