"""One batch with a different adapter for each sample: what each sample gives alone, for every kind of layer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import CheckpointError, checkpoint

from gift_core import FullFineTuningStrategy, merge, merge_strategies
from gift_core.errors import AdapterNameError, ParameterError, SiteError, StateError
from gift_lora_plugin import LoRAAdapterSet, LoRAAllFineTuningStrategy

#: The samples of a batch are mixed, some have no adapter, and one adapter changes fewer layers than the other.
NAMES = ["b", None, "a", "b", "a"]
SIZE = len(NAMES)


class Attention(nn.Module):
    """Attention of a sequence to itself, or to a shorter one of other width, with masks that differ by sample and by head."""

    def __init__(self, batch_first: bool, kdim: int | None = None, mask: str = "", weights: bool = False) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=batch_first, kdim=kdim, vdim=kdim)
        self.narrow = kdim
        self.mask = mask
        self.weights = weights

    def forward(self, x: Tensor) -> Tensor:
        other = x if self.narrow is None else x[:, 1:, : self.narrow]
        query, key = (x, other) if self.inner.batch_first else (x.transpose(0, 1), other.transpose(0, 1))
        options: dict[str, Any] = {"need_weights": self.weights, "average_attn_weights": False}
        if "pad" in self.mask:
            options["key_padding_mask"] = torch.cat([torch.zeros_like(x[:, :1, 0], dtype=torch.bool), x[:, 1:, 0] > 0.5], 1)
        if "shared" in self.mask:
            options["attn_mask"] = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
        if "own" in self.mask:
            mask = torch.stack([x @ x.mT, -x @ x.mT], 1).flatten(0, 1) > 1
            options["attn_mask"] = mask & (torch.arange(x.shape[1]) > 0)
        output, weights = self.inner(query, key, key, **options)
        output = output if self.inner.batch_first else output.transpose(0, 1)
        return output if weights is None else torch.cat([output.flatten(1), weights.flatten(1)], 1)


class Recurrent(nn.Module):
    """A recurrent layer of two directions, with states that differ by sample, or with sequences of different length."""

    def __init__(self, kind: Any, batch_first: bool = False, states: bool = False, packed: bool = False) -> None:
        super().__init__()
        self.inner = kind(8, 6, num_layers=2, bidirectional=True, batch_first=batch_first)
        self.states = states
        self.packed = packed

    def forward(self, x: Tensor) -> Tensor:
        sequences: Any = x if self.inner.batch_first else x.transpose(0, 1)
        states: Any = x[:, :4, :6].transpose(0, 1).contiguous() if self.states else None
        if states is not None and isinstance(self.inner, nn.LSTM):
            states = (states, -states)
        if self.packed:
            lengths = 1 + (x[:, 0, 0].abs() * 7).long() % x.shape[1]
            sequences = pack_padded_sequence(sequences, lengths, self.inner.batch_first, enforce_sorted=False)
        output, last = self.inner(sequences, states)
        if self.packed:
            output, _ = pad_packed_sequence(output, self.inner.batch_first, total_length=x.shape[1])
        output = output if self.inner.batch_first else output.transpose(0, 1)
        last = torch.cat([part.transpose(0, 1) for part in (last if isinstance(last, tuple) else (last,))], 1)
        return torch.cat([output.flatten(1), last.flatten(1)], 1)


class Cell(nn.Module):
    """A cell that goes along the sequence."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.inner = kind(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        state: Any = None
        for step in x.unbind(1):
            state = self.inner(step, state)
        return torch.cat(state, 1) if isinstance(state, tuple) else state


class Pair(nn.Module):
    """A bilinear layer of two parts of a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Bilinear(5, 3, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x[..., :5], x[..., 5:])


class Experts(nn.Module):
    """Parameters of no layer that torch knows: two experts, mixed by a gate that the caller gives by name."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = _Experts()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, gate=x[:, 0, :2].softmax(-1))["mixed"]


