"""Several LoRA adapters on one model, combined and saved; `test_per_sample` has batches of several."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gift_core import FullFineTuningStrategy, merge_strategies
from gift_core.errors import AdapterNameError, ParameterError, StateError
from gift_lora_plugin import LoRAAdapterSet, LoRAAllFineTuningStrategy, LoRALinearFineTuningStrategy


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


def statistics() -> tuple[nn.Module, Tensor]:
    """Linear layers, and a normalisation whose statistics training moves."""
    return nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 7), nn.BatchNorm1d(3)), torch.randn(4, 3, 9)


def waves() -> tuple[nn.Module, Tensor]:
    """A complex convolution, and a complex layer that reads what it gives."""
    layers = nn.Conv1d(3, 4, 3, dtype=torch.complex64), nn.Flatten(), nn.Linear(28, 5, dtype=torch.complex64)
    return nn.Sequential(*layers), torch.randn(4, 3, 9, dtype=torch.complex64)


def in_precision(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The same numbers, real or complex, with parts of a dtype."""
    kind = dtype.to_complex() if tensor.is_complex() else dtype
    return tensor.to(kind) if tensor.is_floating_point() or tensor.is_complex() else tensor


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "linear": linear,
    "conv1d": lambda: convolutions(1),
    "conv2d": lambda: convolutions(2),
    "conv3d": lambda: convolutions(3),
    "embedding": tokens,
    "transposed": transposed,
    "statistics": statistics,
    "complex": waves,
}


def build(kind: str = "linear", dtype: torch.dtype = torch.float64, **options: Any) -> tuple[LoRAAdapterSet, Tensor]:
    """A set with adapters ``a`` and ``b`` whose factors are random, and an input of four samples."""
    torch.manual_seed(0)
    model, x = MODELS[kind]()
    targets = {"targets": ["type:Embedding", "type:Linear"]} if kind == "embedding" else {}
    adapters = LoRAAdapterSet(model._apply(lambda tensor: in_precision(tensor, dtype)))
    for name, rank in (("a", options.pop("rank_a", 2)), ("b", options.pop("rank_b", 2))):
        adapters.add(name, LoRAAllFineTuningStrategy(rank=rank, lora_alpha=3, **targets, **options))
        scramble(adapters, name)
    return adapters, in_precision(x, dtype)


def scramble(adapters: LoRAAdapterSet, name: str) -> None:
    """Give an adapter random values."""
    with torch.no_grad():
        for parameter in adapters.parameters(name):
            parameter.copy_(torch.randn_like(parameter) * 0.3)


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


def test_complex_factors_are_combined_and_have_no_sign() -> None:
    """The decomposition of a complex sum of full rank is that sum; a method that elects signs is refused with those that work."""
    adapters, _ = build("complex", train_bias=True)
    adapters.combine({"a": 0.7, "b": -0.3}, "mix", "svd", rank=4)
    base, a, b, mix = (weights_of(adapters, name) for name in (None, "a", "b", "mix"))
    before = adapters.names

    for key, weight in base.items():
        torch.testing.assert_close(mix[key], weight + 0.7 * (a[key] - weight) - 0.3 * (b[key] - weight))
    with pytest.raises(
        ParameterError, match=r"'ties' elects signs, and the numbers at '0' are complex: choose one of 'linear', 'dare'"
    ):
        adapters.combine({"a": 0.7, "b": 0.3}, "new", "ties")
    assert (adapters.names, adapters.active) == (before, None)
    adapters.combine({"a": 0.7, "b": 0.3}, "dare", "dare", generator=torch.Generator().manual_seed(0))
    adapters.combine({"a": 0.7, "b": 0.3}, "linear")


