from __future__ import annotations

import copy
import json
import math
import pickle
import re
from collections.abc import Iterator
from typing import Any

import pytest
from models import Delta, cnn, mlp, nested, refused
from torch import nn

from gift_core import (
    FineTuningStrategy,
    FullFineTuningStrategy,
    enable_fine_tuning,
    merge_strategies,
    plan_fine_tuning,
    register_strategy,
    strategy_from_config,
)
from gift_core.errors import (
    GiftError,
    InvalidPluginError,
    ModelError,
    NoMatchError,
    ParameterError,
    PatternError,
    PluginError,
    StrategyError,
    UnknownStrategyError,
)
from gift_core.factories import class_is, is_instance, keep_trainable, reparameterize
from gift_core.plugins.registry import unregister_strategy
from gift_core.strategy import as_strategy
from gift_lora_plugin import LoRAAllFineTuningStrategy, LoRAConvFineTuningStrategy, LoRALinearFineTuningStrategy


class DeltaStrategy(FineTuningStrategy):
    """A strategy as an author writes it: it adds only ``__init__``."""

    name = "test-delta"

    def __init__(self, start: float = 0.0, kinds: tuple[str, ...] = ("Linear",), *, extra: object = None) -> None:
        super().__init__([(is_instance(*kinds), reparameterize(Delta), {"start": start})], constraint_type=nn.Module)


@pytest.fixture
def registered() -> Iterator[None]:
    """`DeltaStrategy` under its name."""
    register_strategy("test-delta", DeltaStrategy)
    yield
    unregister_strategy("test-delta")


def taken(strategy: FineTuningStrategy | str, model: nn.Module) -> list[str]:
    """The full names of the sites that a strategy acts on."""
    return [action.site.full_name for action in plan_fine_tuning(model, strategy).actions]


# --- a strategy is data


def test_defaults_are_not_shared() -> None:
    """Two strategies made without arguments have nothing in common that could change."""
    one, two = FineTuningStrategy(), FineTuningStrategy()

    assert (one.module_caps, one.para_caps, one.constraint_type) == ((), (), ())
    assert one._parameters is not two._parameters


def test_a_strategy_can_be_used_again() -> None:
    """Planning and enabling leave a strategy as it was, so that it serves several models."""
    strategy = DeltaStrategy(start=1.0)
    before = pickle.dumps(strategy)

    enable_fine_tuning(mlp(), strategy)
    enable_fine_tuning(cnn(), strategy)

    assert pickle.dumps(strategy) == before


@pytest.mark.parametrize(
    "strategy",
    [
        DeltaStrategy(2.0, kinds=("Linear", "Conv2d")),
        FullFineTuningStrategy("head", exclude=["head.bias"]),
        LoRAAllFineTuningStrategy(rank=2, targets=["head"]),
        merge_strategies(DeltaStrategy(), LoRAConvFineTuningStrategy()),
        FineTuningStrategy([(class_is("Linear"), keep_trainable())]),
    ],
    ids=repr,
)
def test_a_strategy_can_be_pickled_and_copied(strategy: FineTuningStrategy) -> None:
    """The copy is equal, prints the same and does the same."""
    for other in (pickle.loads(pickle.dumps(strategy)), copy.deepcopy(strategy)):
        assert other == strategy
        assert repr(other) == repr(strategy)
        assert taken(other, cnn()) == taken(strategy, cnn())


def test_strategies_differ_by_class_and_parameters() -> None:
    """Equality is of data: class and parameters."""
    assert DeltaStrategy(1.0) == DeltaStrategy(start=1.0)
    assert DeltaStrategy(1.0) != DeltaStrategy(2.0)
    assert LoRAAllFineTuningStrategy() != LoRALinearFineTuningStrategy()
    assert DeltaStrategy() != "test-delta"


def test_the_repr_says_what_it_does() -> None:
    """A subclass shows the parameters that differ from their defaults, a bare strategy its caps."""
    bare = FineTuningStrategy([(class_is("A"), keep_trainable())], [(class_is("B"), keep_trainable())])

    assert repr(DeltaStrategy()) == "DeltaStrategy()"
    assert repr(DeltaStrategy(2.0)) == "DeltaStrategy(start=2.0)"
    assert repr(bare) == "FineTuningStrategy(module: class_is('A') -> keep_trainable(); parameter: class_is('B') -> keep_trainable())"


@pytest.mark.parametrize("constraint", ["Linear", 3, [nn.Linear, "Conv2d"], None, [nn.ReLU()]])
def test_constraints_are_types(constraint: Any) -> None:
    """A constraint that is no type is refused when the strategy is written."""
    with pytest.raises(StrategyError):
        FineTuningStrategy(constraint_type=constraint)


