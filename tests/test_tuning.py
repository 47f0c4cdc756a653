from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    ALL,
    Builder,
    Delta,
    cnn,
    fingerprint,
    input_for,
    lstm,
    mlp,
    nested,
    refused,
    shared,
    single,
    tensor_bytes,
    tied,
    train,
)
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from gift_core import (
    AdapterSet,
    FineTuningStrategy,
    FullFineTuningStrategy,
    adopt,
    disable_fine_tuning,
    enable_fine_tuning,
    load_adapter,
    merge,
    merge_strategies,
    plan_fine_tuning,
    save_adapter,
    tuning_disabled,
)
from gift_core.errors import ActionError, GiftWarning, ModelError, NoMatchError, SiteError, StateError
from gift_core.factories import (
    class_is,
    everything,
    freeze,
    is_instance,
    is_root,
    keep_trainable,
    name_is,
    parameter_name_is,
    reparameterize,
    replace_module,
)
from gift_lora_plugin import LoRA, LoRAAllFineTuningStrategy, LoRALinearFineTuningStrategy

every_model = pytest.mark.parametrize("build", ALL, ids=lambda build: build.__name__)

DELTA = FineTuningStrategy([(is_instance(nn.Linear, nn.Conv2d, nn.Embedding), reparameterize(Delta))])
ONE = FineTuningStrategy([(name_is("head"), reparameterize(Delta))])

#: Strategies of every kind, each for every model of `ALL`.
STRATEGIES: dict[str, FineTuningStrategy] = {
    "reparameterized": DELTA,
    "kept": FullFineTuningStrategy(),
    "parameters": FineTuningStrategy(
        para_caps=[(lambda *site: site[5].endswith(("weight", "bias", "weight_hh_l0")), keep_trainable())]
    ),
    "every parameter": FineTuningStrategy(para_caps=[(everything(), reparameterize(Delta))]),
    "both": merge_strategies(
        DELTA, FineTuningStrategy(para_caps=[(lambda *site: "norm" in site[2] or "l0" in site[5], keep_trainable())])
    ),
}
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)


def trainable(model: nn.Module) -> set[str]:
    """The names of what trains."""
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def through_pickle(model: nn.Module) -> nn.Module:
    """A copy by way of pickle."""
    copied: nn.Module = pickle.loads(pickle.dumps(model))
    return copied


def through_torch(model: nn.Module) -> nn.Module:
    """A copy by way of torch.save."""
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded: nn.Module = torch.load(buffer, weights_only=False)
    return loaded


every_copy = pytest.mark.parametrize("copier", [copy.deepcopy, through_pickle, through_torch])


# --- enable


