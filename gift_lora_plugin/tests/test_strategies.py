"""Which layers LoRA's strategies take, what trains then, and what they refuse."""

from __future__ import annotations

import contextlib
import copy
import json
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gift_core import (
    disable_fine_tuning,
    enable_fine_tuning,
    load_adapter,
    plan_fine_tuning,
    read_adapter_info,
    save_adapter,
    strategy_from_config,
    strategy_from_file,
)
from gift_core.errors import GiftError, GiftWarning, NoMatchError, ParameterError, PatternError
from gift_core.reparameterization import is_adopted
from gift_lora_plugin import LoRA, LoRAAllFineTuningStrategy, LoRAConvFineTuningStrategy, LoRALinearFineTuningStrategy

STRATEGIES = {"lora": LoRAAllFineTuningStrategy, "lora-linear": LoRALinearFineTuningStrategy, "lora-conv": LoRAConvFineTuningStrategy}


class OwnLinear(nn.Linear):
    """A subclass that changes nothing."""


class OwnConv(nn.Conv2d):
    """A subclass with a child of its own."""

    def __init__(self) -> None:
        super().__init__(4, 4, 1)
        self.inner = nn.Linear(2, 2)


class Zoo(nn.Module):
    """Every place that a layer may have, layers that LoRA takes when they are named, and one that it leaves alone."""

    def __init__(self) -> None:
        super().__init__()
        self.direct = nn.Linear(4, 4)
        self.sequence = nn.Sequential(nn.Conv1d(4, 4, 2), nn.ReLU(), nn.Sequential(nn.Conv2d(4, 4, 2)))
        self.list = nn.ModuleList([nn.Conv3d(4, 4, 2), nn.Linear(4, 2, bias=False)])
        self.dict = nn.ModuleDict({"a": nn.Linear(4, 3), "b": OwnConv()})
        self.attention = nn.MultiheadAttention(4, 2)
        self.subclass = OwnLinear(4, 4)
        self.others = nn.ModuleList([nn.ConvTranspose2d(4, 4, 2), nn.Embedding(4, 4), nn.BatchNorm2d(4), nn.Bilinear(2, 2, 2)])
        self.memory = nn.LSTM(4, 4)
        self.register_module("absent", None)


LINEAR = ["direct", "list.1", "dict.a", "attention.out_proj", "subclass"]
CONVOLUTIONS = ["sequence.0", "sequence.2.0", "list.0", "dict.b"]
TAKEN = {
    "lora": sorted([*LINEAR, *CONVOLUTIONS, "attention", "others.0", "others.3", "memory"]),
    "lora-linear": sorted([*LINEAR, "dict.b.inner"]),
    "lora-conv": sorted([*CONVOLUTIONS, "others.0"]),
}


@pytest.fixture
def zoo() -> nn.Module:
    """A `Zoo` with seeded values."""
    torch.manual_seed(0)
    return Zoo()


def adopted(model: nn.Module) -> list[str]:
    """Names of the adopted modules, sorted."""
    return sorted(name for name, module in model.named_modules() if is_adopted(module))


def weights(path: str) -> list[str]:
    """What stands before the names of a layer's adapters: nothing where its weight is called ``weight``."""
    return {"attention": ["in_proj_weight_"], "memory": ["weight_ih_l0_", "weight_hh_l0_"]}.get(path, [""])


