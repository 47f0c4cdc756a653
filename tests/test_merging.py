"""Merged weights: the tuned model's answers at the base model's speed, and back without a trace."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import ALL, Builder, Delta, cnn, embedding, encoder, fingerprint, input_for, lstm, mlp, nested, shared, single, tied, train
from torch import Tensor, nn

from gift_core import (
    FineTuningStrategy,
    FullFineTuningStrategy,
    disable_fine_tuning,
    enable_fine_tuning,
    full_state_dict,
    load_adapter,
    merge,
    merge_and_unload,
    merge_strategies,
    merged,
    save_adapter,
    tuning_disabled,
    unmerge,
)
from gift_core.errors import SiteError, StateError
from gift_core.factories import is_instance, keep_trainable, name_is, reparameterize, replace_module
from gift_lora_plugin import LoRAAllFineTuningStrategy, LoRALinearFineTuningStrategy

#: A merged weight is rounded once more than the sum of two products: relative to the largest output, a few units in the last place.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}

DTYPES = list(TOLERANCE)


def tuned(builder: Builder = cnn, strategy: FineTuningStrategy | None = None, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model that was enabled and trained, in eval mode."""
    model = builder()
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(1)
        enable_fine_tuning(model, strategy or LoRAAllFineTuningStrategy(rank=2))
        train(model, input_for(builder))
    return model.eval().to(dtype)