def plain(build: Builder, tuned: nn.Module) -> nn.Module:
    """The base model with the tuned one's flags, because torch chooses kernels by ``requires_grad``."""
    model, flags = build().train(tuned.training), {name: p.requires_grad for name, p in tuned.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(flags[name])
    return model


@every_model
def test_a_fresh_adapter_changes_nothing(build: Builder) -> None:
    """Right after enabling LoRA the model computes the same, bit for bit, and its base values are untouched."""
    model, inputs = build().eval(), input_for(build)
    values = {name: tensor_bytes(p) for name, p in model.named_parameters()}

    enable_fine_tuning(model, LoRAAllFineTuningStrategy(rank=2))
    after = dict(model.named_parameters())
    base = plain(build, model)

    with torch.no_grad():  # torch chooses kernels by requires_grad, and the effective weights of attention and LSTM have it
        assert torch.equal(model(inputs), base(inputs))
    assert all(tensor_bytes(after[name]) == value for name, value in values.items())


@every_model
def test_only_what_was_asked_for_moves(build: Builder) -> None:
    """After training with an optimizer over parameters(), every trainable tensor moved and no frozen one did."""
    model = build()
    enable_fine_tuning(model, LoRAAllFineTuningStrategy(rank=2))
    before = {name: tensor_bytes(p) for name, p in model.named_parameters()}

    train(model, input_for(build), steps=3)

    moved = {name for name, p in model.named_parameters() if tensor_bytes(p) != before[name]}
    assert moved == trainable(model)
    assert all("lora_" in name.rpartition(".")[2] for name in moved)


@every_model
@every_strategy
def test_parameters_gives_what_trains(build: Builder, strategy: FineTuningStrategy) -> None:
    """parameters() is the trainable part of named_parameters(), each tensor once, also without recursion."""
    model = build()
    enable_fine_tuning(model, strategy)

    assert [id(p) for p in model.parameters()] == [id(p) for _, p in model.named_parameters() if p.requires_grad]
    assert [id(p) for p in model.parameters(recurse=False)] == [
        id(p) for p in model._parameters.values() if p is not None and p.requires_grad
    ]


def test_parameters_follows_a_change_of_flags() -> None:
    """parameters() looks at each call: it gives what tuning lets train, also while it is frozen, and what is let train later."""
    model = mlp()
    enable_fine_tuning(model, DELTA)

    model[0].delta.requires_grad_(False)
    model[2].bias.requires_grad_()

    assert [id(p) for p in model.parameters()] == [id(model[0].delta), id(model[2].bias), id(model[2].delta)]

    model[2].bias.requires_grad_(False)

    assert [id(p) for p in model.parameters()] == [id(model[0].delta), id(model[2].delta)]


def test_parameters_can_stay_as_it_is() -> None:
    """With replace_parameter_function=False parameters() gives everything, and AveragedModel works."""
    model, inputs = mlp(), input_for(mlp)
    enable_fine_tuning(model, DELTA, replace_parameter_function=False)
    everything_there = [id(p) for _, p in model.named_parameters()]
    averaged = AveragedModel(model)

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(inputs).square().sum().backward()
    optimizer.step()
    averaged.update_parameters(model)
    disable_fine_tuning(model)

    assert everything_there != [id(p) for _, p in model.named_parameters()]
    assert torch.allclose(averaged(inputs), averaged.module(inputs))
    assert "parameters" not in vars(model)


def test_the_strategy_may_be_a_name() -> None:
    """A registered name means the strategy with its defaults."""
    by_name, by_instance = cnn(), cnn()

    assert str(enable_fine_tuning(by_name, "lora")) == str(enable_fine_tuning(by_instance, LoRAAllFineTuningStrategy()))
    assert trainable(by_name) == trainable(by_instance)


def test_actions_run_in_the_order_of_the_plan() -> None:
    """Enable is plan, then apply: each action gets its site's arguments and its cap's params, in order."""
    calls: list[tuple[Any, ...]] = []

    def act(*site: Any, **params: Any) -> None:
        calls.append((*site, params))

    strategy = FineTuningStrategy([(is_instance(nn.Linear), act, {"rank": 2})], [(parameter_name_is("scale"), act)])
    model = nested()
    planned = [(*action.site, action.cap.params) for action in plan_fine_tuning(model, strategy).actions]

    enable_fine_tuning(model, strategy)

    assert [(*call[1:4], call[-1]) for call in calls] == [(*call[1:4], call[-1]) for call in planned]
    assert [(id(call[0]), id(call[4]), len(call)) for call in calls] == [(id(call[0]), id(call[4]), len(call)) for call in planned]
    assert [call[-1] for call in calls] == [{}, *[{"rank": 2}] * 5]


def test_manual_seed_governs_enabling() -> None:
    """Only enabling draws random numbers, from torch's generator: one seed, one adapter."""
    models = [mlp(), mlp(), mlp()]
    for seed, model in zip((5, 5, 6), models, strict=True):
        torch.manual_seed(seed)
        enable_fine_tuning(model, "lora")
    drawn = [model[0].lora_A for model in models]

    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_what_cannot_train_is_left_alone() -> None:
    """Whole numbers have no gradient: keeping a module trainable passes them over, and the rest trains."""
    model = mlp()
    model[0].register_parameter("steps", nn.Parameter(torch.zeros(2, dtype=torch.long), requires_grad=False))
    before = fingerprint(model)

    enable_fine_tuning(model, FullFineTuningStrategy())
    names = trainable(model)
    disable_fine_tuning(model)

    assert names == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert fingerprint(model) == before


def test_a_module_used_twice_is_adapted_once() -> None:
    """A layer under two names has one adapter, which works in both places and is undone once."""
    model, inputs = shared(), input_for(shared)
    before = fingerprint(model)

    enable_fine_tuning(model, DELTA)
    names = trainable(model)
    with torch.no_grad():
        model.first.delta += 1
    effective = model.first.weight
    expected = model.last(model.second(model.first(inputs).relu()))

    assert names == {"first.delta", "last.delta"}
    assert model.second is model.first
    assert effective is not model.first._parameters["weight"]
    assert torch.equal(model(inputs), expected)
    disable_fine_tuning(model)
    assert fingerprint(model) == before


def test_nested_strategies_and_parameter_caps_work_together() -> None:
    """A strategy as an action tunes its part; the outer one's parameter caps have the rest."""
    inner = FineTuningStrategy([(class_is("Linear"), reparameterize(Delta))], [(parameter_name_is("bias"), keep_trainable())])
    model = nested()
    before = fingerprint(model)

    enable_fine_tuning(
        model, FineTuningStrategy([(name_is("blocks"), inner)], [(parameter_name_is("scale", "weight"), keep_trainable())])
    )
    names = trainable(model)
    train(model, input_for(nested))
    disable_fine_tuning(model)

    assert names == {
        *(f"blocks.{i}.{name}" for i in (0, 1) for name in ("fc.delta", "norm.bias")),
        *(f"heads.{name}.weight" for name in ("a", "b.0", "b.2")),
        "scale",
    }
    assert fingerprint(model) == before


# --- disable


@every_model
@every_strategy
@pytest.mark.parametrize("training", [True, False])
def test_disable_gives_the_original_back(build: Builder, strategy: FineTuningStrategy, training: bool) -> None:
    """After training and disabling, every object, class, flag, hook, key and byte is what it was, statistics included."""
    model = build().train(training)
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 3 != 0)
    before = fingerprint(model)

    enable_fine_tuning(model, strategy)
    enabled = fingerprint(model)
    train(model, input_for(build))
    trained = fingerprint(model)
    result = disable_fine_tuning(model)

    assert result is model
    assert fingerprint(model) == before
    assert enabled != before
    assert trained != enabled


def test_training_moved_the_statistics() -> None:
    """BatchNorm's buffers move in training and come back in place: the same tensors with their old bytes."""
    model = cnn()
    mean, before = model.bn.running_mean, tensor_bytes(model.bn.running_mean)

    enable_fine_tuning(model, DELTA)
    train(model, input_for(cnn))
    trained, steps = tensor_bytes(mean), int(model.bn.num_batches_tracked)
    disable_fine_tuning(model)

    assert trained != before
    assert steps == 2
    assert model.bn.running_mean is mean
    assert tensor_bytes(mean) == before
    assert int(model.bn.num_batches_tracked) == 0