class _Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(2, 6, 8) / 3)

    def forward(self, x: Tensor, *, gate: Tensor) -> dict[str, Tensor]:
        return {"mixed": torch.einsum("ns,soi,nti->nto", gate, self.stack, x)}


class Tokens(nn.Module):
    """Tokens, looked up one by one and as bags, with a weight for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(11, 8, padding_idx=0)
        self.bags = nn.EmbeddingBag(11, 8, mode="sum")

    def forward(self, x: Tensor) -> Tensor:
        tokens = (x[..., 0].abs() * 9).long() % 11
        return self.rows(tokens).sum(1) + self.bags(tokens, per_sample_weights=x[..., 1])


class Scaled(nn.Linear):
    """A linear layer with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight * 2, self.bias)


class Tied(nn.Module):
    """An adapted embedding whose weight is that of the output layer, too, which stays as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Embedding(11, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.inner.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner((x[..., 0].abs() * 9).long() % 11) + x)


class Waves(nn.Module):
    """A convolution and a linear layer of complex numbers, of which the samples are the parts."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(6, 5, 3, padding=1, dtype=torch.complex64)
        self.head = nn.Linear(8, 3, dtype=torch.complex64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(torch.complex(x, x.tanh())))


def in_precision(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model with numbers, real or complex, whose parts are of a dtype."""
    return model._apply(lambda tensor: tensor.to(dtype.to_complex() if tensor.is_complex() else dtype))


def convolutions(dims: int) -> nn.Module:
    """A convolution with padding, stride, groups and dilation, another with circular padding, and a transposed one with groups."""
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    back = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
    return nn.Sequential(
        nn.Unflatten(1, ((6,), (2, 3), (2, 3, 1))[dims - 1]),
        conv((6, 2, 2)[dims - 1], 8, 3, padding=2, stride=2, groups=2, dilation=2),
        conv(8, 6, 3, padding=1, padding_mode="circular"),
        back(6, 8, 3, stride=2, padding=1, output_padding=1, groups=2),
    )


def conv1d_of_transformers() -> nn.Module:
    """Linear layers whose weight is ``(in, out)``."""
    layers = pytest.importorskip("transformers.pytorch_utils")
    return nn.Sequential(layers.Conv1D(9, 8), nn.Tanh(), layers.Conv1D(5, 9))


def encoder(batch_first: bool) -> nn.Module:
    """Two layers of a transformer, whose linear layers have time first as its attention has, and a head on the mean over time."""
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=batch_first, dropout=0.0)
    layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    turned = [layers] if batch_first else [Turn(), layers, Turn()]
    return nn.Sequential(*turned, nn.Flatten(), nn.Linear(48, 3))


class Turn(nn.Module):
    """Exchanges samples and time."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1)


#: Models of samples of ``(6, 8)``.
MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Linear(8, 9), nn.Tanh(), nn.Linear(9, 7)),
    "conv1d": lambda: convolutions(1),
    "conv2d": lambda: convolutions(2),
    "conv3d": lambda: convolutions(3),
    "own forward": lambda: nn.Sequential(Scaled(8, 9), nn.Tanh(), nn.Linear(9, 7)),
    "transformers": conv1d_of_transformers,
    "bilinear": Pair,
    "tokens": Tokens,
    "tied": Tied,
    "attention": lambda: Attention(True),
    "attention, time first": lambda: Attention(False, mask="pad shared"),
    "attention, masks": lambda: Attention(True, mask="pad own", weights=True),
    "attention, widths": lambda: Attention(False, kdim=5, weights=True),
    "lstm": lambda: Recurrent(nn.LSTM),
    "lstm, states": lambda: Recurrent(nn.LSTM, batch_first=True, states=True),
    "gru, packed": lambda: Recurrent(nn.GRU, packed=True, states=True),
    "lstm, packed": lambda: Recurrent(nn.LSTM, batch_first=True, packed=True, states=True),
    "rnn": lambda: Recurrent(nn.RNN, states=True),
    "lstm cell": lambda: Cell(nn.LSTMCell),
    "gru cell": lambda: Cell(nn.GRUCell),
    "experts": Experts,
    "encoder": lambda: encoder(True),
    "encoder, time first": lambda: encoder(False),
    "complex": Waves,
}


