"""What a tuned model knows of itself, and which tensors are whose."""

from __future__ import annotations

import pytest
import torch
from models import ALL, Builder, cnn, mlp
from torch import nn

from gift_core import disable_fine_tuning, enable_fine_tuning
from gift_core.errors import StateError
from gift_core.record import Original, find_tuning, named_tensors, same_bits, structure_digest, tuned_root

each_model = pytest.mark.parametrize("build", ALL, ids=lambda build: build.__name__)


@each_model
def test_tensors_have_torchs_keys(build: Builder) -> None:
    """Every parameter, and every buffer, comes under each key that torch gives it, with the module that holds it."""
    model = build()
    of_torch = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))

    for buffers, expected in enumerate(of_torch):
        found = list(named_tensors(model, buffers=bool(buffers)))

        assert [(key, id(tensor)) for key, _, _, tensor in found] == [(key, id(tensor)) for key, tensor in expected]
        assert all(getattr(module, name) is tensor and key.endswith(name) for key, module, name, tensor in found)


@each_model
def test_the_structure_is_names_and_shapes(build: Builder) -> None:
    """Two models of equal names and shapes have one digest; values, dtypes and buffers that no file holds are none of it."""
    other = build().double()
    for parameter in other.parameters():
        parameter.data.add_(1)
    other.register_buffer("scratch", torch.ones(3), persistent=False)

    assert structure_digest(other) == structure_digest(build())
    other.register_buffer("kept", torch.ones(3))
    assert structure_digest(other) != structure_digest(build())


def test_another_shape_is_another_structure() -> None:
    """A layer that is wider, or that has another name, gives another digest."""
    digests = {structure_digest(nn.Sequential(nn.Linear(2, size))) for size in (3, 4)}
    digests.add(structure_digest(nn.ModuleDict({"a": nn.Linear(2, 3)})))

    assert len(digests) == 3


def test_a_tuned_model_with_a_tuned_part_is_itself_the_root() -> None:
    """A tuned model is its own root, also where a tuned model was put into it later; a plain one with two is ambiguous."""
    first, second = mlp(), cnn()
    enable_fine_tuning(first, "lora")
    enable_fine_tuning(second, "lora")
    both = nn.ModuleList([first, second])

    with pytest.raises(StateError, match=r"several tuned models \('0', '1'\)"):
        tuned_root(both)
    first.add_module("part", second)
    assert tuned_root(first) is first
    assert tuned_root(nn.ModuleList([second])) is second


def test_one_model_under_two_names_is_one_root() -> None:
    """A tuned model that a larger one holds twice is not ambiguous."""
    model = mlp()
    enable_fine_tuning(model, "lora")

    assert tuned_root(nn.ModuleList([model, model])) is model


def test_disabling_leaves_no_record() -> None:
    """The record comes with tuning and goes with it."""
    model = mlp()
    assert find_tuning(model) is None

    enable_fine_tuning(model, "lora")
    assert find_tuning(model) is not None

    disable_fine_tuning(model)
    assert find_tuning(model) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.complex64], ids=str)
@pytest.mark.parametrize("size", [0, 1, 3, 8, 16])
def test_bits_are_compared(dtype: torch.dtype, size: int) -> None:
    """Tensors of the same bits are the same, wherever they lie in their storage; one other bit makes them different."""
    storage = torch.ones(size + 3, dtype=dtype)
    left, right = storage[:size].clone(), storage[3:]

    assert same_bits(left, right)
    assert not same_bits(left, storage)
    if size:
        left[-1] = 2
        assert not same_bits(left, right)


def test_a_sign_of_zero_is_a_bit_and_nan_equals_itself() -> None:
    """What a comparison of numbers takes for equal or unequal is judged by its bits."""
    assert not same_bits(torch.tensor([0.0, 0.0]), torch.tensor([0.0, -0.0]))
    assert same_bits(torch.tensor([float("nan")]), torch.tensor([float("nan")]))
    assert not same_bits(torch.zeros(2, 3), torch.zeros(3, 2))


def test_an_original_follows_a_move() -> None:
    """A tensor that was converted has not moved, one that was written has, and one that is gone has not."""
    layer = nn.BatchNorm1d(3)
    original = Original(layer, "running_mean", "running_mean", layer.running_mean.clone(), True)

    layer.double()
    assert not original.has_moved()
    layer.running_mean[1] = 2.0
    assert original.has_moved()
    assert original.current() is layer.running_mean
    layer.running_mean = None
    assert original.current() is None and not original.has_moved()


def test_an_original_of_a_parameter() -> None:
    """A parameter is looked up among the parameters, not among the buffers."""
    layer = nn.Linear(2, 2)
    original = Original(layer, "bias", "bias", layer.bias.detach().clone(), False)

    assert original.current() is layer.bias and not original.has_moved()
