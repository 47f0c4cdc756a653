"""Refusals of LoRA beyond its parameters: layers, starts, combinations, batches of several adapters, groups of parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from faults.refusals_common import Case, bystander, enabling, prepared, tuned
from low_rank import LowRankStrategy
from models import cnn, mlp
from torch import Tensor, nn

from gift_core import (
    FineTuningStrategy,
    FullFineTuningStrategy,
    disable_fine_tuning,
    enable_fine_tuning,
    merge_strategies,
    save_adapter,
)
from gift_core.factories import is_instance, name_is, replace_module
from gift_lora_plugin import LoRAAdapterSet, LoRAAllFineTuningStrategy, LoRALinearFineTuningStrategy, lora_plus_param_groups


class Scores(nn.Linear):
    """A layer that gives one number for a whole batch."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).sum()


class Outputs(nn.Linear):
    """A layer that gives an object."""

    def forward(self, input: Tensor) -> Any:
        return range(len(super().forward(input)))


class OwnLSTM(nn.LSTM):
    """A recurrent layer with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(input)[0]


class Reads(nn.Module):
    """Calls a layer, and reads its weight elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.layer(x), self.layer.weight)


class Prompt(nn.Module):
    """Has a parameter of its own, and layers."""

    def __init__(self) -> None:
        super().__init__()
        self.prompt = nn.Parameter(torch.randn(6, 8))
        self.layer = nn.Linear(8, 8)


class Stack(nn.Module):
    """Raw parameters of too many axes, and of too few."""

    def __init__(self) -> None:
        super().__init__()
        self.deep = nn.Parameter(torch.ones(2, 2, 2, 2))
        self.flat = nn.Parameter(torch.ones(2))
        self.layer = nn.Linear(2, 2)


def rerouted() -> nn.Module:
    """A model one of whose layers got another forward, on this very object."""
    model = nn.Sequential(nn.Bilinear(8, 8, 8))
    model[0].forward = model[0].forward  # type: ignore[method-assign]
    return model


def _lora(rank: int = 2, **more: Any) -> LoRAAllFineTuningStrategy:
    return LoRAAllFineTuningStrategy(rank=rank, **more)


def _combining(
    *strategies: FineTuningStrategy, then: Callable[[Any], Any] = lambda model: None, **options: Any
) -> Callable[[Any, Path], Any]:
    """Adding adapters called a, b, and so on, of which the last is trained a little, and combining them."""

    def run(model: Any, _: Path) -> Any:
        adapters = LoRAAdapterSet(model)
        for name, strategy in zip("abc", strategies, strict=False):
            adapters.add(name, strategy)
        try:
            then(adapters)
            weights = options.pop("weights", dict.fromkeys(adapters.names, 1.0))
            return adapters.combine(weights, "new", **options)
        finally:
            adapters.use(None)

    return prepared(run)


def _sampling(model: Callable[[], nn.Module], strategy: FineTuningStrategy | None = None) -> Callable[[Any, Path], Any]:
    """Computing a batch of five samples, of which two have no adapter."""

    def run(_: Any, __: Path) -> Any:
        adapters = LoRAAdapterSet(model())
        adapters.add("a", strategy or _lora(targets="*"))
        with adapters.per_sample(["a", None, "a", "a", None]) as mixed:
            return mixed(torch.ones(5, 6, 8))

    return prepared(run)


def _within(use: Callable[[LoRAAdapterSet, nn.Module], Any], names: Sequence[str | None] = ("a", None)) -> Callable[[Any, Path], Any]:
    def run(_: Any, __: Path) -> Any:
        adapters = LoRAAdapterSet(mlp())
        adapters.add("a", _lora())
        with adapters.per_sample(names) as mixed:
            return use(adapters, mixed)

    return prepared(run)


def _samples_again(adapters: LoRAAdapterSet, _: nn.Module) -> None:
    with adapters.per_sample(["a"]):
        pass


def _answers(_: LoRAAdapterSet, model: nn.Module) -> Any:
    return model(torch.ones(2, 4))


def _uses_within(adapters: LoRAAdapterSet, model: nn.Module) -> Any:
    adapters.use("a")
    return model(torch.ones(2, 4))


def _time_and_samples(_: Any, __: Path) -> Any:
    layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0)
    adapters = LoRAAdapterSet(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False))
    adapters.add("a", _lora())
    with adapters.per_sample(["a", None]) as model:
        return model(torch.ones(2, 2, 8))


