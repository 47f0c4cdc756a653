"""Several LoRA adapters on one model: combined, saved, and one batch with a different adapter for each sample."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gift_core import FullFineTuningStrategy, merge_strategies
from gift_core.errors import AdapterNameError, ParameterError, SiteError, StateError
from gift_lora_plugin import LoRAAdapterSet, LoRAAllFineTuningStrategy


def linear() -> tuple[nn.Module, Tensor]:
    """Linear layers over leading dimensions."""
    return nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 7)), torch.randn(4, 3, 9)


def convolutions(dims: int) -> tuple[nn.Module, Tensor]:
    """A convolution with padding, stride, groups and dilation, another with circular padding, and a transposed one with groups."""
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    back = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
    layers = [
        conv(4, 8, 3, padding=2, stride=2, groups=2, dilation=2),
        conv(8, 6, 3, padding=1, padding_mode="circular"),
        back(6, 8, 3, stride=2, padding=1, output_padding=1, groups=2),
    ]
    return nn.Sequential(*layers), torch.randn(4, 4, *[6] * dims)


def tokens() -> tuple[nn.Module, Tensor]:
    """An embedding with padding, and a head."""
    return nn.Sequential(nn.Embedding(11, 8, padding_idx=0), nn.Linear(8, 5)), torch.randint(0, 11, (4, 6))


def transposed() -> tuple[nn.Module, Tensor]:
    """A model of transformers' Conv1D, whose weight is ``(in, out)``."""
    layers = pytest.importorskip("transformers.pytorch_utils")
    return nn.Sequential(layers.Conv1D(8, 9), nn.Tanh(), layers.Conv1D(5, 8)), torch.randn(4, 3, 9)


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "linear": linear,
    "conv1d": lambda: convolutions(1),
    "conv2d": lambda: convolutions(2),
    "conv3d": lambda: convolutions(3),
    "embedding": tokens,
    "transposed": transposed,
}


def build(kind: str = "linear", dtype: torch.dtype = torch.float64, **options: Any) -> tuple[LoRAAdapterSet, Tensor]:
    """A set with adapters ``a`` and ``b`` whose factors are random, and an input of four samples."""
    torch.manual_seed(0)
    model, x = MODELS[kind]()
    targets = {"targets": ["type:Embedding", "type:Linear"]} if kind == "embedding" else {}
    adapters = LoRAAdapterSet(model.to(dtype))
    for name, rank in (("a", options.pop("rank_a", 2)), ("b", options.pop("rank_b", 2))):
        adapters.add(name, LoRAAllFineTuningStrategy(rank=rank, lora_alpha=3, **targets, **options))
        scramble(adapters, name)
    return adapters, x.to(dtype) if x.is_floating_point() else x


def scramble(adapters: LoRAAdapterSet, name: str) -> None:
    """Give an adapter random values."""
    with torch.no_grad():
        for parameter in adapters.parameters(name):
            parameter.normal_(std=0.3)


def weights_of(adapters: LoRAAdapterSet, name: str | None) -> dict[str, Tensor]:
    """The effective weight of each layer under an adapter."""
    with adapters.using(name) as model:
        layers = [(key, module) for key, module in model.named_modules() if isinstance(getattr(module, "weight", None), Tensor)]
        return {key: module.weight.detach().clone() for key, module in layers}  # type: ignore[operator, union-attr]


# --- combining


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("layout", ["balanced", "out_as_h"])
def test_cat_adds_the_updates_of_every_layer(kind: str, layout: str) -> None:
    """The effective weight under the combination is the base plus the weighted updates, for ranks and scalings that differ."""
    adapters, _ = build(kind, rank_a=1, rank_b=2, conv_layout=layout)
    adapters.combine({"a": 0.7, "b": -0.3}, "mix", "cat")
    base, a, b, mix = (weights_of(adapters, name) for name in (None, "a", "b", "mix"))

    assert adapters.active is None
    for key, weight in base.items():
        torch.testing.assert_close(mix[key], weight + 0.7 * (a[key] - weight) - 0.3 * (b[key] - weight))


