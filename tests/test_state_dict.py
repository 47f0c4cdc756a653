"""What a tuned model saves and takes back: the trained part, strictly, at any depth."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from models import ALL, Builder, Delta, cnn, embedding, fingerprint, input_for, mlp, nested, single, tensor_bytes, tied, train
from torch import Tensor, nn

from gift_core import (
    FineTuningStrategy,
    FullFineTuningStrategy,
    disable_fine_tuning,
    enable_fine_tuning,
    full_state_dict,
    merge_strategies,
    merged,
)
from gift_core.errors import StateDictError, StateError
from gift_core.factories import is_root, reparameterize
from gift_lora_plugin import LoRAAllFineTuningStrategy

STATISTICS = {"bn.running_mean", "bn.running_var", "bn.num_batches_tracked"}

Wrap = Callable[[nn.Module], nn.Module]


class Wrapper(nn.Module):
    """Holds a model as ``module``, as DistributedDataParallel does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


class Larger(nn.Module):
    """A tuned model among other layers, two levels down."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.before = nn.BatchNorm1d(2)
        self.inner = nn.ModuleDict({"model": module})


WRAPS: dict[str, tuple[Wrap, str]] = {
    "alone": (lambda module: module, ""),
    "wrapped": (Wrapper, "module."),
    "child": (Larger, "inner.model."),
    "sequential": (lambda module: nn.Sequential(nn.Identity(), module), "1."),
    "compiled": (lambda module: torch.compile(module, backend="eager"), "_orig_mod."),
}


def tuned(builder: Builder = cnn, strategy: FineTuningStrategy | None = None, steps: int = 2) -> nn.Module:
    """A model that was enabled and, unless ``steps`` is 0, trained."""
    model = builder()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        enable_fine_tuning(model, strategy or LoRAAllFineTuningStrategy(rank=2))
        if steps:
            train(model, input_for(builder), steps)
    return model.eval()


def trained_keys(model: nn.Module) -> set[str]:
    """The oracle: walk the modules and look at what trains, under every name."""
    return {
        f"{name}.{key}" if name else key
        for name, module in model.named_modules(remove_duplicate=False)
        for key, parameter in module._parameters.items()
        if parameter is not None and parameter.requires_grad
    }


def values(model: nn.Module) -> dict[str, bytes]:
    """The bytes of everything, frozen or not."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {key: tensor_bytes(tensor) for key, tensor in tensors.items()}


@pytest.mark.parametrize("builder", ALL, ids=lambda builder: builder.__name__)
def test_the_trained_part_and_nothing_else(builder: Builder) -> None:
    """A tuned model's state dict holds every trainable parameter and the statistics of BatchNorm."""
    model = tuned(builder, LoRAAllFineTuningStrategy(rank=1, train_bias=True))

    expected = trained_keys(model) | (STATISTICS if builder is cnn else set())

    assert set(model.state_dict()) == expected


@pytest.mark.parametrize("builder", ALL, ids=lambda builder: builder.__name__)
def test_a_state_dict_alone_moves_the_tuned_model(builder: Builder) -> None:
    """The state dict of a trained model, loaded into a fresh one with another start, gives equal outputs."""
    model, fresh = tuned(builder), tuned(builder, steps=1)
    inputs = input_for(builder)

    result = fresh.load_state_dict(model.state_dict())

    assert not result.missing_keys and not result.unexpected_keys
    assert torch.equal(fresh(inputs), model(inputs))


@pytest.mark.parametrize(("wrap", "prefix"), WRAPS.values(), ids=WRAPS)
def test_any_depth(wrap: Wrap, prefix: str) -> None:
    """Inside another model the trained part keeps its size, gets the prefix, and loads back there."""
    model, fresh = tuned(), tuned(steps=0)
    alone = model.state_dict()
    outer, other = wrap(model), wrap(fresh)

    state = outer.state_dict()
    other.load_state_dict(state)

    assert {key for key in state if key.startswith(prefix)} == {prefix + key for key in alone}
    assert all(torch.equal(state[prefix + key], value) for key, value in alone.items())
    assert values(fresh) == values(model)


def test_a_prefix_and_a_destination() -> None:
    """``state_dict(destination=..., prefix=...)`` adds the trained part to what is there, as torch does."""
    model = tuned()
    destination = nn.Linear(1, 1).state_dict(prefix="conv.")
    there = list(destination)

    state = model.state_dict(destination=destination, prefix="net.")

    assert state is destination
    assert list(state) == there + [f"net.{key}" for key in model.state_dict()]


