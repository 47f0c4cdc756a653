"""Several adapters on one model: each computes as if it were alone, and the base as if there were none."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import itertools
import pickle
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    ALL,
    Builder,
    Delta,
    WideDelta,
    attention,
    cnn,
    embedding,
    fingerprint,
    input_for,
    lstm,
    mlp,
    nested,
    shared,
    single,
    tied,
    train,
)
from torch import Tensor, nn

from gift_core import (
    AdapterSet,
    FineTuningStrategy,
    FullFineTuningStrategy,
    Reparameterization,
    check_optimizer,
    disable_fine_tuning,
    enable_fine_tuning,
    full_state_dict,
    load_adapter,
    merge,
    merge_and_unload,
    merge_strategies,
    save_adapter,
    tuning_disabled,
    unmerge,
)
from gift_core.errors import (
    AdapterFileError,
    AdapterMismatchError,
    AdapterNameError,
    AdapterWriteError,
    GiftError,
    ModelError,
    NoMatchError,
    PatternError,
    StateError,
)
from gift_core.factories import everything, is_instance, keep_trainable, name_is, parameter_name_is, reparameterize, replace_module
from gift_core.record import set_tuning
from gift_core.switching import Surveyor


class Gain(Reparameterization):
    """A second method, with a parameter, a buffer and a plain attribute of its own."""

    def init_parameters(self, weight: Tensor, *, power: int = 1) -> None:
        self.gain = nn.Parameter(weight.new_ones(weight.shape[0]))
        self.register_buffer("unit", weight.new_ones(()), persistent=False)
        self.power = power

    def reparameterize(self, weight: Tensor) -> Tensor:
        return weight * self.unit * self.gain.pow(self.power).view(-1, *[1] * (weight.dim() - 1))


class Beside(nn.Module):
    """A module with something trainable beside it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.norm = nn.BatchNorm1d(3)
        for parameter in inner.parameters():
            parameter.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.inner(x))


class Waves(nn.Module):
    """Two complex layers, of which real numbers go in and come out."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6, dtype=torch.complex64)
        self.second = nn.Linear(6, 3, dtype=torch.complex64)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(torch.complex(x, x.tanh()))).abs()


def waves() -> nn.Module:
    """A model whose parameters are complex, with the same values every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Waves()


def shut(*site: Any) -> None:
    """An action that takes a child out of its parent, and changes its parent's mode."""
    site[0].training = False
    setattr(site[0], site[1], None)
    site[0].register_parameter("added", nn.Parameter(torch.zeros(2)))


LINEAR = is_instance(nn.Linear, nn.Conv2d, nn.Embedding)


def delta() -> FineTuningStrategy:
    """A full update beside each weight."""
    return FineTuningStrategy([(LINEAR, reparameterize(Delta))])


def gain() -> FineTuningStrategy:
    """Another method, which trains biases as well."""
    return FineTuningStrategy([(LINEAR, reparameterize(Gain, keep=("bias",)), {"power": 2})])


def full() -> FineTuningStrategy:
    """All of the base itself."""
    return FineTuningStrategy(para_caps=[(everything(), keep_trainable())])


STRATEGIES = {"delta": delta, "gain": gain, "full": full}


def adapters_of(model: nn.Module) -> AdapterSet:
    """A set with one adapter of each of three strategies, each trained a little."""
    adapters = AdapterSet(model)
    for name, strategy in STRATEGIES.items():
        adapters.add(name, strategy())
    return adapters


def trained(builder: Builder) -> tuple[AdapterSet, Tensor, dict[str, Tensor]]:
    """A set whose adapters were trained, an input, and what each computes in eval mode, from a model that holds it alone."""
    model, x = builder(), input_for(builder)
    expected = {}
    for name, strategy in STRATEGIES.items():
        alone = builder()
        enable_fine_tuning(alone, strategy())
        train(alone, x)
        expected[name] = alone.eval()(x).detach()
    adapters = adapters_of(model)
    for name in adapters:
        with adapters.using(name):
            train(model, x)
    return adapters, x, expected


# --- each as if it were alone


@pytest.mark.parametrize("builder", [*ALL, waves])
def test_each_adapter_computes_as_if_alone(builder: Builder) -> None:
    """An adapter trained and used in a set gives, bit for bit, what it gives on a model of its own, in any order of switches."""
    adapters, x, expected = trained(builder)
    adapters.model.eval()
    for name in [*adapters, *reversed(adapters.names), None, *adapters]:
        adapters.use(name)

        assert adapters.active == name
        assert name is None or torch.equal(adapters.model(x), expected[name])


