"""PEFT's files both ways, with the installed PEFT and transformers as oracles.

Tolerances are relative to the largest number compared. The libraries add the same terms in different orders, so it is a few units in
the last place of the dtype: 1e-12 in double, 1e-5 in single precision, 3e-2 in bfloat16 and 4e-3 in half precision.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import math
import os
import random
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gift_core import (
    FullFineTuningStrategy,
    GiftWarning,
    disable_fine_tuning,
    enable_fine_tuning,
    load_adapter,
    merge_and_unload,
    merge_strategies,
    merged,
    save_adapter,
)
from gift_core.errors import (
    AdapterFormatError,
    AdapterMismatchError,
    AdapterWriteError,
    ModelError,
    StateError,
)
from gift_lora_plugin import LoRAAllFineTuningStrategy, LoRALinearFineTuningStrategy
from gift_lora_plugin.peft_config import alpha_for, alphas, anchored, config_data, config_from, ranks
from gift_lora_plugin.peft_files import PEFT, export_peft, import_peft, load_peft
from gift_lora_plugin.peft_layers import refusal
from gift_lora_plugin.settings import scaling_of

with warnings.catch_warnings():
    # what PEFT imports may warn about itself
    warnings.simplefilter("ignore")
    peft = pytest.importorskip("peft")
    from peft.utils.other import get_pattern_key

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
RANK, ALPHA = 2, 5.0


def conv1d_of_transformers() -> nn.Module:
    """The linear layer of GPT-2, whose weight is (in, out)."""
    layer: nn.Module = pytest.importorskip("transformers.pytorch_utils").Conv1D(7, 9)
    return layer


TOKENS = torch.tensor([[0, 4, 2], [10, 4, 1]])


def drawn(*shape: int) -> Tensor:
    """The same numbers in each run."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


#: A layer and an input.
LAYERS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "linear": (lambda: nn.Linear(9, 7), drawn(2, 3, 9)),
    "linear without bias": (lambda: nn.Linear(9, 7, bias=False), drawn(2, 9)),
    "transformers Conv1D": (conv1d_of_transformers, drawn(2, 3, 9)),
    "embedding": (lambda: nn.Embedding(11, 6), TOKENS),
    "square embedding, padding": (lambda: nn.Embedding(11, 11, padding_idx=4), TOKENS),
    "conv1d": (lambda: nn.Conv1d(5, 7, 3, padding=1), drawn(2, 5, 6)),
    "conv2d": (lambda: nn.Conv2d(5, 7, 3, padding=1, stride=2), drawn(2, 5, 6, 7)),
    "conv2d 3x2": (lambda: nn.Conv2d(5, 7, (3, 2), padding=(1, 0)), drawn(2, 5, 6, 7)),
    "conv2d 1x1": (lambda: nn.Conv2d(5, 7, 1, bias=False), drawn(2, 5, 4, 3)),
    "conv3d": (lambda: nn.Conv3d(3, 4, (2, 3, 1)), drawn(2, 3, 3, 4, 3)),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "out_as_h": {"conv_layout": "out_as_h"},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dora, rslora": {"use_dora": True, "use_rslora": True, "conv_layout": "out_as_h"},
    "pissa": {"init": "pissa"},
    "olora, dora": {"init": "olora", "use_dora": True},
    "orthogonal, A frozen": {"init": "orthogonal", "freeze_A": True},
}


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Each test draws the same numbers, and sees no warning of PEFT's own."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="peft")
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        yield


def stir(model: nn.Module) -> nn.Module:
    """Move every trainable parameter, as training would."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def with_peft(base: nn.Module, directory: Path) -> Any:
    """The base model with the adapter of a folder, by PEFT."""
    return peft.PeftModel.from_pretrained(copy.deepcopy(base), str(directory), autocast_adapter_dtype=False).eval()


def assert_close(ours: Tensor, theirs: Tensor, dtype: torch.dtype | None = None) -> None:
    """Within the tolerance of the dtype."""
    scale = theirs.abs().max().clamp(min=1e-30)
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= TOLERANCE[dtype or ours.dtype] * scale


def assert_same_model(tuned: nn.Module, theirs: Any, x: Tensor) -> None:
    """Both give the same answers, and the same merged weights under the same keys."""
    x = x.to(next(iter(tuned.state_dict().values())).dtype) if x.is_floating_point() else x
    with torch.no_grad():
        assert_close(tuned.eval()(x), theirs(x))
        with merged(tuned):
            assert_close(tuned(x), theirs(x))
    mine, other = merge_and_unload(copy.deepcopy(tuned)).state_dict(), theirs.merge_and_unload().state_dict()
    assert list(mine) == list(other)
    for key in mine:
        assert_close(mine[key].double(), other[key].double(), mine[key].dtype if mine[key].is_floating_point() else torch.float64)


# --- one layer of each kind


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layer", LAYERS)
def test_peft_computes_what_was_exported(layer: str, variant: str, tmp_path: Path) -> None:
    """PEFT answers as the exported model does, forward and merged, for every layer and variant."""
    build, x = LAYERS[layer]
    base = nn.Sequential(build()).double()
    tuned = copy.deepcopy(base)
    enable_fine_tuning(tuned, LoRAAllFineTuningStrategy(RANK, ALPHA, targets="0", **VARIANTS[variant]))

    export_peft(stir(tuned), tmp_path / "peft")

    assert_same_model(tuned, with_peft(base, tmp_path / "peft"), x)


PEFT_VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "orthogonal": {"init_lora_weights": "orthogonal"},
}


@pytest.mark.parametrize("variant", PEFT_VARIANTS)
@pytest.mark.parametrize("layer", LAYERS)
def test_we_compute_what_peft_saved(layer: str, variant: str, tmp_path: Path) -> None:
    """The model that load_peft tunes answers as PEFT's does, forward and merged, and trains as many numbers."""
    build, x = LAYERS[layer]
    base = nn.Sequential(build()).double()
    settings = PEFT_VARIANTS["plain" if layer != "linear" and variant == "orthogonal" else variant]
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.1, target_modules=["0"], **settings)
    theirs = stir(peft.get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False).double()).eval()
    theirs.save_pretrained(str(tmp_path))  # type: ignore[operator]
    trained = theirs.get_nb_trainable_parameters()[0]  # type: ignore[operator]

    load_peft(base, tmp_path)

    assert sum(parameter.numel() for parameter in base.parameters()) == trained
    assert_same_model(base, theirs, x)


