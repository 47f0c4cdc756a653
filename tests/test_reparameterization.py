"""In-place adoption against the one oracle there is: the same layer, run with the formula's weight in place of its own."""

from __future__ import annotations

import copy
import dataclasses
import functools
import io
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from models import fingerprint, refused, tensor_bytes
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence

from gift_core import Reparameterization, adopt, adopted_weight, enable_fine_tuning
from gift_core.errors import ModelError, SiteError, StateError
from gift_core.factories import everything, is_instance, is_root, parameter_name_is, reparameterize
from gift_core.reparameterization import adoptions_of, original_class_of, set_merged, trust_mesh, trusts_mesh
from gift_core.strategy import FineTuningStrategy

# --- two methods as someone else would write them, and what they mean in plain tensors


class Scale(Reparameterization):
    """Each output's row of the weight times one plus a number."""

    def init_parameters(self, weight: Tensor, *, start: float = 0.0) -> None:
        self.scale = nn.Parameter(weight.new_full((len(weight),), start))

    def reparameterize(self, weight: Tensor) -> Tensor:
        return scaled(weight, self.scale)


class Mix(Reparameterization):
    """The weight plus a gated linear map of a remembered weight: a parameter, a buffer and a submodule."""

    def init_parameters(self, weight: Tensor) -> None:
        self.gate = nn.Parameter(weight.new_ones(len(weight)))
        self.register_buffer("remembered", weight.sin())
        self.mixer = nn.Linear(weight.shape[-1], weight.shape[-1], bias=False, dtype=weight.dtype)
        nn.init.zeros_(self.mixer.weight)

    def reparameterize(self, weight: Tensor) -> Tensor:
        return mixed(weight, self.gate, self.remembered, self.mixer.weight)


def scaled(weight: Tensor, scale: Tensor) -> Tensor:
    """The formula of `Scale`."""
    return weight * (1 + scale.reshape(-1, *[1] * (weight.dim() - 1)))


def mixed(weight: Tensor, gate: Tensor, remembered: Tensor, mixer: Tensor) -> Tensor:
    """The formula of `Mix`."""
    return weight + gate.reshape(-1, *[1] * (weight.dim() - 1)) * (remembered @ mixer.T)


#: Each method with its formula, what it registers that trains, and what else it registers.
METHODS: dict[type[Reparameterization], tuple[Callable[..., Tensor], tuple[str, ...], tuple[str, ...]]] = {
    Scale: (scaled, ("scale",), ()),
    Mix: (lambda weight, gate, mixer, remembered: mixed(weight, gate, remembered, mixer), ("gate", "mixer.weight"), ("remembered",)),
}

# --- every layer that reads its weight


@dataclasses.dataclass
class Case:
    """A layer, which of its weights are adopted (names by path of the module), and inputs."""

    layer: nn.Module
    sites: dict[str, tuple[str, ...]]
    inputs: tuple[Any, ...]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def run(self, layer: nn.Module | None = None) -> tuple[Tensor, ...]:
        """Call a layer, the case's own if none is given, and flatten what it gives."""
        return tuple(_tensors((self.layer if layer is None else layer)(*self.inputs, **self.options)))

    def adopt(self, method: type[Reparameterization]) -> None:
        """Adopt every site."""
        for path, names in self.sites.items():
            adopt(self.layer.get_submodule(path), method, names)

    def weights(self) -> list[str]:
        """Full names of the adopted weights."""
        return [f"{path}.{name}".lstrip(".") for path, names in self.sites.items() for name in names]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _tensors(part)


def _signal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def _convolution(dimensions: int, **options: Any) -> Case:
    layer = getattr(nn, f"Conv{dimensions}d")(4, 6, 3, **options)
    return Case(layer, {"": ("weight",)}, (_signal(2, 4, *[7, 6, 5][:dimensions]),))


def _transposed(dimensions: int, **options: Any) -> Case:
    layer = getattr(nn, f"ConvTranspose{dimensions}d")(4, 6, 3, **options)
    return Case(layer, {"": ("weight",)}, (_signal(2, 4, *[5, 4, 3][:dimensions]),))


def _bag(mode: str, **options: Any) -> Case:
    layer = nn.EmbeddingBag(9, 4, mode=mode, **options)
    inputs = torch.tensor([1, 2, 4, 5, 4, 3, 2]), torch.tensor([0, 3, 4])
    return Case(layer, {"": ("weight",)}, inputs, {"per_sample_weights": _signal(7)} if mode == "sum" else {})


def _attention(*names: str, out_proj: bool = False, **options: Any) -> Case:
    sites: dict[str, tuple[str, ...]] = {"": names} if names else {}
    layer = nn.MultiheadAttention(8, 2, batch_first=True, **options)
    inputs = _signal(2, 3, 8), _signal(2, 5, options.get("kdim", 8)), _signal(2, 5, options.get("vdim", 8))
    return Case(layer, sites | ({"out_proj": ("weight",)} if out_proj else {}), inputs)