def build(kind: str = "linear", dtype: torch.dtype = torch.float64, **options: Any) -> tuple[LoRAAdapterSet, Tensor]:
    """A set with adapters ``a`` on every layer and ``b`` of another rank on all but the first of several, and a batch."""
    torch.manual_seed(0)
    model = MODELS[kind]()
    adapters = LoRAAdapterSet(in_precision(model, dtype))
    raw, targets = ({"parameters": "inner.stack"}, None) if kind == "experts" else ({}, "*")
    first = next((name for name, module in model.named_modules() if module._parameters and name), "")
    alone = sum(bool(module._parameters) for module in model.modules()) < 3
    for name, rank in (("a", 2), ("b", 1)):
        exclude = None if name == "a" or alone else first
        adapters.add(name, LoRAAllFineTuningStrategy(rank, 3, targets=targets, exclude=exclude, **options, **raw))
        scramble(adapters, name)
    return adapters, torch.randn(SIZE, 6, 8).to(dtype)


def scramble(adapters: LoRAAdapterSet, name: str) -> None:
    """Give an adapter random values."""
    with torch.no_grad():
        for parameter in adapters.parameters(name):
            parameter.add_(torch.randn_like(parameter), alpha=0.3)


def one_by_one(adapters: LoRAAdapterSet, x: Tensor, names: Sequence[str | None] = NAMES) -> Tensor:
    """Each sample alone under its own adapter."""
    results = []
    for at, name in enumerate(names):
        with adapters.using(name) as model:
            results.append(output_of(model, x[at : at + 1]))
    return torch.cat(results)


def output_of(model: nn.Module, x: Tensor) -> Tensor:
    """A model's answer."""
    return model(x)  # type: ignore[no-any-return]


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"use_dora": True},
    "biases": {"train_bias": True},
    "pissa": {"init": "pissa"},
    "fixed A": {"freeze_A": True, "use_rslora": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", MODELS)
def test_each_sample_has_its_own_adapter(kind: str, variant: str) -> None:
    """A mixed batch gives what its samples give one by one, and so do the gradients of both adapters; the base gets none."""
    adapters, x = build(kind, **VARIANTS[variant])
    base = list(adapters.model.parameters())
    ours = [*adapters.parameters("a"), *adapters.parameters("b")]
    expected = one_by_one(adapters, x)
    slope = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, ours, slope)
    with adapters.per_sample(NAMES) as model:
        output = output_of(model, x)
    output.backward(slope)

    torch.testing.assert_close(output, expected)
    for parameter, gradient in zip(ours, gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in base)