def in_dtype(inputs: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers in the dtype; token numbers as they are."""
    return inputs.to(dtype) if inputs.is_floating_point() else inputs


def close(left: Tensor, right: Tensor) -> bool:
    """Equal within the tolerance of the dtype, relative to the largest number."""
    error = (left.double() - right.double()).abs().max()
    return bool(error <= TOLERANCE[left.dtype] * right.double().abs().max().clamp(min=1))


def frozen(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter."""
    return {key: parameter.detach().clone() for key, parameter in model.named_parameters()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("builder", ALL, ids=lambda builder: builder.__name__)
@torch.no_grad()
def test_merged_equals_unmerged(builder: Builder, dtype: torch.dtype) -> None:
    """A merged model gives the unmerged model's outputs, within the rounding of one more sum."""
    model, inputs = tuned(builder, dtype=dtype), in_dtype(input_for(builder), dtype)
    before = model(inputs)

    with merged(model):
        inside = model(inputs)

    assert close(inside, before)
    assert torch.equal(model(inputs), before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_two_thousand_cycles(dtype: torch.dtype) -> None:
    """Merging and unmerging 2,000 times moves no bit of any parameter and of any output."""
    model, inputs = tuned(dtype=dtype), input_for(cnn).to(dtype)
    parameters, before = frozen(model), model(inputs)
    first = None

    for _ in range(2000):
        merge(model)
        if first is None:
            first = model(inputs)
        unmerge(model)
    with merged(model):
        last = model(inputs)

    assert all(torch.equal(parameters[key], parameter) for key, parameter in model.named_parameters())
    assert torch.equal(last, first)
    assert torch.equal(model(inputs), before)


@pytest.mark.parametrize("builder", ALL, ids=lambda builder: builder.__name__)
def test_unmerge_leaves_no_trace(builder: Builder) -> None:
    """After unmerge every object, class, flag and byte of the tuned model is what it was."""
    model = tuned(builder)
    before = fingerprint(model)

    merge(model)
    unmerge(model)

    assert fingerprint(model) == before


def test_merged_runs_the_base_model() -> None:
    """Merged, a layer runs its own class's forward with one weight, as the plain layer does."""
    model, plain = tuned(mlp), mlp()

    def kernels(module: nn.Module) -> list[str]:
        with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            module(input_for(mlp))
        return [event.name for event in profile.events()]

    with merged(model), torch.no_grad():
        model(input_for(mlp))

        assert kernels(model) == kernels(plain)


def test_the_context_ends_after_an_error() -> None:
    """An error inside `merged` leaves an unmerged model."""
    model = tuned()
    before = fingerprint(model)

    with pytest.raises(KeyError), merged(model):
        raise KeyError

    assert fingerprint(model) == before


def test_merging_twice_and_unmerging_twice() -> None:
    """Merging a merged model and unmerging an unmerged one are errors that name the other verb."""
    model = tuned()
    with pytest.raises(StateError, match=r"not merged: merge\(model\)"):
        unmerge(model)
    merge(model)
    with pytest.raises(StateError, match=r"merged already: unmerge\(model\)"):
        merge(model)
    unmerge(model)

    with pytest.raises(StateError, match="not merged"):
        unmerge(model)


@pytest.mark.parametrize("verb", [merge, unmerge, merge_and_unload])
def test_a_plain_model(verb: Callable[[nn.Module], object]) -> None:
    """A plain model cannot be merged, unmerged or unloaded; the error says what to call."""
    with pytest.raises(StateError, match="enable_fine_tuning"):
        verb(cnn())


@pytest.mark.parametrize("builder", [cnn, lstm, mlp], ids=lambda builder: builder.__name__)
def test_training_while_merged_is_refused(builder: Builder) -> None:
    """A training step of a merged model would not reach its adapters, so it is an error; evaluation is none."""
    model, inputs = tuned(builder), input_for(builder)

    with merged(model):
        model.train()
        with pytest.raises(StateError, match=r"unmerge\(model\)"):
            model(inputs)
        with torch.no_grad():
            model(inputs)
        model.eval()
        model(inputs)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_step_while_merged(optimizer: type[torch.optim.Optimizer]) -> None:
    """A step that was computed before merging and taken while merged is in the merged weights."""
    model, inputs = tuned(), input_for(cnn)
    optimizer_ = optimizer(model.parameters(), lr=0.1)  # type: ignore[call-arg]
    model(inputs).square().mean().backward()

    with merged(model), torch.no_grad():
        before = model(inputs)
        optimizer_.step()
        after = model(inputs)
    expected = model(inputs)

    assert not close(before, expected)
    assert close(after, expected)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 3])
@torch.no_grad()
def test_a_load_while_merged(assign: bool, steps: int) -> None:
    """A state dict that is loaded while merged is in the merged weights, also where the tensors themselves are replaced."""
    model, other, inputs = tuned(), tuned(), input_for(cnn)
    with torch.enable_grad():
        train(other, inputs, steps)
    state = {key: value.clone() for key, value in other.state_dict().items()}

    with merged(model):
        model(inputs)
        for _ in range(steps):
            model.load_state_dict(state, assign=assign)
        inside = model(inputs)

    assert close(inside, other(inputs))
    assert torch.equal(model(inputs), other(inputs))


@torch.no_grad()
def test_new_tensors_behind_a_merged_model() -> None:
    """An adapter switched while merged, by its ``.data`` or by whole parameters, is in the merged weights."""
    model, other, inputs = tuned(mlp), tuned(mlp), input_for(mlp)
    with torch.enable_grad():
        train(other, inputs, 1)
    expected = other(inputs)
    theirs = dict(other.named_parameters())

    with merged(model):
        model(inputs)
        for key, parameter in model.named_parameters():
            parameter.data = theirs[key].detach().clone()
        assert close(model(inputs), expected)
    with merged(second := tuned(mlp)):
        second(inputs)
        for module_name, module in second.named_modules():
            for key in list(module._parameters):
                setattr(module, key, copy.deepcopy(theirs[f"{module_name}.{key}"]))

        assert close(second(inputs), expected)


@pytest.mark.parametrize("write", [Tensor.copy_, lambda p, average: p.data.copy_(average)], ids=["counted", "past torch"])
@torch.no_grad()
def test_a_write_past_torch_is_in_the_next_merge(write: Callable[[Tensor, Tensor], Tensor]) -> None:
    """An average written through ``.data`` is in the merged weights when they are merged again; one that torch counts, at once."""
    model, inputs = tuned(), input_for(cnn)
    averages = {key: 0.5 * parameter for key, parameter in model.named_parameters() if parameter.requires_grad}

    merge(model)
    model(inputs)
    for key, average in averages.items():
        write(model.get_parameter(key), average)
    if write is not Tensor.copy_:
        unmerge(model)
        merge(model)
    inside = model(inputs)
    unmerge(model)

    assert close(inside, model(inputs))


@torch.no_grad()
def test_an_adapter_file_while_merged(tmp_path: Path) -> None:
    """An adapter file that is loaded while merged is in the merged weights."""
    model, other, inputs = tuned(), tuned(), input_for(cnn)
    with torch.enable_grad():
        train(other, inputs)
    save_adapter(other, tmp_path / "adapter")

    with merged(model):
        load_adapter(model, tmp_path / "adapter")
        inside = model(inputs)

    assert close(inside, other(inputs))


@pytest.mark.parametrize("builder", ALL, ids=lambda builder: builder.__name__)
def test_saving_while_merged(builder: Builder, tmp_path: Path) -> None:
    """The state dict and the adapter file of a merged model are those of the unmerged one."""
    model = tuned(builder)
    state = model.state_dict()
    digest = save_adapter(model, tmp_path / "adapter").digest

    with merged(model):
        inside = model.state_dict()
        assert save_adapter(model, tmp_path / "adapter").digest == digest

    assert list(inside) == list(state)
    assert all(torch.equal(inside[key], value) for key, value in state.items())


@pytest.mark.parametrize("builder", ALL, ids=lambda builder: builder.__name__)
@torch.no_grad()
def test_copies_of_a_merged_model(builder: Builder) -> None:
    """A deep copy and a `torch.save` of a merged model are merged, compute the same, and unmerge on their own."""
    model, inputs = tuned(builder), input_for(builder)
    unmerged = model(inputs)
    merge(model)
    expected = model(inputs)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(model), torch.load(buffer, weights_only=False)]

    for other in copies:
        assert torch.equal(other(inputs), expected)
        unmerge(other)
        assert torch.equal(other(inputs), unmerged)
        assert torch.equal(model(inputs), expected)
        with pytest.raises(StateError):
            merge(model)


