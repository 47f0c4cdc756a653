"""Small models that cover the shapes real models have, each with an input.

A builder gives a new model with the same values every time, in eval mode. It seeds for itself and leaves the generator as it was.
None has dropout, so that a model computes the same in training and in eval mode, normalisation by batch statistics apart.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

#: The complex numbers that have parts of a type; torch warns of those of half precision, and computes little with them.
_COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128}


@dataclasses.dataclass(frozen=True)
class ReferenceModel:
    """A model to try a strategy on.

    Attributes:
        name: how results call it.
        build: gives a new model; called under a fixed seed.
        inputs: gives an input, as `torch.nn.Module` takes it; called under a fixed seed.
        compilable: whether torch compiles the plain model in one graph.
        package: what must be installed for it, beyond what gift-core itself needs; empty for nothing.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    compilable: bool = True
    package: str = ""

    @property
    def is_available(self) -> bool:
        """Whether the package that it needs is installed."""
        return not self.package or importlib.util.find_spec(self.package) is not None

    def fresh(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """A new model with the same values as the last one, in eval mode; complex numbers have parts of ``dtype``.

        Raises:
            TypeError: if it holds complex numbers, and torch has none with parts of ``dtype``.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return cast(self.build(), dtype).eval()

    def example(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The input, the same every time; numbers that count something, as tokens do, stay whole."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            inputs = self.inputs()
        return inputs.to(dtype) if inputs.is_floating_point() else inputs


def reference_models() -> list[ReferenceModel]:
    """The models on which a strategy is checked, simplest first."""
    return list(_MODELS)


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Move a model to ``dtype`` as ``model.to`` does, complex numbers to those with parts of ``dtype``, which ``to`` would drop.

    Raises:
        TypeError: if the model holds complex numbers, and torch has none with parts of ``dtype``.
    """
    if not any(parameter.is_complex() for parameter in nn.Module.parameters(model)):
        return model.to(dtype)
    if dtype not in _COMPLEX:
        raise TypeError(f"torch has no full support for complex numbers with parts of {dtype}")
    for module in model.modules():
        for tensor in (*nn.Module.parameters(module, recurse=False), *module.buffers(recurse=False)):
            tensor.data = tensor.data.to(_COMPLEX[dtype] if tensor.is_complex() else dtype)
    return model


# --- the models


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 5))


def _single() -> nn.Module:
    return nn.Linear(6, 5)


class _CNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.bn(self.conv(x)).tanh()).flatten(1))  # type: ignore[no-any-return]


def _convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, groups=2, padding=1),
        nn.GELU(),
        nn.Conv2d(8, 8, 3, groups=8, padding=1, padding_mode="reflect"),
        nn.Conv2d(8, 6, 3, dilation=2, stride=2, bias=False),
        nn.Flatten(),
    )


def _signals() -> nn.Module:
    return nn.Sequential(nn.Conv1d(4, 6, 3, padding="same"), nn.GroupNorm(2, 6), nn.Unflatten(2, (2, 2, 2)), nn.Conv3d(6, 4, 2))


def _transposed() -> nn.Module:
    return nn.Sequential(
        nn.ConvTranspose1d(4, 6, 3, groups=2, stride=2, output_padding=1),
        nn.Unflatten(2, (2, 5)),
        nn.ConvTranspose2d(6, 4, 3, padding=1),
        nn.Unflatten(3, (1, 5)),
        nn.ConvTranspose3d(4, 2, 2, bias=False),
        nn.Flatten(),
    )


def _embedding() -> nn.Module:
    return nn.Sequential(nn.Embedding(9, 6), nn.LayerNorm(6), nn.Linear(6, 4))


def _bags() -> nn.Module:
    return nn.Sequential(nn.EmbeddingBag(9, 6, mode="sum"), nn.Linear(6, 4))


class _Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bilinear = nn.Bilinear(6, 6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.bilinear(x, x.tanh())  # type: ignore[no-any-return]


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        return x + self.attention(normed, normed, normed, need_weights=False)[0]  # type: ignore[no-any-return]


class _CrossAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        answer, weights = self.attention(x, x[..., :6].tanh(), x[..., 4:].tanh(), attn_mask=x.new_ones(3, 3).triu(1).bool())
        return torch.cat([answer, weights.transpose(0, 1)], -1)


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)


