"""Refusals of a tuned model that is in another state."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from faults.refusals_common import LINEAR, Case, broken, merged_model, tuned
from models import cnn, input_for
from torch import nn

from gift_core import (
    AdapterSet,
    FineTuningStrategy,
    FullFineTuningStrategy,
    check_optimizer,
    disable_fine_tuning,
    enable_fine_tuning,
    full_state_dict,
    merge,
    merge_and_unload,
    plain_layers,
    save_adapter,
    tuning_disabled,
    unmerge,
)
from gift_core.factories import replace_module


def _within(context: Callable[[Any], Any], call: Callable[[Any], Any]) -> Callable[[Any, Path], Any]:
    def run(model: Any, _: Path) -> Any:
        with context(model):
            return call(model)

    return run


class _Groups:
    """What has groups, and is no optimizer of torch's."""

    def __init__(self, groups: list[Any]) -> None:
        self.param_groups = groups


def _without_originals() -> nn.Module:
    model = cnn()
    enable_fine_tuning(model, FullFineTuningStrategy(), keep_originals=False)
    return model


def _two_tuned() -> nn.Module:
    return nn.Sequential(tuned()(), tuned()())


def _in_a_set(call: Callable[[Any], Any]) -> Callable[[Any, Path], Any]:
    def run(model: Any, _: Path) -> Any:
        adapters = AdapterSet(model, "a")
        try:
            return call(model)
        finally:
            adapters.release()

    return run


def _changes_a_class(model: Any, _: Path) -> None:
    with plain_layers(model):
        model.head.__class__ = nn.Identity


STATE_CASES: list[Case] = [
    ("disable what is plain", cnn, lambda m, _: disable_fine_tuning(m), "not tuned"),
    ("disable no model", cnn, lambda m, _: disable_fine_tuning(3), "int"),  # type: ignore[arg-type]
    ("merge what is plain", cnn, lambda m, _: merge(m), "not tuned"),
    ("merge twice", merged_model, lambda m, _: merge(m), "merged already"),
    ("unmerge what is not merged", tuned(), lambda m, _: unmerge(m), "not merged"),
    ("train what is merged", merged_model, lambda m, _: _trained(m), "unmerge"),
    ("unload what is plain", cnn, lambda m, _: merge_and_unload(m), "not tuned"),
    ("unload what is replaced", broken(lambda m: _replaced(m)), lambda m, _: merge_and_unload(m), "head"),
    ("merge within the base", tuned(), _within(tuning_disabled, merge), "tuning_disabled"),
    ("save within the base", tuned(), _within(tuning_disabled, lambda m: save_adapter(m, "x")), "tuning_disabled"),
    ("the base of what is plain", cnn, lambda m, _: tuning_disabled(m).__enter__(), "not tuned"),
    ("all of what is plain", cnn, lambda m, _: full_state_dict(m).__enter__(), "not tuned"),
    (
        "no originals",
        broken(lambda m: enable_fine_tuning(m, _full(), keep_originals=False) and None),
        lambda m, _: disable_fine_tuning(m),
        "kept",
    ),
    ("an optimizer of a plain model", cnn, lambda m, _: check_optimizer(m, torch.optim.SGD(m.parameters())), "not tuned"),
    ("an optimizer that is none", tuned(), lambda m, _: check_optimizer(m, 3), "int"),  # type: ignore[arg-type]
    ("the base without originals", _without_originals, lambda m, _: tuning_disabled(m).__enter__(), "keep_originals=False"),
    ("several tuned models", _two_tuned, lambda m, _: merge(m), "'0'"),
    ("unload what belongs to a set", tuned(), _in_a_set(merge_and_unload), "release()"),
    ("plain layers of what is merged", merged_model, lambda m, _: plain_layers(m).__enter__(), "merged"),
    ("plain layers that changed", tuned(), _changes_a_class, "head"),
    ("a group that is a number", tuned(), lambda m, _: check_optimizer(m, _Groups([3])), "got 3"),
    ("a group without parameters", tuned(), lambda m, _: check_optimizer(m, _Groups([{"lr": 1}])), "'lr'"),
    ("a group whose parameters are a number", tuned(), lambda m, _: check_optimizer(m, _Groups([{"params": 3}])), "'params'"),
    ("a state dict of nothing", tuned(), lambda m, _: m.load_state_dict({}), "missing"),
    ("a state dict with more", tuned(), lambda m, _: m.load_state_dict({**m.state_dict(), "more": torch.ones(1)}), "more"),
    ("a state dict misshapen", tuned(), lambda m, _: m.load_state_dict({key: torch.ones(1, 1, 1) for key in m.state_dict()}), "head"),
]


def _trained(model: nn.Module) -> None:
    model.train()
    try:
        model(input_for(cnn))
    finally:
        model.eval()


def _replaced(model: nn.Module) -> None:
    enable_fine_tuning(model, FineTuningStrategy([(LINEAR, replace_module(lambda layer: nn.Linear(6, 4)))]))


def _full() -> FineTuningStrategy:
    return FullFineTuningStrategy()