@pytest.mark.parametrize("kind", ["linear", "attention, masks", "lstm, packed", "conv2d", "encoder, time first"])
@pytest.mark.parametrize(
    ("dtype", "adapter_dtype", "tolerance"),
    [(torch.float32, None, 1e-5), (torch.bfloat16, None, 5e-2), (torch.bfloat16, "float32", 5e-2), (torch.float16, None, 1e-2)],
)
def test_each_sample_in_lower_precision(kind: str, dtype: torch.dtype, adapter_dtype: str | None, tolerance: float) -> None:
    """In lower precision, also with an adapter in single precision, the two ways agree to a few roundings of numbers of about one.

    Gradients pass more of them: their error is measured against the size of the whole.
    """
    adapters, x = build(kind, dtype, adapter_dtype=adapter_dtype)
    ours = [*adapters.parameters("a"), *adapters.parameters("b")]
    expected = one_by_one(adapters, x)
    gradients = torch.autograd.grad(expected.float().sum(), ours)
    with adapters.per_sample(NAMES) as model:
        output = output_of(model, x)
    output.float().sum().backward()

    assert output.dtype == dtype
    torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)
    found, wanted = (torch.cat([grad.double().flatten() for grad in all_of]) for all_of in ([own.grad for own in ours], gradients))
    assert (found - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize("kind", MODELS)
def test_inference_and_autocast(kind: str) -> None:
    """In evaluation without gradients, where torch has kernels that bypass layers, and under autocast, it is the same."""
    adapters, x = build(kind, torch.float32)
    adapters.model.eval()
    with torch.no_grad():
        expected = one_by_one(adapters, x)
        with adapters.per_sample(NAMES) as model:
            output = output_of(model, x)
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            try:
                one_by_one(adapters, x, [None] * SIZE)
            except RuntimeError as error:
                if "primitive" not in str(error):  # oneDNN's word for a kernel; anything else is ours to mend
                    raise
                pytest.skip(f"torch cannot compute the base model under autocast on this processor: {error}")
            expected = one_by_one(adapters, x)
            with adapters.per_sample(NAMES) as model:
                output = output_of(model, x)

    # under autocast torch gives packed sequences of one sample in another dtype than those of several
    torch.testing.assert_close(output, expected, rtol=5e-2, atol=5e-2, check_dtype=False)


def test_dropout_of_complex_numbers() -> None:
    """In training a complex number of the update's input is dropped or kept as one, and kept ones are scaled up."""
    adapters = LoRAAdapterSet(nn.Sequential(nn.Linear(1, 1, dtype=torch.complex64)))
    adapters.add("a", LoRAAllFineTuningStrategy(rank=1, lora_dropout=0.25))
    scramble(adapters, "a")
    x = torch.ones(64, 1, dtype=torch.complex64)
    base, update = adapters.model(x[:1]), adapters.use("a").eval()(x[:1]) - adapters.use(None)(x[:1])
    adapters.model.train()
    torch.manual_seed(0)
    with adapters.per_sample(["a", None] * 32) as model:
        output = output_of(model, x)

    is_kept = (output - base).abs() > 1e-6
    assert 0 < is_kept[::2].sum() < 32
    assert not is_kept[1::2].any()
    torch.testing.assert_close(output, base + is_kept * update / 0.75)


@pytest.mark.parametrize("names", ["ab", None, 3, [["a"]], ["a", 0], b"ab", [("a",), None]], ids=repr)
def test_names_that_are_no_list_of_names_are_refused(names: Any) -> None:
    """One text is not taken for its letters, and what is no name ends in an error that shows the form."""
    adapters, _ = build()

    shown = r'takes a list with one name, or None, for each sample, as in \["a", None, "a"\], got'
    with pytest.raises(ParameterError, match=shown), adapters.per_sample(names):
        pass


def test_samples_without_an_adapter_are_the_base_s() -> None:
    """None is the base model to the bit where layers are linear, and the set is afterwards as before, also after an error."""
    adapters, x = build()
    base = adapters.model(x)
    adapters.use("a")
    before = [dict(vars(module)) for module in adapters.model.modules()]
    with contextlib.suppress(RuntimeError), adapters.per_sample(["a", None, "b", None, "a"]) as model:
        output = model(x)
        raise RuntimeError

    assert torch.equal(output[[1, 3]], base[[1, 3]])
    assert adapters.active == "a"
    assert [dict(vars(module)) for module in adapters.model.modules()] == before


@pytest.mark.parametrize("names", [["a"] * SIZE, [None] * SIZE, ["b", "b", "b", "b", "a"]])
@pytest.mark.parametrize("kind", ["linear", "lstm, packed", "attention, masks"])
def test_batches_of_one_adapter(kind: str, names: list[str | None]) -> None:
    """One adapter for all samples, none for all, and an adapter for the last alone."""
    adapters, x = build(kind)
    with adapters.per_sample(names) as model:
        torch.testing.assert_close(output_of(model, x), one_by_one_outside(adapters, kind, x, names))


def one_by_one_outside(adapters: LoRAAdapterSet, kind: str, x: Tensor, names: Sequence[str | None]) -> Tensor:
    """The same from a set of its own, built alike."""
    other, _ = build(kind)
    return one_by_one(other, x, names)


class Sorted(nn.Module):
    """A recurrent layer that gets packed sequences in the order of their lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.GRU(8, 6, batch_first=True)
        self.lengths = [6, 5, 3, 3, 1]

    def forward(self, x: Tensor) -> Tensor:
        output, last = self.inner(pack_padded_sequence(x, torch.tensor(self.lengths), batch_first=True))
        return torch.cat([pad_packed_sequence(output, True, total_length=6)[0].flatten(1), last[0]], 1)


def test_packed_sequences_in_order() -> None:
    """Sequences that were packed longest first come back in that order, each with its adapter."""
    torch.manual_seed(0)
    adapters, x, lengths = LoRAAdapterSet(model := Sorted()), torch.randn(SIZE, 6, 8), model.lengths
    for name in ("a", "b"):
        adapters.add(name, LoRAAllFineTuningStrategy(rank=2))
        scramble(adapters, name)
    with adapters.per_sample(NAMES):
        together = model(x)
    for at, name in enumerate(NAMES):
        adapters.use(name)
        model.lengths = lengths[at : at + 1]

        torch.testing.assert_close(model(x[at : at + 1])[0], together[at])


def test_whatever_an_adapter_trains_differs_by_sample() -> None:
    """A trained head, a norm, and statistics that training moved belong to each sample's adapter, beside its factors."""
    torch.manual_seed(0)
    adapters = LoRAAdapterSet(nn.Sequential(nn.Linear(8, 9), nn.BatchNorm1d(9), nn.LayerNorm(9), nn.Linear(9, 3)).double())
    trained = FullFineTuningStrategy(targets=["2", "3"])
    adapters.add("a", merge_strategies([trained, LoRAAllFineTuningStrategy(rank=2, exclude="3")]))
    adapters.add("b", LoRAAllFineTuningStrategy(rank=1))
    adapters.add("head", trained)
    for name in adapters:
        scramble(adapters, name)
        with torch.no_grad():
            adapters.use(name).train()(torch.randn(20, 8).double() * len(name))
    adapters.use(None).eval()
    x, names = torch.randn(4, 8).double(), ["head", "a", None, "b"]
    expected = one_by_one(adapters, x, names)
    with adapters.per_sample(names) as model:
        output = output_of(model, x)
    output.sum().backward()

    torch.testing.assert_close(output, expected)
    assert all(parameter.grad is not None for name in adapters for parameter in adapters.parameters(name))


def test_forwards_put_on_a_layer_are_called() -> None:
    """What a tool puts in front of a linear layer's forward runs once for the batch, as it does without adapters."""
    adapters, x = build()
    expected, sizes = one_by_one(adapters, x), []
    layer: Any = adapters.model[0]  # type: ignore[index]
    plain = layer.forward

    def counted(input: Tensor) -> Tensor:
        sizes.append(len(input))
        return plain(input)  # type: ignore[no-any-return]

    layer.forward = counted
    with adapters.per_sample(NAMES) as model:
        torch.testing.assert_close(output_of(model, x), expected)

    assert sizes == [SIZE]
    assert layer.forward is counted


def test_gradients_left_on_the_base_may_be_cleared() -> None:
    """Within the context gradients are cleared and flags read, as a training loop does."""
    adapters, x = build()
    adapters.model(x).sum().backward()
    with adapters.per_sample(NAMES) as model:
        model.zero_grad(set_to_none=False)
        model.requires_grad_(False)
        model(x).sum().backward()

    assert all(not parameter.grad.any() for parameter in adapters.model.parameters() if parameter.grad is not None)


def test_dropout_follows_the_mode() -> None:
    """In training the update is dropped, also where the mode changes within the context; in evaluation nothing is."""
    adapters, x = build("linear", lora_dropout=0.5)
    with adapters.per_sample(NAMES) as model:
        assert not torch.equal(output_of(model, x), output_of(model, x))
        model.eval()

        assert torch.equal(output_of(model, x), output_of(model, x))


def test_checkpointed_activations() -> None:
    """Activations that are computed again give the right gradients within the context, and an error after it, never wrong ones."""
    adapters, x = build()
    ours = [*adapters.parameters("a"), *adapters.parameters("b")]
    gradients = torch.autograd.grad(one_by_one(adapters, x).sum(), ours)
    with adapters.per_sample(NAMES) as model:
        checkpoint(model, x, use_reentrant=False).sum().backward()
        late = checkpoint(model, x, use_reentrant=False)

    for parameter, gradient in zip(ours, gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    with pytest.raises(CheckpointError):
        late.sum().backward()


def test_compiled_models_compute_with_the_mixture() -> None:
    """A model that was compiled before is right within the context, and afterwards, too."""
    adapters, x = build(dtype=torch.float32)
    compiled = torch.compile(adapters.model, backend="eager")
    base = compiled(x)
    expected = one_by_one(adapters, x)
    with adapters.per_sample(NAMES):
        torch.testing.assert_close(compiled(x), expected)

    torch.testing.assert_close(compiled(x), base)


def test_layers_of_sequences_that_generate() -> None:
    """A model that calls its encoder apart, and its decoder with what it has kept, generates for each sample as alone."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4, "vocab_size": 40}
    config = transformers.T5Config(**sizes, decoder_start_token_id=0)
    adapters = LoRAAdapterSet(transformers.T5ForConditionalGeneration(config).eval())
    for name in ("a", "b"):
        adapters.add(name, LoRAAllFineTuningStrategy(rank=2))
        scramble(adapters, name)
    tokens, names = torch.randint(1, 40, (3, 5)), ["b", None, "a"]
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with adapters.per_sample(names) as model:
        together = model.generate(tokens, **options)  # type: ignore[operator]
    for at, name in enumerate(names):
        alone = adapters.use(name).generate(tokens[at : at + 1], **options)  # type: ignore[operator]

        assert torch.equal(together[at : at + 1], alone)


# --- what is refused


class Reads(nn.Module):
    """Calls a layer, and reads its weight elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        assert self.layer.weight.dtype == x.dtype  # which tells nothing of its values
        return nn.functional.linear(self.layer(x), self.layer.weight)


class TimeFirst(nn.Module):
    """Gives its layer the second axis first."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.transpose(0, 1)).transpose(0, 1)  # type: ignore[no-any-return]


class OwnLSTM(nn.LSTM):
    """A recurrent layer with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(input)[0]


class Scores(nn.Linear):
    """A layer that gives one number for a whole batch."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).sum()


class Bags(nn.Module):
    """Bags of different length, one after another."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.EmbeddingBag(11, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(torch.arange(SIZE), torch.arange(SIZE))  # type: ignore[no-any-return]


class Prompt(nn.Module):
    """Has a parameter of its own, and layers."""

    def __init__(self) -> None:
        super().__init__()
        self.prompt = nn.Parameter(torch.randn(6, 8))
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x + self.prompt)  # type: ignore[no-any-return]


def rerouted() -> nn.Module:
    """A model one of whose layers got another forward, on this very object."""
    model = nn.Sequential(nn.Bilinear(8, 8, 8))
    model[0].forward = model[0].forward  # type: ignore[method-assign]
    return model


def in_training() -> nn.Module:
    """Normalisation over the batch."""
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(6))


