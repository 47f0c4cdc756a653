"""Refusals of a strategy, its parameters, caps, checks and actions."""

from __future__ import annotations

import math
from typing import Any

from faults.refusals_common import LINEAR, Case, bystander, enabling, everything, write_then
from models import CNN, cnn
from torch import nn

from gift_core import (
    Capabilities,
    FineTuningStrategy,
    ModuleIterator,
    merge_strategies,
    strategy_from_config,
    strategy_from_file,
)
from gift_core.caps import Cap, Caps
from gift_core.factories import (
    Check,
    is_instance,
    keep_trainable,
    layer_index,
    name_is,
    name_matches,
    reparameterize,
    replace_module,
    selects,
)
from gift_lora_plugin import LoRAAllFineTuningStrategy


def parameter_cases() -> list[Case]:
    """A value that is not allowed, for each parameter of the strategies."""
    values: dict[str, list[Any]] = {
        "rank": [0, -1, 1.5, "4", None, True, math.nan, [2], 10**30],
        "lora_alpha": ["x", math.nan, math.inf, -math.inf, [1]],
        "lora_dropout": [-0.1, 1.0, 2, "a", math.nan, None],
        "train_bias": ["yes", None, 2],
        "targets": [5, [3], "re:(", "nowhere", ["head", "nowhere"], ""],
        "exclude": [5, "re:[", "nowhere"],
        "conv_layout": ["x", None, 3],
        "use_rslora": ["yes", 3],
        "use_dora": ["yes", None],
        "init": ["x", None, 3],
        "freeze_A": ["no", 2],
        "adapter_dtype": ["int8", 16, "float99"],
        "rank_pattern": [{"head": 0}, {"head": "a"}, [1], {"nowhere": 2}, {3: 2}, "head"],
        "alpha_pattern": [{"head": "a"}, {"nowhere": 2.0}, {"head": math.nan}],
        "dropout_pattern": [{"head": 1.5}, {"head": -1}, {"nowhere": 0.1}],
        "attention": [("x",), "q", 3, ("q", "q", "z")],
        "parameters": [3, "nowhere", [1]],
        "parameter_layout": ["x", None],
    }
    return [
        (
            f"{name}={value!r}",
            cnn,
            enabling(lambda name=name, value=value: LoRAAllFineTuningStrategy(**{name: value})),
            _subject(name, value),
        )
        for name, several in values.items()
        for value in several
    ]


def _subject(name: str, value: Any) -> str:
    if "nowhere" in repr(value):
        return "nowhere"
    if name in ("targets", "exclude", "parameters") or value == {3: 2}:
        return "parameters" if name == "parameters" and value == 3 else "pattern"
    return "conv" if value == 10**30 else name