def test_keys_of_the_surroundings_stay() -> None:
    """Keys of a larger model that end or begin like frozen ones are not dropped."""
    outer = nn.Module()
    outer.model = tuned(single)
    outer.weight = nn.Parameter(torch.ones(2))
    outer.model_weight = nn.Parameter(torch.ones(2))

    assert set(outer.state_dict()) == {"weight", "model_weight", "model.lora_A", "model.lora_B"}


def test_metadata_is_kept() -> None:
    """``_metadata``, which carries the versions of layers, is what the base model's state dict has."""
    base, model = cnn(), tuned()

    assert dict(model.state_dict()._metadata) == dict(base.state_dict()._metadata)  # type: ignore[attr-defined]


@pytest.mark.parametrize("wrap", [wrap for wrap, _ in WRAPS.values()], ids=list(WRAPS))
@pytest.mark.parametrize("kind", ["missing", "missing statistic", "unexpected", "misshapen", "partial base", "no tensor"])
def test_a_misfit_is_refused(wrap: Wrap, kind: str) -> None:
    """A state dict that does not fit is an error that names the key, and no value of the tuned model changes."""
    model = tuned(strategy=LoRAAllFineTuningStrategy(rank=2, train_bias=True))
    outer = wrap(tuned(strategy=LoRAAllFineTuningStrategy(rank=2, train_bias=True), steps=0))
    before = values(outer)
    state = model.state_dict()
    if kind == "partial base":
        state["conv.weight"] = cnn().state_dict()["conv.weight"]
    key = {
        "missing": "head.lora_B",
        "missing statistic": "bn.running_var",
        "unexpected": "head.lora_C",
        "misshapen": "head.lora_A",
        "partial base": "conv.weight",
        "no tensor": "head.lora_A",
    }[kind]
    if kind.startswith("missing"):
        del state[key]
    elif kind != "partial base":
        state[key] = "text" if kind == "no tensor" else torch.ones(3, 6)  # type: ignore[assignment]
    prefix = next(prefix for a_wrap, prefix in WRAPS.values() if a_wrap is wrap)
    given = wrap(model).state_dict()
    for own in [k for k in given if k.startswith(prefix)]:
        del given[own]
    given |= {prefix + k: v for k, v in state.items()}

    with pytest.raises(StateDictError, match=key.replace(".", r"\.")):
        outer.load_state_dict(given)

    assert values(outer) == before


def test_strict_false_skips_nothing() -> None:
    """``strict=False`` does not let a part of an adapter through: torch does not tell a hook about it."""
    model = tuned()
    state = tuned().state_dict()
    del state["conv.lora_A"]

    with pytest.raises(StateDictError, match=r"missing: conv\.lora_A"):
        model.load_state_dict(state, strict=False)


def test_every_problem_is_told_at_once() -> None:
    """One error lists what is missing, unexpected and misshapen."""
    model = tuned()
    state = model.state_dict()
    del state["conv.lora_A"]
    state["extra"] = torch.ones(1)
    state["head.lora_B"] = torch.ones(1, 1)

    with pytest.raises(StateDictError) as caught:
        model.load_state_dict(state)

    for line in ("missing: conv.lora_A", "unexpected: extra", "wrong shape: head.lora_B: (1, 1) given, (4, 2) in the model"):
        assert line in str(caught.value)


def test_one_of_two_counters_missing() -> None:
    """A counter of BatchNorm that is left out while another is there is missing; nothing is written."""

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4))

    model = build()
    enable_fine_tuning(model, LoRAAllFineTuningStrategy(rank=1))
    state = {key: torch.ones_like(value) for key, value in model.state_dict().items() if key != "2.num_batches_tracked"}
    before = values(model)

    with pytest.raises(StateDictError, match=r"missing: 2\.num_batches_tracked"):
        model.load_state_dict(state)

    assert values(model) == before


def test_a_checkpoint_older_than_the_counter() -> None:
    """A base checkpoint without any ``num_batches_tracked``, as of the first years of torch, loads as it does into the base."""
    old = {key: value for key, value in cnn().state_dict().items() if not key.endswith("num_batches_tracked")}
    model = tuned(steps=1)

    model.load_state_dict(old)

    assert torch.equal(model.get_buffer("bn.running_mean"), old["bn.running_mean"])


def test_assign() -> None:
    """``assign=True`` puts the given tensors in place; what is not given stays, and trainable stays trainable."""
    model, fresh = tuned(), tuned(steps=0)
    frozen = fresh.conv._parameters["weight"]
    state = {key: value.clone() for key, value in model.state_dict().items()}

    fresh.load_state_dict(state, assign=True)

    assert fresh.conv._parameters["weight"] is frozen
    assert fresh.conv.lora_A.data_ptr() == state["conv.lora_A"].data_ptr()
    assert trained_keys(fresh) == trained_keys(model)
    assert torch.equal(fresh(input_for(cnn)), model(input_for(cnn)))