@every_model
def test_enabling_again_is_possible_after_disabling(build: Builder) -> None:
    """Enable, train and disable leave nothing behind that would disturb the next time, however often."""
    model, inputs = build(), input_for(build)
    before = fingerprint(model)

    for strategy in (DELTA, FullFineTuningStrategy(), DELTA):
        enable_fine_tuning(model, strategy)
        train(model, inputs, steps=1)
        disable_fine_tuning(model)

    assert fingerprint(model) == before


def test_what_an_action_of_ones_own_did_is_undone() -> None:
    """Undo needs no help from an action: what it replaced, registered, hooked or set is put back."""

    def act(parent: nn.Module, *site: Any, **params: Any) -> None:
        layer: nn.Linear = site[3]
        layer.requires_grad_(False)
        layer.register_forward_hook(lambda module, inputs, output: output * module.gain)
        layer.gain = nn.Parameter(torch.ones(()))
        layer.in_features = 77
        parent.extra = nn.Linear(2, 2)

    model, inputs = cnn(), input_for(cnn)
    before = fingerprint(model)

    enable_fine_tuning(model, FineTuningStrategy([(name_is("head"), act), (name_is("bn"), replace_module(lambda m: nn.Identity()))]))
    names = trainable(model)
    train(model, inputs)
    disable_fine_tuning(model)

    assert names == {"head.gain", "extra.weight", "extra.bias"}
    assert fingerprint(model) == before


def test_disable_while_merged() -> None:
    """A merged model can be disabled as well."""
    model = cnn()
    before = fingerprint(model)

    enable_fine_tuning(model, DELTA)
    train(model, input_for(cnn))
    merge(model.eval())
    disable_fine_tuning(model)

    assert fingerprint(model.train()) == before


def test_disabling_reaches_the_model_inside_a_wrapper() -> None:
    """A wrapper, a larger model or a compiled one around a tuned model stands for it."""
    model = mlp()

    for wrapper in (nn.Sequential(nn.ReLU(), model), nn.DataParallel(model), torch.compile(model, backend="eager")):
        before = fingerprint(model)
        enable_fine_tuning(model, DELTA)

        assert disable_fine_tuning(wrapper) is wrapper
        assert fingerprint(model) == before


@pytest.mark.parametrize("model", [mlp(), nn.Sequential(mlp(), cnn())])
def test_a_plain_model_cannot_be_disabled(model: nn.Module) -> None:
    """What was never enabled, or was disabled before, is an error that says what to call."""
    with refused(model, StateError, "not tuned", "enable_fine_tuning"):
        disable_fine_tuning(model)
    with refused(model, StateError, "not tuned"), tuning_disabled(model):
        pass


@pytest.mark.parametrize("thing", [None, 3, nn.Linear])
def test_only_a_module_can_be_disabled(thing: Any) -> None:
    """What is no module is a StateError that says what was given."""
    with pytest.raises(StateError, match=type(thing).__name__):
        disable_fine_tuning(thing)


def test_two_tuned_models_in_one_must_be_told_apart() -> None:
    """A larger model with two tuned parts is an error that names both."""
    model = nn.ModuleDict({"a": mlp(), "b": mlp()})
    enable_fine_tuning(model["a"], DELTA)
    enable_fine_tuning(model["b"], DELTA)

    with refused(model, StateError, "'a'", "'b'"):
        disable_fine_tuning(model)
    disable_fine_tuning(model["a"])
    disable_fine_tuning(model)
    assert trainable(model["b"]) == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_originals_can_be_left_out() -> None:
    """keep_originals=False keeps no copy of what trains, and disable then refuses with the reason instead of pretending."""
    model = cnn()

    enable_fine_tuning(model, FullFineTuningStrategy(), keep_originals=False)
    train(model, input_for(cnn))

    with refused(model, StateError, "keep_originals=False", "checkpoint"):
        disable_fine_tuning(model)
    with refused(model, StateError, "keep_originals=False"), tuning_disabled(model):
        pass


def test_originals_are_not_needed_where_the_base_is_frozen() -> None:
    """With keep_originals=False a model of which no parameter of its own trains is disabled as ever."""
    model = cnn()
    before = fingerprint(model)

    enable_fine_tuning(model, DELTA, keep_originals=False)
    train(model, input_for(cnn))
    disable_fine_tuning(model)

    assert fingerprint(model) == before


# --- what users do in between


@pytest.mark.parametrize("kinds", [("Linear",), ("Linear", "Embedding")], ids=["frozen", "adapted"])
def test_a_table_that_torch_rescales_comes_back(kinds: tuple[str, ...]) -> None:
    """With ``max_norm`` a forward pass writes into the table: what the tuned model and the base model write is apart."""
    torch.manual_seed(0)
    model, tokens = nn.Sequential(nn.Embedding(6, 4, max_norm=0.3), nn.Linear(4, 2)).eval(), torch.arange(6)
    before = [tensor_bytes(parameter) for parameter in model.parameters()]

    enable_fine_tuning(model, FineTuningStrategy([(is_instance(*kinds), reparameterize(Delta), {"start": 0.1})]))
    tuned = model(tokens)
    disable_fine_tuning(model)

    assert [tensor_bytes(parameter) for parameter in model.parameters()] == before

    enable_fine_tuning(model, FineTuningStrategy([(is_instance(*kinds), reparameterize(Delta), {"start": 0.1})]))
    with tuning_disabled(model):
        model(tokens)
    assert torch.equal(model(tokens), tuned)


