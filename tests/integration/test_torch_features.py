"""A tuned model is a torch model: what torch does with the base, it does with the tuned one."""

from __future__ import annotations

import copy
import functools
import io
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import ALL, Builder, Delta, attention, cnn, encoder, input_for, lstm, mlp, nested, shared, single, tied, train
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from gift_core import (
    FineTuningStrategy,
    disable_fine_tuning,
    enable_fine_tuning,
    load_adapter,
    merge,
    merge_and_unload,
    merged,
    save_adapter,
    tuning_disabled,
    unmerge,
)
from gift_core.errors import SiteError
from gift_core.factories import is_instance, reparameterize
from gift_lora_plugin import LoRAAllFineTuningStrategy, LoRALinearFineTuningStrategy

builders = pytest.mark.parametrize("builder", ALL, ids=lambda builder: builder.__name__)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tuned(builder: Builder, strategy: FineTuningStrategy | None = None, **options: Any) -> nn.Module:
    """A model that was enabled and trained, in eval mode."""
    model = builder()
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(1)
        enable_fine_tuning(model, strategy or LoRAAllFineTuningStrategy(rank=2), **options)
        train(model, input_for(builder))
    return model.eval()


def gradients(model: nn.Module, run: Callable[[Tensor], Tensor], inputs: Tensor) -> dict[str, Tensor]:
    """The gradient of each trainable parameter."""
    model.zero_grad()
    run(inputs).square().mean().backward()
    found = {key: parameter.grad for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(value is not None for value in found.values())
    return {key: value.clone() for key, value in found.items() if value is not None}


def all_close(left: dict[str, Tensor], right: dict[str, Tensor], tolerance: float = 1e-5) -> bool:
    """The same keys, and numbers within the tolerance."""
    return list(left) == list(right) and all(
        torch.allclose(value, right[key], atol=tolerance, rtol=tolerance) for key, value in left.items()
    )


@builders
def test_autocast(builder: Builder) -> None:
    """Under autocast a model computes the same in training, in evaluation and merged, within bfloat16's rounding."""
    model, inputs = tuned(builder), input_for(builder)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(False)
    exact = model(inputs)
    try:
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            builder().eval()(inputs)
    except RuntimeError as error:  # of a plain model: nothing of ours has run
        pytest.skip(f"torch cannot compute the base model under autocast on this processor: {error}")

    with torch.autocast("cpu", torch.bfloat16):
        evaluated = model(inputs)
        model.train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        trained = model(inputs)
        model.eval()
        with merged(model), torch.no_grad():
            inside = model(inputs)
        found = gradients(model, lambda x: model(x).float(), inputs)

    scale = exact.abs().max().clamp(min=1)
    for other in (evaluated, trained, inside):
        assert (other.float() - exact).abs().max() <= 0.05 * scale
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in found.values())


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("builder", [mlp, nested, attention, encoder, lstm], ids=lambda builder: builder.__name__)
def test_gradient_checkpointing(builder: Builder, use_reentrant: bool) -> None:
    """Recomputing the forward pass in the backward pass gives the same gradients."""
    model = tuned(builder).train()
    inputs = input_for(builder).requires_grad_()
    expected = gradients(model, model, inputs)

    found = gradients(model, lambda x: checkpoint(model, x, use_reentrant=use_reentrant), inputs)

    assert all_close(found, expected, 1e-6)


@pytest.mark.parametrize("builder", [b for b in ALL if b is not shared], ids=lambda builder: builder.__name__)
def test_functional_call(builder: Builder) -> None:
    """`functional_call` with another model's parameters gives the other model's outputs, and leaves no trace.

    Not for a layer under two names, where torch itself does not put back what it swapped.
    """
    model, other, inputs = tuned(builder), tuned(builder), input_for(builder)
    train(other, inputs, 1)
    before = model(inputs)

    result = functional_call(model, {**dict(other.named_parameters()), **dict(other.named_buffers())}, (inputs,))

    assert torch.equal(result, other(inputs))
    assert torch.equal(model(inputs), before)