def trainable(model: nn.Module) -> set[str]:
    """Names of the parameters that train."""
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def image_model() -> nn.Module:
    """Convolutions of every kernel size, BatchNorm and a head; takes ``(batch, 3, 8, 8)``."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)
    )


# --- matching


@pytest.mark.parametrize("name", STRATEGIES)
def test_layers_are_matched_by_type_in_every_place(name: str, zoo: nn.Module) -> None:
    """Each strategy takes its types, subclasses included, in every container, and nothing else."""
    enable_fine_tuning(zoo, STRATEGIES[name](rank=1))

    assert adopted(zoo) == TAKEN[name]
    prefixes = [f"{path}.{weight}" for path in TAKEN[name] for weight in weights(path)]
    assert trainable(zoo) == {f"{prefix}{part}" for prefix in prefixes for part in ("lora_A", "lora_B")}


@pytest.mark.parametrize(
    "root", [nn.Linear(4, 3), nn.Conv1d(4, 3, 2), nn.Conv2d(4, 3, 2), nn.Conv3d(4, 3, 2), OwnLinear(4, 3)], ids=str
)
def test_the_root_may_be_the_layer(root: nn.Module) -> None:
    """A model that is one layer is adapted itself."""
    model = copy.deepcopy(root)

    enable_fine_tuning(model, LoRAAllFineTuningStrategy(rank=1))

    assert adopted(model) == [""]
    assert isinstance(model, type(root))
    assert trainable(model) == {"lora_A", "lora_B"}


@pytest.mark.parametrize("name", STRATEGIES)
def test_strategies_are_registered(name: str, zoo: nn.Module) -> None:
    """The registered name does what the class does with its defaults."""
    twin = copy.deepcopy(zoo)
    with pytest.warns(GiftWarning) if name != "lora-conv" else contextlib.nullcontext():
        enable_fine_tuning(zoo, name)
        enable_fine_tuning(twin, STRATEGIES[name]())

    assert adopted(zoo) == adopted(twin) == TAKEN[name]
    assert [p.shape for p in zoo.parameters()] == [p.shape for p in twin.parameters()]


@pytest.mark.parametrize("training", [True, False])
def test_the_default_rank_is_three(training: bool) -> None:
    """Without arguments the rank is 3, the scaling 1, and there is no dropout; the mode stays as it was."""
    model = image_model().train(training)

    enable_fine_tuning(model, LoRAAllFineTuningStrategy())
    layer: Any = model[0]

    assert layer.lora_A.shape[0] == layer.lora_B.shape[1] == 3
    assert (layer.lora_scaling, layer.lora_dropout) == (1.0, 0.0)
    assert all(module.training is training for module in model.modules())


def test_attention_trains_through_its_out_proj() -> None:
    """The adapter on attention's output projection takes part, on the slow path and on the fast one."""
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval()
    x = torch.randn(2, 3, 8)
    enable_fine_tuning(model, LoRAAllFineTuningStrategy(rank=2, targets="self_attn"))
    before = model(x)
    model(x).square().sum().backward()
    assert model.self_attn.out_proj.lora_B.grad.any()

    with torch.no_grad():
        model.self_attn.out_proj.lora_B.normal_()
        fast = model(x)
    slow = model(x)

    torch.testing.assert_close(fast, slow.detach(), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(slow, before)


# --- biases


@pytest.mark.parametrize("train_bias", [False, True])
def test_biases_train_on_demand(train_bias: bool) -> None:
    """With ``train_bias`` the adapted layers' biases train, and no one else's; without it none does."""
    model = image_model()

    enable_fine_tuning(model, LoRAAllFineTuningStrategy(rank=2, train_bias=train_bias, targets=["0", "6"]))
    biases = {name for name in trainable(model) if name.endswith("bias")}

    assert biases == ({"0.bias", "6.bias"} if train_bias else set())


def test_trained_biases_are_saved_and_given_back(tmp_path: Any) -> None:
    """A trained bias is in the adapter file, and disable gives the original back."""
    model, x = image_model(), torch.randn(4, 3, 8, 8)
    fresh, original = copy.deepcopy(model), model[6].bias.detach().clone()
    enable_fine_tuning(model, LoRAAllFineTuningStrategy(rank=2, train_bias=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(x).square().mean().backward()
    optimizer.step()

    save_adapter(model, tmp_path / "adapter.safetensors")
    load_adapter(fresh, tmp_path / "adapter.safetensors")

    assert not torch.equal(model[6].bias, original)
    assert torch.equal(fresh.eval()(x), model.eval()(x))
    assert torch.equal(disable_fine_tuning(model)[6].bias, original)  # type: ignore[index]


# --- targets and exclude


@pytest.mark.parametrize(
    ("targets", "exclude", "expected"),
    [
        ("direct", None, ["direct"]),
        (["direct", "list"], None, ["direct", "list.0", "list.1"]),
        ("*.0", None, ["list.0", "others.0", "sequence.0", "sequence.2.0"]),
        ("type:Conv2d", None, ["dict.b", "sequence.2.0"]),
        ("type:OwnLinear", None, ["subclass"]),
        (r"re:(sequence|dict)\..*", "sequence.2", ["dict.a", "dict.b", "sequence.0"]),
        ("layer:1", None, ["list.1", "others.1"]),
        # what is left out by type is walked into, and its child is a layer of its own
        (None, ["attention", "type:_ConvNd", "list", "others", "memory"], ["dict.a", "dict.b.inner", "direct", "subclass"]),
        ("dict", "type:Conv2d", ["dict.a", "dict.b.inner"]),
        ("dict", "dict.b", ["dict.a"]),
    ],
)
def test_targets_and_exclude_choose(targets: Any, exclude: Any, expected: list[str], zoo: nn.Module) -> None:
    """``targets`` and ``exclude`` take names, globs, expressions, types and layer numbers, as one pattern or several."""
    enable_fine_tuning(zoo, LoRAAllFineTuningStrategy(rank=1, targets=targets, exclude=exclude))

    assert adopted(zoo) == expected


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"targets": ["direct", "dirct2"]}, "dirct2"),
        ({"targets": "others.2"}, "others.2"),
        ({"exclude": "nowhere"}, "nowhere"),
        ({"targets": "direct", "exclude": "direct"}, "direct"),
    ],
)
def test_what_was_named_must_match(params: dict[str, Any], says: str, zoo: nn.Module) -> None:
    """A pattern that names nothing, or nothing that LoRA adapts, is an error that names it."""
    with pytest.raises(NoMatchError, match=says):
        enable_fine_tuning(zoo, LoRAAllFineTuningStrategy(rank=1, **params))
    assert adopted(zoo) == []