@pytest.mark.parametrize(
    ("model", "error", "says"),
    [
        (in_training, SiteError, r"'1' \(BatchNorm1d\) mixes"),
        (lambda: nn.Sequential(OwnLSTM(8, 8)), SiteError, r"'0' \(OwnLSTM\) has a forward of its own"),
        (lambda: nn.Sequential(nn.Embedding(11, 8, scale_grad_by_freq=True)), SiteError, r"'0' \(Embedding\) scales its gradients"),
        (rerouted, SiteError, r"'0' \(Bilinear\) has a forward that was put on this very object"),
        (lambda: nn.Sequential(Scores(8, 8)), SiteError, r"'0' \(Scores\) gives a tensor of \(\)"),
        (Reads, StateError, "the weight of 'layer' differs by sample here"),
        (TimeFirst, StateError, r"'layer' is called with input of \(6, 5, 8\), and per_sample names 5 samples"),
        (Bags, StateError, r"'inner' is called with input of \(5,\)"),
    ],
)
def test_what_cannot_differ_by_sample_is_refused(model: Callable[[], nn.Module], error: type[Exception], says: str) -> None:
    """A layer that mixes samples, has its batch elsewhere or whose weight others read is refused by name, never wrong."""
    torch.manual_seed(0)
    adapters = LoRAAdapterSet(model())
    adapters.add("a", LoRAAllFineTuningStrategy(rank=2, targets="*"))
    scramble(adapters, "a")
    before = [dict(vars(module)) for module in adapters.model.modules()]

    with pytest.raises(error, match=says), adapters.per_sample(["a", None, "a", "a", None]) as mixed:
        mixed(torch.randn(SIZE, 6, 8))
    assert adapters.active is None
    assert [dict(vars(module)) for module in adapters.model.modules()] == before