@pytest.mark.parametrize("assign", [False, True])
def test_tied_weights(assign: bool) -> None:
    """A weight under two names is saved under both or neither, and stays tied when the state dict is loaded."""
    strategy = LoRAAllFineTuningStrategy(rank=2, targets="middle")
    model, fresh = tuned(tied, strategy), tuned(tied, strategy, steps=0)

    state = model.state_dict()
    fresh.load_state_dict(state, assign=assign)

    assert set(state) == {"middle.lora_A", "middle.lora_B"}
    assert fresh.get_parameter("output.weight") is fresh.get_parameter("embedding.weight")
    assert torch.equal(fresh(input_for(tied)), model(input_for(tied)))


def test_tied_weights_in_training() -> None:
    """A tied weight that trains is saved under both names and takes both back."""
    strategy = FullFineTuningStrategy(targets="embedding")
    model, fresh = tuned(tied, strategy), tuned(tied, strategy, steps=0)

    fresh.load_state_dict(model.state_dict())

    assert {"embedding.weight", "output.weight"} <= set(model.state_dict())
    assert torch.equal(fresh(input_for(tied)), model(input_for(tied)))


@pytest.mark.parametrize(("wrap", "prefix"), WRAPS.values(), ids=WRAPS)
@pytest.mark.parametrize("given", ["the trained part", "half of it", "the base"])
def test_a_tie_in_training_outlasts_assign(given: str, wrap: Wrap, prefix: str) -> None:
    """Tied weights that train are one tensor after ``assign=True``, given under both names or one, and disabling restores both."""
    model = tuned(tied, FullFineTuningStrategy())
    base = tied().state_dict()
    state = copy.deepcopy(base if given == "the base" else tuned(tied, FullFineTuningStrategy(), steps=4).state_dict())
    if given == "half of it":
        del state["output.weight"]
    outer = wrap(model)
    others = {key: value for key, value in outer.state_dict().items() if not key.startswith(prefix)}

    outer.load_state_dict(others | {prefix + key: value for key, value in state.items()}, strict=given != "half of it", assign=True)

    assert model.get_parameter("output.weight") is model.get_parameter("embedding.weight")
    assert torch.equal(model.get_parameter("output.weight"), state["embedding.weight"])
    train(model, input_for(tied))
    disable_fine_tuning(model)
    assert {key: tensor_bytes(value) for key, value in model.state_dict().items()} == {
        key: tensor_bytes(value) for key, value in base.items()
    }


@pytest.mark.parametrize("wrap", [wrap for wrap, _ in WRAPS.values()], ids=list(WRAPS))
@pytest.mark.parametrize("part", ["adapter", "base"])
def test_tensors_of_inference_mode_are_not_assigned(part: str, wrap: Wrap) -> None:
    """What could never train is not put into a model by ``assign=True``; its values may be copied."""
    model = tuned(mlp, steps=0)
    with torch.inference_mode():
        state = {key: value.clone() for key, value in (model if part == "adapter" else mlp()).state_dict().items()}
    outer = wrap(model)
    before = values(model)
    prefix = next(prefix for a_wrap, prefix in WRAPS.values() if a_wrap is wrap)
    others = {key: value for key, value in outer.state_dict().items() if not key.startswith(prefix)}
    given = others | {prefix + key: value for key, value in state.items()}

    with pytest.raises(StateDictError, match=r"an inference tensor: 0\..*clone\(\) it outside"):
        outer.load_state_dict(given, assign=True)

    assert values(model) == before
    outer.load_state_dict(given)
    train(model, input_for(mlp))


@pytest.mark.parametrize("builder", ALL, ids=lambda builder: builder.__name__)
@pytest.mark.parametrize("assign", [False, True])
def test_the_original_checkpoint_loads_after_enabling(builder: Builder, assign: bool) -> None:
    """A full checkpoint of the original model loads into the tuned one under its own keys; the adapter stays as it is."""
    other = builder()
    with torch.no_grad():
        for tensor in {id(tensor): tensor for tensor in other.state_dict(keep_vars=True).values()}.values():
            tensor.add_(1)
    expected = builder().eval()
    expected.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
    expected.requires_grad_(False)  # torch chooses other kernels for attention and LSTM where gradients may flow
    model = tuned(builder, steps=0)
    adapter = {key: tensor_bytes(p) for key, p in model.named_parameters() if "lora" in key}

    model.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)

    assert {key: tensor_bytes(p) for key, p in model.named_parameters() if "lora" in key} == adapter
    with torch.no_grad():
        assert torch.equal(model(input_for(builder)), expected(input_for(builder)))
    disable_fine_tuning(model)
    assert values(model) == values(expected)