def test_functional_call_while_merged() -> None:
    """`functional_call` on a merged model computes from the parameters given."""
    model, other, inputs = tuned(mlp), tuned(mlp), input_for(mlp)
    train(other, inputs, 1)

    with merged(model), torch.no_grad():
        before = model(inputs)
        result = functional_call(model, dict(other.named_parameters()), (inputs,))

        assert torch.allclose(result, other(inputs), atol=1e-6)
        assert torch.equal(model(inputs), before)


@pytest.mark.parametrize("builder", [mlp, cnn, nested, single, tied, attention], ids=lambda builder: builder.__name__)
def test_func_grad(builder: Builder) -> None:
    """`torch.func.grad` over `functional_call` gives autograd's gradients."""
    model, inputs = tuned(builder), input_for(builder)
    trainable = {key: parameter.detach() for key, parameter in model.named_parameters() if parameter.requires_grad}

    found = grad(lambda parameters: functional_call(model, parameters, (inputs,)).square().mean())(trainable)

    assert all_close(found, gradients(model, model, inputs))


@pytest.mark.parametrize("builder", [mlp, cnn, nested, single, tied], ids=lambda builder: builder.__name__)
def test_gradients_of_each_example(builder: Builder) -> None:
    """`vmap` of `grad` gives each example's own gradients."""
    model, inputs = tuned(builder), input_for(builder)
    trainable = {key: parameter.detach() for key, parameter in model.named_parameters() if parameter.requires_grad}

    def loss(parameters: dict[str, Tensor], example: Tensor) -> Tensor:
        return functional_call(model, parameters, (example.unsqueeze(0),)).square().mean()

    found = vmap(grad(loss), in_dims=(None, 0))(trainable, inputs)

    for i in range(len(inputs)):
        assert all_close({key: value[i] for key, value in found.items()}, gradients(model, model, inputs[i : i + 1]))


def test_an_ensemble_of_adapters() -> None:
    """`vmap` over stacked adapters runs several on one base at once."""
    models = [tuned(mlp), tuned(mlp)]
    train(models[1], input_for(mlp), 1)
    keys = [key for key, parameter in models[0].named_parameters() if parameter.requires_grad]
    stacked = {key: torch.stack([model.get_parameter(key).detach() for model in models]) for key in keys}

    inputs = input_for(mlp)

    both = vmap(lambda parameters: functional_call(models[0], parameters, (inputs,)))(stacked)

    assert torch.allclose(both, torch.stack([model(inputs) for model in models]), atol=1e-6)


@pytest.mark.filterwarnings("ignore:The tensor attributes self.lstm._flat_weights")  # of any LSTM
@builders
@pytest.mark.parametrize("is_merged", [False, True])
def test_export(builder: Builder, is_merged: bool) -> None:
    """`torch.export` captures a tuned and a merged model, and computes the same."""
    model, inputs = tuned(builder), input_for(builder)
    if is_merged:
        merge(model)

    with torch.no_grad():
        expected = model(inputs)
        exported = torch.export.export(model, (inputs,)).module()

        assert torch.allclose(exported(inputs), expected, atol=1e-5)


COMPILED = {
    "eager": (cnn, nested, tied, single, attention, encoder),
    "aot_eager": (mlp, cnn, attention),
}


@pytest.mark.parametrize(
    ("builder", "backend"),
    [pytest.param(builder, backend, id=f"{builder.__name__}-{backend}") for backend, some in COMPILED.items() for builder in some],
)
def test_compile(builder: Builder, backend: str) -> None:
    """`torch.compile` takes the whole model as one graph, in training, in evaluation and merged."""
    model, inputs = tuned(builder), input_for(builder)
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend=backend)

    assert torch.allclose(compiled(inputs), model(inputs), atol=1e-5)
    model.train()
    reference.train()
    assert all_close(gradients(model, compiled, inputs), gradients(reference, reference, inputs), 1e-4)
    model.eval()
    with torch.no_grad():
        expected = model(inputs)
        merge(model)
        assert torch.allclose(compiled(inputs), expected, atol=1e-5)
        unmerge(model)
        assert torch.allclose(compiled(inputs), expected, atol=1e-5)