def test_a_users_changes_survive_disabling() -> None:
    """A hook, a mode, an attribute and a child that came while tuned are still there."""
    model = cnn()
    hooks: list[nn.Module] = []

    enable_fine_tuning(model, DELTA)
    model.head.register_forward_hook(lambda module, *rest: hooks.append(module))
    model.eval()
    model.note = "mine"
    model.register_buffer("seen", torch.ones(1))
    model.extra = nn.ReLU()
    disable_fine_tuning(model)
    model(input_for(cnn))

    assert hooks == [model.head]
    assert not any(module.training for name, module in model.named_modules() if name != "extra")
    assert model.note == "mine"
    assert model.seen.item() == 1
    assert list(model._modules) == ["conv", "bn", "pool", "head", "extra"]


def test_a_removed_hook_stays_removed() -> None:
    """A handle that the user took before enabling still works while tuned, and disable does not bring the hook back."""
    model = cnn()
    handle = model.head.register_forward_hook(lambda *args: None)

    enable_fine_tuning(model, DELTA)
    handle.remove()
    disable_fine_tuning(model)

    assert not model.head._forward_hooks


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@every_strategy
def test_a_change_of_dtype_survives_disabling(strategy: FineTuningStrategy, dtype: torch.dtype) -> None:
    """A model that was converted while tuned is the converted original afterwards."""
    model = cnn()
    expected = cnn().to(dtype)

    enable_fine_tuning(model, strategy)
    train(model, input_for(cnn))
    model.to(dtype)
    disable_fine_tuning(model)

    assert list(model.state_dict()) == list(expected.state_dict())
    assert all(
        torch.equal(a, b) and a.dtype == b.dtype
        for a, b in zip(model.state_dict().values(), expected.state_dict().values(), strict=True)
    )


@every_copy
@every_model
def test_a_copy_is_its_own_model(copier: Callable[[nn.Module], nn.Module], build: Builder) -> None:
    """A deep copy, a pickle and a torch.save of a tuned model compute the same, own their parameters and are disabled alone."""
    model, inputs = build(), input_for(build)
    enable_fine_tuning(model, DELTA)
    train(model, inputs)
    model.eval()
    before = fingerprint(model)
    output = model(inputs)

    other = copier(model)
    same = torch.equal(other(inputs), output)
    parameters = {id(p) for p in other.parameters()}
    own = {id(p) for p in other.modules() for p in p._parameters.values()}
    train(other, inputs)
    moved = not torch.equal(other(inputs), output)
    disable_fine_tuning(other)
    expected = build().eval()

    assert same
    assert moved
    assert parameters <= own
    assert parameters.isdisjoint({id(p) for _, p in model.named_parameters()})
    assert fingerprint(model) == before
    assert torch.equal(other(inputs), expected(inputs))
    assert [type(module) for module in other.modules()] == [type(module) for module in expected.modules()]
    assert list(other.state_dict()) == list(expected.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), expected.state_dict().values(), strict=True))


@every_copy
def test_a_copy_of_a_copy_outlives_its_original(copier: Callable[[nn.Module], nn.Module]) -> None:
    """Nothing of a copy points back: it works when the original is gone, or disabled first."""
    model = lstm()
    enable_fine_tuning(model, FineTuningStrategy(para_caps=[(everything(), reparameterize(Delta))]))
    other = copier(copier(model))

    disable_fine_tuning(model)
    train(other, input_for(lstm))
    disable_fine_tuning(other)

    expected = lstm().state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in other.state_dict().items())
    assert list(other.state_dict()) == list(expected)


def test_a_frozen_layers_weight_needs_no_gradient() -> None:
    """Training computes no gradient for what is frozen."""
    model = mlp()
    enable_fine_tuning(model, DELTA)

    model(input_for(mlp)).sum().backward()

    assert all((p.grad is not None) == p.requires_grad for _, p in model.named_parameters())


# --- tuning_disabled


@every_model
@every_strategy
def test_within_the_context_the_base_model_computes(build: Builder, strategy: FineTuningStrategy) -> None:
    """tuning_disabled gives the base model's answers, and afterwards the tuned model is exactly what it was."""
    model, inputs = build().eval(), input_for(build)
    enable_fine_tuning(model, strategy)
    train(model, inputs)
    tuned, before = model(inputs), fingerprint(model)

    with tuning_disabled(model) as inside:
        within = model(inputs)
        base = plain(build, model)(inputs)
        keys = list(model.state_dict())

    assert inside is model
    assert torch.equal(within, base)
    assert keys == list(build().state_dict())
    assert fingerprint(model) == before
    assert torch.equal(model(inputs), tuned)
    assert not torch.equal(tuned, base)


def test_the_context_ends_after_an_error_too() -> None:
    """An error inside leaves the tuned model as it was."""
    model = cnn()
    enable_fine_tuning(model, DELTA)
    train(model, input_for(cnn))
    before = fingerprint(model)

    with pytest.raises(RuntimeError, match="mine"), tuning_disabled(model):
        raise RuntimeError("mine")

    assert fingerprint(model) == before