@pytest.mark.parametrize("method", ["linear", "cat", "svd", "ties", "dare"])
def test_a_combination_is_an_ordinary_adapter(method: str, tmp_path: Path) -> None:
    """It has parameters that train, and its file, read into another set, computes the same; nothing is drawn from torch's generator."""
    adapters, x = build()
    random = torch.get_rng_state()
    generator = torch.Generator().manual_seed(1)
    adapters.combine({"a": 0.5, "b": 0.5}, "mix", method, density=0.7, generator=generator)

    assert torch.equal(torch.get_rng_state(), random)

    expected = adapters.use("mix")(x)
    expected.sum().backward()

    assert all(parameter.grad is not None for parameter in adapters.parameters("mix"))

    adapters.save("mix", tmp_path / "mix.safetensors")
    others, _ = build()
    others.add("mix", tmp_path / "mix.safetensors")

    assert torch.equal(others.use("mix")(x), expected)


def test_ranks_that_differ_by_layer(tmp_path: Path) -> None:
    """Where adapters have other ranks at other layers, the sum of ranks is each layer's own, in the strategy and the file."""
    torch.manual_seed(0)
    adapters = LoRAAdapterSet(nn.Sequential(nn.Linear(9, 8), nn.Linear(8, 7)).double())
    adapters.add("a", LoRAAllFineTuningStrategy(rank=2, rank_pattern={"1": 1}))
    adapters.add("b", LoRAAllFineTuningStrategy(rank=3))
    for name in ("a", "b"):
        scramble(adapters, name)
    adapters.combine({"a": 1.0, "b": 1.0}, "mix", "cat")
    base, a, b, mix = (weights_of(adapters, name) for name in (None, "a", "b", "mix"))
    model = adapters.use("mix")

    assert [model[at].lora_A.shape[0] for at in (0, 1)] == [5, 4]  # type: ignore[index]
    for key, weight in base.items():
        torch.testing.assert_close(mix[key], a[key] + b[key] - weight)

    adapters.save("mix", tmp_path / "mix.safetensors")
    adapters.add("again", tmp_path / "mix.safetensors")

    assert all(torch.equal(weight, mix[key]) for key, weight in weights_of(adapters, "again").items())


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_initialisations_from_the_weight_are_folded_in(init: str) -> None:
    """An update that counts from its start is combined as what it adds to the base."""
    adapters, _ = build(rank_a=1, rank_b=1, init=init)
    adapters.combine({"a": 0.5, "b": 2.0}, "mix", "cat")
    base, a, b, mix = (weights_of(adapters, name) for name in (None, "a", "b", "mix"))

    for key, weight in base.items():
        torch.testing.assert_close(mix[key], weight + 0.5 * (a[key] - weight) + 2.0 * (b[key] - weight))


def test_what_cannot_be_combined_is_refused_by_name() -> None:
    """Adapters that are more than factors, or of other layers, are refused with the reason, and the set stays as it is."""
    adapters, _ = build()
    adapters.add("bias", LoRAAllFineTuningStrategy(rank=2, train_bias=True))
    adapters.add("dora", LoRAAllFineTuningStrategy(rank=2, use_dora=True))
    adapters.add("head", merge_strategies([FullFineTuningStrategy(targets="2"), LoRAAllFineTuningStrategy(rank=2, exclude="2")]))
    adapters.add("one", LoRAAllFineTuningStrategy(rank=2, targets="0"))
    adapters.add("wide", LoRAAllFineTuningStrategy(rank=4))
    before = adapters.names
    cases: list[tuple[dict[str, float], dict[str, Any], type[Exception], str]] = [
        ({"a": 1.0, "bias": 1.0}, {}, StateError, "'bias' has 0.bias, 2.bias of its own"),
        ({"dora": 1.0}, {}, StateError, "'dora' uses DoRA at '0'"),
        ({"a": 1.0, "head": 1.0}, {}, StateError, "'head' is of"),
        ({"a": 1.0, "one": 1.0}, {"method": "cat"}, StateError, "targets is None in 'a'"),
        ({"a": 1.0, "wide": 1.0}, {"method": "ties"}, ParameterError, r"at '0' they are \[2, 4\]"),
        ({"a": 1.0, "zzz": 1.0}, {}, AdapterNameError, "zzz"),
        ({"a": float("nan")}, {}, ParameterError, "finite"),
        ({}, {}, ParameterError, "at least one"),
        ({"a": 1.0}, {"method": "mean"}, ParameterError, "method must be one of"),
        ({"a": 1.0}, {"rank": 2}, ParameterError, "'svd' alone"),
        ({"a": 1.0}, {"method": "dare", "density": 0}, ParameterError, "density"),
    ]
    for weights, options, error, says in cases:
        with pytest.raises(error, match=says):
            adapters.combine(weights, "new", **options)
    with pytest.raises(AdapterNameError, match="already"):
        adapters.combine({"a": 1.0}, "b")

    assert (adapters.names, adapters.active) == (before, None)