@pytest.mark.parametrize("use_dora", [False, True], ids=["plain", "dora"])
def test_complex_adapters_are_switched_and_moved(use_dora: bool) -> None:
    """Complex adapters, with real magnitudes too, give what they gave after the model went to another precision without them."""
    adapters, x = build("complex", torch.float32, use_dora=use_dora)
    expected = {name: adapters.use(name)(x).detach() for name in ("a", "b", None, "a")}
    adapters.use(None)
    adapters.model._apply(lambda tensor: in_precision(tensor, torch.float64))

    for name in ("a", "b", None, "a"):
        model = adapters.use(name)
        assert {tensor.dtype.to_real() for tensor in model.state_dict().values()} == {torch.float64}
        torch.testing.assert_close(model(in_precision(x, torch.float64)), expected[name].to(torch.complex128), rtol=1e-5, atol=1e-5)


def test_a_combination_without_a_name_is_named_after_its_parts() -> None:
    """The name tells the method and the adapters; a second one of that name is refused before anything is combined."""
    adapters, x = build()
    adapters.combine({"a": 0.7, "b": 0.3}, "mix", "cat")
    expected = adapters.use("mix")(x)

    adapters.combine({"a": 0.7, "b": 0.3}, method="cat")
    adapters.combine({"b": 1.0})

    assert adapters.names == ("a", "b", "mix", "cat-a-b", "linear-b")
    assert torch.equal(adapters.use("cat-a-b")(x), expected)
    with pytest.raises(AdapterNameError, match="'cat-a-b' already: choose another name"):
        adapters.combine({"a": 1.0, "b": 1.0}, method="cat")


@pytest.mark.parametrize("use_dora", [False, True], ids=["plain", "dora"])
def test_switching_a_compiled_convolution_does_not_recompile(use_dora: bool) -> None:
    """Convolutions and linear layers, with DoRA too, are switched without a recompilation, and compute with the right adapter."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(64, 5)), torch.randn(2, 3, 4, 4)
    adapters = LoRAAdapterSet(model)
    for name in ("a", "b", "c"):
        adapters.add(name, LoRAAllFineTuningStrategy(rank=2, use_dora=use_dora))
        scramble(adapters, name)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    adapters.use("a")
    compiled(x)
    torch._dynamo.config.error_on_recompile, was = True, torch._dynamo.config.error_on_recompile
    try:
        for name in ("b", "c", "a"):
            expected = adapters.use(name)(x)
            torch.testing.assert_close(compiled(x), expected)
    finally:
        torch._dynamo.config.error_on_recompile = was
        torch._dynamo.reset()


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


def tuned(adapters: LoRAAdapterSet, name: str | None) -> dict[str, Tensor]:
    """What `weights_of` gives, and the other parameters of the model under an adapter."""
    values = weights_of(adapters, name)
    with adapters.using(name) as model:
        base = [key for key, _ in model.named_parameters() if "lora" not in key]
        own = {key: model.get_parameter(key).detach().clone() for key in base if key.removesuffix(".weight") not in values}
    return {**values, **own}


@pytest.mark.parametrize("method", ["cat", "linear", "svd", "ties", "dare"])
def test_what_is_trained_of_the_base_is_combined_by_its_differences(method: str, tmp_path: Path) -> None:
    """Biases and a head are the base's plus the weighted differences, beside factors of two strategies; and the file holds them."""
    torch.manual_seed(0)
    adapters = LoRAAdapterSet(nn.Sequential(nn.Linear(9, 8), nn.Linear(8, 9), nn.Linear(9, 3)).double())
    ranks = (2, 2) if method in ("linear", "ties", "dare") else (1, 3)
    for name, rank in zip(("a", "b"), ranks, strict=True):
        parts = [LoRAAllFineTuningStrategy(rank, targets="0", train_bias=True), LoRALinearFineTuningStrategy(2 * rank, exclude="2")]
        adapters.add(name, merge_strategies([FullFineTuningStrategy(targets="2"), merge_strategies(parts)]))
        scramble(adapters, name)
        adapters.use(name).requires_grad_(False)  # frozen for a while, which takes nothing from it
    adapters.use(None)
    adapters.combine({"a": 0.7, "b": -0.3}, "mix", method, density=1)
    base, a, b, mix = (tuned(adapters, name) for name in (None, "a", "b", "mix"))
    kept = ["0.bias", "2", "2.bias"]

    assert mix.keys() == base.keys() and all(not torch.equal(mix[key], base[key]) for key in kept)
    for key in base if method in ("cat", "svd") else kept:
        if key in kept and method == "ties":
            continue  # its formula is tested with the functions
        if key in kept or method == "cat":
            torch.testing.assert_close(mix[key], base[key] + 0.7 * (a[key] - base[key]) - 0.3 * (b[key] - base[key]))

    adapters.save("mix", tmp_path / "mix.safetensors")
    adapters.add("again", tmp_path / "mix.safetensors")

    assert all(torch.equal(value, mix[key]) for key, value in tuned(adapters, "again").items())