def test_the_context_works_while_merged() -> None:
    """A merged model gives the base's answers inside, and is merged again afterwards."""
    model, inputs = cnn().eval(), input_for(cnn)
    base = model(inputs)
    enable_fine_tuning(model, DELTA)
    train(model, inputs)
    merge(model)
    tuned, before = model(inputs), fingerprint(model)

    with tuning_disabled(model):
        within = model(inputs)

    assert torch.equal(within, base)
    assert fingerprint(model) == before
    assert torch.equal(model(inputs), tuned)


@pytest.mark.parametrize("call", [disable_fine_tuning, merge, lambda model: tuning_disabled(model).__enter__()])
def test_the_context_cannot_be_disturbed(call: Callable[[nn.Module], object]) -> None:
    """Inside the context what would change the state is an error that says to leave first."""
    model = mlp()
    enable_fine_tuning(model, DELTA)
    before = fingerprint(model)

    with tuning_disabled(model), pytest.raises(StateError, match="tuning_disabled"):
        call(model)

    assert fingerprint(model) == before


def test_statistics_moved_inside_are_the_bases() -> None:
    """The adapter's statistics do not take part in what happens inside: they come back as they were."""
    model, inputs = cnn(), input_for(cnn)
    enable_fine_tuning(model, DELTA)
    train(model, inputs)
    before = tensor_bytes(model.bn.running_mean)

    with tuning_disabled(model):
        model(inputs)

    assert tensor_bytes(model.bn.running_mean) == before


# --- tied weights


def test_tied_weights_stay_tied() -> None:
    """A tied weight kept trainable under both names trains as one, and comes back as one."""
    model = tied()
    before = fingerprint(model)

    enable_fine_tuning(model, FineTuningStrategy([(name_is("embedding", "output"), keep_trainable())]))
    names = trainable(model)
    train(model, input_for(tied))
    still = model.output.weight is model.embedding.weight
    disable_fine_tuning(model)

    assert names == {"embedding.weight"}
    assert still
    assert fingerprint(model) == before


def test_adapting_both_ends_of_a_tie_keeps_the_tie() -> None:
    """Each end gets an adapter of its own over the one frozen tensor."""
    model = tied()
    before = fingerprint(model)

    enable_fine_tuning(model, FineTuningStrategy([(name_is("embedding", "output"), reparameterize(Delta))]))
    names = trainable(model)
    one = model.output._parameters["weight"] is model.embedding._parameters["weight"]
    train(model, input_for(tied))
    disable_fine_tuning(model)

    assert names == {"embedding.delta", "output.delta"}
    assert one
    assert fingerprint(model) == before


@pytest.mark.parametrize("first", ["embedding", "output"])
@pytest.mark.parametrize("other", [keep_trainable(), lambda *site: None])
def test_one_tensor_cannot_be_both_adapted_and_kept(first: str, other: Any) -> None:
    """Adapting one end of a tie and training the other is an error that names the site, whichever comes first in the model."""
    second = "output" if first == "embedding" else "embedding"

    with refused(model := tied(), SiteError, "exclude"):
        enable_fine_tuning(model, FineTuningStrategy([(name_is(first), reparameterize(Delta)), (name_is(second), other)]))


@pytest.mark.parametrize("kept", ["embedding", "output"])
def test_one_tensor_cannot_be_both_frozen_and_kept(kept: str) -> None:
    """Freezing one end of a tie and training the other is an error in either order."""
    frozen = "output" if kept == "embedding" else "embedding"

    with refused(model := tied(), SiteError, "exclude"):
        enable_fine_tuning(model, FineTuningStrategy([(name_is(kept), keep_trainable()), (name_is(frozen), freeze())]))


def test_an_adapted_weight_stays_frozen() -> None:
    """An action that adapts a weight and lets it train as well is an error that names the weight."""

    def careless(*site: Any) -> None:
        adopt(site[4], Delta)
        site[4].requires_grad_(True)

    with refused(model := cnn(), SiteError, "head.weight", "frozen"):
        enable_fine_tuning(model, FineTuningStrategy([(name_is("head"), careless)]))


def test_parameters_of_one_module_are_free_of_each_other() -> None:
    """Parameter caps on one module each decide for their own parameter: adapt one, train one, freeze one."""
    model = lstm()
    before = fingerprint(model)
    caps = [
        (parameter_name_is("weight_ih_l0"), reparameterize(Delta)),
        (parameter_name_is("bias_ih_l0"), keep_trainable()),
        (parameter_name_is("weight_hh_l0"), freeze()),
        (parameter_name_is("bias_hh_l0"), lambda *site: None),
    ]

    enable_fine_tuning(model, FineTuningStrategy(para_caps=caps))
    names = trainable(model)
    train(model, input_for(lstm))
    disable_fine_tuning(model)

    assert names == {"lstm.weight_ih_l0_delta", "lstm.bias_ih_l0", "lstm.bias_hh_l0"}
    assert fingerprint(model) == before


# --- bad input: an error, and an untouched model


@pytest.mark.parametrize("thing", [None, 3, "resnet18", nn.Linear])
def test_no_module_is_refused(thing: Any) -> None:
    """Without a model there is an error that says to pass one."""
    with pytest.raises(ModelError, match="pass the model itself"):
        enable_fine_tuning(thing, DELTA)


def half_way(*site: Any, **params: Any) -> None:
    """Adopt, hook, replace, write and draw, and fail at the head."""
    parent, name, module = site[0], site[1], site[4]
    torch.randn(3)
    if name != "head":
        adopt(module, LoRA, rank=2)
        return
    with torch.no_grad():
        module.weight.mul_(3)
    module.bias.data.zero_()
    module.register_forward_hook(print)
    module.requires_grad_(False)
    module.eval()
    module.register_buffer("extra", torch.ones(1))
    parent.head = nn.Linear(1, 1)
    parent.bn.momentum = 0.7
    raise ZeroDivisionError("half way")