@torch.no_grad()
def test_moving_a_merged_model() -> None:
    """A merged model that is moved to another dtype computes in it, and so does what unmerge gives back."""
    model, inputs = tuned(), input_for(cnn)
    expected = model(inputs)

    merge(model)
    model.to(torch.float64)
    inside = model(inputs.double())
    unmerge(model)

    assert torch.allclose(inside, expected.double(), atol=1e-5)
    assert torch.allclose(model(inputs.double()), expected.double(), atol=1e-5)


@pytest.mark.parametrize("builder", ALL, ids=lambda builder: builder.__name__)
@torch.no_grad()
def test_disable_while_merged(builder: Builder) -> None:
    """Disabling a merged model gives the original back, and so does `tuning_disabled` for a while."""
    model, inputs = builder().eval(), input_for(builder)
    before, base = fingerprint(model), builder().eval().requires_grad_(False)(inputs)
    with torch.enable_grad():
        enable_fine_tuning(model, LoRAAllFineTuningStrategy(rank=2))
        train(model, inputs)
    merge(model)
    inside = model(inputs)

    with tuning_disabled(model):
        assert close(model(inputs), base)
    assert torch.equal(model(inputs), inside)
    disable_fine_tuning(model)

    assert fingerprint(model) == before


# --- unloading


@pytest.mark.parametrize("builder", ALL, ids=lambda builder: builder.__name__)
@pytest.mark.parametrize("was_merged", [False, True])
@torch.no_grad()
def test_merge_and_unload(builder: Builder, was_merged: bool) -> None:
    """Unloading gives the base's classes, keys and flags with the tuned model's weights; it can be loaded and tuned again."""
    model, plain, inputs = tuned(builder), builder().eval(), input_for(builder)
    expected = model(inputs)
    if was_merged:
        merge(model)

    result = merge_and_unload(model)

    assert result is model
    assert [(name, type(module)) for name, module in model.named_modules()] == [
        (name, type(module)) for name, module in plain.named_modules()
    ]
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert close(model(inputs), expected)
    if builder is not tied:  # two weights that were one in the base
        plain.load_state_dict(model.state_dict())
        assert close(plain(inputs), expected)
    enable_fine_tuning(model, LoRAAllFineTuningStrategy(rank=1))
    assert close(model(inputs), expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("builder", [mlp, cnn, encoder])
@torch.no_grad()
def test_what_is_unloaded_can_be_scripted(builder: Builder) -> None:
    """A refused scripted model is told to be scripted after `merge_and_unload`, and that works."""
    model, inputs = tuned(builder), input_for(builder)
    expected = model(inputs)

    scripted = torch.jit.script(merge_and_unload(model))

    assert close(scripted(inputs), expected)


@torch.no_grad()
def test_unloading_keeps_what_was_trained() -> None:
    """A kept head, biases and BatchNorm's statistics stay as they were trained."""
    strategy = merge_strategies(LoRAAllFineTuningStrategy(rank=2, train_bias=True, targets="conv"), FullFineTuningStrategy("head"))
    model = tuned(strategy=strategy)
    trained = {key: value.clone() for key, value in model.state_dict().items() if "lora" not in key}

    merge_and_unload(model)

    assert {"head.weight", "conv.bias", "bn.running_mean"} <= set(trained)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in trained.items())


@torch.no_grad()
def test_unloading_unties_what_differs() -> None:
    """A tied weight of which one side was adapted becomes two; one that both sides share adapted stays one object a side."""
    model, inputs = tuned(tied, LoRALinearFineTuningStrategy(rank=2, targets="output")), input_for(tied)
    base, expected = tied().get_parameter("embedding.weight"), model(inputs)

    merge_and_unload(model)

    assert torch.equal(model.get_parameter("embedding.weight"), base)
    assert not torch.equal(model.get_parameter("output.weight"), base)
    assert close(model(inputs), expected)


@torch.no_grad()
def test_unloading_a_shared_layer() -> None:
    """One layer under two names is one layer after unloading."""
    model = tuned(shared)

    merge_and_unload(model)

    assert model.get_submodule("first") is model.get_submodule("second")
    assert model.get_parameter("first.weight") is model.get_parameter("second.weight")