#: Starts that PEFT makes anew from the base weight when it loads; in half precision it rounds what it leaves of the base.
STARTS: dict[str, dict[str, Any]] = {
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "pissa, dora, rslora": {"init_lora_weights": "pissa", "use_dora": True, "use_rslora": True},
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
@pytest.mark.parametrize(
    ("layer", "start"),
    [*(("linear", start) for start in STARTS), ("transformers Conv1D", "pissa")],  # of which PEFT has no OLoRA
)
def test_starts_from_the_weight_that_peft_did_not_convert(
    layer: str, start: str, dtype: torch.dtype, tolerance: float, tmp_path: Path
) -> None:
    """An adapter saved as it trained counts from what the base at hand gives, as where PEFT loads it; the base stays as it is."""
    build, x = LAYERS[layer]
    base = nn.Sequential(build()).to(dtype)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"], fan_in_fan_out=layer != "linear", **STARTS[start])
    theirs = stir(peft.get_peft_model(copy.deepcopy(base), config)).eval()
    theirs.save_pretrained(str(tmp_path))  # type: ignore[operator]
    again, x = with_peft(base, tmp_path).eval(), x.to(dtype)
    before = base[0].weight.clone()  # type: ignore[union-attr, operator]

    load_peft(base, tmp_path)

    torch.testing.assert_close(base.eval()(x), again(x), rtol=tolerance, atol=tolerance)
    assert torch.equal(base[0]._parameters["weight"], before)  # type: ignore[arg-type]
    save_adapter(base, tmp_path / "ours.safetensors")
    answer = base(x)
    disable_fine_tuning(base)
    load_adapter(base, tmp_path / "ours.safetensors")

    assert torch.equal(base(x), answer)


@pytest.mark.parametrize("rslora", [False, True], ids=["plain", "rslora"])
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_of_fewer_directions_than_the_rank_keeps_pefts_scaling(start: str, rslora: bool, tmp_path: Path) -> None:
    """Where a weight has fewer directions than the configured rank, the scaling is that of the configured rank, as in PEFT."""
    base = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3), nn.Linear(3, 8))
    config = peft.LoraConfig(
        r=5, lora_alpha=7, target_modules=["0", "2", "3"], rank_pattern={"3": 2}, init_lora_weights=start, use_rslora=rslora
    )
    theirs = stir(peft.get_peft_model(copy.deepcopy(base), config)).eval()
    theirs.save_pretrained(str(tmp_path))  # type: ignore[operator]
    again, x = with_peft(base, tmp_path), torch.randn(5, 6)

    load_peft(base, tmp_path)

    assert [base[at].lora_A.shape[0] for at in (0, 2, 3)] == [4, 3, 2]  # type: ignore[index]
    assert_close(base.eval()(x), theirs(x))
    assert_close(base(x), again(x))


class TiedHead(nn.Module):
    """An output layer that has the weight of the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 6)
        self.mid = nn.Linear(6, 6)
        self.fc = nn.Linear(6, 11, bias=False)
        self.fc.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.mid(self.tokens(x)).tanh())  # type: ignore[no-any-return]

    def untie(self) -> None:
        """Give the output layer a weight of its own."""
        self.fc.weight = nn.Parameter(self.fc.weight.detach().clone())


@pytest.mark.parametrize(
    ("model", "start", "says"),
    [
        (TiedHead, "pissa", "fc: its weight is another layer's too, which PEFT's start 'pissa' would change"),
        (lambda: nn.ModuleDict({"fc": conv1d_of_transformers()}), "olora", "fc: PEFT has no start 'olora' for a Conv1D"),
        (lambda: nn.ModuleDict({"fc": nn.Conv2d(6, 8, 1)}), "pissa", "fc: PEFT has no start 'pissa' for a Conv2d"),
    ],
)
def test_starts_that_peft_does_not_make_are_refused(model: Callable[[], nn.Module], start: str, says: str, tmp_path: Path) -> None:
    """A start at a layer where PEFT makes none, or where it would change another layer too, is refused by name."""
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "init_lora_weights": start}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    tensors = {"fc.lora_A.weight": torch.zeros(2, 6), "fc.lora_B.weight": torch.zeros(11 if model is TiedHead else 8, 2)}
    save_file({f"base_model.model.{key}": value for key, value in tensors.items()}, tmp_path / "adapter_model.safetensors")

    with pytest.raises(AdapterMismatchError, match=re.escape(says)):
        load_peft(model(), tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layer", ["linear", "embedding", "conv2d"])
def test_precisions_both_ways(layer: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """In each precision PEFT answers as we do, and what it saves again is, bit for bit, what we wrote."""
    build, x = LAYERS[layer]
    base = nn.Sequential(build()).to(dtype)
    tuned = copy.deepcopy(base)
    enable_fine_tuning(tuned, LoRAAllFineTuningStrategy(RANK, ALPHA, targets="0", conv_layout="out_as_h"))
    export_peft(stir(tuned), tmp_path / "ours")
    theirs = with_peft(base, tmp_path / "ours")
    theirs.save_pretrained(str(tmp_path / "theirs"))
    load_peft(base, tmp_path / "theirs")
    x = x.to(dtype) if x.is_floating_point() else x

    assert_close(tuned.eval()(x), theirs(x))
    assert {key: value.dtype for key, value in base.state_dict().items()} == {
        key: value.dtype for key, value in tuned.state_dict().items()
    }
    assert all(torch.equal(value, base.state_dict()[key]) for key, value in tuned.state_dict().items())


def test_single_precision_factors_of_a_half_precision_base(tmp_path: Path) -> None:
    """Factors that the base's dtype cannot hold stay as they are, both ways."""
    base = nn.Sequential(nn.Linear(9, 7)).bfloat16()
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"])
    theirs = stir(peft.get_peft_model(copy.deepcopy(base), config)).eval()
    theirs.save_pretrained(str(tmp_path / "theirs"))  # type: ignore[operator]
    x = torch.randn(4, 9).bfloat16()

    load_peft(base, tmp_path / "theirs")
    export_peft(base, tmp_path / "ours")

    assert base[0].lora_A.dtype == torch.float32
    assert_close(base.eval()(x), theirs(x))
    ours, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert list(ours) == list(other)
    assert all(torch.equal(ours[key], other[key]) and ours[key].dtype == other[key].dtype for key in ours)


def test_single_precision_of_a_trained_module_is_rounded_as_in_peft(tmp_path: Path) -> None:
    """A head that trained in single precision is rounded for a base in half precision, to what PEFT makes of it."""
    base = nn.ModuleDict({"fc": nn.Linear(9, 7), "head": nn.Linear(7, 5)})
    saved_by_peft(base, tmp_path, target_modules=["fc"], modules_to_save=["head"])
    theirs = with_peft(base.bfloat16(), tmp_path).base_model.model["head"].modules_to_save["default"]

    load_peft(base, tmp_path)

    assert theirs.weight.dtype == torch.bfloat16
    assert torch.equal(base["head"].weight, theirs.weight)
    assert torch.equal(base["head"].bias, theirs.bias)


@pytest.mark.parametrize("rslora", [False, True], ids=["plain", "rslora"])
def test_the_numerator_of_any_scaling(rslora: bool) -> None:
    """The numerator gives the very scaling, or, where no number's quotient is that, one that is off by the last bit."""
    numbers = random.Random(0)
    for _ in range(2000):
        rank, grown, alpha = numbers.randint(1, 64), numbers.choice([1, 3, 5, 7]), numbers.uniform(0.01, 100)
        scaling = scaling_of(rank, alpha, rslora)
        divisor = math.sqrt(rank * grown) if rslora else rank * grown
        found = alpha_for(scaling, rank * grown, rslora)

        assert abs(found / divisor - scaling) <= math.ulp(scaling)
        if found / divisor != scaling:
            assert all(math.nextafter(found, end) / divisor != scaling for end in (-math.inf, math.inf))