@pytest.mark.parametrize("builder", [*ALL, waves])
def test_none_is_the_base(builder: Builder) -> None:
    """With no adapter in use the model is the base: objects, classes, flags, keys in order and every bit, after training others."""
    before = fingerprint(model := builder())
    assert fingerprint(builder()) != before  # objects are told apart
    adapters = adapters_of(model)

    assert fingerprint(model) == before

    for name in adapters:
        adapters.use(name)
        train(model, input_for(builder))
    adapters.use(None)

    assert fingerprint(model) == before


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_adapter_in_use_is_an_ordinary_tuned_model(strategy: str, tmp_path: Path) -> None:
    """With an adapter in use the model has the keys, parameters and adapter file that it has when tuned alone."""
    alone = cnn()
    enable_fine_tuning(alone, STRATEGIES[strategy]())
    adapters = adapters_of(cnn())
    model = adapters.use(strategy)

    assert list(model.state_dict()) == list(alone.state_dict())
    assert [p.shape for p in model.parameters()] == [p.shape for p in alone.parameters()]
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in alone.named_parameters()]


def test_statistics_belong_to_the_adapter() -> None:
    """BatchNorm statistics that move under one adapter are that adapter's: neither the base nor another sees them."""
    adapters = adapters_of(model := cnn())
    base = model.bn.running_mean.clone()
    adapters.use("delta")
    train(model, input_for(cnn))
    moved = model.bn.running_mean.clone()

    assert not torch.equal(moved, base)

    adapters.use("gain")

    assert torch.equal(model.bn.running_mean, base)

    adapters.use("delta")

    assert torch.equal(model.bn.running_mean, moved)


def test_replaced_and_removed_modules() -> None:
    """Strategies that replace a module, or take one out, switch with the others, and the registries keep their order."""
    model = mlp()
    model.register_module("last", nn.Identity())
    before = fingerprint(model)
    adapters = AdapterSet(model)
    adapters.add("beside", FineTuningStrategy([(name_is("2"), replace_module(Beside))]))
    adapters.add("without", FineTuningStrategy([(name_is("1"), shut)]))
    adapters.add("delta", delta())
    x = input_for(mlp)
    seen = {}
    for name in ("beside", "without", "delta", "without", "beside", None, "delta"):
        adapters.use(name)
        seen.setdefault(name, (type(model[2]), list(model._modules), model.training))

        assert (type(model[2]), list(model._modules), model.training) == seen[name]

    assert seen["beside"] == (Beside, ["0", "1", "2", "last"], True)
    assert seen["without"][2] is False

    adapters.use("beside")
    train(model, x)
    adapters.use(None)

    assert fingerprint(model) == before


# --- names, errors, all or nothing


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "-x", "a b", "ä", "x" * 101, None, 3])
def test_a_name_becomes_a_file(name: Any) -> None:
    """A name that could not be a file's on every system is refused, and nothing changes."""
    before = fingerprint(model := mlp())
    adapters = AdapterSet(model)

    with pytest.raises(AdapterNameError, match="letters, digits"):
        adapters.add(name, delta())

    assert (fingerprint(model), adapters.names) == (before, ())


def test_unknown_and_taken_names_are_explained() -> None:
    """An unknown name is answered with close ones, a taken one with the way out."""
    adapters = adapters_of(mlp())

    for call in (adapters.use, adapters.remove, adapters.parameters, adapters.report, adapters.strategy):
        with pytest.raises(AdapterNameError, match="no adapter is called 'dleta'; did you mean 'delta'"):
            call("dleta")
    with pytest.raises(AdapterNameError, match="there are: delta, gain, full"):
        adapters.use("zzz")
    with pytest.raises(AdapterNameError, match=r"remove\('gain'\)"):
        adapters.add("gain", delta())