def test_unloading_keeps_hooks_and_references() -> None:
    """Layers are the same objects after unloading, and their hooks still run."""
    model, calls = cnn(), []
    layer, weight = model.get_submodule("conv"), model.get_parameter("conv.weight")
    layer.register_forward_hook(lambda *_: calls.append(1))
    enable_fine_tuning(model, LoRAAllFineTuningStrategy())

    merge_and_unload(model)
    model(input_for(cnn))

    assert model.get_submodule("conv") is layer
    assert model.get_parameter("conv.weight") is weight
    assert calls == [1]


def test_unloading_works_after_inference_mode() -> None:
    """What is unloaded inside inference mode can be trained afterwards."""
    model = tuned(mlp)

    with torch.inference_mode():
        merge_and_unload(model)

    train(model, input_for(mlp))


def doubled(module: nn.Module) -> nn.Module:
    """A replacement that is no function of the weight."""
    return nn.Sequential(module, nn.Linear(8, 8))


def test_a_replaced_module_is_refused() -> None:
    """A method that replaced a module has no merged weight: unloading says so and leaves the model tuned."""
    model = mlp()
    enable_fine_tuning(
        model,
        FineTuningStrategy(
            module_caps=[(name_is("0"), replace_module(doubled)), (name_is("2"), reparameterize(Delta, keep=("bias",)))]
        ),
    )
    before = fingerprint(model)

    with pytest.raises(SiteError, match="replaced module"):
        merge_and_unload(model)

    assert fingerprint(model) == before
    with merged(model), torch.no_grad():
        model(input_for(mlp))


def test_a_layer_that_left_is_not_forgotten() -> None:
    """A model that lost one of its adapted layers is not unloaded, because that layer's adapter would be gone; nothing changes."""
    model = tuned(mlp)
    model[2] = nn.Linear(8, 3)
    with full_state_dict(model):
        before = fingerprint(model)

        with pytest.raises(StateError, match=r"not unloaded: 2\.lora_A.* left the model.*put it back"):
            merge_and_unload(model)

        assert fingerprint(model) == before


def test_a_method_that_fails_half_way() -> None:
    """If one layer's weight cannot be computed, no layer is merged."""

    class Fails(Delta):
        """Works while its delta is zero."""

        def reparameterize(self, weight: Tensor) -> Tensor:
            if self.delta.any():
                raise ArithmeticError("no weight")
            return super().reparameterize(weight)

    model = mlp()
    enable_fine_tuning(model, FineTuningStrategy(module_caps=[(is_instance("Linear"), reparameterize(Fails))]))
    with torch.no_grad():
        model.get_parameter("2.delta").add_(1)
    before = fingerprint(model)

    for verb in (merge, merge_and_unload):
        with pytest.raises(ArithmeticError):
            verb(model)

    assert fingerprint(model) == before


def test_methods_of_several_weights() -> None:
    """A layer with several adapted weights merges and unloads them all."""
    model = nn.LSTM(4, 5, batch_first=True).eval()
    names = ("weight_ih_l0", "weight_hh_l0")
    enable_fine_tuning(model, FineTuningStrategy(module_caps=[(is_instance("LSTM"), reparameterize(Delta, names=names))]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
        expected = model(input_for(lstm))[0]
        with merged(model):
            assert close(model(input_for(lstm))[0], expected)

        merge_and_unload(model)

        assert type(model) is nn.LSTM
        assert close(model(input_for(lstm))[0], expected)


def test_full_fine_tuning_merges_to_itself() -> None:
    """A strategy that adapts no weight can be merged and unloaded: the weights are the trained ones."""
    model = tuned(embedding, FineTuningStrategy(module_caps=[(is_instance("Linear"), keep_trainable())]))
    expected = model(input_for(embedding))

    with merged(model):
        assert torch.equal(model(input_for(embedding)), expected)
    merge_and_unload(model)

    assert torch.equal(model(input_for(embedding)), expected)


@pytest.mark.parametrize("builder", [single, nested, encoder], ids=lambda builder: builder.__name__)
def test_merging_through_a_wrapper(builder: Builder) -> None:
    """Every verb takes a model that holds the tuned one."""
    model = tuned(builder)
    outer = nn.Sequential(model)
    before = fingerprint(outer)

    merge(outer)
    unmerge(outer)

    assert fingerprint(outer) == before
    assert merge_and_unload(outer) is outer


@pytest.mark.parametrize("gone", ["buffer", "stamp"])
def test_a_reader_amid_an_unmerging_gets_the_effective_weight(gone: str) -> None:
    """What a thread finds while another takes the merged weight away is the effective weight, whichever part went first."""
    model = tuned(mlp)
    expected = model[0].weight.clone()
    merge(model)
    if gone == "buffer":
        del model[0]._buffers["merged_weight"]
    else:
        del model[0]._gift_merge_stamp

    assert torch.equal(model[0].weight, expected)