# where torch breaks the graph, its compiler looks at what goes over, and warns itself of a weight that is no leaf
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_recurrent_layer() -> None:
    """A compiled model with an LSTM computes the same; torch itself breaks the graph there."""
    model, inputs = tuned(lstm), input_for(lstm)

    compiled = torch.compile(model, backend="eager")

    assert torch.allclose(compiled(inputs), model(inputs), atol=1e-6)


def test_compiled_training() -> None:
    """Steps of a compiled model are those of the plain one."""
    model = tuned(cnn)
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

    for network in (compiled, reference):
        train(network, input_for(cnn), 3)

    assert all_close(dict(model.named_parameters()), dict(reference.named_parameters()), 1e-4)  # type: ignore[arg-type]


def test_switching_adapters_does_not_recompile() -> None:
    """A compiled model takes another adapter's tensors, by ``.data`` or as parameters, without another compilation."""
    model, other, inputs = tuned(mlp), tuned(mlp), input_for(mlp)
    train(other, inputs, 1)
    theirs, graphs = dict(other.named_parameters()), []

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=count)
    compiled(inputs)
    for key, parameter in model.named_parameters():
        parameter.data = theirs[key].detach().clone()
    switched = compiled(inputs)

    assert torch.allclose(switched, other(inputs), atol=1e-6)
    assert len(graphs) == 1


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # the layers' inputs need no gradients
@builders
def test_hooks(builder: Builder) -> None:
    """Forward, pre-forward and backward hooks on adapted layers run, whenever they were registered."""
    model, inputs = builder(), input_for(builder)
    calls: list[tuple[str, str, str]] = []
    names = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    names = [name for name in names if not name.endswith("out_proj")]  # attention reads its weight and never calls it

    def register(when: str) -> None:
        for name in names:
            layer = model.get_submodule(name)
            layer.register_forward_pre_hook(lambda *_, at=(when, "pre", name): calls.append(at))
            layer.register_forward_hook(lambda *_, at=(when, "forward", name): calls.append(at))
            layer.register_full_backward_hook(lambda *_, at=(when, "backward", name): calls.append(at))

    register("before")
    enable_fine_tuning(model, LoRAAllFineTuningStrategy(rank=1))
    register("after")
    model(inputs).square().mean().backward()

    assert set(calls) == set(itertools.product(("before", "after"), ("pre", "forward", "backward"), names))
    calls.clear()
    disable_fine_tuning(model)
    model(inputs)
    assert {("before", "forward", name) for name in names} <= set(calls)