@pytest.mark.parametrize(("name", "model"), [("lora-conv", nn.Linear(4, 3)), ("lora-linear", nn.Conv2d(3, 4, 1)), ("lora", nn.ReLU())])
def test_a_model_without_such_layers_is_refused(name: str, model: nn.Module) -> None:
    """A strategy that finds none of its layers says so."""
    with pytest.raises(NoMatchError, match="matches nothing"):
        enable_fine_tuning(model, STRATEGIES[name](rank=1))


# --- parameters


@pytest.mark.parametrize("strategy", STRATEGIES.values())
@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("rank", value) for value in (0, -1, 2.0, 2.5, "3", None, True, float("nan"))),
        *(("lora_alpha", value) for value in (float("nan"), float("inf"), -float("inf"), "8", True, [1])),
        *(("lora_dropout", value) for value in (-0.1, 1, 1.0, 2, float("nan"), "0.1", None, True)),
        *(("train_bias", value) for value in (1, None, "yes", "all")),
        *(("conv_layout", value) for value in ("Balanced", "", None, 0)),
        *((flag, value) for flag in ("use_rslora", "use_dora", "freeze_A") for value in (1, None, "yes")),
        *(("init", value) for value in ("gaussian", None, True, 0)),
        *(("adapter_dtype", value) for value in ("float16", "fp32", True, torch.float32)),
        *((rules, value) for rules in ("rank_pattern", "alpha_pattern", "dropout_pattern") for value in ({}, "a", [("a", 1)], 3)),
    ],
)
def test_bad_parameters_are_refused(strategy: type[Any], name: str, value: Any) -> None:
    """Each value that is not allowed is an error that names the parameter and the value, and is a ValueError too."""
    with pytest.raises(ParameterError) as caught:
        strategy(**{name: value})

    assert name in str(caught.value)
    assert repr(value) in str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("attention", value) for value in ("q", [], ["q", "q"], ["query"], None, [1])),
        *(("parameter_layout", value) for value in ("in", None, True)),
    ],
)
def test_bad_parameters_of_the_whole_are_refused(name: str, value: Any) -> None:
    """So are those that the strategy for every layer alone has."""
    with pytest.raises(ParameterError, match=name) as caught:
        LoRAAllFineTuningStrategy(**{name: value})
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "bad", "value"), [("rank_pattern", 0, "0"), ("alpha_pattern", "8", "'8'"), ("dropout_pattern", 1.5, "1.5")]
)
def test_a_bad_value_of_a_pattern_is_named(name: str, bad: Any, value: str) -> None:
    """A value that the parameter could not have is refused with the pattern that it stands at."""
    with pytest.raises(ParameterError) as caught:
        LoRAAllFineTuningStrategy(**{name: {"0": bad}})
    assert str(caught.value).startswith(f"{name}['0'] must be")
    assert f"got {value}" in str(caught.value)