@pytest.mark.parametrize("training", [True, False])
def test_an_action_that_raises_half_way_leaves_no_trace(training: bool) -> None:
    """Whatever an action did before it raised, and those before it, is undone; the error names it, the site and the cause."""
    strategy = FineTuningStrategy([(is_instance(nn.Linear, nn.Conv2d), half_way)])

    with refused(model := cnn().train(training), ActionError, "half_way", "'head' (Linear)", "ZeroDivisionError: half way"):
        enable_fine_tuning(model, strategy)
    with pytest.raises(ActionError) as caught:
        enable_fine_tuning(model, strategy)

    assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError])
def test_an_interrupt_leaves_no_trace(error: type[BaseException]) -> None:
    """Ctrl-C in the middle of enabling stays Ctrl-C, and the model is as before."""

    def interrupted(*site: Any) -> None:
        adopt(site[4], LoRA, rank=2)
        with torch.no_grad():
            site[4].bias.add_(1)
        raise error

    model = mlp()
    before, random = fingerprint(model), torch.get_rng_state()

    with pytest.raises(ActionError if issubclass(error, Exception) else error):
        enable_fine_tuning(model, FineTuningStrategy([(is_instance(nn.Linear), interrupted)]))

    assert fingerprint(model) == before
    assert torch.equal(torch.get_rng_state(), random)


def write_quietly(*site: Any) -> None:
    """Change the base's values and keep silent."""
    with torch.no_grad():
        site[4].weight.add_(1)


def write_data(*site: Any) -> None:
    """The same, past torch's version counter."""
    site[4].weight.data.add_(1)


def exchange_data(*site: Any) -> None:
    """The same, by another storage."""
    site[4].weight.data = torch.zeros(3)


@pytest.mark.parametrize("action", [write_quietly, write_data, exchange_data, lambda *site: site[4].double()])
def test_an_action_must_not_write_into_the_base(action: Any) -> None:
    """An action that changes values of the base could not be undone, so it is an error that says what to do instead."""
    with refused(model := cnn(), ActionError, "wrote into the base", "'head' (Linear)"):
        enable_fine_tuning(model, FineTuningStrategy([(name_is("conv"), reparameterize(LoRA), {"rank": 2}), (name_is("head"), action)]))


def test_a_method_that_fails_is_named() -> None:
    """An error of GIFt's own inside an action keeps its class and gains the site."""
    params = {"start": 0.0, "strat": 1.0}

    with refused(model := cnn(), ActionError, "reparameterize(Delta)", "'head'", "strat"):
        enable_fine_tuning(model, FineTuningStrategy([(name_is("head"), reparameterize(Delta), params)]))
    with refused(model := cnn(), SiteError, "'bn' (BatchNorm2d)", "'kernel'"):
        enable_fine_tuning(model, FineTuningStrategy([(name_is("bn"), lambda *site: adopt(site[4], Delta, ["kernel"]))]))


def test_a_rank_above_what_a_layer_can_use_warns() -> None:
    """It works, and a GiftWarning names the rank and the layers, once."""
    model, inputs = nested(), input_for(nested)

    with pytest.warns(GiftWarning, match=r"rank 4 .*heads\.a, heads\.b\.0, heads\.b\.2") as caught:
        enable_fine_tuning(model, LoRALinearFineTuningStrategy(rank=4))
    train(model, inputs)

    assert len(caught) == 1
    assert "blocks" not in str(caught[0].message)
    assert model.heads["a"].lora_A.shape == (4, 4)


def test_a_warning_that_is_an_error_leaves_no_trace() -> None:
    """Where warnings are errors, nothing has happened yet."""
    model = mlp()
    before = fingerprint(model)

    with pytest.raises(GiftWarning):
        enable_fine_tuning(model, LoRALinearFineTuningStrategy(rank=100))

    assert fingerprint(model) == before


@pytest.mark.parametrize("again", [DELTA, FullFineTuningStrategy(), "lora"])
def test_enabling_twice_is_refused(again: Any) -> None:
    """A tuned model is an error that says by what, and how to undo or add."""
    model = cnn()
    enable_fine_tuning(model, FullFineTuningStrategy("head"))

    with refused(
        model, StateError, "the model is tuned", "FullFineTuningStrategy(targets='head')", "disable_fine_tuning", "merge_strategies"
    ):
        enable_fine_tuning(model, again)


def test_enabling_around_a_tuned_part_is_refused() -> None:
    """A tuned part inside the model is named."""
    model = nn.ModuleDict({"backbone": cnn(), "head": nn.Linear(4, 2)})
    enable_fine_tuning(model["backbone"], DELTA)

    with refused(model, StateError, "'backbone'", "disable_fine_tuning"):
        enable_fine_tuning(model, "lora")


@pytest.mark.parametrize("part", ["head", "conv"])
def test_enabling_inside_a_tuned_model_is_refused(part: str) -> None:
    """An adapted part of a tuned model is an error as well."""
    model = cnn()
    enable_fine_tuning(model, DELTA)

    with refused(model, ModelError, "adapted already", "disable_fine_tuning"):
        enable_fine_tuning(getattr(model, part), DELTA)