def test_balanced_factors_grow_by_the_first_kernel_side(tmp_path: Path) -> None:
    """A balanced convolution of rank r goes out at rank k0 r with k0 times alpha, so that the scaling stays."""
    model = nn.Sequential(nn.Conv2d(5, 7, (3, 2)))
    enable_fine_tuning(model, LoRAAllFineTuningStrategy(RANK, ALPHA))
    export_peft(model, tmp_path / "peft")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())

    assert (config["r"], config["lora_alpha"]) == (3 * RANK, 3 * ALPHA)


# --- what PEFT computes differently

CONVOLUTIONS = {
    f"{groups=}, {dilation=}, {mode}, {padding=}, {kernel=}": (
        {"groups": groups, "dilation": dilation, "padding_mode": mode, "padding": padding, "kernel_size": kernel}
    )
    for groups, dilation, mode, padding, kernel in itertools.product(
        [1, 2], [1, 2], ["zeros", "reflect", "circular"], [0, 1, "same"], [1, 3]
    )
    if kernel > 1 or dilation == 1 or padding != "same"
}


@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_refused_convolutions_are_those_that_differ(options: dict[str, Any]) -> None:
    """A convolution is refused if, and only if, PEFT's answer for the same factors is another than that of W + s B A."""
    layer = nn.Conv2d(4, 6, **options).double()
    theirs = peft.get_peft_model(nn.Sequential(copy.deepcopy(layer)), peft.LoraConfig(r=4, target_modules=["0"])).double()
    inner = theirs.base_model.model[0]
    A, B = inner.lora_A["default"].weight, nn.init.normal_(inner.lora_B["default"].weight)
    x = torch.randn(2, 4, 7, 7).double()
    try:
        update = (B.flatten(1) @ A.flatten(1)).view(layer.weight.shape)
        with torch.no_grad():
            expected = torch.func.functional_call(layer, {"weight": layer.weight + update * inner.scaling["default"]}, x)
            same = torch.allclose(theirs(x), expected)
    except RuntimeError:
        same = False  # the shapes of the factors, or of the answers, do not go together

    assert (refusal(layer) is None) == same


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(2 * input)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "code of its own": (lambda: Doubled(4, 4), "Doubled is a Linear with code of its own"),
    "transposed": (lambda: nn.ConvTranspose2d(4, 4, 3), "no form for a ConvTranspose2d"),
    "bag": (lambda: nn.EmbeddingBag(4, 4), "no form for a EmbeddingBag"),
    "max_norm": (lambda: nn.Embedding(4, 4, max_norm=1.0), "max_norm rescales"),
    "grouped": (lambda: nn.Conv2d(4, 4, 3, groups=2), "groups=2"),
    "attention": (lambda: nn.MultiheadAttention(4, 2), "MultiheadAttention reads its weight"),
    "recurrent": (lambda: nn.LSTM(4, 4), "PEFT files have no form for it"),
    "bilinear": (lambda: nn.Bilinear(4, 4, 4), "no form for a Bilinear"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_has_no_form_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    """An export names every place that PEFT cannot do, with the reason, and writes nothing."""
    build, reason = REFUSED[kind]
    model = nn.Sequential(nn.Linear(4, 4), build(), nn.Conv2d(4, 4, 3, dilation=2))
    enable_fine_tuning(model, LoRAAllFineTuningStrategy(RANK, targets=["0", "1", "2"]))

    with pytest.raises(AdapterFormatError, match=reason) as caught:
        export_peft(model, tmp_path / "peft")

    assert "\n  1" in str(caught.value)
    assert "\n  2: dilation=(2, 2)" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_layer_in_two_places_is_refused(tmp_path: Path) -> None:
    """PEFT replaces a shared layer in one of its places only, so that it is refused."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model.append(model[0])
    enable_fine_tuning(model, LoRAAllFineTuningStrategy(RANK))

    with pytest.raises(AdapterFormatError, match="0: the layer stands in several places"):
        export_peft(model, tmp_path / "peft")


def test_files_for_a_layer_in_two_places_are_refused(tmp_path: Path) -> None:
    """PEFT adapts a shared layer where it found it first and nowhere else, so that its files are refused by the layer's name."""
    base = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    base.append(base[0])
    theirs = saved_by_peft(base, tmp_path, target_modules=["0", "2"])

    assert type(theirs.base_model.model[3]) is nn.Linear
    with pytest.raises(AdapterMismatchError, match="0: the layer stands in several places") as caught:
        load_peft(base, tmp_path)
    assert "2: " not in str(caught.value)
    assert type(base[0]) is nn.Linear


class SharedBlock(nn.Module):
    """One block in two places, with a layer that stands in the block alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = nn.Sequential(nn.Linear(4, 4), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))  # type: ignore[no-any-return]


def test_a_layer_of_a_block_in_two_places_goes_both_ways(tmp_path: Path) -> None:
    """PEFT replaces a layer inside of a shared block for both of the block's places, as it is done here."""
    base, x = SharedBlock(), torch.randn(3, 4)
    plain = copy.deepcopy(base)
    theirs = saved_by_peft(base, tmp_path / "theirs", target_modules=["0"])

    load_peft(base, tmp_path / "theirs")
    export_peft(base, tmp_path / "ours")

    assert_close(base.eval()(x), theirs(x))
    assert_close(with_peft(plain, tmp_path / "ours")(x), base(x))


def encoder() -> nn.Module:
    """A model whose layers `torch.nn.TransformerEncoderLayer` reads without calling them, and one that is called."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.ModuleDict({"layers": nn.ModuleList([layer]), "linear1": nn.Linear(8, 8)}).eval()


@pytest.mark.parametrize("name", ["linear1", "linear2"])
def test_what_an_encoder_layer_reads_without_a_call_is_refused(name: str, tmp_path: Path) -> None:
    """PEFT's adapter is without effect on torch's fast path, where ours has one, so that both ways refuse it by name."""
    base, x = encoder(), torch.randn(2, 3, 8)
    theirs = saved_by_peft(base, tmp_path / "theirs", target_modules=[f"layers.0.{name}", "linear1"]).base_model.model
    tuned = copy.deepcopy(base)
    enable_fine_tuning(tuned, LoRAAllFineTuningStrategy(RANK, ALPHA, targets=[f"layers.0.{name}", "linear1"]))
    with torch.no_grad():
        assert torch.equal(theirs["layers"][0](x), base["layers"][0](x))  # type: ignore[index]
        assert not torch.equal(stir(tuned)["layers"][0](x), base["layers"][0](x))  # type: ignore[index]

    for error, refuses in (
        (AdapterFormatError, lambda: export_peft(tuned, tmp_path / "ours")),
        (AdapterMismatchError, lambda: load_peft(base, tmp_path / "theirs")),
    ):
        with pytest.raises(error, match=rf"layers.0.{name}: TransformerEncoderLayer reads its weight") as caught:
            refuses()
        assert "\n  linear1" not in str(caught.value)


@pytest.mark.parametrize("name", ["linear1", "linear2", "out_proj"])
def test_a_file_whose_layer_may_be_read_without_a_call_asks_for_the_model(name: str, tmp_path: Path) -> None:
    """Without the model nothing tells whose layer it is, and with the model a layer of another owner goes."""
    base = nn.Sequential()
    base.add_module(name, nn.Linear(4, 4))
    tuned = copy.deepcopy(base)
    enable_fine_tuning(tuned, LoRALinearFineTuningStrategy(RANK))
    save_adapter(stir(tuned), tmp_path / "a.safetensors")

    with pytest.raises(AdapterFormatError, match="name the base model too"):
        export_peft(tmp_path / "a.safetensors", tmp_path / "peft")
    export_peft(tmp_path / "a.safetensors", tmp_path / "peft", model=base)

    assert_same_model(tuned, with_peft(base, tmp_path / "peft"), torch.randn(2, 4))


class Scaled(nn.Module):
    """A parameter of its own, and a layer inside."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.fc = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.scale  # type: ignore[no-any-return]


def test_a_trained_module_around_an_adapted_layer_is_refused(tmp_path: Path) -> None:
    """PEFT leaves the layers alone that lie in a module it trains in full, so that both together are refused."""
    model = nn.Sequential(Scaled(), nn.Linear(4, 4))
    strategies = LoRAAllFineTuningStrategy(RANK, targets=["0.fc", "1"]), FullFineTuningStrategy(targets="0.scale")
    enable_fine_tuning(model, merge_strategies(strategies))

    with pytest.raises(AdapterFormatError, match=r"0 is trained in full, and PEFT would leave out 0.fc"):
        export_peft(model, tmp_path / "peft")


def test_a_tied_module_trained_in_full_is_refused(tmp_path: Path) -> None:
    """PEFT trains a copy of a module, which would no longer be tied."""
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5, bias=False))
    model[2].weight = model[0].weight
    enable_fine_tuning(model, merge_strategies(LoRAAllFineTuningStrategy(RANK, targets="1"), FullFineTuningStrategy(targets="0")))

    with pytest.raises(AdapterFormatError, match="0: its weight is shared with another module"):
        export_peft(model, tmp_path / "peft")