def _moved(adapters: Any) -> None:
    adapters.use("a").train()(torch.ones(4, 3, 6, 6))


def _nameless() -> FineTuningStrategy:
    return FineTuningStrategy(list(_lora().module_caps))


def _tuned_without_name() -> nn.Module:
    model = mlp()
    enable_fine_tuning(model, _nameless())
    return model


def _combines_own(model: Any, _: Path) -> Any:
    adapters = LoRAAdapterSet(model, "a")
    try:
        return adapters.combine({"a": 1.0}, "new")
    finally:
        adapters.release()


def _replacing() -> FineTuningStrategy:
    return FineTuningStrategy([(name_is("head"), replace_module(lambda layer: nn.Sequential(nn.Linear(6, 4))))])


def _infinite() -> nn.Module:
    model = mlp()
    with torch.no_grad():
        model[0].weight[0, 0] = torch.inf
    return model


def _traces(model: Any, _: Path) -> Any:
    enable_fine_tuning(model, LoRALinearFineTuningStrategy())
    try:
        return torch.fx.Tracer().trace(model)
    finally:
        disable_fine_tuning(model)


class ReadsParameter(nn.Module):
    """A parameter that its module reads itself."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(4, 4))

    def forward(self, input: Tensor) -> Tensor:
        return input @ self.table


def _traces_parameter(model: Any, _: Path) -> Any:
    enable_fine_tuning(model, _lora(parameters="table"))
    try:
        return torch.fx.symbolic_trace(model)
    finally:
        disable_fine_tuning(model)


def _saves_own_scaling(model: Any, folder: Path) -> Any:
    enable_fine_tuning(model, _lora())
    model[0].lora_scaling = 7.0
    try:
        return save_adapter(model, folder / "adapter")
    finally:
        disable_fine_tuning(model)


class OwnLinear(nn.Linear):
    """A Linear layer with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