def test_enabling_inside_the_context_is_refused() -> None:
    """A model that is only switched off is still tuned."""
    model = cnn()
    enable_fine_tuning(model, DELTA)

    with tuning_disabled(model), pytest.raises(StateError, match="tuned already"):
        enable_fine_tuning(model, DELTA)


def test_a_root_of_another_type_is_refused() -> None:
    """A constraint that is not met leaves the model alone."""
    with refused(model := cnn(), ModelError, "LSTM", "CNN"):
        enable_fine_tuning(model, FineTuningStrategy([(name_is("head"), keep_trainable())], constraint_type=nn.LSTM))


def test_replacing_the_root_is_refused() -> None:
    """The root has no holder; an action of one's own that tries it anyway fails and is undone."""

    def own(parent: nn.Module, name: str, *site: Any) -> None:
        parent._modules[name] = nn.ReLU()

    with refused(model := single(), SiteError, "root"):
        enable_fine_tuning(model, FineTuningStrategy([(is_root(), replace_module(lambda module: nn.ReLU()))]))
    with refused(model := single(), ActionError, "the root (Linear)"):
        enable_fine_tuning(model, FineTuningStrategy([(is_root(), own)]))


def test_a_model_without_values_is_refused() -> None:
    """A parameter or buffer on the meta device is named, and what to do is said."""
    with torch.device("meta"):
        model = cnn()
    partly = cnn()
    partly.bn.running_mean = torch.zeros(6, device="meta")

    with refused(model, ModelError, "'conv.weight'", "meta"):
        enable_fine_tuning(model, FullFineTuningStrategy())
    with refused(partly, ModelError, "'bn.running_mean'", "meta"):
        enable_fine_tuning(partly, FullFineTuningStrategy())
    with refused(model, SiteError, "'conv'", "meta"):
        enable_fine_tuning(model, "lora")


def test_a_model_made_for_inference_only_is_refused() -> None:
    """Tensors from torch.inference_mode cannot train; the first is named."""
    with torch.inference_mode():
        model = nn.Linear(2, 2)

    with pytest.raises(ModelError, match=r"'weight'.*inference_mode"):
        enable_fine_tuning(model, FullFineTuningStrategy())


def test_lazy_modules_are_refused() -> None:
    """A layer without shapes is refused before anything changes."""
    with refused(model := nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(2)), ModelError, "'1' (LazyLinear)", "forward pass"):
        enable_fine_tuning(model, DELTA)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_scripted_modules_are_refused() -> None:
    """A scripted part is refused before anything changes; the plain parts are untouched."""
    model = nn.Sequential(nn.Linear(2, 2), torch.jit.script(nn.Linear(2, 2)))
    before = fingerprint(model[0])

    with pytest.raises(ModelError, match=r"'1'.*scripted"):
        enable_fine_tuning(model, DELTA)

    assert fingerprint(model[0]) == before


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")], ids=["DataParallel", "compile"]
)
def test_wrappers_are_refused(wrap: Callable[[nn.Module], nn.Module]) -> None:
    """A model inside a wrapper is enabled first and wrapped afterwards; the error says so."""
    model = cnn()
    wrapper = wrap(model)

    with refused(model, ModelError, type(wrapper).__name__, "wrap it afterwards"):
        enable_fine_tuning(wrapper, DELTA)


def test_a_distributed_wrapper_is_refused(tmp_path: Any) -> None:
    """DDP is a wrapper like any other, also where it wraps a part of the model."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        model = mlp()
        with refused(model, ModelError, "DistributedDataParallel", "wrap it afterwards"):
            enable_fine_tuning(nn.parallel.DistributedDataParallel(model), DELTA)
        around = nn.Sequential(nn.Linear(2, 4), nn.parallel.DistributedDataParallel(model))
        with refused(model, ModelError, "DistributedDataParallel", "wrap it afterwards"):
            enable_fine_tuning(around, DELTA)
    finally:
        torch.distributed.destroy_process_group()


def test_a_strategy_that_trains_nothing_is_refused() -> None:
    """Actions that leave every parameter frozen are an error: silence is a bug."""
    with refused(model := cnn(), NoMatchError, "nothing would train"):
        enable_fine_tuning(model, FineTuningStrategy([(everything(), freeze())]))


def test_nothing_matched_is_refused() -> None:
    """A strategy that finds nothing is an error, not a frozen model."""
    with refused(model := nn.Sequential(nn.Embedding(3, 2)), NoMatchError, "Embedding"):
        enable_fine_tuning(model, "lora")


@pytest.mark.parametrize("argument", ["targets", "exclude"])
def test_a_misspelt_name_is_refused(argument: str) -> None:
    """A named target or exclude that matched nothing is an error with the nearest name."""
    with refused(model := cnn(), NoMatchError, "'haed'", "head"):
        enable_fine_tuning(model, LoRAAllFineTuningStrategy(rank=2, **{argument: ["haed"]}))


@pytest.mark.parametrize("kind", ["parametrize", "packed"])
def test_a_weight_that_cannot_be_adapted_is_refused(kind: str) -> None:
    """A weight that torch computes itself, or that is no floating-point tensor, is an error that names it."""
    model = cnn()
    if kind == "parametrize":
        nn.utils.parametrizations.weight_norm(model.head)
    else:
        model.head.weight = nn.Parameter(torch.zeros(4, 6, dtype=torch.int8), requires_grad=False)

    with refused(model, SiteError, "'head'", "'weight'", "exclude"):
        enable_fine_tuning(model, DELTA)


def test_forward_never_writes() -> None:
    """In training, evaluation and without gradients, a forward pass leaves every parameter's bytes and version as they are."""
    model, inputs = mlp(), input_for(mlp)
    enable_fine_tuning(model, DELTA)

    def state() -> list[tuple[bytes, int]]:
        return [(tensor_bytes(p), p._version) for _, p in model.named_parameters()]

    before = state()
    for mode in (True, False):
        model.train(mode)
        model(inputs)
        with torch.no_grad():
            model(inputs)
        with torch.inference_mode():
            model(inputs)

    assert state() == before