def test_the_original_checkpoint_loads_before_enabling_and_after_disabling() -> None:
    """The base model's own loading is as before, with and without a past of tuning."""
    checkpoint = cnn().state_dict()
    model = tuned()
    disable_fine_tuning(model)

    model.load_state_dict(checkpoint)

    assert list(model.state_dict()) == list(checkpoint)
    assert all(torch.equal(value, checkpoint[key]) for key, value in model.state_dict().items())


def test_a_new_base_is_what_disable_gives_back() -> None:
    """After a full checkpoint is loaded into a tuned model, its values are the originals, for the parts that train too."""
    strategy = merge_strategies(LoRAAllFineTuningStrategy(targets="conv"), FullFineTuningStrategy(targets="head"))
    model, other = tuned(strategy=strategy), tuned(strategy=FullFineTuningStrategy())
    checkpoint = copy.deepcopy(other.state_dict())

    model.load_state_dict(checkpoint)
    train(model, input_for(cnn))
    disable_fine_tuning(model)

    assert {key: tensor_bytes(value) for key, value in model.state_dict().items()} == {
        key: tensor_bytes(value) for key, value in checkpoint.items()
    }


@pytest.mark.parametrize(("wrap", "prefix"), WRAPS.values(), ids=WRAPS)
def test_full_state_dict(wrap: Wrap, prefix: str) -> None:
    """Within `full_state_dict` everything is there, and such a checkpoint loads into another tuned model at any time."""
    model, fresh = tuned(), tuned(steps=0)
    outer, other = wrap(model), wrap(fresh)

    with full_state_dict(outer):
        state = copy.deepcopy(outer.state_dict())
    other.load_state_dict(state)

    own = {key.removeprefix(prefix) for key in state if key.startswith(prefix)}
    assert own == {key for key, _ in model.named_parameters()} | STATISTICS
    assert values(fresh) == values(model)
    assert set(model.state_dict()) == trained_keys(model) | STATISTICS


def test_full_state_dict_ends_after_an_error() -> None:
    """An error inside the context leaves the state dict as short as it was."""
    model = tuned()

    with pytest.raises(KeyError), full_state_dict(model):
        raise KeyError

    assert set(model.state_dict()) == trained_keys(model) | STATISTICS


def test_a_copy_is_not_within_the_context() -> None:
    """A copy or a pickle of a model whose full state dict is asked for gives the trained part."""
    model = tuned()

    with full_state_dict(model):
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]

    assert all(list(one.state_dict()) == list(model.state_dict()) for one in copies)


def test_full_state_dict_of_a_plain_model() -> None:
    """Asking a plain model for its full state dict is an error that says what to call."""
    with pytest.raises(StateError, match="enable_fine_tuning"), full_state_dict(cnn()):
        pass


def test_other_buffers_are_saved_once_they_moved() -> None:
    """A persistent buffer is part of the state dict when its value differs from the base's, and loading restores either."""
    model, fresh = tuned(nested), tuned(nested, steps=0)
    unmoved = model.state_dict()
    model.get_buffer("offset").add_(1)
    moved = copy.deepcopy(model.state_dict())

    fresh.load_state_dict(moved)

    assert "offset" not in unmoved and "offset" in moved
    assert torch.equal(fresh.get_buffer("offset"), torch.ones(4))
    fresh.load_state_dict(unmoved)
    assert torch.equal(fresh.get_buffer("offset"), torch.zeros(4))


def test_buffers_that_are_not_persistent_stay_out() -> None:
    """A scratch buffer is no part of a state dict, moved or not, and a state dict that has it is refused."""
    model = tuned(nested)
    model.get_buffer("scratch").add_(1)
    state = model.state_dict()

    assert "scratch" not in state
    before = values(model)
    state = {key: torch.zeros_like(value) for key, value in state.items()} | {"scratch": torch.zeros(2)}
    with pytest.raises(StateDictError, match="unexpected: scratch"):
        model.load_state_dict(state)
    assert values(model) == before