@pytest.mark.parametrize(("place", "trained"), [("plain", "plain"), ("scaled.fc", "scaled")], ids=["itself", "a part"])
def test_a_trained_module_in_two_places_is_refused(place: str, trained: str, tmp_path: Path) -> None:
    """PEFT trains a copy in one of the places, so that a trained module, or a part of one, that stands in two is refused."""
    base = nn.ModuleDict({"first": nn.Linear(4, 4), "scaled": Scaled(), "plain": nn.Linear(4, 4)})
    base["again"] = base.get_submodule(place)
    theirs = saved_by_peft(base, tmp_path / "theirs", target_modules=["first"], modules_to_save=[trained]).base_model.model
    strategies = LoRAAllFineTuningStrategy(RANK, targets="first"), FullFineTuningStrategy(targets=trained)
    enable_fine_tuning(base, merge_strategies(strategies))

    assert type(theirs["again"]) is nn.Linear
    with pytest.raises(AdapterFormatError, match=f"{trained} is trained in full, and it or a part of it stands in another place too"):
        export_peft(base, tmp_path / "peft")


def test_a_trained_module_in_a_block_in_two_places_goes_to_peft(tmp_path: Path) -> None:
    """PEFT replaces a trained module inside of a shared block for both of the block's places, as it is done here."""
    base, x = nn.Sequential(nn.Linear(4, 4), SharedBlock()), torch.randn(3, 4)
    tuned = copy.deepcopy(base)
    strategies = LoRAAllFineTuningStrategy(RANK, targets="0"), FullFineTuningStrategy(targets="1.first.0")
    enable_fine_tuning(tuned, merge_strategies(strategies))

    export_peft(stir(tuned), tmp_path)

    assert_close(with_peft(base, tmp_path)(x), tuned.eval()(x))


def test_a_tied_layer_is_exported_with_a_warning(tmp_path: Path) -> None:
    """PEFT answers with an adapted tied layer as we do; that it merges another model is told, and with the base untied it does not."""
    base = TiedHead()
    tuned = copy.deepcopy(base)
    enable_fine_tuning(tuned, LoRAAllFineTuningStrategy(RANK, ALPHA))

    with pytest.warns(GiftWarning, match=r"fc: the weight is tied.*merge_and_unload.*Untie the base") as caught:
        done = export_peft(stir(tuned), tmp_path)

    assert done.notes == (str(caught[0].message),)
    expected = tuned(TOKENS)
    theirs = with_peft(base, tmp_path)
    assert_close(theirs(TOKENS), expected)
    assert (theirs.merge_and_unload()(TOKENS) - expected).abs().max() > 0.01
    base.untie()
    assert_same_model(tuned, with_peft(base, tmp_path), TOKENS)


def test_the_command_tells_of_a_tied_layer_once(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """What ``gift convert`` prints as notes names the tied layer, and no warning says it a second time."""
    tuned, base = TiedHead(), TiedHead()
    base.load_state_dict(tuned.state_dict())
    enable_fine_tuning(tuned, LoRAAllFineTuningStrategy(RANK))
    save_adapter(tuned, tmp_path / "adapter.safetensors")

    notes = PEFT.export(tmp_path / "adapter.safetensors", tmp_path / "peft", model=base)["notes"]

    assert [note.partition(":")[0] for note in notes] == ["fc"]
    assert not [warning for warning in recwarn if issubclass(warning.category, GiftWarning)]


def saved_by_peft(base: nn.Module, directory: Path, **settings: Any) -> Any:
    """PEFT's model with an adapter that trained, whose files are in the folder."""
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, **settings)
    theirs = stir(peft.get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False)).eval()
    theirs.save_pretrained(str(directory))  # type: ignore[operator]
    return theirs


@pytest.mark.parametrize("saved", [["tokens"], ["fc"], ["tokens", "fc"]], ids=str)
def test_a_copy_that_peft_untied_is_refused(saved: list[str], tmp_path: Path) -> None:
    """What PEFT trained apart of a tied pair is refused by name before anything changes; once the base is untied it loads."""
    base, names = TiedHead(), {"tokens.weight", "fc.weight"}
    theirs = saved_by_peft(base, tmp_path, target_modules=["mid"], modules_to_save=saved)
    before = {key: value.clone() for key, value in base.state_dict().items()}

    for name in saved:
        with pytest.raises(AdapterMismatchError, match=rf"{name}.weight is tied to {(names - {f'{name}.weight'}).pop()}.*untie"):
            load_peft(base, tmp_path)

    assert base.fc.weight is base.tokens.weight
    assert type(base.mid) is nn.Linear
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())

    base.untie()
    load_peft(base, tmp_path)

    assert_same_model(base, theirs, TOKENS)


