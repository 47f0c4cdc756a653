"""Small models that cover the shapes a real model has, and how tests compare a model with what it was.

Every builder gives a new model with the same values: it seeds, and puts the generator back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gift_core import Reparameterization
from gift_core.errors import GiftError, StateError

Builder = Callable[[], nn.Module]


def _seeded(builder: Builder) -> Builder:
    @functools.wraps(builder)
    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return builder()

    return build


@_seeded
def mlp() -> nn.Module:
    """Linear layers with names: ``0``, ``1``, ``2``; takes ``(batch, 4)``."""
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


class CNN(nn.Module):
    """A convolution with BatchNorm, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.bn(self.conv(x)).relu()).flatten(1))


@_seeded
def cnn() -> nn.Module:
    """A `CNN`; takes ``(batch, 3, 6, 6)``."""
    return CNN()


class Tied(nn.Module):
    """An embedding whose weight is also the output layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.middle = nn.Linear(4, 4)
        self.output = nn.Linear(4, 7, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.middle(self.embedding(x)))


@_seeded
def tied() -> nn.Module:
    """A `Tied`; takes token numbers below 7."""
    return Tied()


class Shared(nn.Module):
    """One Linear layer under two names, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x).relu()))


@_seeded
def shared() -> nn.Module:
    """A `Shared`; takes ``(batch, 4)``."""
    return Shared()


class SelfAttention(nn.Module):
    """`torch.nn.MultiheadAttention` of a sequence with itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


@_seeded
def attention() -> nn.Module:
    """A `SelfAttention`; takes ``(batch, length, 4)``."""
    return SelfAttention()


@_seeded
def encoder() -> nn.Module:
    """Two transformer layers without dropout; takes ``(batch, length, 4)``."""
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


class Recurrent(nn.Module):
    """A bidirectional LSTM and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 5, 2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0])


@_seeded
def lstm() -> nn.Module:
    """A `Recurrent`; takes ``(batch, length, 4)``."""
    return Recurrent()


@_seeded
def embedding() -> nn.Module:
    """An embedding and a head; takes token numbers below 7."""
    return nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 2))


class Block(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc(self.norm(x))


class Nested(nn.Module):
    """Every container: ModuleList, ModuleDict, Sequential, a missing child, a parameter and a buffer of the root's own."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.heads = nn.ModuleDict({"a": nn.Linear(4, 2), "b": nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))})
        self.register_module("nothing", None)
        self.scale = nn.Parameter(torch.ones(4))
        self.register_buffer("offset", torch.zeros(4))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return sum(head(x * self.scale + self.offset) for head in self.heads.values())  # type: ignore[return-value]


@_seeded
def nested() -> nn.Module:
    """A `Nested`; takes ``(batch, 4)``."""
    return Nested()


@_seeded
def single() -> nn.Module:
    """A root that is the only layer; takes ``(batch, 4)``."""
    return nn.Linear(4, 3)


_VECTORS = (mlp, shared, nested, single)
_SEQUENCES = (attention, encoder, lstm)
_TOKENS = (tied, embedding)

#: Every builder of this file.
ALL: tuple[Builder, ...] = (*_VECTORS, *_SEQUENCES, *_TOKENS, cnn)


class Delta(Reparameterization):
    """The simplest method: the weight plus a trainable tensor of its shape, ``start`` everywhere at first."""

    delta: nn.Parameter

    def init_parameters(self, weight: Tensor, *, start: float = 0.0) -> None:
        self.delta = nn.Parameter(torch.full_like(weight, start))

    def reparameterize(self, weight: Tensor) -> Tensor:
        return weight + self.delta


class WideDelta(Delta):
    """The same in float32, whatever the dtype of the weight."""

    def init_parameters(self, weight: Tensor, *, start: float = 0.0) -> None:
        self.delta = nn.Parameter(torch.full_like(weight, start, dtype=torch.float32))

    def reparameterize(self, weight: Tensor) -> Tensor:
        return (weight.float() + self.delta).to(weight.dtype)


def input_for(builder: Builder) -> Tensor:
    """An input for the model that a builder gives; the same one every time."""
    generator = torch.Generator().manual_seed(1)
    if builder in _TOKENS:
        return torch.randint(0, 7, (3, 5), generator=generator)
    shape = (3, 5, 4) if builder in _SEQUENCES else (3, 3, 6, 6) if builder is cnn else (3, 4)
    return torch.randn(shape, generator=generator)


def train(model: nn.Module, inputs: Tensor, steps: int = 2) -> None:
    """Take a few steps of SGD on whatever ``model.parameters()`` gives, in training mode, and leave the mode as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        output = model(inputs)
        # a target that differs everywhere: behind a LayerNorm the same one for all has no gradient
        (output - torch.linspace(-1, 1, output.numel()).view_as(output)).square().mean().backward()
        optimizer.step()
    for module, mode in modes:
        module.training = mode


@dataclasses.dataclass
class Fingerprint:
    """What a model is, as facts that can be compared. ``alive`` keeps the objects, so that no id is used again."""

    facts: dict[str, Any]
    alive: list[Any] = dataclasses.field(compare=False, repr=False)


def fingerprint(model: nn.Module) -> Fingerprint:
    """Everything that enable and disable promise to give back.

    Ids and classes of modules, parameters and buffers, ``requires_grad``, training flags, hooks and all other attributes of every
    module, the keys of the state dict in order, what ``parameters()`` gives, and the bytes of every tensor.
    """
    facts: dict[str, Any] = {}
    alive: list[Any] = []
    for name, module in model.named_modules(remove_duplicate=False):
        alive.append(module)
        facts[f"{name}:"] = (id(module), type(module), module.training)
        for key, value in sorted(vars(module).items()):
            alive.append(value)
            facts[f"{name}:{key}"] = _identity(value, alive)
    for registry in ("_parameters", "_buffers"):
        for name, module in model.named_modules(remove_duplicate=False):
            for key, tensor in getattr(module, registry).items():
                if isinstance(tensor, nn.parameter.UninitializedTensorMixin):
                    facts[f"{name}.{key}"] = "lazy"
                elif tensor is not None:
                    facts[f"{name}.{key}"] = (tensor.requires_grad, tensor.dtype, tuple(tensor.shape), tensor_bytes(tensor))
    try:
        state = model.state_dict()
    except StateError as error:  # a tuned model that lacks a layer has none
        facts["keys"] = str(error)
    else:
        facts["keys"] = list(state)
        facts["metadata"] = {key: dict(value) for key, value in state._metadata.items()}  # type: ignore[attr-defined]
    facts["parameters"] = [id(parameter) for parameter in model.parameters()]
    return Fingerprint(facts, alive)


def tensor_bytes(tensor: Tensor) -> bytes:
    """The bits of a tensor; on the meta device there are none."""
    if tensor.is_meta:
        return b"none"
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _identity(value: Any, alive: list[Any]) -> Any:
    if isinstance(value, dict):
        alive.extend(value.values())
        return [(key, id(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        alive.extend(value)
        return [id(item) for item in value]
    return sorted(map(repr, value)) if isinstance(value, set) else id(value)


@contextlib.contextmanager
def refused(model: nn.Module, error: type[GiftError], *says: str) -> Iterator[None]:
    """Expect an error of GIFt's own that says certain things, and a model and a random generator that do not know of it."""
    before, random = fingerprint(model), torch.get_rng_state()
    with pytest.raises(error) as caught:
        yield
    for text in says:
        assert text in str(caught.value)
    assert fingerprint(model) == before
    assert torch.equal(torch.get_rng_state(), random)