def test_weights_of_one_layer_have_ranks_of_their_own() -> None:
    """Two weights of one recurrent layer, and a layer with wildcards in its name, keep ranks that differ."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"r[0]": nn.GRU(9, 8), "r*": nn.Linear(4, 4)})
    adapters = LoRAAdapterSet(model.double())
    for name, rank in (("a", 2), ("b", 1)):
        adapters.add(name, LoRAAllFineTuningStrategy(rank, rank_pattern={"*weight_ih_l0": 3}))
        scramble(adapters, name)
    adapters.combine({"a": 1.0, "b": 1.0}, "mix", "cat")
    base, a, b, mix = (gru_weights(adapters, name) for name in (None, "a", "b", "mix"))

    for key, weight in base.items():
        torch.testing.assert_close(mix[key], a[key] + b[key] - weight)


def gru_weights(adapters: LoRAAdapterSet, name: str | None) -> dict[str, Tensor]:
    """The effective matrices of the model under an adapter."""
    with adapters.using(name) as model:
        gru, linear = model["r[0]"], model["r*"]  # type: ignore[index]
        return {
            "ih": gru.weight_ih_l0.detach().clone(),
            "hh": gru.weight_hh_l0.detach().clone(),
            "linear": linear.weight.detach().clone(),
        }


def test_what_cannot_be_combined_is_refused_by_name() -> None:
    """Adapters of other layers, with DoRA or statistics, are refused with the reason, and the set stays as it is."""
    adapters, x = build("statistics")
    adapters.add("moved", LoRAAllFineTuningStrategy(rank=2))
    adapters.use("moved").train()(x)
    adapters.use(None).eval()
    adapters.add("full", FullFineTuningStrategy(targets="2"))
    adapters.add("bias", LoRAAllFineTuningStrategy(rank=2, train_bias=True))
    adapters.add("dora", LoRAAllFineTuningStrategy(rank=2, use_dora=True))
    adapters.add("head", merge_strategies([FullFineTuningStrategy(targets="2"), LoRAAllFineTuningStrategy(rank=2, exclude="2")]))
    adapters.add("one", LoRAAllFineTuningStrategy(rank=2, targets="0"))
    adapters.add("wide", LoRAAllFineTuningStrategy(rank=4))
    before = adapters.names
    cases: list[tuple[dict[str, float], dict[str, Any], type[Exception], str]] = [
        ({"a": 1.0, "bias": 1.0}, {}, StateError, "'a' and 'bias' have train_bias False and True"),
        ({"dora": 1.0}, {}, StateError, "'dora' uses DoRA at '0'"),
        ({"a": 1.0, "head": 1.0}, {}, StateError, "'a' and 'head' are of 1 and 2 strategies"),
        ({"full": 1.0}, {}, StateError, "'full' adapts no weight by low-rank factors"),
        ({"moved": 1.0}, {}, StateError, "'moved' has moved 3.running_mean, 3.running_var"),
        ({"a": 1.0, "one": 1.0}, {"method": "cat"}, StateError, "'a' and 'one' have targets None and '0'"),
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