def test_adapters_that_are_no_layers_are_refused() -> None:
    """What an adapter trains in a module that holds layers, and a module of its own, are refused before anything is computed."""
    adapters = LoRAAdapterSet(Prompt())
    adapters.add("prompt", FullFineTuningStrategy(targets="prompt"))
    adapters.add("a", LoRAAllFineTuningStrategy(rank=2))
    with (
        pytest.raises(SiteError, match=r"'the root' \(Prompt\) has tensors of its own under 'prompt'"),
        adapters.per_sample(["prompt"]),
    ):
        pass
    with adapters.per_sample(["a", None]) as model:
        assert output_of(model, torch.randn(2, 6, 8)).shape == (2, 6, 8)


def test_time_and_samples_that_cannot_be_told_apart_are_refused() -> None:
    """Where layers have time first, as many steps as samples leave two ways to read what a linear layer gets."""
    adapters, _ = build("encoder, time first")
    x = torch.randn(6, 6, 8).double()
    with pytest.raises(StateError, match="as many steps of time as samples"), adapters.per_sample([*NAMES, "a"]) as model:
        model(x)
    with adapters.per_sample(["a"] * 6) as model:  # where nothing has to be told apart
        together = model(x)

    torch.testing.assert_close(together, adapters.use("a")(x))


def test_the_context_is_not_left_half() -> None:
    """Unknown names, another batch, another context or another adapter within it, and merging are errors by name."""
    adapters, x = build()
    with pytest.raises(AdapterNameError, match="zzz"), adapters.per_sample(["zzz"]):
        pass
    with pytest.raises(StateError, match="names 3 samples"), adapters.per_sample(["a", "b", "a"]) as model:
        model(x)
    with adapters.per_sample(NAMES) as model:
        with pytest.raises(StateError, match="active already"), adapters.per_sample(NAMES):
            pass
        with pytest.raises(StateError, match="not tuned"):
            merge(model)
        expected = model(x)
        assert len(adapters.parameters("a")) == 4  # which looks at another adapter for a moment
        torch.testing.assert_close(model(x), expected)
        adapters.use("a")
        with pytest.raises(StateError, match="put to use within per_sample"):
            model(x)

    assert adapters.active is None
    assert all(parameter.requires_grad for parameter in adapters.model.parameters())