@pytest.mark.parametrize("constraint", [nn.Sequential, (nn.Linear, nn.Sequential), [nn.Module]])
def test_one_type_or_several_constrain_the_root(constraint: Any) -> None:
    """A root of one of the types, subclasses included, is taken."""
    strategy = FineTuningStrategy([(class_is("Linear"), keep_trainable())], constraint_type=constraint)

    assert taken(strategy, mlp()) == ["0", "2"]


def test_another_root_is_refused() -> None:
    """A root that is of none of the types is an error that names the strategy's types and the root's."""
    strategy = FineTuningStrategy([(class_is("Linear"), keep_trainable())], constraint_type=(nn.ModuleList, nn.Linear))

    with refused(model := mlp(), ModelError, "ModuleList or Linear", "Sequential"):
        enable_fine_tuning(model, strategy)


# --- full fine-tuning


def test_full_fine_tuning_trains_everything() -> None:
    """Without arguments every parameter trains, also those that were frozen."""
    model = nested().requires_grad_(False)

    enable_fine_tuning(model, FullFineTuningStrategy())

    assert all(parameter.requires_grad for _, parameter in model.named_parameters())


@pytest.mark.parametrize(
    ("targets", "exclude", "trained"),
    [
        ("heads", None, {"heads.a.weight", "heads.a.bias", "heads.b.0.weight", "heads.b.0.bias", "heads.b.2.weight", "heads.b.2.bias"}),
        (["heads.a", "scale"], None, {"heads.a.weight", "heads.a.bias", "scale"}),
        ("heads.b", "*.bias", {"heads.b.0.weight", "heads.b.2.weight"}),
        (None, ["blocks", "heads"], {"scale"}),
        ("type:LayerNorm", None, {f"blocks.{i}.norm.{part}" for i in (0, 1) for part in ("weight", "bias")}),
        ("layer:1", "blocks.1.norm", {"blocks.1.fc.weight", "blocks.1.fc.bias"}),
    ],
)
def test_full_fine_tuning_trains_what_is_selected(targets: Any, exclude: Any, trained: set[str]) -> None:
    """Targets choose modules with all they hold, or parameters, and exclude takes out of them; the rest is frozen."""
    model = nested()

    enable_fine_tuning(model, FullFineTuningStrategy(targets, exclude))

    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained


@pytest.mark.parametrize(
    ("targets", "exclude", "says"), [("haeds", None, "heads"), (None, "blocs", "blocks"), ("heads.q", None, "heads.")]
)
def test_a_selection_that_matches_nothing_is_refused(targets: Any, exclude: Any, says: str) -> None:
    """A misspelt target or exclude is an error that names it and the nearest names."""
    with refused(model := nested(), NoMatchError, targets or exclude, says):
        enable_fine_tuning(model, FullFineTuningStrategy(targets, exclude))


def test_excluding_everything_is_refused() -> None:
    """Where exclude leaves nothing of targets, nothing matches, and that is an error."""
    with refused(model := nested(), NoMatchError):
        enable_fine_tuning(model, FullFineTuningStrategy("heads", exclude="heads"))


# --- merging


def test_the_earlier_strategy_has_the_site() -> None:
    """Caps come in the order of the strategies: where two want a site, the first has it."""
    model = cnn()
    both = merge_strategies([DeltaStrategy(kinds=("Conv2d",)), FullFineTuningStrategy("conv", None), LoRALinearFineTuningStrategy()])

    with pytest.raises(NoMatchError, match="conv"):
        plan_fine_tuning(model, both)
    plan = plan_fine_tuning(model, merge_strategies(DeltaStrategy(kinds=("Conv2d",)), LoRAAllFineTuningStrategy()))

    assert [(action.site.full_name, repr(action.cap.action)) for action in plan.actions] == [
        ("conv", "reparameterize(Delta)"),
        ("head", "reparameterize(LoRA)"),
    ]


def test_strategies_merge_by_name_and_one_by_one() -> None:
    """A list, separate arguments and registered names mean the same."""
    parts = [LoRALinearFineTuningStrategy(), LoRAConvFineTuningStrategy()]

    assert merge_strategies(parts) == merge_strategies(*parts) == merge_strategies("lora-linear", "lora-conv")
    assert merge_strategies(iter(parts)) == merge_strategies(parts)