STRATEGY_CASES: list[Case] = [
    ("a cap of one", cnn, enabling(lambda: FineTuningStrategy([(LINEAR,)])), "cap 0"),
    ("a cap that is no tuple", cnn, enabling(lambda: FineTuningStrategy([3])), "3"),
    ("a check that is none", cnn, enabling(lambda: FineTuningStrategy([("x", keep_trainable())])), "'x'"),
    ("an action that is none", cnn, enabling(lambda: FineTuningStrategy([(LINEAR, 7)])), "7"),
    ("params that are none", cnn, enabling(lambda: FineTuningStrategy([(LINEAR, keep_trainable(), [1])])), "got [1]"),
    (
        "a type that is none",
        cnn,
        enabling(lambda: FineTuningStrategy([(everything, keep_trainable())], constraint_type=["CNN"])),
        "CNN",
    ),
    ("another type", cnn, enabling(lambda: FineTuningStrategy([(everything, keep_trainable())], constraint_type=[nn.GRU])), "GRU"),
    ("types that exclude each other", cnn, enabling(lambda: merge_strategies([_only(nn.GRU), _only(CNN)])), "GRU and CNN"),
    ("no strategies", cnn, enabling(lambda: merge_strategies([])), "strateg"),
    ("no strategy", cnn, enabling(lambda: 3), "3"),
    ("an unknown name", cnn, enabling(lambda: "loar"), "lora"),
    ("a config of nothing", cnn, lambda m, _: strategy_from_config({}), "{}"),
    ("a config that is none", cnn, lambda m, _: strategy_from_config([1]), "[1]"),  # type: ignore[arg-type]
    ("a config of a stranger", cnn, lambda m, _: strategy_from_config({"name": "no-such-thing", "parameters": {}}), "no-such-thing"),
    ("a parameter of a stranger", cnn, lambda m, _: strategy_from_config({"name": "lora", "parameters": {"rnak": 2}}), "rnak"),
    ("a strategy file that is missing", cnn, lambda m, f: strategy_from_file(f / "s.toml"), "s.toml"),
    ("a strategy file of another kind", cnn, write_then("x", lambda m, p: strategy_from_file(p), "s.yaml"), "s.yaml"),
    ("a strategy file that is no TOML", cnn, write_then("[[", lambda m, p: strategy_from_file(p), "s.toml"), "s.toml"),
    ("a strategy file that is no JSON", cnn, write_then("{", lambda m, p: strategy_from_file(p), "s.json"), "s.json"),
    ("a strategy file of nothing", cnn, write_then("{}", lambda m, p: strategy_from_file(p), "s.json"), "s.json"),
    ("a pattern that is none", cnn, enabling(lambda: FineTuningStrategy([(name_matches("re:("), keep_trainable())])), "re:("),
    ("caps that are one cap", bystander, lambda m, _: Caps(Cap(LINEAR, keep_trainable())), "is_instance"),  # type: ignore[arg-type]
    ("params for a strategy", bystander, lambda m, _: Cap(LINEAR, _only(nn.Linear), {"rank": 1}), "'rank'"),
    ("strategies that are no list", bystander, lambda m, _: merge_strategies(3), "got 3"),  # type: ignore[arg-type]
    ("types that are no list", bystander, lambda m, _: FineTuningStrategy(constraint_type="GRU"), "'GRU'"),
    ("a parameter that is no data", bystander, lambda m, _: LoRAAllFineTuningStrategy(targets={"head"}).to_config(), "targets"),
    ("children of no model", bystander, lambda m, _: ModuleIterator(3), "int"),  # type: ignore[arg-type]
    ("layers that are no names", bystander, lambda m, _: Capabilities(layers="Linear"), "layers"),  # type: ignore[arg-type]
    ("a promise that is no truth value", bystander, lambda m, _: Capabilities(mergeable="yes"), "mergeable"),  # type: ignore[arg-type]
    ("a dtype that is no name", bystander, lambda m, _: Capabilities(adapter_dtype=32), "adapter_dtype"),  # type: ignore[arg-type]
    ("no dtypes", bystander, lambda m, _: Capabilities(dtypes=()), "dtypes"),
    ("instances of nothing", bystander, lambda m, _: is_instance(), "is_instance"),
    ("instances of a stranger", bystander, lambda m, _: is_instance("Lnear"), "'Lnear'"),
    ("a layer that is no number", bystander, lambda m, _: layer_index("3"), "'3'"),  # type: ignore[arg-type]
    ("no name", bystander, lambda m, _: name_is(), "name_is"),
    ("a layer range that is none", bystander, lambda m, _: name_matches("layer:x"), "layer:x"),
    ("a pattern of nothing", bystander, lambda m, _: name_matches("re:"), "'re:'"),
    ("a regular expression without end", bystander, lambda m, _: name_matches("re:" + "a" * 5000), "5000 characters"),
    ("a replacement that is no function", bystander, lambda m, _: replace_module(3), "got 3"),  # type: ignore[arg-type]
    ("a check that is no data", bystander, lambda m, _: (LINEAR & everything).to_config(), "everything"),
    ("a config of no check", bystander, lambda m, _: Check.from_config({"check": "x", "arguments": []}), "'x'"),
    ("a config with more", bystander, lambda m, _: Check.from_config({"check": "everything", "arguments": [], "x": 1}), "'x'"),
    ("a config of two in one", bystander, lambda m, _: Check.from_config({"check": "and", "arguments": []}), "'and'"),
    ("a config of wrong arguments", bystander, lambda m, _: Check.from_config({"check": "everything", "arguments": [1]}), "everything"),
    (
        "a class that is no instance",
        bystander,
        lambda m, _: enabling(lambda: LoRAAllFineTuningStrategy)(m, _),
        "LoRAAllFineTuningStrategy()",
    ),
    ("a list of no patterns", bystander, lambda m, _: selects([]), "targets"),
    ("a name that is no text", bystander, lambda m, _: strategy_from_config({"name": 3, "parameters": {}}), "got 3"),
    ("a form of what has no name", bystander, lambda m, _: FineTuningStrategy().to_config(), "FineTuningStrategy"),
    ("a method that is none", cnn, enabling(lambda: FineTuningStrategy([(LINEAR, reparameterize(nn.Linear))])), "Linear"),  # type: ignore[arg-type]
]


def _only(kind: type[nn.Module]) -> FineTuningStrategy:
    return FineTuningStrategy([(everything, keep_trainable())], constraint_type=[kind])