def test_a_replaced_forward() -> None:
    """A forward that was replaced on the instance, as device hooks do, reads the effective weight."""
    model, inputs = tuned(single), input_for(single)
    expected = model(inputs)

    model.forward = lambda x: nn.functional.linear(x, model.weight, model.bias)  # type: ignore[method-assign]

    assert torch.allclose(model(inputs), expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@builders
@torch.no_grad()
def test_another_dtype(builder: Builder, dtype: torch.dtype) -> None:
    """A tuned model that is moved to another dtype is wholly in it, computes about the same, and can still be disabled."""
    model, inputs = tuned(builder), input_for(builder)
    expected = model(inputs)

    model.to(dtype)
    result = model(inputs.to(dtype) if inputs.is_floating_point() else inputs)

    assert result.dtype == dtype
    assert all(parameter.dtype == dtype for parameter in model.parameters())
    assert (result.double() - expected.double()).abs().max() <= 0.05 * expected.abs().max().clamp(min=1)
    disable_fine_tuning(model)
    assert all(parameter.dtype == dtype for parameter in model.parameters())


def test_half_and_back() -> None:
    """``half()``, ``float()`` and ``bfloat16()`` are the same as ``to``; an adapter made in half trains in half."""
    model = mlp().half()
    enable_fine_tuning(model, LoRAAllFineTuningStrategy(rank=1))

    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    train(model, input_for(mlp).half(), 1)
    assert model.float()(input_for(mlp)).dtype == torch.float32


def test_the_meta_device() -> None:
    """A tuned model moves to the meta device, where shapes are computed."""
    model = tuned(cnn).to("meta")

    assert model(input_for(cnn).to("meta")).shape == (3, 4)


def test_averaging() -> None:
    """`AveragedModel` averages the parameters that train, with ``replace_parameter_function=False`` as its copy needs."""
    model = tuned(mlp, replace_parameter_function=False)
    averaged = AveragedModel(model)
    seen = []
    for _ in range(3):
        train(model, input_for(mlp), 1)
        averaged.update_parameters(model)
        seen.append(model.get_parameter("0.lora_B").detach().clone())

    assert torch.allclose(averaged.module.get_parameter("0.lora_B"), torch.stack(seen).mean(0), atol=1e-6)
    assert torch.equal(dict(averaged.module.named_parameters())["0.weight"], mlp().get_parameter("0.weight"))
    assert averaged.module(input_for(mlp)).shape == (3, 3)


@pytest.mark.parametrize("use_buffers", [False, True])
def test_exponential_average(use_buffers: bool, tmp_path: Path) -> None:
    """An exponential average of a tuned model is that of what trains, its base keeps its bits, and it goes into a file of its own."""
    decay, keys = 0.75, ("conv.lora_A", "head.lora_B", "bn.running_mean")
    model = tuned(cnn, replace_parameter_function=False)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=use_buffers)
    seen: list[dict[str, Tensor]] = []
    for _ in range(4):
        train(model, input_for(cnn), 1)
        averaged.update_parameters(model)
        held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        seen.append({key: held[key].detach().clone() for key in keys})
    averaged.eval()
    save_adapter(averaged, tmp_path / "average")
    load_adapter(fresh := cnn().eval(), tmp_path / "average")

    found = {**dict(averaged.module.named_parameters()), **dict(averaged.module.named_buffers())}
    for key in keys:
        expected = functools.reduce(lambda average, now: decay * average + (1 - decay) * now, (step[key] for step in seen))
        if key.startswith("bn") and not use_buffers:
            expected = seen[-1][key]
        assert torch.allclose(found[key], expected, atol=1e-6)
    assert all(torch.equal(found[key], value) for key, value in cnn().named_parameters())
    assert torch.equal(averaged(input_for(cnn)), fresh(input_for(cnn)))


@pytest.mark.parametrize("builder", [mlp, cnn, nested], ids=lambda builder: builder.__name__)
def test_symbolic_trace(builder: Builder) -> None:
    """`torch.fx.symbolic_trace` traces a tuned model, and its graph module computes the same and trains."""
    model, inputs = tuned(builder), input_for(builder)

    traced = torch.fx.symbolic_trace(model)

    assert torch.allclose(traced(inputs), model(inputs), atol=1e-6)
    assert all_close(gradients(traced, traced, inputs), gradients(model, model, inputs))


@pytest.mark.parametrize(("builder", "inputs"), [(single, torch.ones(3, 4)), (lambda: nn.Conv1d(4, 3, 1), torch.ones(3, 4, 2))])
def test_symbolic_trace_into_a_layer(builder: Builder, inputs: Tensor) -> None:
    """Tracing into an adapted layer, where its weight would become a constant, is refused; unloaded, it works."""
    model = builder()
    enable_fine_tuning(model, LoRAAllFineTuningStrategy(rank=1))

    with pytest.raises(SiteError, match="merge_and_unload"):
        torch.fx.symbolic_trace(model)
    merge_and_unload(model)
    assert torch.equal(torch.fx.symbolic_trace(model)(inputs), model(inputs))