def test_the_effective_weight_is_the_formula() -> None:
    """An adapted layer computes with its frozen weight plus the method's part, by the layer's own code."""
    model, inputs = cnn().eval(), input_for(cnn)
    enable_fine_tuning(model, DELTA)
    train(model, inputs)
    oracle = cnn().eval()
    state: dict[str, Tensor] = dict(oracle.state_dict())
    for name, buffer in model.named_buffers():
        state[name] = buffer
    for name in ("conv", "head"):
        state[f"{name}.weight"] = state[f"{name}.weight"] + getattr(model, name).delta.detach()

    assert torch.equal(model(inputs), torch.func.functional_call(oracle, state, (inputs,)))


def _pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def _saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _in_another(model: nn.Module) -> nn.Module:
    return copy.deepcopy(nn.Sequential(model))[0]


@every_model
@pytest.mark.parametrize(("strategy", "is_merged"), [("every parameter", True), ("both", False)])
@pytest.mark.parametrize("way", [copy.deepcopy, _pickled, _saved, _in_another], ids=lambda way: way.__name__)
@torch.no_grad()
def test_a_copy_made_while_the_base_computes_is_tuned(
    build: Builder, strategy: str, is_merged: bool, way: Callable[[Any], Any]
) -> None:
    """A copy or a pickle made within `tuning_disabled` is of the tuned model; the model itself goes on as the base."""
    model, inputs = build(), input_for(build)
    with torch.enable_grad():
        enable_fine_tuning(model, STRATEGIES[strategy])
        train(model, inputs)
    model.eval()
    if is_merged:
        merge(model)
    expected, state = model(inputs), model.state_dict()
    before = fingerprint(model)

    with tuning_disabled(model):
        base = model(inputs)
        twin = way(model)
        assert torch.equal(model(inputs), base)

    assert fingerprint(model) == before
    assert torch.equal(twin(inputs), expected)
    assert list(twin.state_dict()) == list(state)
    assert all(torch.equal(twin.state_dict()[key], value) for key, value in state.items())
    assert twin.parameters.module is twin
    disable_fine_tuning(twin)
    assert all(torch.equal(value, build().state_dict()[key]) for key, value in twin.state_dict().items())
    assert fingerprint(model) == before


def test_a_shallow_copy_leaves_the_model_alone() -> None:
    """A shallow copy made within `tuning_disabled` shares the model's modules, and changes none of them."""
    model = mlp()
    enable_fine_tuning(model, DELTA)
    before = fingerprint(model)

    with tuning_disabled(model):
        copy.copy(model)
        assert type(model[0]) is nn.Linear

    assert fingerprint(model) == before


class TooSmall(SiteError):
    """An error of a plugin's, with a constructor of its own."""

    def __init__(self, layer: str, sides: tuple[int, ...]) -> None:
        super().__init__(f"{layer} is too small")
        self.sides = sides


class Worded(TooSmall):
    """One that makes its text when it is asked."""

    def __str__(self) -> str:
        return f"{self.sides} are too few"


@pytest.mark.parametrize("kind", [TooSmall, Worded])
def test_an_error_of_a_plugins_stays_itself(kind: type[TooSmall]) -> None:
    """A plugin's own kind of `GiftError` comes out of enabling as it is, with the place in its text, or as a note."""

    def act(*site: Any) -> None:
        raise kind(site[2], tuple(site[4].weight.shape))

    model = mlp()
    before = fingerprint(model)

    with pytest.raises(kind) as caught:
        enable_fine_tuning(model, FineTuningStrategy([(is_instance(nn.Linear), act)]))

    assert caught.value.sides == (8, 4)
    assert "at '0' (Linear)" in "".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert fingerprint(model) == before


@pytest.mark.parametrize("strategy", [DELTA, FullFineTuningStrategy(targets="2")], ids=["adapted", "kept"])
def test_a_model_enabled_in_inference_mode_trains(strategy: FineTuningStrategy, tmp_path: Path) -> None:
    """Enabling, adding to a set and loading a file within inference mode make tensors that train outside of it."""
    model, source, loaded, several = mlp(), mlp(), mlp(), mlp()
    enable_fine_tuning(source, LoRALinearFineTuningStrategy(rank=2))
    save_adapter(source, tmp_path / "adapter")
    adapters = AdapterSet(several)

    with torch.inference_mode():
        enable_fine_tuning(model, strategy)
        load_adapter(loaded, tmp_path / "adapter")
        adapters.add("a", strategy)
        adapters.use("a")

    for one in (model, loaded, several):
        before = [parameter.detach().clone() for parameter in one.parameters()]
        train(one, input_for(mlp))
        assert not any(torch.equal(old, new) for old, new in zip(before, one.parameters(), strict=True))
        disable_fine_tuning(one)
        assert all(torch.equal(value, mlp().state_dict()[key]) for key, value in one.state_dict().items())