@pytest.mark.parametrize("name", ["targets", "exclude", "parameters"])
@pytest.mark.parametrize("value", [[], "", [""], 3, [None], "re:[", "layer:x", "type:"])
def test_bad_patterns_are_refused(name: str, value: Any) -> None:
    """A malformed pattern is refused when the strategy is made."""
    with pytest.raises(PatternError):
        LoRAAllFineTuningStrategy(**{name: value})


def test_a_rank_above_what_a_layer_can_use_is_told() -> None:
    """Such a rank works, with a warning that names the layers concerned, and only those."""
    model, x = image_model(), torch.randn(2, 3, 8, 8)

    with pytest.warns(GiftWarning, match=r"rank 5 is more than these layers can use; it works, and wastes numbers: 6$"):
        enable_fine_tuning(model, LoRAAllFineTuningStrategy(rank=5))

    model(x).square().mean().backward()
    assert model[6].lora_B.grad.any()


def test_dropout_where_attention_reads_the_weight_is_told() -> None:
    """Dropout that has no effect on a layer is a warning that names it."""
    with pytest.warns(GiftWarning, match=r"reads the weight itself: self_attn\.in_proj_weight, self_attn\.out_proj"):
        enable_fine_tuning(nn.TransformerEncoderLayer(8, 2, 16), LoRAAllFineTuningStrategy(rank=1, lora_dropout=0.1))


# --- values by pattern


def test_ranks_go_by_pattern(zoo: nn.Module) -> None:
    """The first pattern that matches a layer gives its rank, alpha and dropout; the others keep the strategy's own."""
    strategy = LoRAAllFineTuningStrategy(
        rank=1,
        lora_alpha=4,
        targets=["direct", "list", "dict", "attention"],
        rank_pattern={"list.0": 3, "list": 2, "attention": 4, "type:OwnConv": 1},
        alpha_pattern={"re:dict.*": 6.0},
        dropout_pattern={"direct": 0.25},
    )
    enable_fine_tuning(zoo, strategy)
    layers: dict[str, Any] = dict(zoo.named_modules())

    assert {name: layers[name].lora_A.shape[-2] for name in ("direct", "list.0", "list.1", "dict.b")} == {
        "direct": 1,
        "list.0": 3,
        "list.1": 2,
        "dict.b": 1,
    }
    assert layers["attention"].in_proj_weight_lora_A.shape == (3, 4, 4)
    assert [layers[name].lora_scaling for name in ("direct", "list.0", "dict.a", "attention.out_proj")] == [4.0, 4 / 3, 6.0, 1.0]
    assert [layers[name].lora_dropout for name in ("direct", "list.1")] == [0.25, 0.0]


@pytest.mark.parametrize(
    ("pattern", "says"), [("dirct", "Did you mean direct"), ("others.2", "adapts none of them"), ("others.1", "adapts none of them")]
)
def test_a_pattern_for_no_adapted_layer_is_refused(pattern: str, says: str, zoo: nn.Module) -> None:
    """A rule that would apply nowhere is an error that names it, with the nearest names or the reason; nothing changes."""
    with pytest.raises(NoMatchError, match=pattern) as caught:
        enable_fine_tuning(zoo, LoRAAllFineTuningStrategy(rank=1, rank_pattern={pattern: 2}))
    assert says in str(caught.value)
    assert adopted(zoo) == []


def test_patterns_travel_in_files(tmp_path: Any) -> None:
    """Patterns, in their order, are in the adapter file, which loads into a plain model; a strategy file may hold them too."""
    model, x = image_model(), torch.randn(2, 3, 8, 8)
    fresh = copy.deepcopy(model)
    strategy = LoRAAllFineTuningStrategy(rank=1, rank_pattern={"[3-6]": 2, "*": 3}, alpha_pattern={"6": 5})
    enable_fine_tuning(model, strategy)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    (tmp_path / "tuning.toml").write_text('strategy = "lora"\n[parameters]\nrank_pattern = {"[3-6]" = 2, "*" = 3}\nrank = 1\n')

    save_adapter(model, tmp_path / "adapter.safetensors")
    load_adapter(fresh, tmp_path / "adapter.safetensors")

    assert [fresh[at].lora_A.shape[0] for at in (0, 3, 6)] == [3, 2, 2]
    assert torch.equal(fresh.eval()(x), model.eval()(x))
    assert strategy_from_config(strategy.to_config()) == strategy
    assert str(plan_fine_tuning(image_model(), strategy_from_file(tmp_path / "tuning.toml"))).count("rank=1")