def test_children_added_after_enabling() -> None:
    """A child that is added to a tuned model is saved in full and loaded strictly."""
    model, fresh = tuned(), tuned(steps=0)
    model.extra = nn.Linear(2, 2)
    fresh.extra = nn.Linear(2, 2)

    fresh.load_state_dict(model.state_dict())

    assert {"extra.weight", "extra.bias"} <= set(model.state_dict())
    assert values(fresh) == values(model)
    state = {key: torch.zeros_like(value) for key, value in model.state_dict().items() if key != "extra.bias"}
    with pytest.raises(StateDictError, match=r"missing: extra\.bias"):
        fresh.load_state_dict(state)
    assert values(fresh) == values(model)


def _added(model: nn.Module) -> set[str]:
    model.extra = nn.Linear(2, 2)
    return {"extra.weight", "extra.bias"}


def _replaced(model: nn.Module) -> set[str]:
    model.head = nn.Linear(6, 5)
    return {"head.weight", "head.bias"}


def _let_train(model: nn.Module) -> set[str]:
    model.get_submodule("head").requires_grad_()
    return {"head.weight", "head.bias"}


def _exchanged(model: nn.Module) -> set[str]:
    model.get_submodule("head").weight = nn.Parameter(torch.ones(5, 6))
    return {"head.weight"}


@pytest.mark.parametrize("wrap", [wrap for wrap, _ in WRAPS.values()], ids=list(WRAPS))
@pytest.mark.parametrize("change", [_added, _replaced, _let_train, _exchanged])
def test_what_trains_since_is_in_it(change: Callable[[nn.Module], set[str]], wrap: Wrap) -> None:
    """Whatever trains now is in a state dict and comes back from it, also what tuning froze or did not know."""
    strategy = LoRAAllFineTuningStrategy(rank=2, targets="conv")
    model, fresh, unchanged = (tuned(strategy=strategy, steps=0) for _ in range(3))
    keys = change(model)
    change(fresh)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()

    state = wrap(model).state_dict()
    before = values(unchanged)
    wrap(fresh).load_state_dict(state)

    assert set(model.state_dict()) == trained_keys(model) | STATISTICS
    assert keys <= trained_keys(model)
    assert values(fresh) == values(model)
    with pytest.raises(StateDictError, match=min(keys).replace(".", r"\.")):
        wrap(unchanged).load_state_dict(state)
    assert values(unchanged) == before


class Scaled(nn.Linear):
    """A layer with a persistent buffer."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.register_buffer("scale", torch.ones(4))


def test_what_took_a_layers_place_stays_in_it() -> None:
    """A new layer is no part of the base, frozen or not; nor are its buffers, and its absence is an error."""
    model = nn.Sequential(nn.Linear(4, 4), Scaled())
    enable_fine_tuning(model, LoRAAllFineTuningStrategy(rank=1, targets="0"))
    model[1] = Scaled().requires_grad_(False)
    keys = {"1.weight", "1.bias", "1.scale"}

    state = model.state_dict()

    assert keys < set(state)
    for key in keys:
        with pytest.raises(StateDictError, match=rf"missing: {key}"):
            model.load_state_dict({other: value for other, value in state.items() if other != key})


def test_a_layer_of_the_same_tensors_is_the_base() -> None:
    """A layer that took over the tensors of the one in whose place it came, as SyncBatchNorm does, changes no state dict."""
    model = tuned()
    before = model.state_dict()

    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)

    assert type(model.get_submodule("bn")) is nn.SyncBatchNorm
    assert list(model.state_dict()) == list(before)


def test_an_adapted_layer_that_left() -> None:
    """Without one of its adapted layers a tuned model has no state dict, but the full one; put back, it has."""
    model = tuned(mlp)
    before, layer = model.state_dict(), model[2]
    model[2] = nn.Linear(8, 3)

    for outer in (model, nn.Sequential(model)):
        with pytest.raises(StateError, match=r"2\.lora_A.* left the model.*put it back"):
            outer.state_dict()
    with full_state_dict(model):
        assert "2.weight" in model.state_dict()
    model[2] = layer
    assert list(model.state_dict()) == list(before)


def test_a_layer_that_was_wrapped_since_is_still_there() -> None:
    """A layer that is compiled in its place has another name and has not left; its adapter is in the state dict."""
    model = tuned(mlp)

    model[2] = torch.compile(model[2], backend="eager")

    assert {"2._orig_mod.lora_A", "2._orig_mod.lora_B"} <= set(model.state_dict())


def test_trainable_state_dict_off() -> None:
    """With ``trainable_state_dict=False`` the state dict is torch's own: everything, under the base's keys and the adapter's."""
    model = cnn()
    enable_fine_tuning(model, LoRAAllFineTuningStrategy(), trainable_state_dict=False)

    assert set(model.state_dict()) == {key for key, _ in model.named_parameters()} | STATISTICS