@pytest.mark.parametrize("active", [None, "delta"])
def test_adding_is_all_or_nothing(active: str | None, tmp_path: Path) -> None:
    """An adapter that cannot be added, for whatever reason, leaves model, set and random generator as they were."""
    other = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 3))
    enable_fine_tuning(other, FullFineTuningStrategy(targets="0"))
    save_adapter(other, tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no")

    def fails(*site: Any) -> None:
        site[4].register_parameter("half", nn.Parameter(torch.randn(3)))
        raise RuntimeError("halfway")

    adapters = adapters_of(model := mlp())
    adapters.use(active)
    before, random = fingerprint(model), torch.get_rng_state()
    bad: list[tuple[Any, type[GiftError]]] = [
        (FineTuningStrategy([(name_is("nothing"), keep_trainable())]), NoMatchError),
        (FineTuningStrategy([(name_is("2"), fails)]), GiftError),
        (tmp_path / "other.safetensors", AdapterMismatchError),
        (str(tmp_path / "broken.safetensors"), AdapterFileError),
        (tmp_path / "missing.safetensors", AdapterFileError),
        ("no-such-strategy", GiftError),
    ]
    for source, error in bad:
        with pytest.raises(error):
            adapters.add("new", source)

        assert fingerprint(model) == before
        assert torch.equal(torch.get_rng_state(), random)
    assert (adapters.names, adapters.active) == (tuple(STRATEGIES), active)


def test_an_interrupted_switch_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt in the middle of a switch leaves the adapter in use that was."""
    adapters = adapters_of(model := lstm())
    adapters.use("full")
    before = fingerprint(model)
    with monkeypatch.context() as patch:
        patch.setattr("gift_core.switching._enter_modes", interrupt_once())
        with pytest.raises(KeyboardInterrupt):
            adapters.use("delta")

    assert adapters.active == "full"
    assert {key: value for key, value in fingerprint(model).facts.items() if "_flat_weight" not in key} == {
        key: value for key, value in before.facts.items() if "_flat_weight" not in key
    }


@pytest.mark.parametrize(("source", "target"), [(None, "gain"), ("gain", "modes"), ("modes", None), ("modes", "full")])
def test_an_interrupt_at_any_line_leaves_one_of_the_two(source: str | None, target: str | None) -> None:
    """Wherever a switch is interrupted, one of the two is in use, whole: values, order, flags, modes; and switching goes on."""
    adapters = adapters_of(model := mlp())
    adapters.add("modes", FineTuningStrategy([(is_instance(nn.ReLU), eval_mode), (LINEAR, reparameterize(Delta))]))
    whole = {name: looks(adapters.use(name)) for name in (source, target)}
    line, fired = 0, [None]
    while fired:
        line += 1
        adapters.use(source)
        with contextlib.suppress(KeyboardInterrupt), interrupted_at(line, ("switching.py", "adapter_set.py")) as fired:
            adapters.use(target)

        assert looks(model) == whole[adapters.active], f"after an interrupt at line {line} of the switch"

    assert line > 50


def eval_mode(*site: Any) -> None:
    """An action that sets a mode."""
    site[4].eval()


def looks(model: nn.Module) -> list[Any]:
    """What of a model a switch changes, in order."""
    tensors = [*nn.Module.named_parameters(model), *model.named_buffers()]
    values = [(key, tensor.requires_grad, tensor.tolist()) for key, tensor in tensors]
    return [values, [(type(module), module.training) for module in model.modules()]]


@contextlib.contextmanager
def interrupted_at(line: int, files: tuple[str, ...]) -> Iterator[list[None]]:
    """Raise a KeyboardInterrupt at the so-manieth line that runs in these files; gives a list that is empty until then."""
    count, fired, before = itertools.count(1), [], sys.gettrace()

    def trace(frame: Any, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.endswith(files):
            return None
        if event == "line" and not fired and next(count) == line:
            fired.append(None)
            raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        yield fired
    finally:
        sys.settrace(before)


def interrupt_once() -> Any:
    """A stand-in that is interrupted the first time, and does nothing the second."""
    pending = [KeyboardInterrupt()]

    def run(*_: Any) -> None:
        if pending:
            raise pending.pop()

    return run


def test_what_is_no_model_and_what_is_tuned_already() -> None:
    """The set wants a model of its own, and says what to do about a tuned one."""
    with pytest.raises(ModelError, match=r"torch\.nn\.Module"):
        AdapterSet("model")  # type: ignore[arg-type]
    enable_fine_tuning(model := mlp(), delta())
    with pytest.raises(StateError, match="tuned already"):
        AdapterSet(model)
    adapters = AdapterSet(model, "a")
    with pytest.raises(StateError, match="belongs to a set"):
        AdapterSet(model, "b")
    with pytest.raises(StateError, match="not tuned"):
        AdapterSet(mlp(), "a")

    assert adapters.active == "a"


def test_tuning_outside_the_set_is_noticed() -> None:
    """A model that was tuned past its set is not switched: the error says how to go on, and going on works."""
    adapters = adapters_of(model := mlp())
    enable_fine_tuning(model, delta())
    with pytest.raises(StateError, match="outside its set"):
        adapters.use("gain")

    disable_fine_tuning(model)
    adapters.use("gain")

    assert adapters.active == "gain"


# --- a model that was tuned before


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_tuned_model_becomes_the_first_adapter(strategy: str) -> None:
    """A set made of a tuned model keeps its parameters, so that its optimizer goes on, and has the base's values back with None."""
    base = cnn().eval()(x := input_for(cnn))
    enable_fine_tuning(model := cnn(), STRATEGIES[strategy]())
    own = list(model.parameters())
    train(model, x)
    tuned = model.eval()(x)
    flags = {name: p.requires_grad for name, p in cnn().named_parameters()}
    adapters = AdapterSet(model, "first")

    assert [id(p) for p in adapters.parameters("first")] == [id(p) for p in own] == [id(p) for p in model.parameters()]
    assert torch.equal(adapters.use(None).eval()(x), base)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert torch.equal(adapters.use("first")(x), tuned)


def test_a_model_without_its_originals_is_refused() -> None:
    """Where the base's values were not kept there is no base to share, and the set says so."""
    enable_fine_tuning(model := mlp(), full(), keep_originals=False)

    with pytest.raises(StateError, match="not kept"):
        AdapterSet(model, "a")


# --- optimizers


def test_optimizers_stay_valid() -> None:
    """Parameters are the same objects before, during and after use, and an optimizer made at any time trains its own adapter."""
    adapters = adapters_of(model := cnn())
    ours = {name: adapters.parameters(name) for name in adapters}
    optimizers = {name: torch.optim.AdamW(ours[name], lr=0.1) for name in adapters}
    x = input_for(cnn)
    for name in (*adapters, *adapters):
        adapters.use(name)

        assert [id(p) for p in model.parameters()] == [id(p) for p in ours[name]]

        before = [p.detach().clone() for p in ours[name]]
        optimizers[name].zero_grad()
        model(x).square().sum().backward()
        optimizers[name].step()

        assert all(not torch.equal(old, new) for old, new in zip(before, ours[name], strict=True) if new.grad.abs().max() > 1e-6)


def test_an_optimizer_of_another_adapter_changes_nothing() -> None:
    """A step of one adapter's optimizer while another is in use moves no tensor of either, nor of the base."""
    adapters = adapters_of(model := mlp())
    optimizer = torch.optim.AdamW(adapters.parameters("full"), lr=0.1, weight_decay=0.5)
    adapters.use("delta")
    model(input_for(mlp)).sum().backward()
    before = {name: [p.detach().clone() for p in adapters.parameters(name)] for name in adapters}
    optimizer.step()
    after = {name: list(adapters.parameters(name)) for name in adapters}

    assert all(torch.equal(a, b) for name in adapters for a, b in zip(before[name], after[name], strict=True))


def test_the_base_gets_no_gradient() -> None:
    """Training an adapter leaves no gradient on the base's own parameters, whose flags come back with None."""
    adapters = adapters_of(model := mlp())
    base = list(model.parameters())
    adapters.use("full")
    model(input_for(mlp)).sum().backward()

    assert all(p.grad is None and not p.requires_grad for p in base)

    adapters.use(None)

    assert all(p.requires_grad for p in base)


# --- what the user does between switches


def test_hooks_and_attributes_survive() -> None:
    """What a user puts on a module between switches stays through them."""
    adapters = adapters_of(model := mlp())
    adapters.use("delta")
    called = []
    model[0].register_forward_hook(lambda *_: called.append(1))
    model.note = "mine"
    model[2].register_buffer("extra", torch.ones(1))
    for name in ("gain", None, "full"):
        adapters.use(name)
        model(input_for(mlp))

        assert (model.note, "extra" in dict(model[2].named_buffers())) == ("mine", True)
    assert len(called) == 3


@pytest.mark.parametrize("order", [["beside", "delta", None], [None, "delta", "beside", None], ["delta", None, "beside"]])
def test_modes_reach_what_was_out_of_the_model(order: list[str | None]) -> None:
    """``train()`` and ``eval()`` reach a replaced module when it comes back; a mode that was set apart stays where none was called."""
    adapters = AdapterSet(model := mlp())
    adapters.add("beside", FineTuningStrategy([(name_is("2"), replace_module(Beside))]))
    adapters.add("delta", delta())
    adapters.use(order[0])
    model.eval()
    for name in order:
        adapters.use(name)

        assert not any(module.training for module in model.modules())
    model.train()
    for name in reversed(order):
        adapters.use(name)

        assert all(module.training for module in model.modules())


def test_a_mode_set_apart_survives() -> None:
    """A layer of the base that is in eval mode in a training model is so after any switch, also behind a replaced module."""
    model = cnn()
    model.head.eval()
    adapters = AdapterSet(model)
    adapters.add("beside", FineTuningStrategy([(name_is("head"), replace_module(lambda old: nn.Sequential(old, nn.Linear(4, 4))))]))
    for name in ("beside", None, "beside", None):
        adapters.use(name)

        assert (model.training, model.bn.training) == (True, True)
    assert not model.head.training


def test_a_mode_that_a_strategy_sets_gives_way_to_the_users() -> None:
    """A training flag that a strategy sets comes and goes with it, until the user sets it: that is every adapter's then."""

    def still(*site: Any) -> None:
        site[4].eval()
        site[4].weight.requires_grad_(True)

    adapters = AdapterSet(model := cnn())
    adapters.add("still", FineTuningStrategy([(name_is("bn"), still)]))
    adapters.add("delta", delta())
    seen = []
    for name in ("still", "delta", "still", None):
        adapters.use(name)
        seen.append(model.bn.training)

    assert seen == [False, True, False, True]

    adapters.use("still")
    model.train()
    adapters.use("delta")
    model.eval()
    for name in (None, "still"):
        adapters.use(name)

        assert not model.bn.training


@pytest.mark.parametrize("builder", [cnn, mlp, lstm, attention, tied, single])
@pytest.mark.parametrize("while_in_use", [None, "delta", "full"])
def test_dtype_moves_reach_what_was_out_of_the_model(builder: Builder, while_in_use: str | None) -> None:
    """After ``model.to(dtype)`` every adapter and the base are in that dtype when they come back, with the same objects."""
    adapters = adapters_of(model := builder())
    x = input_for(builder)
    x = x.double() if x.is_floating_point() else x
    parameters = {name: adapters.parameters(name) for name in adapters}
    gradient = parameters["gain"][0].grad = torch.ones_like(parameters["gain"][0])
    adapters.use(while_in_use)
    model.to(torch.float64)
    for name in (*adapters, None, *adapters):
        adapters.use(name)

        assert model(x).dtype == torch.float64
        assert all(not t.is_floating_point() or t.dtype == torch.float64 for t in model.state_dict().values())
    for name in adapters:
        assert [id(p) for p in adapters.parameters(name)] == [id(p) for p in parameters[name]]
    assert torch.equal(parameters["gain"][0].grad, gradient.double())


def test_a_replaced_module_follows_a_move() -> None:
    """A module that stands in for another is moved with the model when it comes back, and so is the one it stands for."""
    adapters = AdapterSet(model := mlp())
    adapters.add("beside", FineTuningStrategy([(name_is("2"), replace_module(lambda old: nn.Linear(8, 3)))]))
    model.double()
    adapters.use("beside")
    model(x := input_for(mlp).double())
    model.float()
    adapters.use(None)

    assert model(x.float()).dtype == torch.float32


def test_an_adapter_of_its_own_dtype_keeps_it() -> None:
    """Switching alone converts nothing: an adapter in float32 on a base in bfloat16 stays in float32."""
    adapters = AdapterSet(model := mlp().bfloat16())
    adapters.add("wide", FineTuningStrategy([(LINEAR, reparameterize(WideDelta))]))
    adapters.add("full", full())
    for name in ("wide", "full", None, "wide"):
        adapters.use(name)

    assert (model[0].delta.dtype, model[0]._parameters["weight"].dtype) == (torch.float32, torch.bfloat16)


def test_meta_is_refused() -> None:
    """On the meta device tensors have no values: a switch there is refused before anything moves."""
    adapters = adapters_of(model := mlp())
    parameters = adapters.parameters("gain")
    adapters.use("delta")
    model.to("meta")

    with pytest.raises(StateError, match="meta device"):
        adapters.use("gain")

    assert adapters.active == "delta"
    assert not any(p.is_meta for p in parameters)


def test_a_checkpoint_of_the_base_is_the_bases() -> None:
    """A complete checkpoint that is loaded while an adapter is in use becomes the base, also where the adapter trains."""
    adapters = adapters_of(model := cnn())
    with torch.no_grad():
        for tensor in (other := cnn()).state_dict().values():
            tensor.add_(1)
    adapters.use("gain")
    model.load_state_dict(other.state_dict())
    adapters.use(None)

    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_assigned_parameters_are_kept() -> None:
    """``load_state_dict(assign=True)`` gives an adapter new objects, and they are the adapter's from then on."""
    adapters = adapters_of(model := mlp())
    adapters.use("delta")
    state = {key: value.detach() + 1 for key, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    adapters.use("gain")
    adapters.use("delta")

    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


# --- states of a tuned model


def test_a_merged_model_is_not_switched() -> None:
    """While merged every verb that would switch is refused, with the way out; saving what is in use is not."""
    adapters, x, expected = trained(mlp)
    adapters.use("delta").eval()
    merge(adapters.model)
    for refused in (
        lambda: adapters.use("gain"),
        lambda: adapters.use(None),
        lambda: adapters.add("new", delta()),
        lambda: adapters.remove("delta"),
        lambda: adapters.using("gain").__enter__(),
        adapters.release,
    ):
        with pytest.raises(StateError, match=r"unmerge\(model\)"):
            refused()
    unmerge(adapters.model)

    assert torch.equal(adapters.model(x), expected["delta"])
    assert torch.equal(adapters.use("gain")(x), expected["gain"])


def test_contexts_of_a_tuned_model_are_not_left_by_switching() -> None:
    """Within tuning_disabled and full_state_dict a switch is refused; what they promise holds for an adapter of a set."""
    adapters, x, expected = trained(cnn)
    base = cnn().eval()(x)
    model = adapters.use("gain").eval()
    with tuning_disabled(model):
        assert torch.equal(model(x), base)
        with pytest.raises(StateError, match="tuning_disabled"):
            adapters.use("delta")
    with full_state_dict(model), pytest.raises(StateError, match="full_state_dict"):
        adapters.use("delta")

    assert torch.equal(model(x), expected["gain"])


@pytest.mark.parametrize("is_merged", [False, True])
def test_disable_gives_the_base_and_keeps_the_adapters(is_merged: bool) -> None:
    """disable_fine_tuning on an adapter of a set is ``use(None)``: the base bit for bit, and every adapter still there."""
    before = fingerprint(model := cnn().eval())
    adapters, x, expected = adapters_of(model), input_for(cnn), {}
    for name in adapters:
        with adapters.using(name):
            train(model, x)
            expected[name] = model(x)
    adapters.use("full" if not is_merged else "delta")
    if is_merged:
        merge(model)
    disable_fine_tuning(model)

    assert adapters.active is None
    assert fingerprint(model) == before
    assert all(torch.equal(adapters.use(name)(x), expected[name]) for name in adapters)


@pytest.mark.parametrize("name", ["delta", "gain"])
def test_release_leaves_one_ordinary_model(name: str) -> None:
    """A set is not unloaded under its other adapters; after release the one in use merges, unloads and disables as ever."""
    adapters, x, expected = trained(cnn)
    model = adapters.use(name).eval()
    with pytest.raises(StateError, match=r"release\(\)"):
        merge_and_unload(model)

    copied = copy.deepcopy(adapters.release())
    merge_and_unload(model)

    assert adapters.names == ()
    assert type(model) is type(cnn())
    torch.testing.assert_close(model(x), expected[name])
    assert torch.equal(copied(x), expected[name])
    assert torch.equal(disable_fine_tuning(copied)(x), cnn().eval()(x))


def test_a_forgotten_set_leaves_an_ordinary_model() -> None:
    """When the set itself is gone the model is tuned by what was in use, and can be disabled."""
    adapters, x, expected = trained(cnn)
    model = adapters.use("gain").eval()
    del adapters
    gc.collect()

    assert torch.equal(model(x), expected["gain"])
    assert torch.equal(disable_fine_tuning(model)(x), cnn().eval()(x))


def test_removing() -> None:
    """A removed adapter is gone; if it was in use, the base is in use; the others are untouched, and the name is free."""
    adapters, x, expected = trained(mlp)
    adapters.model.eval()
    adapters.use("gain")
    adapters.remove("delta")

    assert (adapters.names, adapters.active) == (("gain", "full"), "gain")

    adapters.remove("gain")

    assert (adapters.names, adapters.active) == (("full",), None)
    assert torch.equal(adapters.model(x), mlp()(x))

    adapters.add("gain", delta())

    assert torch.equal(adapters.use("full")(x), expected["full"])


def test_using_comes_back() -> None:
    """A context uses an adapter and gives back what was in use, nested and after an error, also if that was removed meanwhile."""
    adapters = adapters_of(mlp())
    adapters.use("gain")
    with pytest.raises(RuntimeError, match="mine"), adapters.using("delta"), adapters.using(None):
        assert adapters.active is None
        raise RuntimeError("mine")

    assert adapters.active == "gain"

    with adapters.using("delta"):
        adapters.remove("gain")

    assert adapters.active == "delta"


def test_release_within_using_keeps_what_is_in_use() -> None:
    """A set may end inside its own context: the model keeps the adapter that is in use there."""
    adapters = adapters_of(mlp())
    with adapters.using("gain") as model:
        adapters.release()

    assert check_optimizer(model, torch.optim.SGD(model.parameters())).ok
    assert adapters.names == ()


def test_parameters_within_tuning_disabled_are_refused() -> None:
    """While tuning is switched off an adapter in use has nothing that trains, which must not become an optimizer of nothing."""
    adapters = adapters_of(mlp())
    with tuning_disabled(adapters.use("gain")), pytest.raises(StateError, match="tuning_disabled"):
        adapters.parameters("gain")

    assert adapters.parameters("gain")


def test_a_tuned_model_that_cannot_be_taken_over_stays_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where making a set of a tuned model fails, as for lack of memory, the model keeps its adapter, bit for bit."""
    model = mlp()
    enable_fine_tuning(model, full())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    before = {key: value.clone() for key, value in model.state_dict().items()}

    def fail(*args: Any, **kwargs: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(Surveyor, "_swap", fail)
    with pytest.raises(MemoryError):
        AdapterSet(model, "mine")

    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# --- copies, files, looks


@pytest.mark.parametrize("name", [None, *STRATEGIES])
def test_copies_are_ordinary_models(name: str | None) -> None:
    """A deep copy or a pickle of the model computes the same, is no part of the set, and gives the base's values when disabled."""
    adapters, x, _ = trained(cnn)
    model = adapters.use(name).eval()
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    for copied in (copy.deepcopy(model), torch.load(stored, weights_only=False)):
        adapters.use(name)

        assert torch.equal(copied(x), model(x))

        if name is not None:
            disable_fine_tuning(copied)

        assert torch.equal(copied(x), adapters.use(None)(x))
        assert {t.data_ptr() for t in copied.state_dict().values()}.isdisjoint(t.data_ptr() for t in model.state_dict().values())


@pytest.mark.parametrize("copying", [copy.copy, copy.deepcopy, pickle.dumps])
def test_the_set_is_not_copied(copying: Any) -> None:
    """Copying the set is refused, because its pointers are this model's; the error says how to carry the adapters over."""
    with pytest.raises(StateError, match="save_all"):
        copying(adapters_of(mlp()))


def registered() -> dict[str, FineTuningStrategy]:
    """Strategies that a file can name."""
    return {"head": FullFineTuningStrategy(targets="head"), "bn": FullFineTuningStrategy(targets="bn"), "all": FullFineTuningStrategy()}


def test_files_round_trip(tmp_path: Path) -> None:
    """save_all and add_all are inverse, whatever is in use; each file is what save_adapter writes and loads alone as well."""
    adapters, x = AdapterSet(model := cnn()), input_for(cnn)
    expected = {}
    for name, strategy in registered().items():
        adapters.add(name, strategy)
        with adapters.using(name):
            train(model, x)
            expected[name] = model.eval()(x)
            model.train()
    adapters.use("bn")
    infos = adapters.save_all(tmp_path / "new")

    assert adapters.active == "bn"
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["all.safetensors", "bn.safetensors", "head.safetensors"]
    assert infos["head"].strategy == registered()["head"].to_config()

    others = AdapterSet(cnn().eval())

    assert others.add_all(tmp_path / "new") == ("all", "bn", "head")
    assert all(torch.equal(others.use(name)(x), expected[name]) for name in others)
    assert others.strategy("head") == registered()["head"]

    load_adapter(alone := cnn().eval(), tmp_path / "new" / "head.safetensors")

    assert torch.equal(alone(x), expected["head"])


def test_a_folder_that_cannot_hold_all_is_refused(tmp_path: Path) -> None:
    """A folder that cannot be made, and names that some file systems take for one, are errors by name; nothing is written."""
    adapters = adapters_of(mlp())
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(AdapterWriteError, match=r"the folder .*file.* could not be made"):
            adapters.save_all(folder)
    adapters.add("GAIN", gain())
    with pytest.raises(AdapterNameError, match="'gain' and 'GAIN' differ in case alone"):
        adapters.save_all(tmp_path / "out")

    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_layer_that_was_replaced_is_not_left_out_of_a_file(tmp_path: Path) -> None:
    """What an adapter belongs to and is no longer in the model stops the saving, of a set's adapter and of an ordinary tuned model."""
    adapters = adapters_of(model := mlp())
    name, layer = next((name, child) for name, child in model.named_children() if isinstance(child, nn.Linear))
    setattr(model, name, nn.Linear(layer.in_features, layer.out_features))
    with pytest.raises(StateError, match=rf"not saved: {name}\..* left the model"):
        adapters.save("gain", tmp_path / "gain.safetensors")
    with pytest.raises(StateError, match="left the model"):
        save_adapter(adapters.use("gain"), tmp_path / "gain.safetensors")

    assert not list(tmp_path.iterdir())


def test_adding_a_folder_is_all_or_nothing(tmp_path: Path) -> None:
    """If one file of a folder does not fit, none is added; a folder without adapters is an error."""
    adapters = AdapterSet(model := cnn())
    adapters.add("head", registered()["head"])
    adapters.save("head", tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"broken")
    before = fingerprint(model)
    with pytest.raises(AdapterFileError, match=r"b\.safetensors"):
        adapters.add_all(tmp_path)

    assert (adapters.names, fingerprint(model)) == (("head",), before)

    with pytest.raises(AdapterFileError, match="there is no"):
        adapters.add_all(tmp_path / "nowhere")


def test_a_file_for_another_base_is_refused_unless_asked(tmp_path: Path) -> None:
    """An adapter trained on other base weights is refused, and taken with check_base=False, as load_adapter does."""
    adapters = AdapterSet(mlp())
    adapters.add("a", "lora-linear")
    adapters.save("a", tmp_path / "a.safetensors")
    other = mlp()
    with torch.no_grad():
        other[0].weight.add_(1)
    others = AdapterSet(other)
    with pytest.raises(AdapterMismatchError):
        others.add("a", tmp_path / "a.safetensors")

    others.add("a", tmp_path / "a.safetensors", check_base=False)

    assert others.names == ("a",)


def test_a_regular_expression_of_a_file_is_run_where_it_is_trusted(tmp_path: Path) -> None:
    """A file whose strategy has a regular expression is added when it is said to be trusted, alone and from a folder; else refused."""
    enable_fine_tuning(model := cnn(), FullFineTuningStrategy("re:head"))
    save_adapter(model, tmp_path / "mine.safetensors")
    adapters = AdapterSet(cnn())

    with pytest.raises(PatternError, match="trusted=True"):
        adapters.add("mine", tmp_path / "mine.safetensors")
    with pytest.raises(PatternError, match="trusted=True"):
        adapters.add_all(tmp_path)
    assert adapters.names == ()

    adapters.add("alone", tmp_path / "mine.safetensors", trusted=True)
    adapters.add_all(tmp_path, trusted=True)
    assert adapters.names == ("alone", "mine")


def test_what_it_looks_like() -> None:
    """The set prints as a table of its adapters: which is in use, strategy, numbers and bytes; in a notebook too."""
    adapters = adapters_of(mlp())
    adapters.use("gain")

    assert repr(adapters) == "AdapterSet(Sequential: delta, gain (in use), full)"
    assert repr(AdapterSet(mlp())) == "AdapterSet(Sequential: no adapters)"

    line = next(line for line in str(adapters).splitlines() if "| gain" in line)
    cells = [cell.strip() for cell in line.split("|")]

    # gains and biases of two layers, and a scalar for each
    assert (cells[0], cells[1], cells[-2], cells[-1]) == ("*", "gain", "24", "96")
    assert "<td>gain</td>" in adapters._repr_html_() and "reparameterize(Gain)" in adapters._repr_html_()
    assert (len(adapters), "gain" in adapters, "other" in adapters, list(adapters)) == (3, True, False, ["delta", "gain", "full"])
    assert adapters.report("gain").trainable_after == 22


# --- compiled models, threads, merged strategies


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_switching_does_not_recompile(backend: str) -> None:
    """A compiled model is switched between adapters of one strategy without a recompilation, and computes with the right one."""
    torch._dynamo.reset()
    model, x = mlp(), input_for(mlp)
    adapters = AdapterSet(model)
    for name in ("a", "b", "c"):
        adapters.add(name, gain())
        with adapters.using(name):
            train(model, x, steps=ord(name) - 96)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    adapters.use("a")
    compiled(x)
    torch._dynamo.config.error_on_recompile, was = True, torch._dynamo.config.error_on_recompile
    try:
        for name in ("b", "c", "a", "b"):
            adapters.use(name)

            torch.testing.assert_close(compiled(x), model(x))
    finally:
        torch._dynamo.config.error_on_recompile = was
        torch._dynamo.reset()


def test_threads_take_turns_within_using() -> None:
    """Threads that compute within ``using`` get the answer of their own adapter, however many there are."""
    adapters, x, expected = trained(mlp)
    adapters.model.eval()
    wrong = []

    def work(name: str) -> None:
        for _ in range(30):
            with adapters.using(name) as model, torch.no_grad():
                if not torch.equal(model(x), expected[name]):
                    wrong.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in (*adapters, *adapters)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert (wrong, adapters.active) == ([], None)


@pytest.mark.parametrize("builder", [nested, shared, embedding])
def test_merged_strategies_switch(builder: Builder) -> None:
    """An adapter of several strategies is one adapter, and shared layers and raw parameters switch once."""
    both = merge_strategies(
        [delta(), FineTuningStrategy(para_caps=[(parameter_name_is("scale", "bias", "weight", optional=True), keep_trainable())])]
    )
    before = fingerprint(model := builder())
    adapters = AdapterSet(model)
    adapters.add("both", both)
    adapters.add("full", full())
    x = input_for(builder)
    adapters.use("both")
    train(model, x)
    tuned = model.eval()(x)
    model.train()
    adapters.use("full")
    train(model, x)

    assert torch.equal(adapters.use("both").eval()(x), tuned)

    model.train()
    adapters.use(None)

    assert fingerprint(model) == before


def test_a_sharded_model_is_not_switched() -> None:
    """Adapters of a model that is spread over processes are not exchanged; the refusal says what can be done."""

    class DTensor(Tensor):
        """Goes by the name of torch's."""

    adapters = AdapterSet(model := mlp())
    adapters.add("delta", delta())
    model[0].weight = nn.Parameter(torch.zeros(8, 4).as_subclass(DTensor))

    with pytest.raises(StateError, match=r"is sharded.*release\(\) it, or switch before fully_shard"):
        adapters.use("delta")
    assert adapters.active is None


def test_the_one_in_use_is_marked_among_any_names() -> None:
    """The mark stands at the adapter in use alone, whatever the others are called."""
    adapters = adapters_of(mlp())
    adapters.use("delta")

    assert repr(adapters) == "AdapterSet(Sequential: delta (in use), gain, full)"


def test_what_happened_outside_the_set_is_told_apart() -> None:
    """A model that was tuned past its set, and one whose adapter was taken off, are refused in words of their own."""
    adapters = adapters_of(model := mlp())
    enable_fine_tuning(model, delta())
    with pytest.raises(StateError, match="was tuned outside its set"):
        adapters.use("gain")

    adapters = adapters_of(model := mlp())
    adapters.use("gain")
    set_tuning(model, None)
    with pytest.raises(StateError, match="was changed outside its set"):
        adapters.use("delta")


def test_a_bare_file_name_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text that ends in .safetensors is a file of the folder one is in; text without is the name of a strategy."""
    enable_fine_tuning(source := mlp(), "full")
    save_adapter(source, tmp_path / "mine.safetensors")
    monkeypatch.chdir(tmp_path)
    adapters = AdapterSet(mlp())

    adapters.add("file", "mine.safetensors")
    adapters.add("strategy", "full")

    assert adapters.names == ("file", "strategy")


def test_a_tuned_model_of_an_unknown_strategy_can_be_taken_over() -> None:
    """A strategy whose name no installed package provides has no form that could be built again: the set knows none, and works."""

    class Elsewhere(FineTuningStrategy):
        name = "of-no-installed-package"

        def __init__(self) -> None:
            super().__init__([(LINEAR, reparameterize(Delta))])

    enable_fine_tuning(model := mlp(), Elsewhere())
    adapters = AdapterSet(model, "first")

    assert adapters.strategy("first") is None
    assert adapters.active == "first"


def test_an_adapter_that_cannot_be_taken_in_leaves_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory runs out when an adapter has been enabled, it is taken off again, and the set is as before."""
    adapters = adapters_of(model := mlp())
    before = fingerprint(model)

    def out_of_memory(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("gift_core.switching.Surveyor.arrangement", out_of_memory)
    with pytest.raises(MemoryError):
        adapters.add("more", delta())

    assert adapters.names == tuple(STRATEGIES)
    assert fingerprint(model) == before
    adapters.use("gain")