ENCODER_PARTS = {
    "all linear": LoRALinearFineTuningStrategy(rank=2),
    "attention's output": LoRALinearFineTuningStrategy(rank=2, targets="*.out_proj"),
    "first": LoRALinearFineTuningStrategy(rank=2, targets="*.linear1"),
    "second": LoRALinearFineTuningStrategy(rank=2, targets="*.linear2"),
    "attention's input": FineTuningStrategy(
        module_caps=[(is_instance(nn.MultiheadAttention), reparameterize(Delta, names=("in_proj_weight",)))]
    ),
}


@pytest.mark.parametrize(
    ("builder", "part"),
    [*((encoder, part) for part in ENCODER_PARTS), (attention, "attention's output"), (attention, "attention's input")],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_the_fast_path_of_attention(builder: Builder, part: str) -> None:
    """Torch's fused kernels, which read the weights without calling the layers, see the effective weights."""
    model, inputs = tuned(builder, ENCODER_PARTS[part]), input_for(builder)
    base = builder().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)
    slow = model(inputs)

    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        fast = model(inputs)
    names = {event.name for event in profile.events()}

    assert names & {"aten::_transformer_encoder_layer_fwd", "aten::_native_multi_head_attention"}
    assert torch.allclose(fast, slow, atol=1e-5)
    assert not torch.allclose(fast, base(inputs), atol=1e-3)
    with tuning_disabled(model), torch.no_grad():
        assert torch.allclose(model(inputs), base(inputs), atol=1e-5)


@builders
def test_deep_copy(builder: Builder) -> None:
    """A deep copy computes the same, trains on its own, and its ``parameters()`` are its own."""
    model, inputs = tuned(builder), input_for(builder)
    before = model(inputs)

    other = copy.deepcopy(model)

    assert torch.equal(other(inputs), before)
    assert not {id(parameter) for parameter in other.parameters()} & {id(parameter) for parameter in model.parameters()}
    train(other, inputs, 1)
    assert torch.equal(model(inputs), before)
    assert not torch.equal(other(inputs), before)
    disable_fine_tuning(other)
    assert torch.equal(model(inputs), before)


@builders
def test_torch_save(builder: Builder) -> None:
    """A model that `torch.save` wrote comes back tuned: same outputs, trainable, and with the way back to the base."""
    model, inputs = tuned(builder), input_for(builder)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)

    other = torch.load(buffer, weights_only=False)

    assert torch.equal(other(inputs), model(inputs))
    assert list(other.state_dict()) == list(model.state_dict())
    train(other, inputs, 1)
    disable_fine_tuning(other)
    plain = builder()
    assert [type(module) for module in other.modules()] == [type(module) for module in plain.modules()]
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in other.state_dict().items())


@builders
def test_gradients_in_training_and_evaluation(builder: Builder) -> None:
    """Without dropout and with BatchNorm in evaluation, gradients are the same in both modes."""
    model, inputs = tuned(builder), input_for(builder)
    evaluated = gradients(model, model, inputs)

    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()

    assert all_close(gradients(model, model, inputs), evaluated, 1e-6)


def test_forward_writes_no_weight() -> None:
    """No mode of forward changes a parameter's version or bits."""
    model, inputs = tuned(cnn), input_for(cnn)
    parameters = dict(model.named_parameters())
    versions = {key: parameter._version for key, parameter in parameters.items()}

    model(inputs)
    model.train()(inputs)
    model.eval()
    with torch.no_grad(), merged(model):
        model(inputs)
    with torch.inference_mode():
        model(inputs)

    assert {key: parameter._version for key, parameter in parameters.items()} == versions