def _encoder_layer() -> Case:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    sites = {"self_attn": ("in_proj_weight",), "self_attn.out_proj": ("weight",), "linear1": ("weight",), "linear2": ("weight",)}
    return Case(layer, sites, (_signal(2, 3, 8),))


def _recurrent(kind: type[nn.RNNBase], packed: bool = False, biases: bool = False, **options: Any) -> Case:
    layer = kind(4, 5, batch_first=True, **options)
    names = tuple(name for name, _ in layer.named_parameters() if biases or name.startswith("weight"))
    steps: Any = _signal(3, 6, 4)
    if packed:
        steps = pack_padded_sequence(steps, torch.tensor([6, 2, 4]), batch_first=True, enforce_sorted=False)
    return Case(layer, {"": names}, (steps,))


class Projected(nn.Module):
    """A module whose matrix is a parameter of its own, read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(4, 4))
        self.weight = nn.Parameter(torch.randn(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.matrix).tanh() @ self.matrix @ self.weight


def _simple(layer: nn.Module, *inputs: Tensor) -> Case:
    return Case(layer, {"": ("weight",)}, inputs)


TOKENS = torch.tensor([[1, 0, 4], [4, 2, 2]])
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
CASES: dict[str, Callable[[], Case]] = {
    "linear": lambda: _simple(nn.Linear(4, 3), _signal(2, 5, 4)),
    "linear without bias": lambda: _simple(nn.Linear(4, 3, bias=False), _signal(4)),
    **{f"conv{d}d": functools.partial(_convolution, d) for d in (1, 2, 3)},
    **{f"conv{d}d groups, stride, dilation": functools.partial(_convolution, d, groups=2, stride=2, dilation=2) for d in (1, 2)},
    "conv3d groups, stride": lambda: _convolution(3, groups=2, stride=(2, 1, 1)),
    **{
        f"conv{d}d {mode}": functools.partial(_convolution, d, padding=(1,) * d, padding_mode=mode)
        for d in (1, 2, 3)
        for mode in PADDING_MODES
    },
    "conv2d same": lambda: _convolution(2, padding="same", dilation=2),
    **{f"transposed{d}d": functools.partial(_transposed, d) for d in (1, 2, 3)},
    **{
        f"transposed{d}d groups": functools.partial(_transposed, d, groups=2, stride=2, padding=1, output_padding=1, dilation=2)
        for d in (1, 2, 3)
    },
    "embedding": lambda: _simple(nn.Embedding(9, 4), TOKENS),
    "embedding padding": lambda: _simple(nn.Embedding(9, 4, padding_idx=2, scale_grad_by_freq=True), TOKENS),
    "embedding max_norm": lambda: _simple(nn.Embedding(9, 4, max_norm=0.5), TOKENS),
    **{f"bag {mode}": functools.partial(_bag, mode) for mode in ("sum", "mean", "max")},
    "bag last offset": lambda: _bag("mean", include_last_offset=True, padding_idx=2),
    "bilinear": lambda: _simple(nn.Bilinear(4, 3, 5), _signal(2, 4), _signal(2, 3)),
    "layer norm": lambda: _simple(nn.LayerNorm(4), _signal(2, 4)),
    "batch norm": lambda: _simple(nn.BatchNorm1d(4), _signal(5, 4)),
    "prelu": lambda: _simple(nn.PReLU(4), _signal(2, 4)),
    "attention": lambda: _attention("in_proj_weight"),
    "attention out_proj": lambda: _attention(out_proj=True),
    "attention both": lambda: _attention("in_proj_weight", out_proj=True, bias=False),
    "attention biases": lambda: _attention("in_proj_weight", "in_proj_bias", "bias_k", "bias_v", add_bias_kv=True),
    "attention q, k, v": lambda: _attention("q_proj_weight", "k_proj_weight", "v_proj_weight", out_proj=True, kdim=6, vdim=4),
    "encoder layer": _encoder_layer,
    **{
        f"{kind.__name__} {title}": functools.partial(_recurrent, kind, **options)
        for kind in (nn.LSTM, nn.GRU, nn.RNN)
        for title, options in {
            "plain": {},
            "packed": {"packed": True},
            "bidirectional, two layers": {"bidirectional": True, "num_layers": 2, "biases": True},
        }.items()
    },
    "LSTM proj_size": lambda: _recurrent(nn.LSTM, proj_size=3, bidirectional=True, packed=True, num_layers=2),
    "own parameters": lambda: Case(Projected(), {"": ("matrix", "weight")}, (_signal(2, 4),)),
}
#: One of each kind of adoption: ``weight``, another name, several names, a child, a recurrent layer.
KINDS = ("linear", "conv2d reflect", "embedding", "attention both", "attention q, k, v", "LSTM proj_size", "own parameters")


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    """Every layer in turn, in double precision and in training mode."""
    return build(request.param)


@pytest.fixture(params=KINDS, ids=str)
def kind(request: pytest.FixtureRequest) -> Case:
    """One layer of each kind of adoption."""
    return build(request.param)


@pytest.fixture(params=METHODS, ids=lambda method: method.__name__)
def method(request: pytest.FixtureRequest) -> type[Reparameterization]:
    """Each of the two methods."""
    return request.param  # type: ignore[no-any-return]


def build(name: str) -> Case:
    """A case with seeded values."""
    torch.manual_seed(0)
    case = CASES[name]()
    case.layer.double()
    return case


def adapters(case: Case, method: type[Reparameterization]) -> dict[str, Tensor]:
    """What a method registered that trains, under the keys that it must have."""
    own = dict(case.layer.named_parameters())
    return {key + part: own[key + part] for key in map(prefix_of, case.weights()) for part in METHODS[method][1]}


def prefix_of(key: str) -> str:
    """What stands before a method's names for an adopted weight: nothing more than the path for ``weight``."""
    path, dot, name = key.rpartition(".")
    return path + dot if name == "weight" else f"{key}_"