def test_a_weight_of_another_name() -> None:
    """What a method adds for a weight that is not called ``weight`` is saved under the name of that weight."""
    model = nn.LSTM(4, 5)
    strategy = FineTuningStrategy(module_caps=[(is_root(), reparameterize(Delta, names=("weight_ih_l0",)))])
    enable_fine_tuning(model, strategy)

    assert set(model.state_dict()) == {"weight_ih_l0_delta"}


def test_saving_and_loading_change_nothing_else() -> None:
    """Reading a state dict leaves the model as it is, and loading its own state dict changes no object and no byte."""
    model = tuned()
    before, random = fingerprint(model), torch.get_rng_state()

    model.load_state_dict(model.state_dict())

    assert fingerprint(model) == before
    assert torch.equal(torch.get_rng_state(), random)


def test_an_optimizer_continues() -> None:
    """A state dict and the optimizer's state continue a training run as if it had not stopped."""
    inputs = input_for(embedding)

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            optimizer.step()

    through, first, second = (tuned(embedding, steps=0) for _ in range(3))
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.1) for model in (through, first, second)]
    steps(through, optimizers[0], 4)
    steps(first, optimizers[1], 2)
    second.load_state_dict(first.state_dict())
    optimizers[2].load_state_dict(optimizers[1].state_dict())
    steps(second, optimizers[2], 2)

    assert values(second) == values(through)


# --- the short way and torch's


@pytest.mark.parametrize("builder", ALL, ids=lambda builder: builder.__name__)
def test_the_short_way_is_torchs(builder: Builder) -> None:
    """What `state_dict` gives and `load_state_dict` does is what torch's own methods with our hooks give and do, order included."""
    model, short, long = tuned(builder), tuned(builder, steps=0), tuned(builder, steps=0)
    state = model.state_dict()
    torchs = type(model).state_dict(model)

    short.load_state_dict(state)
    type(long).load_state_dict(long, state)

    assert list(state) == list(torchs) and all(torch.equal(value, torchs[key]) for key, value in state.items())
    assert state._metadata == torchs._metadata and type(state) is type(torchs)  # type: ignore[attr-defined]
    assert not any(value.requires_grad for value in state.values())
    assert all(value.requires_grad for key, value in model.state_dict(keep_vars=True).items() if "lora" in key)
    assert values(short) == values(long) == values(model)


def test_a_load_visits_each_tensor_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading the trained part, or a whole checkpoint, calls none of torch's per-module loading, which is quadratic in the layers."""
    checkpoint = {key: value + 1 for key, value in cnn().state_dict().items()}
    model, state = tuned(), tuned(steps=1).state_dict()
    monkeypatch.setattr(nn.Module, "_load_from_state_dict", lambda *_: pytest.fail("torch's own way"))

    model.load_state_dict(state)
    model.load_state_dict(checkpoint)

    assert torch.equal(model.conv._parameters["weight"], checkpoint["conv.weight"])
    assert torch.equal(model.conv.lora_B, state["conv.lora_B"])


@pytest.mark.parametrize("builder", ALL, ids=lambda builder: builder.__name__)
def test_the_short_way_of_assign_is_torchs(builder: Builder) -> None:
    """With ``assign=True`` too: the same values, the given tensors in place, the same flags, and what is not given as it was."""
    state = {key: value.clone() for key, value in tuned(builder).state_dict().items()}
    short, long = tuned(builder, steps=0), tuned(builder, steps=0)
    before = {key: parameter for key, parameter in short.named_parameters() if key not in state}

    short.load_state_dict(state, assign=True)
    type(long).load_state_dict(long, dict(state), assign=True)

    held = short.state_dict(keep_vars=True)
    assert values(short) == values(long)
    # of a tensor under two keys, the one that was given last is in place
    assert {held[key].data_ptr() for key in state} <= {value.data_ptr() for value in state.values()}
    assert trained_keys(short) == trained_keys(long)
    assert all(short.get_parameter(key) is parameter for key, parameter in before.items() if "weight" not in key)


def test_assign_visits_each_tensor_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """``assign=True`` calls none of torch's per-module loading either, for the trained part and for a whole checkpoint."""
    checkpoint = {key: value + 1 for key, value in cnn().state_dict().items()}
    model, state = tuned(), tuned(steps=1).state_dict()
    monkeypatch.setattr(nn.Module, "_load_from_state_dict", lambda *_: pytest.fail("torch's own way"))

    model.load_state_dict(state, assign=True)
    model.load_state_dict(checkpoint, assign=True)

    assert model.conv._parameters["weight"].data_ptr() == checkpoint["conv.weight"].data_ptr()
    assert not model.conv._parameters["weight"].requires_grad
    assert model.conv.lora_B.data_ptr() == state["conv.lora_B"].data_ptr()