# --- strategies as data


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_survives_as_plain_data(name: str, zoo: nn.Module) -> None:
    """A strategy rebuilt from its config, or from a pickle, plans the same and prints the same."""
    variant = {"use_rslora": True, "use_dora": True, "init": "orthogonal", "freeze_A": True, "adapter_dtype": "float32"}
    rules = {"rank_pattern": {"*": 2}, "alpha_pattern": {"type:Module": 1.5}}
    strategy = STRATEGIES[name](
        rank=1, lora_alpha=2.5, train_bias=True, exclude="attention", conv_layout="out_as_h", **variant, **rules
    )

    for twin in (strategy_from_config(strategy.to_config()), pickle.loads(pickle.dumps(strategy)), copy.deepcopy(strategy)):
        assert type(twin) is type(strategy)
        assert repr(twin) == repr(strategy)
        assert str(plan_fine_tuning(zoo, twin)) == str(plan_fine_tuning(zoo, strategy))


def test_a_config_is_a_name_and_json(zoo: nn.Module) -> None:
    """The config holds the registered name and the parameters, and nothing that could be executed."""
    config = LoRAAllFineTuningStrategy(rank=2, targets=["a", "b"]).to_config()

    assert json.loads(json.dumps(config)) == config
    assert config["name"] == "lora"
    assert config["parameters"]["rank"] == 2


def test_a_strategy_may_be_used_again() -> None:
    """One strategy serves several models, and each draws its own start."""
    strategy = LoRAAllFineTuningStrategy(rank=2)
    models = [image_model(), image_model()]
    torch.manual_seed(1)
    for model in models:
        enable_fine_tuning(model, strategy)

    assert not torch.equal(models[0][0].lora_A, models[1][0].lora_A)
    assert all(isinstance(model[0], LoRA) for model in models)


@pytest.mark.parametrize("conv_layout", ["balanced", "out_as_h"])
def test_the_adapter_file_records_the_layout(conv_layout: str, tmp_path: Any) -> None:
    """A file says how the convolutions are laid out, and loads so into a plain model without being told."""
    model, x = image_model(), torch.randn(2, 3, 8, 8)
    fresh = copy.deepcopy(model)
    enable_fine_tuning(model, LoRAAllFineTuningStrategy(rank=2, lora_alpha=7, conv_layout=conv_layout))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()

    save_adapter(model, tmp_path / "adapter.safetensors")
    load_adapter(fresh, tmp_path / "adapter.safetensors")

    assert conv_layout in str(read_adapter_info(tmp_path / "adapter.safetensors").strategy)
    assert fresh[0].lora_B.shape == model[0].lora_B.shape == ((18, 2) if conv_layout == "balanced" else (6, 2))
    assert torch.equal(fresh.eval()(x), model.eval()(x))


def test_another_layout_is_not_loaded(tmp_path: Any) -> None:
    """An adapter of one layout does not load into a model tuned with the other."""
    model, other = image_model(), image_model()
    enable_fine_tuning(model, LoRAAllFineTuningStrategy(rank=2))
    enable_fine_tuning(other, LoRAAllFineTuningStrategy(rank=2, conv_layout="out_as_h"))
    save_adapter(model, tmp_path / "adapter.safetensors")

    with pytest.raises(GiftError, match="conv_layout"):
        load_adapter(other, tmp_path / "adapter.safetensors")


def test_a_forward_of_a_shared_layer_is_adapted_once() -> None:
    """A layer under two names is adapted once, and both names see it."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.second = self.first

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    model = Twice()
    report = enable_fine_tuning(model, LoRAAllFineTuningStrategy(rank=2))

    assert len(list(model.parameters())) == 2
    assert isinstance(model.second, LoRA)
    assert "second" in str(report)