@pytest.mark.parametrize(
    ("model", "error", "says"),
    [
        (lambda: nn.ModuleDict({"fc": nn.LazyLinear(7)}), ModelError, r"'fc' \(LazyLinear\) is lazy.*run one forward pass first"),
        (
            lambda: nn.ModuleDict({"fc": nn.Linear(6, 7).to(torch.float8_e4m3fn)}),
            AdapterMismatchError,
            r"fc: its 'weight' is in torch.float8",
        ),
    ],
    ids=["lazy", "float8"],
)
def test_a_model_that_cannot_be_tuned_is_refused(
    model: Callable[[], nn.Module], error: type[Exception], says: str, tmp_path: Path
) -> None:
    """A layer without a shape, or in a dtype without arithmetic, is named, as where a strategy meets it."""
    saved_by_peft(nn.ModuleDict({"fc": nn.Linear(6, 7)}), tmp_path, target_modules=["fc"])

    with pytest.raises(error, match=says):
        load_peft(model(), tmp_path)


class TiedWithin(nn.Module):
    """A tied pair that lies in one module, and a bias that a second module holds."""

    def __init__(self) -> None:
        super().__init__()
        self.lm = TiedHead()
        self.out = nn.Linear(11, 6)
        self.again = nn.Linear(6, 6)
        self.again.bias = self.out.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.out(self.lm(x)))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "settings", [{"target_modules": ["out"], "modules_to_save": ["lm"]}, {"target_modules": ["mid"], "bias": "all"}], ids=str
)
def test_a_tie_that_peft_keeps_is_loaded(settings: dict[str, Any], tmp_path: Path) -> None:
    """A pair inside of one trained module, and a bias of two layers, stay tied in PEFT and here."""
    base = TiedWithin()
    theirs = saved_by_peft(base, tmp_path, **settings)

    load_peft(base, tmp_path)

    assert base.lm.fc.weight is base.lm.tokens.weight
    assert_same_model(base, theirs, TOKENS)


def test_values_that_a_tie_cannot_hold_are_refused(tmp_path: Path) -> None:
    """Two values for one tensor of the model are refused, whichever would be written last."""
    base = TiedWithin()
    saved_by_peft(base, tmp_path, target_modules=["mid"], bias="all")
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.again.bias"] += 1
    save_file(tensors, file)

    with pytest.raises(AdapterMismatchError, match=r"out.bias is tied to again.bias, and the file holds other values.*untie"):
        load_peft(base, tmp_path)


def test_an_embedding_has_no_dropout_in_peft(tmp_path: Path) -> None:
    """PEFT's dropout leaves embeddings alone, and so does what is loaded."""
    base = nn.Sequential(nn.Embedding(11, 6))
    theirs = stir(peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=RANK, lora_dropout=0.9, target_modules=["0"])))
    theirs.save_pretrained(str(tmp_path))  # type: ignore[operator]
    load_peft(base, tmp_path)

    assert_close(base.train()(TOKENS), theirs.train()(TOKENS))


def test_only_the_layers_of_the_file_are_adapted(tmp_path: Path) -> None:
    """Of layers in a row, those that the file holds are adapted and the others are not."""
    base = nn.Sequential(*(nn.Linear(4, 4) for _ in range(12)))
    tuned = copy.deepcopy(base)
    enable_fine_tuning(tuned, LoRAAllFineTuningStrategy(RANK, ALPHA, targets=["1", "3", "10"]))
    export_peft(stir(tuned), tmp_path)
    load_peft(base, tmp_path)

    assert [type(layer) is nn.Linear for layer in base] == [type(layer) is nn.Linear for layer in tuned]


# --- whole models


class Net(nn.Module):
    """A small model with names that are ends and beginnings of one another."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.conv = nn.Conv1d(6, 6, 3, padding=1)
        self.norm = nn.BatchNorm1d(6)
        self.fc = nn.Linear(6, 6)
        self.block = nn.ModuleDict({"fc": nn.Linear(6, 6), "fc_2": nn.Linear(6, 6), "xfc": nn.Linear(6, 6, bias=False)})
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(self.embed(x).transpose(1, 2))).transpose(1, 2)
        x = self.block["fc"](x).relu() + self.block["fc_2"](x).relu() + self.block["xfc"](x)
        return self.head(self.fc(x))  # type: ignore[no-any-return]


def tuned_net(*strategies: Any) -> tuple[Net, Net]:
    """A base model and a copy of it, tuned."""
    base = Net().double().eval()
    tuned = copy.deepcopy(base)
    enable_fine_tuning(tuned, strategies[0] if len(strategies) == 1 else merge_strategies(strategies))
    return base, stir(tuned)  # type: ignore[return-value]


def test_names_match_exactly_our_sites(tmp_path: Path) -> None:
    """PEFT adapts the layers that we adapt and no other, whose name ends or begins alike, each with its own rank and alpha."""
    base, tuned = tuned_net(
        LoRAAllFineTuningStrategy(2, 4.0, targets=["fc", "embed"]),
        LoRAAllFineTuningStrategy(3, 1.5, targets="block.xfc"),
        LoRAAllFineTuningStrategy(2, 7.0, targets="block.fc_2"),
    )
    export_peft(tuned, tmp_path / "peft")
    theirs = with_peft(base, tmp_path / "peft")
    scalings = {
        name: module.scaling["default"] for name, module in theirs.base_model.model.named_modules() if hasattr(module, "scaling")
    }

    assert scalings == {"fc": 2.0, "embed": 2.0, "block.xfc": 0.5, "block.fc_2": 3.5}
    assert_same_model(tuned, theirs, TOKENS)


@pytest.mark.parametrize("train_bias", [False, True], ids=["none", "lora_only"])
def test_trained_modules_and_statistics_are_exported(train_bias: bool, tmp_path: Path) -> None:
    """A head and a normalisation layer trained in full, moved statistics and the biases of adapted layers arrive in PEFT."""
    base, tuned = tuned_net(
        LoRAAllFineTuningStrategy(RANK, ALPHA, targets=["conv", "fc", "block"], train_bias=train_bias),
        FullFineTuningStrategy(targets=["head", "norm"]),
    )
    tuned.train()(TOKENS)

    done = export_peft(tuned, tmp_path / "peft")

    assert (done.layers, done.modules_to_save, done.bias) == (5, ("head", "norm"), "lora_only" if train_bias else "none")
    assert_same_model(tuned, with_peft(base, tmp_path / "peft"), TOKENS)


def test_statistics_that_moved_are_exported_though_nothing_trains_them(tmp_path: Path) -> None:
    """Statistics of a frozen normalisation layer that training has moved are part of what is exported."""
    base, tuned = tuned_net(LoRAAllFineTuningStrategy(RANK, ALPHA, targets=["fc"]))
    tuned.train()(TOKENS)

    assert export_peft(tuned, tmp_path / "peft").modules_to_save == ("norm",)
    assert_same_model(tuned, with_peft(base, tmp_path / "peft"), TOKENS)


def test_loose_biases_are_exported(tmp_path: Path) -> None:
    """Biases of layers without LoRA make it PEFT's bias="all"."""
    base, tuned = tuned_net(
        LoRAAllFineTuningStrategy(RANK, ALPHA, targets=["fc"], train_bias=True),
        FullFineTuningStrategy(targets=["head.bias", "block.fc.bias"]),
    )

    assert export_peft(tuned, tmp_path / "peft").bias == "all"
    assert_same_model(tuned, with_peft(base, tmp_path / "peft"), TOKENS)


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_trained_modules_and_biases_are_imported(bias: str, tmp_path: Path) -> None:
    """PEFT's modules_to_save and its biases, with each setting, arrive here."""
    base = Net().double().eval()
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["conv", "fc"], modules_to_save=["head", "norm"], bias=bias)
    theirs = stir(peft.get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False))
    theirs.train()(TOKENS)
    theirs.eval().save_pretrained(str(tmp_path))  # type: ignore[operator]

    done = load_peft(base, tmp_path)

    assert done.layers == 3
    assert {"head", "norm"} <= set(done.modules_to_save)
    with torch.no_grad():
        assert_close(base.eval()(TOKENS), theirs(TOKENS))