@pytest.mark.parametrize(
    ("constraints", "both"),
    [
        ([(), ()], ()),
        ([(nn.Linear,), ()], (nn.Linear,)),
        ([(), (nn.Linear,), ()], (nn.Linear,)),
        ([(nn.Linear, nn.Conv2d), (nn.Conv2d,)], (nn.Conv2d,)),
        ([(nn.Module,), (nn.Linear,)], (nn.Linear,)),
        ([(nn.Linear,), (nn.Module,)], (nn.Linear,)),
        ([(nn.Module,), (nn.Linear, nn.Conv2d), (nn.Conv2d,)], (nn.Conv2d,)),
    ],
)
def test_constraints_intersect(constraints: list[tuple[type, ...]], both: tuple[type, ...]) -> None:
    """A merged strategy is for what all of its parts are for, the narrower of two related types."""
    assert merge_strategies([FineTuningStrategy(constraint_type=types) for types in constraints]).constraint_type == both


def test_an_empty_intersection_is_refused() -> None:
    """Constraints that no model meets are an error that names both."""
    parts = [FineTuningStrategy(constraint_type=types) for types in (nn.Linear, nn.Conv2d)]

    with pytest.raises(StrategyError, match="Linear and Conv2d"):
        merge_strategies(parts)


@pytest.mark.parametrize(
    "bad", [[], None, 3, [None], [nn.Linear], {"name": "lora"}, [{"name": "lora", "parameters": {}}], [DeltaStrategy]]
)
def test_only_strategies_merge(bad: Any) -> None:
    """Nothing, or something that is no strategy, is a StrategyError."""
    with pytest.raises(StrategyError):
        merge_strategies(bad)


def test_an_unknown_name_does_not_merge() -> None:
    """A name is looked up as everywhere."""
    with pytest.raises(UnknownStrategyError, match="lora"):
        merge_strategies("lora", "loora")


# --- config


@pytest.mark.parametrize(
    "strategy",
    [
        FullFineTuningStrategy(),
        FullFineTuningStrategy(["head"], exclude="head.bias"),
        LoRAAllFineTuningStrategy(),
        LoRAConvFineTuningStrategy(rank=5, lora_alpha=2.5, conv_layout="out_as_h", exclude=["x"]),
        DeltaStrategy(1.5),
        merge_strategies("lora-linear", FullFineTuningStrategy("bn")),
        merge_strategies(merge_strategies("lora-linear"), "full"),
    ],
    ids=repr,
)
@pytest.mark.usefixtures("registered")
def test_a_strategy_round_trips_through_json(strategy: FineTuningStrategy) -> None:
    """Name and parameters, as JSON text, give a strategy with the same caps and the same config."""
    text = json.dumps(strategy.to_config())

    again = strategy_from_config(json.loads(text))

    assert json.dumps(again.to_config()) == text
    assert [repr(cap) for cap in (*again.module_caps, *again.para_caps)] == [
        repr(cap) for cap in (*strategy.module_caps, *strategy.para_caps)
    ]


def test_a_config_records_defaults_too() -> None:
    """A later change of a default does not change what a config means."""
    config = LoRAAllFineTuningStrategy(rank=4).to_config()

    assert config["name"] == "lora"
    assert config["parameters"] == {
        "rank": 4,
        "lora_alpha": None,
        "lora_dropout": 0.0,
        "train_bias": False,
        "targets": None,
        "exclude": None,
        "conv_layout": "balanced",
        "use_rslora": False,
        "use_dora": False,
        "init": "kaiming",
        "freeze_A": False,
        "adapter_dtype": None,
        "rank_pattern": None,
        "alpha_pattern": None,
        "dropout_pattern": None,
        "attention": ["q", "k", "v", "out"],
        "parameters": None,
        "parameter_layout": "out_in",
    }


def test_a_one_shot_iterable_is_recorded() -> None:
    """Targets given as an iterator reach both the caps and the config."""
    strategy = FullFineTuningStrategy(iter(["head"]))

    assert taken(strategy, cnn()) == ["head.weight", "head.bias"]
    with pytest.raises(StrategyError, match="targets"):
        strategy.to_config()


def test_a_strategy_without_a_name_has_no_config() -> None:
    """What is not registered cannot be written down; the error says what to do."""
    with pytest.raises(StrategyError, match=re.escape("gift.strategies")):
        FineTuningStrategy([(class_is("Linear"), keep_trainable())]).to_config()


@pytest.mark.parametrize("value", [object(), math.nan, nn.Linear, {1, 2}])
def test_parameters_must_be_plain_data(value: object) -> None:
    """A parameter that JSON cannot hold is named."""
    with pytest.raises(StrategyError, match="extra"):
        DeltaStrategy(extra=value).to_config()