LORA_CASES: list[Case] = [
    (
        "LoRA on sparse gradients",
        lambda: nn.Embedding(7, 4, sparse=True, max_norm=1.0),
        enabling(lambda: _lora(targets="*")),
        "Embedding",
    ),
    ("LoRA with dropout where the weight is read", lambda: OwnLinear(4, 4), enabling(lambda: _lora(lora_dropout=0.5)), "OwnLinear"),
    ("LoRA on a vector", lambda: Stack(), enabling(lambda: _lora(parameters="flat")), "(2,)"),
    ("LoRA on four axes", lambda: Stack(), enabling(lambda: _lora(parameters="deep", parameter_layout="in_out")), "(2, 2, 2, 2)"),
    ("PiSSA of more directions than there are", mlp, enabling(lambda: _lora(5, init="pissa")), "4"),
    ("PiSSA with a negative scaling", mlp, enabling(lambda: _lora(init="pissa", lora_alpha=-1.0)), "lora_alpha"),
    ("OLoRA with no scaling", mlp, enabling(lambda: _lora(init="olora", lora_alpha=0.0)), "lora_alpha"),
    ("PiSSA of an infinite weight", _infinite, enabling(lambda: _lora(init="pissa")), "'0'"),
    ("tracing an adapted layer", lambda: nn.Linear(2, 2), prepared(_traces), "torch.fx"),
    ("groups of a plain model", tuned(), lambda m, _: lora_plus_param_groups(m, 0.1), "has no LoRA"),
    ("groups without a rate", tuned(), lambda m, _: lora_plus_param_groups(m, 0), "lr"),
    ("groups of no ratio", tuned(), lambda m, _: lora_plus_param_groups(m, 0.1, ratio=float("nan")), "ratio"),
    ("groups of no model", tuned(), lambda m, _: lora_plus_param_groups(5, 0.1), "int"),  # type: ignore[arg-type]
    ("groups of a rate beyond all floats", tuned(), lambda m, _: lora_plus_param_groups(m, 10**400), "lr"),
    ("LoRA of an alpha beyond all floats", mlp, enabling(lambda: _lora(lora_alpha=10**400)), "lora_alpha"),
    ("LoRA of an alpha beyond single precision", mlp, enabling(lambda: _lora(lora_alpha=1e300)), "lora_alpha"),
    ("a trace into a module that reads its parameter", ReadsParameter, prepared(_traces_parameter), "'table'"),
    ("save a setting of a layer's own", mlp, prepared(_saves_own_scaling), "lora_scaling"),
    ("combine by no method", mlp, _combining(_lora(), method="x"), "'x'"),
    ("combine by a list of methods", mlp, _combining(_lora(), method=["svd"]), "['svd']"),
    ("combine names without weights", mlp, _combining(_lora(), weights=["a"]), "['a']"),
    ("combine what has no name", mlp, _combining(_lora(), weights={("a",): 1.0}), "('a',)"),
    ("combine by a number beyond all floats", mlp, _combining(_lora(), weights={"a": 10**400}), "'a'"),
    ("combine with a density that is text", mlp, _combining(_lora(), method="ties", density="0.5"), "'0.5'"),
    ("combine with a generator that is none", mlp, _combining(_lora(), method="dare", generator=3), "got 3"),
    ("combine complex signs", lambda: nn.Linear(4, 4, dtype=torch.complex64), _combining(_lora(), method="ties"), "'ties'"),
    ("sample by a text", mlp, _within(_answers, "a"), "'a'"),
    ("sample by a number", mlp, _within(_answers, ("a", 3)), "got 3"),  # type: ignore[arg-type]
    ("LoRA on numbers that are only stored", lambda: nn.Linear(4, 4).to(torch.float8_e4m3fn), enabling(_lora), "float8_e4m3fn"),
    ("combine nothing", mlp, _combining(_lora(), weights={}), "weights"),
    ("combine by no number", mlp, _combining(_lora(), weights={"a": "x"}), "'a'"),
    ("combine at a rank", mlp, _combining(_lora(), method="cat", rank=2), "'cat'"),
    ("combine with no density", mlp, _combining(_lora(), method="ties", density=0), "density"),
    ("combine other ranks", mlp, _combining(_lora(), _lora(3), method="linear"), "[2, 3]"),
    ("combine other layers", mlp, _combining(_lora(), _lora(targets="0")), "'a' and 'b'"),
    ("combine what is not there", mlp, _combining(_lora(), weights={"z": 1.0}), "'z'"),
    ("combine what has no form as data", _tuned_without_name, prepared(_combines_own), "'a'"),
    ("combine moved statistics", cnn, _combining(_lora(), then=_moved), "bn.running_mean"),
    ("combine what is not low-rank", mlp, _combining(LowRankStrategy()), "thin_left"),
    ("combine what adapts nothing", mlp, _combining(FullFineTuningStrategy()), "'a' adapts no weight"),
    ("combine DoRA", mlp, _combining(_lora(use_dora=True)), "DoRA at '0'"),
    ("combine replaced layers", cnn, _combining(merge_strategies([_replacing(), _lora()])), "FineTuningStrategy"),
    ("mix statistics", bystander, _sampling(lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(6))), "'1' (BatchNorm1d)"),
    ("mix a forward of its own", bystander, _sampling(lambda: nn.Sequential(OwnLSTM(8, 8))), "'0' (OwnLSTM)"),
    (
        "mix gradients of the batch",
        bystander,
        _sampling(lambda: nn.Sequential(nn.Embedding(9, 8, scale_grad_by_freq=True))),
        "'0' (Embedding)",
    ),
    ("mix another forward", bystander, _sampling(rerouted), "'0' (Bilinear)"),
    ("mix one number", bystander, _sampling(lambda: nn.Sequential(Scores(8, 8))), "'0' (Scores)"),
    ("mix objects", bystander, _sampling(lambda: nn.Sequential(Outputs(8, 8))), "'0' (Outputs)"),
    ("mix a weight that others read", bystander, _sampling(Reads), "'layer'"),
    ("mix what holds layers", bystander, _sampling(Prompt, FullFineTuningStrategy(targets="prompt")), "'the root' (Prompt)"),
    (
        "mix modules of its own",
        bystander,
        _sampling(lambda: nn.Sequential(nn.Linear(8, 8)), FineTuningStrategy([(is_instance("Linear"), replace_module(nn.Sequential))])),
        "'a'",
    ),
    ("mix time and samples", bystander, prepared(_time_and_samples), "as many steps of time as samples"),
    ("mix another number", bystander, _within(lambda s, model: model(torch.ones(3, 4))), "names 2 samples"),
    ("mix an unknown name", bystander, _within(lambda s, model: None, ["z"]), "'z'"),
    ("mix within a mixture", bystander, _within(_samples_again), "per_sample is active"),
    ("use within a mixture", bystander, _within(_uses_within), "within per_sample"),
]