@pytest.mark.parametrize(
    ("strategies", "reason"),
    [
        ([FullFineTuningStrategy(targets="fc")], "fc is trained in full, and PEFT would train block.fc, block.xfc too"),
        ([FullFineTuningStrategy(targets="block.fc.weight")], None),
        ([FullFineTuningStrategy(targets="embed")], None),
    ],
    ids=["ends alike", "a part", "whole"],
)
def test_modules_trained_in_full_have_a_form_or_are_refused(strategies: list[Any], reason: str | None, tmp_path: Path) -> None:
    """What PEFT would take for another module too is refused, and everything else is exact."""
    base, tuned = tuned_net(LoRAAllFineTuningStrategy(RANK, ALPHA, targets="conv"), *strategies)

    if reason is None:
        export_peft(tuned, tmp_path / "peft")
        assert_same_model(tuned, with_peft(base, tmp_path / "peft"), TOKENS)
    else:
        with pytest.raises(AdapterFormatError, match=reason):
            export_peft(tuned, tmp_path / "peft")


class Mixed(nn.Module):
    """Modules with parameters of their own and trained layers inside."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.scaled = nn.Sequential(Scaled(8))
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(self.scaled(self.first(x)))  # type: ignore[no-any-return]


NESTED: dict[str, tuple[list[str], tuple[str, ...], str]] = {
    "all of it": (["scaled.0"], ("scaled.0",), "none"),
    "a parameter and the bias inside": (["scaled.0.scale", "scaled.0.fc.bias"], ("scaled.0",), "none"),
    "that bias alone": (["scaled.0.fc.bias"], (), "all"),
    "attention": (["encoder.self_attn"], ("encoder.self_attn",), "none"),
    "attention and a bias elsewhere": (["encoder.self_attn", "encoder.linear2.bias"], ("encoder.self_attn",), "all"),
    "both": (["encoder.self_attn", "scaled"], ("encoder.self_attn", "scaled.0"), "none"),
}


@pytest.mark.parametrize("case", NESTED)
def test_a_trained_module_with_trained_modules_inside_is_exported_as_one(case: str, tmp_path: Path) -> None:
    """Where a module and one inside of it are trained, PEFT is told the outer one, of which it trains a copy, and loads it."""
    targets, modules, bias = NESTED[case]
    base, x = Mixed().double().eval(), torch.randn(2, 3, 8).double()
    tuned = copy.deepcopy(base)
    strategies = FullFineTuningStrategy(targets=targets), LoRAAllFineTuningStrategy(RANK, ALPHA, targets="first")
    enable_fine_tuning(tuned, merge_strategies(strategies))

    done = export_peft(stir(tuned), tmp_path)

    assert (done.modules_to_save, done.bias) == (modules, bias)
    assert_same_model(tuned, with_peft(base, tmp_path), x)


@pytest.mark.parametrize("saved", ["scaled.0", "scaled", "encoder", "encoder.self_attn"])
def test_a_module_that_peft_trained_goes_back_to_peft(saved: str, tmp_path: Path) -> None:
    """What PEFT trained in full is loaded, exported again, and gives PEFT's answers there."""
    base, x = Mixed().double().eval(), torch.randn(2, 3, 8).double()
    plain = copy.deepcopy(base)
    theirs = saved_by_peft(base, tmp_path / "theirs", target_modules=["first"], modules_to_save=[saved])

    load_peft(base, tmp_path / "theirs")
    export_peft(base, tmp_path / "ours")

    again = with_peft(plain, tmp_path / "ours")
    assert_close(again(x), theirs(x))
    assert_same_model(base, again, x)


def test_a_round_trip_gives_the_same_tensors(tmp_path: Path) -> None:
    """What is exported and imported again is the same adapter, bit for bit, where the layout is PEFT's."""
    base, tuned = tuned_net(
        LoRAAllFineTuningStrategy(RANK, ALPHA, targets=["conv", "embed", "block.*"], use_dora=True, conv_layout="out_as_h"),
        FullFineTuningStrategy(targets="head"),
    )
    export_peft(tuned, tmp_path / "peft")
    load_peft(base, tmp_path / "peft")
    mine, again = tuned.state_dict(), base.state_dict()

    assert mine.keys() == again.keys()
    assert all(torch.equal(mine[key], again[key]) for key in mine)


# --- files


def save_net(path: Path, *strategies: Any) -> tuple[Net, Net]:
    """A base model, and its tuned copy saved in a file."""
    base, tuned = tuned_net(*strategies)
    save_adapter(tuned, path)
    return base, tuned


def test_a_file_and_its_model_are_exported(tmp_path: Path) -> None:
    """A file exports like the model it was saved from, with another base's weights too, and the model is left as it was."""
    base, tuned = save_net(tmp_path / "a.safetensors", LoRAAllFineTuningStrategy(RANK, ALPHA, targets=["conv", "fc"], use_dora=True))
    other = Net().double()
    before = copy.deepcopy(other.state_dict())

    export_peft(tmp_path / "a.safetensors", tmp_path / "peft", model=other)

    assert_same_model(tuned, with_peft(base, tmp_path / "peft"), TOKENS)
    assert type(other.fc) is nn.Linear
    assert other.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())