def test_assigning_nothing_in_the_place_of_a_buffer_that_moved() -> None:
    """A buffer of the base that a state dict leaves out gets the base's value with ``assign=True``, and a memory of its own."""
    model = tuned(nested, steps=0)
    state = model.state_dict()
    model.get_buffer("offset").add_(1)

    model.load_state_dict(state, assign=True)
    assert torch.equal(model.get_buffer("offset"), torch.zeros(4))
    model.get_buffer("offset").add_(1)

    assert torch.equal(disable_fine_tuning(model).get_buffer("offset"), torch.zeros(4))


@pytest.mark.parametrize("strict", [True, False])
def test_a_missing_state_of_a_layers_own(strict: bool) -> None:
    """The state that a layer takes of its own is missed before anything is written, unless ``strict=False`` does without it."""

    def build() -> nn.Module:
        model = nn.Sequential(nn.Linear(2, 2), Says())
        enable_fine_tuning(model, LoRAAllFineTuningStrategy(rank=1))
        return model

    model = build()
    state = {key: torch.ones_like(value) for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    before = values(model)

    if strict:
        with pytest.raises(StateDictError, match=r"missing: 1\._extra_state"):
            model.load_state_dict(state)
        assert values(model) == before
    else:
        assert model.load_state_dict(state, strict=False).missing_keys == ["1._extra_state"]
        assert all(torch.equal(value, torch.ones_like(value)) for key, value in model.state_dict().items() if "lora" in key)


class Says(nn.Module):
    """A layer with a state of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.said = "nothing"

    def get_extra_state(self) -> str:
        return self.said

    def set_extra_state(self, state: str) -> None:
        self.said = state


class Doubles(nn.Linear):
    """A layer that writes itself in its own way."""

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}bias"] = destination[f"{prefix}bias"] * 2

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: object) -> None:
        state_dict[f"{prefix}bias"] = state_dict[f"{prefix}bias"] / 2
        super()._load_from_state_dict(state_dict, prefix, *rest)  # type: ignore[arg-type]


def test_what_layers_do_of_their_own_is_done() -> None:
    """Hooks, extra states and overridden ways of saving and loading of any layer are heard, as without tuning."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 2), Says(), Doubles(2, 2), nn.Linear(2, 2))
        enable_fine_tuning(model, merge_strategies(LoRAAllFineTuningStrategy(rank=1, targets="0"), FullFineTuningStrategy("2.bias")))
        return model

    model, fresh = build(), build()
    model[1].said = "hello"
    with torch.no_grad():
        model[0].lora_B.fill_(1)
        model[2].bias.fill_(3)
    model[3].register_state_dict_post_hook(lambda module, state, prefix, metadata: state.update(heard=torch.ones(1)))
    fresh[0].register_load_state_dict_post_hook(lambda module, keys: setattr(fresh, "loaded", True))

    state = model.state_dict()
    assert state.pop("heard") == 1
    fresh.load_state_dict(state)

    assert torch.equal(state["2.bias"], torch.full((2,), 6.0))
    assert fresh[1].said == "hello" and fresh.loaded
    assert values(fresh) == values(model)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"])
def test_a_copy_saves_and_loads_itself(copied: Callable[[nn.Module], nn.Module]) -> None:
    """A copy or pickle of a tuned model gives and takes its own state, and leaves the original's alone."""
    model = tuned()
    other, before = copied(model), values(model)

    other.load_state_dict({key: torch.zeros_like(value) for key, value in model.state_dict().items()})

    assert values(model) == before
    assert not any(value.any() for value in other.state_dict().values())


def test_a_state_dict_of_the_users_own_stays() -> None:
    """A model whose ``state_dict`` somebody has replaced keeps the replacement, and what it calls gives the trained part."""
    model = cnn()
    model.state_dict = lambda *args, **kwargs: {"own": nn.Module.state_dict(model)}  # type: ignore[method-assign]
    enable_fine_tuning(model, LoRAAllFineTuningStrategy())

    assert set(model.state_dict()["own"]) == trained_keys(model) | STATISTICS


def test_a_merged_model_sees_a_load() -> None:
    """A merged model computes with what is loaded into it."""
    model, fresh, inputs = tuned(), tuned(steps=0), input_for(cnn)

    with merged(fresh), torch.no_grad():
        fresh.load_state_dict(model.state_dict())
        loaded = fresh(inputs)
    with merged(model), torch.no_grad():
        assert torch.equal(loaded, model(inputs))


def test_a_tied_tensor_takes_its_last_value() -> None:
    """Different values for one tensor under two keys: the later key's is written, as torch does."""
    strategy = FullFineTuningStrategy(targets="embedding")
    short, long = tuned(tied, strategy), tuned(tied, strategy)
    state = short.state_dict()
    state["output.weight"] = state["output.weight"] + 1

    short.load_state_dict(state)
    type(long).load_state_dict(long, state)

    assert values(short) == values(long)


def test_a_tied_tensor_given_once_is_enough_where_torch_says_so() -> None:
    """A file that holds a tied tensor once loads with ``strict=False``, which reports the other key; the strict way writes nothing."""
    strategy = FullFineTuningStrategy()
    model, fresh = tuned(tied, strategy), tuned(tied, strategy, steps=0)
    state = {key: value for key, value in model.state_dict().items() if key != "output.weight"}
    before = values(fresh)

    with pytest.raises(StateDictError, match=r"output\.weight \(tied to embedding\.weight"):
        fresh.load_state_dict(state)
    assert values(fresh) == before

    assert fresh.load_state_dict(state, strict=False).missing_keys == ["output.weight"]
    assert values(fresh) == values(model)


def test_a_checkpoint_that_holds_a_tied_tensor_once_is_a_whole_one() -> None:
    """A checkpoint of the base under the other key of a tied pair is adopted: disabling gives its values back."""
    model = tuned(
        tied, merge_strategies([FullFineTuningStrategy(targets="middle"), LoRAAllFineTuningStrategy(targets="output", rank=2)])
    )
    base = tied()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(1)
    state = {key: value for key, value in base.state_dict().items() if key != "embedding.weight"}

    model.load_state_dict(state, strict=False)

    assert values(disable_fine_tuning(model)) == values(base)


def test_a_users_hook_on_the_tuned_model_is_called() -> None:
    """What a user hooks into saving or loading of the tuned model itself has its say, each alone and beside ours."""

    def add(module: nn.Module, state: dict[str, Tensor], *_: object) -> None:
        state["0.lora_A"] = torch.ones_like(module[0].lora_A)  # type: ignore[index, union-attr]

    enable_fine_tuning(model := mlp(), "lora")
    seen: list[str] = []
    model.register_state_dict_pre_hook(lambda *_: seen.append("before saving"))
    state = model.state_dict()
    assert seen == ["before saving"]

    enable_fine_tuning(model := mlp(), "lora")
    model.register_state_dict_post_hook(lambda module, state, prefix, metadata: state.update(heard=torch.ones(1)))
    assert "heard" in model.state_dict()

    enable_fine_tuning(model := mlp(), "lora")
    model.register_load_state_dict_pre_hook(add)
    model.load_state_dict(state)
    assert torch.equal(model[0].lora_A, torch.ones_like(model[0].lora_A))

    enable_fine_tuning(model := mlp(), "lora")
    model.register_load_state_dict_post_hook(lambda *_: seen.append("after loading"))
    model.load_state_dict(state)
    assert seen[-1] == "after loading"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_another_dtype_is_converted(dtype: torch.dtype) -> None:
    """A state dict in another precision loads as torch loads it, in the model's own; one of complex numbers does not fit real ones."""
    enable_fine_tuning(model := mlp(), "lora")
    given = {key: torch.full_like(tensor, 0.3).to(dtype) for key, tensor in model.state_dict().items()}

    model.load_state_dict(given)

    state = model.state_dict()
    assert all(tensor.dtype is torch.float32 and torch.equal(tensor, given[key].float()) for key, tensor in state.items())
    with pytest.raises(StateDictError, match="wrong dtype"):
        model.load_state_dict({key: tensor.to(torch.complex64) for key, tensor in state.items()})


def test_a_layout_that_does_not_fit_is_told() -> None:
    """A sparse or a nested tensor in a state dict is refused with the key and with what it is."""
    enable_fine_tuning(model := mlp(), "lora")
    state = model.state_dict()
    nested_tensor = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)

    for tensor, what in ((state["0.lora_A"].to_sparse(), "torch.sparse_coo"), (nested_tensor, "nested")):
        with pytest.raises(StateDictError, match=rf"no dense tensor: 0\.lora_A: layout {what} given"):
            model.load_state_dict(state | {"0.lora_A": tensor})
