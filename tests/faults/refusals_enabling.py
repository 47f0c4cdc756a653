"""Refusals to plan and to enable."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from faults.refusals_common import LINEAR, Case, broken, bystander, enabling, everything, merged_model, prepared, tuned
from low_rank import LowRankStrategy
from models import Delta, attention, cnn, input_for, mlp, shared, tied
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from gift_core import (
    FineTuningStrategy,
    Reparameterization,
    adopt,
    disable_fine_tuning,
    enable_fine_tuning,
    plan_fine_tuning,
)
from gift_core.errors import GiftError
from gift_core.factories import is_instance, keep_trainable, reparameterize, replace_module
from gift_lora_plugin import LoRAAllFineTuningStrategy, LoRAConvFineTuningStrategy, LoRALinearFineTuningStrategy


def _raises(*_: Any) -> None:
    raise ValueError("of a user's own")


def _writes(*site: Any) -> None:
    with torch.no_grad():
        site[4].weight.add_(1)


def _raises_ours(*_: Any) -> None:
    raise GiftError("it cannot be done here: exclude it.")


def _adapts_and_trains(*site: Any) -> None:
    adopt(site[4], Delta)
    site[4].requires_grad_(True)


def _enables(*site: Any) -> None:
    parent = site[0]
    enable_fine_tuning(parent, LowRankStrategy())


class _Unplanned:
    """An action that fails where it is asked whether it can."""

    def __call__(self, *_: Any) -> None:
        """Do nothing."""

    def examine(self, *_: Any) -> None:
        raise ValueError("of a user's own")


class Overwriting(Delta):
    """Sets an attribute that the layer has."""

    def init_parameters(self, weight: Tensor, *, start: float = 0.0) -> None:
        super().init_parameters(weight)
        self.in_features = 3


class Twice(Delta):
    """Sets an attribute that its class has, too."""

    size = 1

    def init_parameters(self, weight: Tensor, *, start: float = 0.0) -> None:
        super().init_parameters(weight)
        self.size = 2


class Unstarted(Reparameterization):
    """Has no start of its own."""


class Narrow(Delta):
    """Gives a weight of another shape."""

    def reparameterize(self, weight: Tensor) -> Tensor:
        return weight[:, 0]


class Missing(Delta):
    """Reads an attribute that it never set."""

    def reparameterize(self, weight: Tensor) -> Tensor:
        return weight + self.absent


class Final(nn.Linear):
    """A layer that nothing may inherit from."""

    def __init_subclass__(cls, **_: Any) -> None:
        raise TypeError("Final is final")


def _circular(_: Any, __: Path) -> Any:
    model = nn.Sequential()
    model.add_module("inner", nn.Sequential(nn.Linear(2, 2)))
    model.inner.add_module("up", model)  # type: ignore[operator]
    return plan_fine_tuning(model, "full")


def _deep(_: Any, __: Path) -> None:
    """Deeper and deeper, up to where the model is still counted and no longer planned."""
    for depth in range(850, 1000):
        model: nn.Module = nn.Linear(2, 2)
        for _ in range(depth):
            model = nn.Sequential(model)
        plan_fine_tuning(model, LowRankStrategy())


def _with(method: type[Reparameterization], kind: str = "Linear", name: str = "weight") -> FineTuningStrategy:
    return FineTuningStrategy([(is_instance(kind), reparameterize(method, [name]))])


def _strategy() -> LowRankStrategy:
    return LowRankStrategy()


def _answers(strategy: Callable[[], FineTuningStrategy]) -> Callable[[Any, Path], Any]:
    """Enabling, which works, and computing, which does not."""

    def run(model: Any, _: Path) -> Any:
        enable_fine_tuning(model, strategy())
        try:
            return model(input_for(mlp))
        finally:
            disable_fine_tuning(model)

    return run


def _inferring() -> nn.Module:
    with torch.inference_mode():
        return nn.Linear(2, 2)


ENABLE_CASES: list[Case] = [
    ("tuned already", tuned(), enabling(LowRankStrategy), "LowRankStrategy"),
    ("a tuned part", broken(lambda m: enable_fine_tuning(m.head, LowRankStrategy()) and None), enabling(LowRankStrategy), "'head'"),
    ("merged already", merged_model, enabling(LowRankStrategy), "LowRankStrategy"),
    ("nothing matches", cnn, enabling(lambda: LoRAAllFineTuningStrategy(targets="bn")), "bn"),
    ("no such kind", mlp, enabling(LoRAConvFineTuningStrategy), "Linear"),
    ("nothing trains", cnn, enabling(lambda: FineTuningStrategy([(LINEAR, lambda *s: s[4].requires_grad_(False))])), "frozen"),
    ("on meta", broken(lambda m: m.to("meta")), enabling(LowRankStrategy), "meta"),
    ("trained on meta", broken(lambda m: m.to("meta")), enabling(lambda: "full"), "meta"),
    ("holding itself", bystander, prepared(_circular), "'inner.up'"),
    ("nested too deep", bystander, prepared(_deep), "nest"),
    ("lazy", broken(lambda m: m.add_module("lazy", nn.LazyLinear(3))), enabling(LowRankStrategy), "lazy"),
    ("scripted", broken(lambda m: torch.jit.script(m.head)), enabling(LowRankStrategy), "script"),
    ("DataParallel", broken(lambda m: nn.DataParallel(m)), enabling(LowRankStrategy), "DataParallel"),
    ("a check that raises", cnn, enabling(lambda: FineTuningStrategy([(_raises, keep_trainable())])), "of a user's own"),
    ("a check that answers nothing", cnn, enabling(lambda: FineTuningStrategy([(lambda *s: None, keep_trainable())])), "None"),
    ("an action that raises", cnn, enabling(lambda: FineTuningStrategy([(LINEAR, _raises)])), "head"),
    ("an action that writes", cnn, enabling(lambda: FineTuningStrategy([(LINEAR, _writes)])), "head"),
    (
        "a replaced root",
        broken(lambda m: m.head),
        enabling(lambda: FineTuningStrategy([(LINEAR, replace_module(nn.Identity))])),
        "the root",
    ),
    ("a replacement that is none", cnn, enabling(lambda: FineTuningStrategy([(LINEAR, replace_module(lambda *s: 3))])), "head"),
    ("both ends of a tie", tied, enabling(lambda: FineTuningStrategy([(is_instance("Embedding"), keep_trainable()), *_low()])), "tied"),
    ("a second name", shared, enabling(lambda: LowRankStrategy(targets="second")), "first"),
    ("a method's own keyword", cnn, enabling(lambda: FineTuningStrategy([(LINEAR, reparameterize(Delta), {"strat": 1})])), "strat"),
    ("a name that is close", cnn, enabling(lambda: LoRALinearFineTuningStrategy(targets="haed")), "head"),
    ("planning nothing", cnn, lambda m, _: plan_fine_tuning(m, LowRankStrategy(targets="nowhere")), "nowhere"),
    ("planning no model", cnn, lambda m, _: plan_fine_tuning(3, LowRankStrategy()), "int"),  # type: ignore[arg-type]
    ("enabling no model", cnn, lambda m, _: enable_fine_tuning(None, LowRankStrategy()), "got nothing"),  # type: ignore[arg-type]
    ("adopting what is not there", cnn, lambda m, _: adopt(m.head, Delta, ["wieght"]), "wieght"),
    ("adopting twice", tuned(), lambda m, _: adopt(m.head, Delta), "weight"),
    ("a replaced parameter", cnn, enabling(lambda: FineTuningStrategy((), [(everything, replace_module(nn.Identity))])), "conv.weight"),
    ("a strategy on a parameter", cnn, enabling(lambda: FineTuningStrategy((), [(everything, _strategy())])), "conv.weight"),
    ("an action that cannot be planned", cnn, enabling(lambda: FineTuningStrategy([(LINEAR, _Unplanned())])), "head"),
    ("an action that cannot be done", cnn, enabling(lambda: FineTuningStrategy([(LINEAR, _raises_ours)])), "at 'head'"),
    ("an action that adapts and trains", cnn, enabling(lambda: FineTuningStrategy([(LINEAR, _adapts_and_trains)])), "head.weight"),
    ("an excluded name that is close", cnn, enabling(lambda: LowRankStrategy(targets=["head", "convv"])), "conv"),
    ("a target of another kind", cnn, enabling(lambda: LowRankStrategy(targets="bn")), "'bn'"),
    ("a method without start", cnn, enabling(lambda: _with(Unstarted)), "head"),
    ("a method that overwrites", cnn, enabling(lambda: _with(Overwriting)), "in_features"),
    (
        "a method that sets what its class has",
        attention,
        enabling(lambda: _with(Twice, "MultiheadAttention", "in_proj_weight")),
        "'size'",
    ),
    ("a method of another shape", mlp, _answers(lambda: _with(Narrow)), "(8,)"),
    ("a method that looks for what is not there", mlp, _answers(lambda: _with(Missing)), "'absent'"),
    ("a class that cannot be extended", broken(lambda m: setattr(m, "head", Final(6, 4))), enabling(LowRankStrategy), "Final"),
    ("a parametrized weight", broken(lambda m: parametrizations.weight_norm(m.head) and None), enabling(LowRankStrategy), "head"),
    ("made in inference mode", _inferring, enabling(LowRankStrategy), "inference_mode"),
    ("adopting what is lazy", lambda: nn.LazyLinear(3), lambda m, _: adopt(m, Delta), "weight"),
    ("adopting what is scripted", lambda: torch.jit.script(nn.Linear(2, 2)), lambda m, _: adopt(m, Delta), "script"),
    ("adopting what is parametrized", lambda: parametrizations.weight_norm(nn.Linear(2, 2)), lambda m, _: adopt(m, Delta), "weight"),
    ("adopting on meta", lambda: nn.Linear(2, 2, device="meta"), lambda m, _: adopt(m, Delta), "meta"),
    ("enabling while it is enabled", cnn, enabling(lambda: FineTuningStrategy([(LINEAR, _enables)])), "CNN"),
    ("whole numbers", broken(lambda m: setattr(m.head, "weight", _whole())), enabling(LowRankStrategy), "head"),
]


def _low() -> list[Any]:
    return list(LowRankStrategy().module_caps)


def _whole() -> nn.Parameter:
    return nn.Parameter(torch.ones(4, 6, dtype=torch.int64), requires_grad=False)