@pytest.mark.parametrize("variant", [{}, {"use_rslora": True, "use_dora": True}, {"init": "pissa"}], ids=str)
def test_a_file_of_linear_layers_needs_no_model(variant: dict[str, Any], tmp_path: Path) -> None:
    """A file of lora-linear alone is exported as with its model, and the report says what was assumed."""
    base, tuned = save_net(
        tmp_path / "a.safetensors", LoRALinearFineTuningStrategy(RANK, ALPHA, targets=["fc", "block"], train_bias=True, **variant)
    )

    done = export_peft(tmp_path / "a.safetensors", tmp_path / "peft")

    assert "taken to be plain torch.nn.Linear" in done.notes[0]
    assert_same_model(tuned, with_peft(base, tmp_path / "peft"), TOKENS)


def test_a_file_that_does_not_tell_its_layers_asks_for_the_model(tmp_path: Path) -> None:
    """Where the file alone does not say what kind of layers it has, the error asks for the base model."""
    save_net(tmp_path / "a.safetensors", LoRAAllFineTuningStrategy(RANK, targets="fc"))

    with pytest.raises(AdapterFormatError, match="name the base model too"):
        export_peft(tmp_path / "a.safetensors", tmp_path / "peft")


def test_a_module_that_the_file_holds_in_part_needs_its_base(tmp_path: Path) -> None:
    """PEFT saves whole modules: where the file has a part, the rest comes from the right base weights, or is refused."""
    strategies = LoRAAllFineTuningStrategy(RANK, ALPHA, targets="fc"), FullFineTuningStrategy(targets="block.fc.weight")
    base, tuned = save_net(tmp_path / "a.safetensors", *strategies)

    with pytest.raises(AdapterFormatError, match=r"block.fc: PEFT saves the whole module, and the file has no bias"):
        export_peft(tmp_path / "a.safetensors", tmp_path / "peft", model=Net().double())
    export_peft(tmp_path / "a.safetensors", tmp_path / "peft", model=copy.deepcopy(base))

    assert_same_model(tuned, with_peft(base, tmp_path / "peft"), TOKENS)


def test_peft_files_become_an_adapter_file(tmp_path: Path) -> None:
    """import_peft writes a file that loads into the base model, which it leaves as it was."""
    base, tuned = tuned_net(LoRAAllFineTuningStrategy(RANK, ALPHA, targets=["conv", "fc"]))
    export_peft(tuned, tmp_path / "peft")
    import_peft(tmp_path / "peft", tmp_path / "b.safetensors", base)

    assert type(base.fc) is nn.Linear
    load_adapter(base, tmp_path / "b.safetensors")
    assert_close(base(TOKENS), tuned.eval()(TOKENS))


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    """Both ways refuse a target that is there; force overwrites it."""
    base, tuned = tuned_net(LoRAAllFineTuningStrategy(RANK, ALPHA, targets="fc"))
    export_peft(tuned, tmp_path / "peft")
    import_peft(tmp_path / "peft", tmp_path / "b.safetensors", base)

    with pytest.raises(AdapterWriteError, match=r"adapter_config.json and adapter_model.safetensors already"):
        export_peft(tuned, tmp_path / "peft")
    with pytest.raises(AdapterWriteError, match="exists already"):
        import_peft(tmp_path / "peft", tmp_path / "b.safetensors", base)
    export_peft(stir(tuned), tmp_path / "peft", force=True)
    import_peft(tmp_path / "peft", tmp_path / "b.safetensors", base, force=True)

    load_adapter(base, tmp_path / "b.safetensors")
    assert_close(base(TOKENS), tuned.eval()(TOKENS))