# --- a different adapter for each sample

NAMES = ["b", None, "a", "b"]


def one_by_one(adapters: LoRAAdapterSet, x: Tensor, names: list[str | None]) -> Tensor:
    """Each sample alone under its own adapter."""
    results = []
    for at, name in enumerate(names):
        with adapters.using(name) as model:
            results.append(model(x[at : at + 1]))
    return torch.cat(results)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("layout", ["balanced", "out_as_h"])
def test_each_sample_has_its_own_adapter(kind: str, layout: str) -> None:
    """A mixed batch gives what its samples give one by one, and so do the gradients; the base gets none."""
    adapters, x = build(kind, rank_b=1, conv_layout=layout)
    base = list(adapters.model.parameters())
    ours = [*adapters.parameters("a"), *adapters.parameters("b")]
    expected = one_by_one(adapters, x, NAMES)
    slope = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, ours, slope)
    with adapters.per_sample(NAMES) as model:
        output = model(x)
    torch.testing.assert_close(output, expected)
    output.backward(slope)

    for parameter, gradient in zip(ours, gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in base)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_each_sample_in_lower_precision(dtype: torch.dtype, tolerance: float) -> None:
    """In float32 and bfloat16 the two ways agree to a few roundings of numbers of about one."""
    adapters, x = build(dtype=dtype)
    with torch.no_grad():
        expected = one_by_one(adapters, x, NAMES)
        with adapters.per_sample(NAMES) as model:
            torch.testing.assert_close(model(x), expected, rtol=tolerance, atol=tolerance)


def test_samples_without_an_adapter_are_the_base_s() -> None:
    """None is the base model to the bit, and the set is afterwards as before, also after an error."""
    adapters, x = build()
    base = adapters.model(x)
    adapters.use("a")
    with contextlib.suppress(RuntimeError), adapters.per_sample(["a", None, "b", None]) as model:
        output = model(x)
        raise RuntimeError

    assert torch.equal(output[[1, 3]], base[[1, 3]])
    assert adapters.active == "a"
    assert not any(module._forward_hooks for module in adapters.model.modules())


class Reads(nn.Module):
    """Reads the weight of a layer that it does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(9, 9)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.layer.weight)


class TimeFirst(nn.Module):
    """Gives its layer the second axis first."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(9, 9)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.transpose(0, 1)).transpose(0, 1)


@pytest.mark.parametrize(
    ("model", "error", "says"),
    [
        (lambda: nn.Sequential(nn.Linear(9, 9), nn.BatchNorm1d(3)), SiteError, r"'1' \(BatchNorm1d\) mixes"),
        (lambda: nn.TransformerEncoderLayer(9, 3, 9), SiteError, "'self_attn"),
        (lambda: nn.Sequential(nn.LSTM(9, 9)), SiteError, "'0'"),
        (Reads, StateError, "'?layer'? took no part"),
        (TimeFirst, StateError, r"'layer' is called with an input of \(3, 4, 9\)"),
    ],
)
def test_what_cannot_differ_by_sample_is_refused(model: Callable[[], nn.Module], error: type[Exception], says: str) -> None:
    """A layer that mixes samples, reads a weight itself or has its batch elsewhere is refused by name, never wrong."""
    torch.manual_seed(0)
    adapters = LoRAAdapterSet(model())
    adapters.add("a", LoRAAllFineTuningStrategy(rank=2))
    scramble(adapters, "a")

    with pytest.raises(error, match=says), adapters.per_sample(["a", None, "a", "a"]) as mixed:
        mixed(torch.randn(4, 3, 9))
    assert adapters.active is None


def test_what_is_more_than_factors_is_refused() -> None:
    """An adapter with biases or statistics of its own, DoRA, an unknown name, and a batch of another size are errors by name."""
    adapters, x = build()
    adapters.add("bias", LoRAAllFineTuningStrategy(rank=2, train_bias=True))
    adapters.add("dora", LoRAAllFineTuningStrategy(rank=2, use_dora=True))
    for name, error, says in (("bias", StateError, "'bias' has 0.bias"), ("dora", SiteError, "DoRA"), ("zzz", AdapterNameError, "zzz")):
        with pytest.raises(error, match=says), adapters.per_sample([name]):
            pass
    with pytest.raises(StateError, match="names 3 samples"), adapters.per_sample(["a", "b", "a"]) as model:
        model(x)