@pytest.mark.parametrize(
    "config",
    [
        None,
        "lora",
        {},
        {"name": "lora"},
        {"parameters": {}},
        {"name": "lora", "parameters": []},
        {"name": "lora", "parameters": {}, "module": "os"},
        {"name": 3, "parameters": {}},
        {"name": "lora", "parameters": {"rnk": 3}},
        {"name": "lora", "parameters": {1: 3}},
        {"name": "lora", "parameters": {"rank": "3"}},
        {"name": "merged", "parameters": {"strategies": []}},
        {"name": "merged", "parameters": {"strategies": "lora"}},
        {"name": "merged", "parameters": {"strategies": [3]}},
        {"name": "merged", "parameters": {"strategies": [{"name": "lora"}]}},
        {"name": "merged", "parameters": {}},
    ],
    ids=repr,
)
def test_a_malformed_config_is_refused(config: Any) -> None:
    """A config comes from a file: whatever it holds, the answer is a strategy or a StrategyError."""
    with pytest.raises(StrategyError):
        strategy_from_config(config)


def test_an_unknown_parameter_is_named_with_those_allowed() -> None:
    """The message helps to correct a typo."""
    with pytest.raises(StrategyError, match=r"rnk.*rank, lora_alpha"):
        strategy_from_config({"name": "lora", "parameters": {"rnk": 3}})


@pytest.mark.parametrize("name", ["loraa", "os:system", "builtins.print", "", "gift_core.strategy:FineTuningStrategy"])
def test_a_config_names_no_code(name: str) -> None:
    """Only registered names are looked up; a module path is an unknown name."""
    with pytest.raises(PluginError):
        strategy_from_config({"name": name, "parameters": {}})


@pytest.mark.parametrize("result", [None, 3, nn.Linear(1, 1)])
def test_a_factory_must_give_a_strategy(result: object) -> None:
    """A registered function that gives something else is the plugin's fault, and said to be."""
    register_strategy("test-odd", lambda: result)
    try:
        with pytest.raises(InvalidPluginError, match=type(result).__name__):
            strategy_from_config({"name": "test-odd", "parameters": {}})
    finally:
        unregister_strategy("test-odd")


# --- what a user may pass as a strategy


def test_a_name_means_the_defaults() -> None:
    """A registered name is the strategy with its default parameters."""
    assert as_strategy("lora") == LoRAAllFineTuningStrategy()


@pytest.mark.parametrize("bad", [None, 3, [], object(), DeltaStrategy, nn.ReLU(), {"name": "lora", "parameters": {}}])
def test_what_is_no_strategy_is_refused(bad: Any) -> None:
    """Anything else is a StrategyError, and a class is told to be called."""
    with refused(model := mlp(), StrategyError, "DeltaStrategy()" if bad is DeltaStrategy else "strategy"):
        enable_fine_tuning(model, bad)


def test_an_unknown_name_is_refused() -> None:
    """The error gives the name, the nearest ones and those installed, and is a LookupError."""
    with refused(model := mlp(), UnknownStrategyError, "'lorra'", "did you mean 'lora'", "full"):
        enable_fine_tuning(model, "lorra")

    assert issubclass(UnknownStrategyError, GiftError)
    assert issubclass(UnknownStrategyError, LookupError)


@pytest.mark.parametrize("strategy", [LoRAAllFineTuningStrategy, LoRALinearFineTuningStrategy, LoRAConvFineTuningStrategy])
@pytest.mark.parametrize(
    "bad",
    [
        {"rank": 0},
        {"rank": -1},
        {"rank": 2.0},
        {"rank": True},
        {"rank": "3"},
        {"rank": None},
        {"lora_alpha": math.nan},
        {"lora_alpha": math.inf},
        {"lora_alpha": -math.inf},
        {"lora_alpha": "1"},
        {"lora_alpha": True},
        {"lora_dropout": 1.0},
        {"lora_dropout": 1},
        {"lora_dropout": -0.1},
        {"lora_dropout": math.nan},
        {"lora_dropout": None},
        {"lora_dropout": False},
        {"train_bias": 1},
        {"train_bias": "no"},
        {"conv_layout": "wide"},
        {"conv_layout": None},
        {"conv_layout": ["balanced"]},
    ],
    ids=repr,
)
def test_a_value_that_is_not_allowed_is_named(strategy: type[FineTuningStrategy], bad: dict[str, Any]) -> None:
    """Rank, alpha, dropout and the rest are checked at construction; the error names the parameter and the value."""
    ((name, value),) = bad.items()

    with pytest.raises(ParameterError, match=re.escape(repr(value))) as caught:
        strategy(**bad)

    assert name in str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("strategy", [LoRAAllFineTuningStrategy, FullFineTuningStrategy])
@pytest.mark.parametrize(
    "bad", [{"targets": []}, {"targets": "re:["}, {"exclude": []}, {"exclude": 3}, {"targets": [["fc"]]}], ids=repr
)
def test_patterns_are_read_at_construction(strategy: type[FineTuningStrategy], bad: dict[str, Any]) -> None:
    """A pattern that cannot be read never reaches a model."""
    with pytest.raises(PatternError):
        strategy(**bad)