@pytest.mark.parametrize("failing", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_failed_write_leaves_the_old_pair(failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If either file cannot take its place, both old files are there, whole, and nothing else is."""
    _, tuned = tuned_net(LoRAAllFineTuningStrategy(RANK, ALPHA, targets="fc"))
    export_peft(tuned, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    replace = os.replace

    def fail(source: Any, target: Any) -> None:
        if Path(target).name == failing and ".old" not in str(source):
            raise OSError("disk full")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(AdapterWriteError):
        export_peft(stir(tuned), tmp_path, force=True)

    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("failing", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_failed_first_write_leaves_nothing(failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If either file of a new folder cannot take its place, the folder is gone again."""
    _, tuned = tuned_net(LoRAAllFineTuningStrategy(RANK, ALPHA, targets="fc"))
    replace = os.replace

    def fail(source: Any, target: Any) -> None:
        if Path(target).name == failing:
            raise OSError("disk full")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(AdapterWriteError, match=f"{failing} could not be written: disk full. What was there is intact: "):
        export_peft(tuned, tmp_path / "peft")

    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_set_aside_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the old files cannot be moved, they are where they were, and nothing else is."""
    _, tuned = tuned_net(LoRAAllFineTuningStrategy(RANK, ALPHA, targets="fc"))
    export_peft(tuned, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    replace = os.replace

    def fail(source: Any, target: Any) -> None:
        if Path(source).name == "adapter_model.safetensors" and str(target).endswith(".old"):
            raise OSError("not permitted")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(AdapterWriteError, match="not permitted"):
        export_peft(stir(tuned), tmp_path, force=True)

    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_links_stay_and_what_they_point_to_is_replaced(tmp_path: Path) -> None:
    """A folder of symbolic links, as a cache of downloads is, keeps its links."""
    base, tuned = tuned_net(LoRAAllFineTuningStrategy(RANK, ALPHA, targets="fc"))
    export_peft(tuned, tmp_path / "blobs")
    (tmp_path / "links").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "links" / name).symlink_to(tmp_path / "blobs" / name)
    export_peft(stir(tuned), tmp_path / "links", force=True)
    load_peft(base, tmp_path / "blobs")

    assert all(file.is_symlink() for file in (tmp_path / "links").iterdir())
    assert len(list((tmp_path / "blobs").iterdir())) == 2
    assert_close(base.eval()(TOKENS), tuned.eval()(TOKENS))


def test_no_configuration_stands_beside_other_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one file is being replaced, a reader that comes between finds no configuration, rather than one of another adapter."""
    _, tuned = tuned_net(LoRAAllFineTuningStrategy(RANK, ALPHA, targets="fc"))
    export_peft(tuned, tmp_path)
    replace, seen = os.replace, []

    def watch(source: Any, target: Any) -> None:
        if Path(target).name == "adapter_model.safetensors":
            seen.append((tmp_path / "adapter_config.json").exists())
        replace(source, target)

    monkeypatch.setattr(os, "replace", watch)
    export_peft(stir(tuned), tmp_path, force=True)

    assert seen == [False]


def test_what_must_be_plain_or_tuned_is_checked(tmp_path: Path) -> None:
    """Each function says which of a plain and a tuned model it takes."""
    base, tuned = save_net(tmp_path / "a.safetensors", LoRAAllFineTuningStrategy(RANK, targets="fc"))
    export_peft(tuned, tmp_path / "peft")

    with pytest.raises(StateError, match="not tuned"):
        export_peft(base, tmp_path / "other")
    with pytest.raises(StateError, match="is tuned already"):
        load_peft(tuned, tmp_path / "peft")
    with pytest.raises(StateError, match="is tuned already"):
        export_peft(tmp_path / "a.safetensors", tmp_path / "other", model=tuned)
    with pytest.raises(StateError, match="pass the tuned model itself"):
        export_peft(nn.Sequential(tuned), tmp_path / "other")


def test_loading_draws_no_random_number(tmp_path: Path) -> None:
    """load_peft leaves torch's generator as it was."""
    base, tuned = tuned_net(LoRAAllFineTuningStrategy(RANK, targets="fc"))
    export_peft(tuned, tmp_path)
    before = torch.get_rng_state()
    load_peft(base, tmp_path)

    assert torch.equal(torch.get_rng_state(), before)


# --- patterns

NAME = st.text("ab1_.-", min_size=1, max_size=6).filter(lambda name: ".." not in name and not name.startswith(".") and name[-1] != ".")


@given(st.lists(NAME, min_size=1, max_size=6, unique=True), st.lists(NAME, min_size=1, max_size=6, unique=True), st.booleans())
@settings(deadline=None, max_examples=200, derandomize=True)
def test_patterns_match_as_in_peft(keys: list[str], names: list[str], anchor: bool) -> None:
    """A key that is a name, an end of a name, or one that we wrote, matches exactly where PEFT's regular expression does."""
    pattern = {(anchored(key) if anchor and at % 2 else key): float(at + 1) for at, key in enumerate(keys)}
    found = alphas(config_from({"peft_type": "LORA", "lora_alpha": 0.5, "alpha_pattern": pattern}), names)

    assert found == {name: pattern.get(get_pattern_key(pattern, name), 0.5) for name in names}

    whole = {key: int(value) for key, value in pattern.items()}
    said = ranks(config_from({"peft_type": "LORA", "r": 99, "rank_pattern": whole}), names)

    assert said == {name: whole.get(get_pattern_key(whole, name), 99) for name in names}


@given(st.lists(st.text(min_size=1, max_size=8).filter(lambda name: "\n" not in name), min_size=2, max_size=6, unique=True))
@settings(deadline=None, max_examples=200, derandomize=True)
def test_what_we_write_matches_our_names_alone(names: list[str]) -> None:
    """Of any names, target_modules matches those that are adapted and no other, and each rank belongs to its own."""
    ours, others = names[: len(names) // 2], names[len(names) // 2 :]
    ranks = {name: at + 1 for at, name in enumerate(ours)}
    data = config_data(
        ranks=ranks,
        alphas=dict.fromkeys(ours, 1.0),
        dropout=0.0,
        rslora=False,
        dora=False,
        bias="none",
        modules_to_save=[],
        fan_in_fan_out=False,
        base_model=None,
        task_type=None,
    )
    config = peft.LoraConfig(**data)

    assert [name for name in names if peft.tuners.tuners_utils.check_target_module_exists(config, name)] == ours
    assert not any(get_pattern_key(config.rank_pattern, other) in config.rank_pattern for other in others)
    assert {name: config.rank_pattern.get(get_pattern_key(config.rank_pattern, name), config.r) for name in ours} == ranks


# --- transformers


def small_model(kind: str) -> tuple[Any, list[str]]:
    """A small transformers model with random weights, and the patterns of what is adapted."""
    transformers = pytest.importorskip("transformers")
    size = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    if kind == "bert":
        config = transformers.BertConfig(**size)
        return transformers.BertForSequenceClassification(config).eval(), ["*.query", "*.value", "*.dense", "*.word_embeddings"]
    if kind == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**size)).eval(), ["*.q_proj", "*.down_proj", "*.embed_tokens"]
    if kind == "tied llama":
        config = transformers.LlamaConfig(**size, tie_word_embeddings=True)
        return transformers.LlamaForCausalLM(config).eval(), ["*.q_proj", "lm_head"]
    config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config).eval(), ["*.c_attn", "*.c_fc"]


IDS = torch.tensor([[3, 7, 1, 20], [5, 5, 39, 0]])


@pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])
@pytest.mark.parametrize("kind", ["bert", "llama", "tied llama", "gpt2"])
def test_transformers_loads_what_was_exported(kind: str, dora: bool, tmp_path: Path) -> None:
    """The load_adapter of transformers, and PEFT, give the exported model's answers, and so does PEFT merged, of an untied base."""
    base, targets = small_model(kind)
    tuned = copy.deepcopy(base)
    enable_fine_tuning(tuned, LoRAAllFineTuningStrategy(RANK, ALPHA, targets=targets, use_dora=dora))
    with pytest.warns(GiftWarning, match="^lm_head: the weight is tied") if kind == "tied llama" else contextlib.nullcontext():
        export_peft(stir(tuned), tmp_path)
    loaded = copy.deepcopy(base)
    loaded.load_adapter(str(tmp_path))
    with torch.no_grad():
        expected = tuned.eval()(IDS).logits

        assert (expected - base(IDS).logits).abs().max() > 0.01
        assert_close(loaded.eval()(IDS).logits, expected)
        assert_close(with_peft(base, tmp_path)(IDS).logits, expected)
        if kind == "tied llama":
            base.lm_head.weight = nn.Parameter(base.lm_head.weight.detach().clone())
            base.config.tie_word_embeddings = False
        assert_close(with_peft(base, tmp_path).merge_and_unload()(IDS).logits, expected)


def test_transformers_loads_a_trained_head_and_biases(tmp_path: Path) -> None:
    """The load_adapter of transformers gives a head that was trained in full, and the biases of adapted layers."""
    base, targets = small_model("bert")
    tuned = copy.deepcopy(base)
    strategies = (
        LoRAAllFineTuningStrategy(RANK, ALPHA, targets=targets[:2], train_bias=True),
        FullFineTuningStrategy(targets="classifier"),
    )
    enable_fine_tuning(tuned, merge_strategies(strategies))
    export_peft(stir(tuned), tmp_path, task_type="SEQ_CLS")
    loaded = copy.deepcopy(base)
    loaded.load_adapter(str(tmp_path))
    with torch.no_grad():
        expected = tuned.eval()(IDS).logits

        assert_close(loaded.eval()(IDS).logits, expected)
        assert_close(with_peft(base, tmp_path)(IDS).logits, expected)


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
def test_what_transformers_saved_is_loaded(kind: str, tmp_path: Path) -> None:
    """An adapter made and saved through transformers gives its answers here."""
    base, targets = small_model(kind)
    theirs = copy.deepcopy(base)
    names = [target.removeprefix("*.") for target in targets]
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=names, rank_pattern={names[0]: 3}, alpha_pattern={names[0]: 4})
    try:
        theirs.add_adapter(config)
    except ValueError as error:
        if "version of PEFT" not in str(error):
            raise
        pytest.skip(f"this transformers makes no adapters with peft {peft.__version__}: {error}")
    stir(theirs).eval().save_pretrained(str(tmp_path))  # type: ignore[operator]

    load_peft(base, tmp_path)

    with torch.no_grad():
        assert_close(base.eval()(IDS).logits, theirs(IDS).logits)