class _LSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 5, bidirectional=True, batch_first=True)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0])  # type: ignore[no-any-return]


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(6, 5, 2)
        self.rnn = nn.RNN(5, 4, nonlinearity="relu", bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(self.gru(x)[0])[0]  # type: ignore[no-any-return]


class _Cells(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTMCell(6, 5)
        self.gru = nn.GRUCell(5, 4)
        self.rnn = nn.RNNCell(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(self.gru(self.lstm(x)[0]))  # type: ignore[no-any-return]


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 6)
        self.middle = nn.Linear(6, 6)
        self.output = nn.Linear(6, 9, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.middle(self.embedding(x)))  # type: ignore[no-any-return]


class _Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = self.first
        self.last = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x).tanh()))  # type: ignore[no-any-return]


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc(self.norm(x))  # type: ignore[no-any-return]


class _Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([_Block(), _Block()])
        self.heads = nn.ModuleDict({"a": nn.Linear(6, 4), "b": nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 4))})
        self.scale = nn.Parameter(torch.ones(6))
        self.offset: Tensor
        self.register_buffer("offset", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        x = x * self.scale + self.offset
        return self.heads["a"](x) + self.heads["b"](x)  # type: ignore[no-any-return]


class _Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def _parametrised() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Unflatten(1, (8, 1)), nn.Conv1d(8, 4, 1))
    parametrize.register_parametrization(model[0], "weight", _Doubled())
    return model


class _Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.randn(3, 6))
        self.experts = nn.Parameter(torch.randn(3, 4, 6))
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = torch.einsum("bi,eoi,be->bo", x, self.experts, F.linear(x, self.gate).softmax(-1))
        return mixed * self.scale


class _Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wave = nn.Linear(6, 5, dtype=torch.complex64)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        wave = self.wave(torch.complex(x, x.tanh()))
        return self.head(torch.view_as_real(wave).flatten(1))  # type: ignore[no-any-return]


class _Standardised(nn.Conv2d):
    """A convolution with a forward of its own, which reads its weight."""

    def forward(self, input: Tensor) -> Tensor:
        centred = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(input, centred, self.bias)  # type: ignore[no-any-return]


class _Halved(nn.Linear):
    """A Linear layer with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight / 2, self.bias)


def _subclassed() -> nn.Module:
    return nn.Sequential(_Standardised(3, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), _Halved(4, 5))


def _conv1d() -> nn.Module:
    conv1d = importlib.import_module("transformers.pytorch_utils").Conv1D
    return nn.Sequential(conv1d(8, 6), nn.GELU(), conv1d(5, 8))


def _vectors() -> Tensor:
    return torch.randn(3, 6)


def _images(channels: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(3, channels, 8, 8)


def _sequences(features: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(3, 5, features)


def _tokens() -> Tensor:
    # the last token never occurs, so that its row is a part of the base that no output depends on
    return torch.randint(0, 8, (3, 5))


_MODELS = (
    ReferenceModel("mlp", _mlp, _vectors),
    ReferenceModel("single", _single, _vectors),
    ReferenceModel("cnn", _CNN, _images(3)),
    ReferenceModel("convolutions", _convolutions, _images(4)),
    ReferenceModel("signals", _signals, lambda: torch.randn(3, 4, 8)),
    ReferenceModel("transposed", _transposed, lambda: torch.randn(3, 4, 4)),
    ReferenceModel("embedding", _embedding, _tokens),
    ReferenceModel("bags", _bags, _tokens),
    ReferenceModel("bilinear", _Bilinear, _vectors),
    ReferenceModel("attention", _Attention, _sequences(8)),
    ReferenceModel("cross_attention", _CrossAttention, lambda: torch.randn(3, 2, 8)),
    ReferenceModel("encoder", _encoder, _sequences(8)),
    # torch itself does not trace recurrent layers into one graph
    ReferenceModel("lstm", _LSTM, _sequences(6), compilable=False),
    ReferenceModel("recurrent", _Recurrent, _sequences(6), compilable=False),
    ReferenceModel("cells", _Cells, _vectors),
    ReferenceModel("tied", _Tied, _tokens),
    ReferenceModel("shared", _Shared, _vectors),
    ReferenceModel("nested", _Nested, _vectors),
    ReferenceModel("parametrised", _parametrised, _vectors),
    ReferenceModel("experts", _Experts, _vectors),
    ReferenceModel("complex", _Complex, _vectors),
    ReferenceModel("subclassed", _subclassed, _images(3)),
    ReferenceModel("conv1d", _conv1d, _vectors, package="transformers"),
)