def disturb(tensors: Mapping[str, Tensor]) -> None:
    """Move adapters away from where they start."""
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.add_(torch.randn_like(tensor), alpha=0.3)


def effective(case: Case, method: type[Reparameterization], plain: nn.Module, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights that the formula gives, from the plain layer's own and from what was registered."""
    formula, trained, rest = METHODS[method]
    buffers = dict(case.layer.named_buffers())
    weights = {}
    for key in case.weights():
        prefix = prefix_of(key)
        parts = [own[prefix + part] for part in trained] + [buffers[prefix + part] for part in rest]
        weights[key] = formula(plain.get_parameter(key).detach(), *parts)
    return weights


def oracle(case: Case, plain: nn.Module, weights: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """What the plain layer gives with other weights."""
    return tuple(_tensors(torch.func.functional_call(plain, dict(weights), case.inputs, case.options)))


def loss_of(outputs: tuple[Tensor, ...]) -> Tensor:
    """One number that every floating-point output has a part in."""
    return torch.stack([output.sin().sum() for output in outputs if output.is_floating_point()]).sum()


def assert_same(actual: Any, expected: Any) -> None:
    """Equal to within the rounding of double precision."""
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


# --- what every layer computes


def test_a_fresh_adapter_changes_nothing(case: Case, method: type[Reparameterization]) -> None:
    """Before training, every layer gives the same bits as without the adapter, in training and in eval mode."""
    plain = copy.deepcopy(case.layer)

    case.adopt(method)

    assert _bits(case.run()) == _bits(case.run(plain))
    assert _bits(case.run(case.layer.eval())) == _bits(case.run(plain.eval()))


def test_every_layer_computes_with_the_formula(case: Case, method: type[Reparameterization]) -> None:
    """A layer gives what it would with the formula's weight in place of its own, in every mode, also without gradients."""
    plain = copy.deepcopy(case.layer)
    case.adopt(method)
    own = adapters(case, method)
    disturb(own)
    weights = effective(case, method, plain, own)

    for training in (True, False):
        case.layer.train(training)
        plain.train(training)

        assert_same(case.run(), oracle(case, plain, weights))
        with torch.no_grad():
            assert_same(case.run(), oracle(case, plain, weights))


def test_a_trained_adapter_changes_the_output(case: Case, method: type[Reparameterization]) -> None:
    """No layer ignores its adapter."""
    case.layer.eval()
    before = case.run()
    case.adopt(method)
    disturb(adapters(case, method))

    assert _bits(case.run()) != _bits(before)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_gradients_are_the_formulas(case: Case, method: type[Reparameterization], training: bool) -> None:
    """The adapter's gradients, and the inputs', are autograd's through the formula; frozen weights get none."""
    plain = copy.deepcopy(case.layer).train(training)
    case.adopt(method)
    case.layer.train(training)
    own = adapters(case, method)
    disturb(own)
    leaves = {key: tensor.detach().clone().requires_grad_() for key, tensor in own.items()}
    wanted = dict(
        zip(
            leaves,
            torch.autograd.grad(loss_of(oracle(case, plain, effective(case, method, plain, leaves))), [*leaves.values()]),
            strict=True,
        )
    )

    loss_of(case.run()).backward()

    assert_same({key: tensor.grad for key, tensor in own.items()}, wanted)
    assert all(_frozen(case.layer, key).grad is None for key in case.weights())
    assert not any(_frozen(case.layer, key).requires_grad for key in case.weights())


def test_the_base_is_never_written(case: Case, method: type[Reparameterization]) -> None:
    """Forward and backward leave every bit of the base model's parameters, merged too."""
    before = {key: tensor_bytes(parameter) for key, parameter in case.layer.named_parameters()}
    case.adopt(method)
    disturb(adapters(case, method))

    loss_of(case.run()).backward()
    case.layer.eval()
    _merge(case.layer, True)
    case.run()
    _merge(case.layer, False)

    assert {key: tensor_bytes(parameter) for key, parameter in case.layer.named_parameters() if key in before} == before


def test_merged_layers_compute_the_same(case: Case, method: type[Reparameterization]) -> None:
    """A merged layer gives what the unmerged one gives, and unmerging gives back the unmerged one's exact bits."""
    case.layer.eval()
    case.adopt(method)
    disturb(adapters(case, method))
    expected = case.run()

    _merge(case.layer, True)
    merged = case.run()
    _merge(case.layer, False)

    assert_same(merged, expected)
    assert _bits(case.run()) == _bits(expected)


def test_base_keys_are_unchanged(case: Case, method: type[Reparameterization]) -> None:
    """Adopting adds keys and changes none, neither their names nor their order nor the parameters behind them."""
    before = dict(case.layer.named_parameters())
    buffers = dict(case.layer.named_buffers())

    case.adopt(method)
    after = dict(case.layer.named_parameters())

    assert [key for key in after if key in before] == list(before)
    assert all(after[key] is parameter for key, parameter in before.items())
    assert set(after) - set(before) == set(adapters(case, method))
    assert {key.split(".")[-1].split("_")[-1] for key, _ in case.layer.named_buffers() if key not in buffers} == set(METHODS[method][2])


def _bits(outputs: tuple[Tensor, ...]) -> list[bytes]:
    return [tensor_bytes(output) for output in outputs]


def _frozen(layer: nn.Module, key: str) -> nn.Parameter:
    path, _, name = key.rpartition(".")
    return layer.get_submodule(path)._parameters[name]  # type: ignore[return-value]


def _merge(layer: nn.Module, merged: bool) -> None:
    for module in layer.modules():
        if adoptions_of(module):
            set_merged(module, merged)


# --- layers that read weights in ways of their own


@pytest.fixture
def encoder() -> Case:
    """An adopted encoder layer in eval mode, its adapters moved."""
    case = build("encoder layer")
    case.layer.eval()
    case.adopt(Scale)
    disturb(adapters(case, Scale))
    return case


def test_the_encoders_fast_path_is_taken_and_right(encoder: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused encoder kernel still runs, and gets the effective weights."""
    calls = []
    fused = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *arguments: calls.append(1) or fused(*arguments))
    expected = encoder.run()
    assert not calls

    with torch.no_grad():
        actual = encoder.run()

    assert len(calls) == 1
    assert_same(actual, expected)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_an_encoder_with_nested_tensors_is_right() -> None:
    """A padded batch, which the encoder packs into a nested tensor on its fast path, gives what the slow path gives."""
    torch.manual_seed(0)
    stack = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2).double().eval()
    for layer in stack.layers:
        for module, name in ((layer.self_attn, "in_proj_weight"), (layer.self_attn.out_proj, "weight"), (layer.linear1, "weight")):
            adopt(module, Scale, (name,), start=0.2)
    x, padding = _signal(2, 4, 8), torch.tensor([[False] * 4, [False, False, True, True]])
    expected = stack(x, src_key_padding_mask=padding)

    with torch.no_grad():
        actual = stack(x, src_key_padding_mask=padding)

    assert_same(actual[~padding], expected[~padding])


def test_attention_weights_come_from_the_effective_weight() -> None:
    """Averaged attention weights are those of the effective projection."""
    case = build("attention both")
    plain = copy.deepcopy(case.layer)
    case.adopt(Scale)
    own = adapters(case, Scale)
    disturb(own)
    case.options = {"average_attn_weights": False, "need_weights": True}

    assert_same(case.run(), oracle(case, plain, effective(case, Scale, plain, own)))


def test_a_recurrent_layer_follows_a_move() -> None:
    """After a change of dtype a recurrent layer reads its weights anew."""
    case = build("LSTM proj_size")
    case.adopt(Scale)
    disturb(adapters(case, Scale))
    expected = case.run()[0]
    case.layer.float()
    case.inputs = (case.inputs[0].float(),)

    assert case.run()[0].dtype is torch.float32
    torch.testing.assert_close(case.run()[0].double(), expected, rtol=1e-5, atol=1e-6)


def test_a_state_dict_loads_into_a_recurrent_layer() -> None:
    """Loading reaches the weights that a recurrent layer computes with, also with ``assign=True``."""
    source, target = build("GRU bidirectional, two layers"), build("GRU bidirectional, two layers")
    for case in (source, target):
        case.adopt(Scale)
    disturb(dict(source.layer.named_parameters()))

    for assign in (False, True):
        disturb(dict(target.layer.named_parameters()))
        target.layer.load_state_dict(copy.deepcopy(source.layer.state_dict()), assign=assign)

        assert _bits(target.run()) == _bits(source.run())


class Doubled(nn.Linear):
    """A Linear layer whose own forward reads its weight in its own way."""

    def forward(self, input: Tensor) -> Tensor:
        """Give the outputs twice over, with the weight read as an attribute."""
        return torch.cat([input @ self.weight.T, input @ self.weight.T + 1], dim=-1)


def test_a_subclass_keeps_its_forward() -> None:
    """A layer with a forward of its own keeps it, and it computes with the effective weight."""
    torch.manual_seed(0)
    layer, x = Doubled(4, 3), torch.randn(2, 4)
    adopt(layer, Scale, start=0.5)

    expected = x @ (layer._parameters["weight"] * 1.5).T

    assert isinstance(layer, Doubled)
    torch.testing.assert_close(layer(x), torch.cat([expected, expected + 1], dim=-1))


@pytest.mark.parametrize("first", [True, False], ids=["before adoption", "after adoption"])
def test_an_instance_level_forward_stays_right(first: bool) -> None:
    """A ``forward`` that a tool puts on the instance, around the old one, computes with the effective weight."""
    torch.manual_seed(0)
    layer, x = nn.Linear(4, 3), torch.randn(2, 4)

    def wrap() -> None:
        old = layer.forward
        layer.forward = lambda *arguments: old(*arguments) + 100  # type: ignore[method-assign]

    for step in (wrap, lambda: adopt(layer, Scale, start=0.5)) if first else (lambda: adopt(layer, Scale, start=0.5), wrap):
        step()

    torch.testing.assert_close(layer(x), F.linear(x, layer._parameters["weight"] * 1.5, layer.bias) + 100)


def test_a_method_may_have_a_forward() -> None:
    """A method's own forward is used unmerged; merged layers run the layer's own code."""

    class Loud(Scale):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + 10  # type: ignore[no-any-return]

    torch.manual_seed(0)
    layer, x = nn.Linear(4, 3).eval(), torch.randn(2, 4)
    plain = layer(x)
    adopt(layer, Loud)

    assert torch.equal(layer(x), plain + 10)
    set_merged(layer, True)
    assert torch.equal(layer(x), plain)


def test_a_method_may_choose_its_class_by_the_layer() -> None:
    """What ``specialize`` answers is what adopts the layer, and the generated class is still called after the method."""

    class Chosen(Scale):
        pass

    class Choosing(Scale):
        @classmethod
        def specialize(cls, module: nn.Module) -> type[Reparameterization]:
            return Chosen if isinstance(module, nn.Linear) else cls

    linear, conv = nn.Linear(4, 3), nn.Conv1d(4, 3, 2)
    for layer in (linear, conv):
        adopt(layer, Choosing)

    assert adoptions_of(linear) == (("weight", Chosen),)
    assert adoptions_of(conv) == (("weight", Choosing),)
    assert type(linear).__name__ == "ScaleLinear"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_effective_weight_has_the_weights_dtype(dtype: torch.dtype) -> None:
    """A method that computes in another precision gives a weight in the layer's own."""

    class Precise(Scale):
        def reparameterize(self, weight: Tensor) -> Tensor:
            return weight.double() * (1 + self.scale.double())[:, None]

    layer = nn.Linear(4, 3, dtype=dtype)
    adopt(layer, Precise, start=0.25)

    assert layer.weight.dtype is dtype
    assert torch.equal(layer.weight, (layer._parameters["weight"].double() * 1.25).to(dtype))


def test_autocast_does_not_reach_into_a_method() -> None:
    """Under autocast the weight is built in its own precision and only then cast, as a plain layer's is."""

    class Product(Scale):
        def reparameterize(self, weight: Tensor) -> Tensor:
            return torch.diag(1 + self.scale) @ weight

    torch.manual_seed(0)
    layer, x = nn.Linear(16, 8), torch.randn(2, 16)
    adopt(layer, Product, start=1 / 3)
    weight = torch.diag(torch.full((8,), 1 + 1 / 3)) @ layer._parameters["weight"]

    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = layer(x), F.linear(x, weight, layer.bias)

    assert actual.dtype is torch.bfloat16
    assert torch.equal(actual, expected)


# --- identity, copies


def test_adopting_keeps_the_object(kind: Case) -> None:
    """The layer stays the same object of the same family of classes; hooks and references on it stay valid."""
    seen = []
    kind.layer.register_forward_hook(lambda module, arguments, output: seen.append(module))
    before, original = id(kind.layer), type(kind.layer)

    kind.adopt(Scale)
    kind.run()

    assert seen == [kind.layer]
    assert id(kind.layer) == before
    assert isinstance(kind.layer, original)
    assert original_class_of(kind.layer) is original


def _through_pickle(layer: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(layer))  # type: ignore[no-any-return]


def _through_torch(layer: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize("copied", [copy.deepcopy, _through_pickle, _through_torch], ids=["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("state", ["plain", "adopted", "merged"])
def test_copies_are_whole_and_apart(kind: Case, method: type[Reparameterization], state: str, copied: Callable[..., nn.Module]) -> None:
    """A copy gives the same bits, is of the same classes, shares no tensor, and goes on in every way the original does."""
    kind.layer.eval()
    if state != "plain":
        kind.adopt(method)
        disturb(adapters(kind, method))
    unmerged = kind.run()
    _merge(kind.layer, state == "merged")
    expected = kind.run()

    twin = copied(kind.layer)

    assert _bits(kind.run(twin)) == _bits(expected)
    assert [type(module) for module in twin.modules()] == [type(module) for module in kind.layer.modules()]
    assert not {t.data_ptr() for t in twin.state_dict().values()} & {t.data_ptr() for t in kind.layer.state_dict().values()}
    disturb(dict(twin.named_parameters()))
    assert _bits(kind.run(twin)) != _bits(expected)
    assert _bits(kind.run()) == _bits(expected)
    _merge(kind.layer, False)
    assert _bits(kind.run()) == _bits(unmerged)


def test_a_copy_of_a_merged_layer_unmerges(kind: Case, method: type[Reparameterization]) -> None:
    """A copy made while merged goes back to the frozen weight and the adapter, and trains."""
    kind.layer.eval()
    kind.adopt(method)
    disturb(adapters(kind, method))
    expected = kind.run()
    _merge(kind.layer, True)

    twin = copy.deepcopy(kind.layer)
    _merge(twin, False)

    assert _bits(kind.run(twin)) == _bits(expected)
    loss_of(kind.run(twin.train())).backward()
    assert all(parameter.grad is not None for key, parameter in twin.named_parameters() if key in adapters(kind, method))


def test_training_a_merged_layer_is_refused(kind: Case) -> None:
    """A merged layer in training mode does not quietly train nothing."""
    kind.adopt(Scale)
    _merge(kind.layer, True)

    with pytest.raises(StateError, match="unmerge"):
        kind.run()


@pytest.mark.parametrize("name", ["attention both", "attention q, k, v", "linear", "conv2d reflect", "own parameters", "embedding"])
@pytest.mark.parametrize("merged", [False, True], ids=["adopted", "merged"])
def test_adopted_layers_compile_whole(name: str, method: type[Reparameterization], merged: bool) -> None:
    """torch.compile captures an adopted layer, names other than ``weight`` included, in one graph with the same answers."""
    torch.compiler.reset()
    case = build(name)
    case.layer.eval()
    case.adopt(method)
    disturb(adapters(case, method))
    _merge(case.layer, merged)
    expected = case.run()

    compiled = torch.compile(case.layer, fullgraph=True, backend="eager")

    assert_same(case.run(compiled), expected)
    if not merged:
        disturb(adapters(case, method))
        assert_same(case.run(compiled), case.run())


def test_functional_call_reaches_adapter_and_base(kind: Case) -> None:
    """torch.func.functional_call swaps the adapter and the frozen weight alike."""
    plain = copy.deepcopy(kind.layer)
    kind.adopt(Scale)
    own = {key: tensor.detach() + 0.3 for key, tensor in adapters(kind, Scale).items()}
    base = {key: plain.get_parameter(key).detach() * 2 for key in kind.weights()}

    outputs = tuple(_tensors(torch.func.functional_call(kind.layer, {**own, **base}, kind.inputs, kind.options)))

    assert_same(outputs, oracle(kind, plain, {key: weight * 1.3 for key, weight in base.items()}))


# --- names


def test_names_are_kept_apart() -> None:
    """Each adapted name other than ``weight`` has its registrations under its own prefix, and ``weight`` has none."""
    case = build("own parameters")
    case.adopt(Mix)

    own = {key for key, _ in case.layer.named_parameters()} - {"matrix", "weight"}

    assert own == {"gate", "mixer.weight", "matrix_gate", "matrix_mixer.weight"}
    assert {key for key, _ in case.layer.named_buffers()} == {"remembered", "matrix_remembered"}


def test_a_method_can_ask_which_weight_it_serves() -> None:
    """In both functions a method learns the layer and the parameter's name that it is called for."""
    asked = []

    class Asking(Reparameterization):
        def init_parameters(self, weight: Tensor) -> None:
            asked.append(adopted_weight(self))

        def reparameterize(self, weight: Tensor) -> Tensor:
            asked.append(adopted_weight(self))
            return weight

    linear, recurrent = nn.Linear(3, 2), nn.GRUCell(3, 2)
    adopt(linear, Asking)
    adopt(recurrent, Asking, ["weight_hh"])
    assert linear.weight is not None
    assert recurrent.weight_hh is not None

    assert [(id(layer), name) for layer, name in asked] == [
        (id(layer), name) for _ in range(2) for layer, name in ((linear, "weight"), (recurrent, "weight_hh"))
    ]


@pytest.mark.parametrize("order", [("weight_ih_l0", "weight_hh_l0"), ("weight_hh_l0", "weight_ih_l0")], ids=str)
def test_two_methods_on_one_module(order: tuple[str, str]) -> None:
    """Two names of one module may have two methods, whichever comes first."""
    torch.manual_seed(0)
    layer = nn.LSTM(4, 5).double()
    plain, x = copy.deepcopy(layer), _signal(3, 2, 4)
    for name, method in zip(order, (Scale, Mix), strict=True):
        adopt(layer, method, (name,))
    disturb(
        {key: tensor for key, tensor in layer.named_parameters() if tensor.requires_grad and key not in dict(plain.named_parameters())}
    )
    first, second = order
    own = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    weights = {
        first: scaled(own[first], own[f"{first}_scale"]),
        second: mixed(own[second], own[f"{second}_gate"], own[f"{second}_remembered"], own[f"{second}_mixer.weight"]),
    }

    expected = torch.func.functional_call(plain, weights, (x,))

    assert_same(layer(x), expected)
    assert_same(_through_pickle(layer)(x), expected)
    assert adoptions_of(layer) == ((first, Scale), (second, Mix))


def test_a_method_reads_the_layers_own_attributes() -> None:
    """``self`` is the layer: what it has can be read, also for a name other than ``weight``."""

    class PerHead(Reparameterization):
        def init_parameters(self, weight: Tensor) -> None:
            self.scale = nn.Parameter(weight.new_zeros(self.num_heads))
            self.heads = self.num_heads

        def reparameterize(self, weight: Tensor) -> Tensor:
            return self.grown(weight) if self.training else weight

        def grown(self, weight: Tensor) -> Tensor:
            return weight * (1 + self.scale.repeat(len(weight) // self.heads)[:, None])

    layer = nn.MultiheadAttention(8, 2)
    adopt(layer, PerHead, ("in_proj_weight",))
    nn.init.constant_(layer.in_proj_weight_scale, 1.0)

    assert torch.equal(layer.in_proj_weight, layer._parameters["in_proj_weight"] * 2)
    assert torch.equal(layer.eval().in_proj_weight, layer._parameters["in_proj_weight"])


# --- bad methods


class Misspelt(Scale):
    """Reads what it never registered."""

    def reparameterize(self, weight: Tensor) -> Tensor:
        return weight * self.sclae  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("name", ["linear", "attention both", "LSTM plain"])
def test_an_attribute_error_in_a_method_is_told(name: str) -> None:
    """Where torch would answer an AttributeError with the frozen weight, there is an error that names the cause."""
    case = build(name)
    case.adopt(Misspelt)

    with pytest.raises(SiteError, match=r"Misspelt\.reparameterize failed on .*sclae"):
        case.run()


class Transposed(Scale):
    """Gives a weight of another shape."""

    def reparameterize(self, weight: Tensor) -> Tensor:
        return weight.T


@pytest.mark.parametrize(
    ("name", "shapes"), [("linear", r"\(4, 3\) for 'weight' of \(3, 4\)"), ("attention", r"\(8, 24\) for 'in_proj_weight'")]
)
def test_a_wrong_shape_is_refused(name: str, shapes: str) -> None:
    """An effective weight of another shape is an error with both shapes, not a broadcast."""
    case = build(name)
    case.adopt(Transposed)

    with pytest.raises(SiteError, match=rf"Transposed\.reparameterize gave {shapes}"):
        case.run()


def _overwriting(name: str, value: Callable[[], Any]) -> type[Reparameterization]:
    class Overwriting(Scale):
        def init_parameters(self, weight: Tensor, *, start: float = 0.0) -> None:
            self.scale = nn.Parameter(weight.new_full((len(weight),), start))
            setattr(self, name, value())

    return Overwriting


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("bias", lambda: nn.Parameter(torch.ones(3))),
        ("bias", lambda: None),
        ("in_features", lambda: 7),
        ("out_features", lambda: 3.0),
        ("forward", lambda: print),
        ("extra_repr", lambda: print),
        ("weight", lambda: nn.Parameter(torch.ones(3, 4))),
    ],
)
def test_a_method_may_not_overwrite_the_layer(name: str, value: Callable[[], Any]) -> None:
    """A method that sets what the layer has already is refused by name, and the model is untouched."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3))
    strategy = FineTuningStrategy([(is_instance(nn.Linear), reparameterize(_overwriting(name, value)))])

    with refused(model, SiteError, name):
        enable_fine_tuning(model, strategy)


def test_a_prefixed_name_may_not_overwrite_the_layer() -> None:
    """The prefix does not make a way around: what lands on an attribute that the layer has is refused too."""

    class Colliding(Scale):
        def init_parameters(self, weight: Tensor, *, start: float = 0.0) -> None:
            self.weight = nn.Parameter(weight.clone())

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_proj = nn.Parameter(torch.randn(3, 4))
            self.in_proj_weight = nn.Parameter(torch.randn(3, 4))

    model = Odd()
    strategy = FineTuningStrategy(para_caps=[(parameter_name_is("in_proj"), reparameterize(Colliding))])

    with refused(model, SiteError, "in_proj_weight"):
        enable_fine_tuning(model, strategy)


# --- places that cannot be adopted


def _weight_normed() -> nn.Module:
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(nn.Linear(4, 3))


def _parametrised() -> nn.Module:
    layer = nn.Linear(4, 3)
    nn.utils.parametrize.register_parametrization(layer, "weight", nn.Tanh())
    return layer


def _integer() -> nn.Module:
    layer = nn.Linear(4, 3)
    layer.weight = nn.Parameter(torch.ones(3, 4, dtype=torch.int8), requires_grad=False)
    return layer


def _sparse() -> nn.Module:
    layer = nn.Linear(4, 3)
    layer.weight = nn.Parameter(torch.eye(4)[:3].to_sparse())
    return layer


def _adopted() -> nn.Module:
    layer = nn.Linear(4, 3)
    adopt(layer, Scale)
    return layer


def _scripted() -> nn.Module:
    # torch deprecates scripting, with a warning that depends on its version; models that are scripted already stay around
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(nn.Linear(4, 3))  # type: ignore[no-any-return]


def _state(model: nn.Module) -> Any:
    if any(isinstance(m, torch.jit.ScriptModule | nn.LazyLinear) or _has_sparse(m) for m in model.modules()):
        # these have no bytes to compare: classes, objects and flags are
        return [(id(m), type(m), [(key, id(p), p.requires_grad) for key, p in m.named_parameters()]) for m in model.modules()]
    return fingerprint(model)


def _has_sparse(module: nn.Module) -> bool:
    return any(p is not None and p.layout is not torch.strided for p in module._parameters.values())


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "twice": (_adopted, "adapted already"),
    "unknown": (nn.ReLU, r"no parameter 'weight' \(its own: none\)"),
    "absent": (lambda: nn.LayerNorm(3, elementwise_affine=False), "no parameter 'weight'"),
    "old weight_norm": (_weight_normed, "weight_g, weight_v"),
    "parametrised": (_parametrised, "torch.nn.utils.parametrize"),
    "weight_norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), "torch.nn.utils.parametrize"),
    "spectral_norm": (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)), "torch.nn.utils.parametrize"),
    "lazy": (lambda: nn.LazyLinear(3), "no shape yet"),
    "integer": (_integer, "no dense floating-point tensor"),
    "sparse": (_sparse, "no dense floating-point tensor"),
    "meta": (lambda: nn.Linear(4, 3, device="meta"), "meta device"),
    "scripted": (_scripted, "scripted"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_adopted_is_refused(name: str) -> None:
    """Each unusable weight is an error with its reason, and the layer keeps class and members."""
    make, reason = REFUSED[name]
    layer = make()
    before = _state(layer)

    with pytest.raises(SiteError, match=reason):
        adopt(layer, Scale)

    assert _state(layer) == before


@pytest.mark.parametrize("name", [name for name in REFUSED if name != "absent"])
def test_what_cannot_be_adopted_leaves_the_model_untouched(name: str) -> None:
    """Inside a model, the error comes before anything changes, and says where."""
    layer = REFUSED[name][0]()
    model = nn.Sequential(nn.Linear(4, 4), layer)
    before = _state(model)

    with pytest.raises((SiteError, ModelError)) as caught:
        enable_fine_tuning(model, FineTuningStrategy([(~is_root() & everything(), reparameterize(Scale))]))

    assert "'1'" in str(caught.value)
    assert _state(model) == before


def test_an_unknown_name_is_refused_with_those_there_are() -> None:
    """The message for a name that the layer lacks lists the names it has."""
    with pytest.raises(SiteError, match=r"no parameter 'wieght' \(its own: weight, bias\)"):
        adopt(nn.Linear(4, 3), Scale, ("wieght",))


def test_one_name_of_several_refused_says_which() -> None:
    """Of several names, the one that cannot be adopted is named."""
    layer = nn.LSTM(4, 5)

    with pytest.raises(SiteError, match="weight_ih_l7"):
        adopt(layer, Scale, ("weight_ih_l0", "weight_ih_l7"))


def test_a_complex_weight_is_adopted() -> None:
    """A complex weight is dense numbers too: whether it can be adapted is the method's affair."""
    torch.manual_seed(0)
    layer, x = nn.Linear(4, 3, dtype=torch.complex64), torch.randn(2, 4, dtype=torch.complex64)
    expected = F.linear(x, layer.weight * 1.5, layer.bias)
    adopt(layer, Scale, start=0.5)

    torch.testing.assert_close(layer(x), expected)


def test_a_mesh_is_trusted_by_itself_alone() -> None:
    """An adopted layer computes with tensors sharded over the mesh that it was told of, and with those of no other."""

    class DTensor(Tensor):
        """Goes by the name of torch's."""

    mine, others, plain = (torch.ones(2, 2).as_subclass(kind) for kind in (DTensor, DTensor, Tensor))
    mine.device_mesh, others.device_mesh = "mine", "another"
    layer = nn.Linear(2, 2)
    assert not trusts_mesh(layer, mine)

    adopt(layer, Scale)
    layer._parameters["weight"] = mine
    trust_mesh(layer)

    assert [trusts_mesh(layer, tensor) for tensor in (mine, others, plain)] == [True, False, False]


def test_what_a_user_set_on_a_layer_is_no_overwriting() -> None:
    """The refusal of a method that overwrites names what the method overwrote, not what stood on the layer before."""

    class Greedy(Scale):
        def init_parameters(self, weight: Tensor, **params: Any) -> None:
            super().init_parameters(weight, **params)
            self.in_features = 99

    layer = nn.Linear(2, 2)
    layer.extra_repr = lambda: "mine"  # type: ignore[method-assign]

    with pytest.raises(SiteError, match="Greedy overwrites in_features of the layer"):
        adopt(layer, Greedy)


def test_a_quantised_weight_is_handed_out_raw() -> None:
    """A frozen weight that became whole numbers, as quantisation in place does it, is what the layer gives: no method can add to it."""
    adopt(layer := nn.Linear(4, 3), Scale)
    packed = nn.Parameter(torch.ones(3, 4, dtype=torch.int8), requires_grad=False)

    layer._parameters["weight"] = packed

    assert layer.weight is packed
