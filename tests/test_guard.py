from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import mlp, refused
from torch import Tensor, nn

from gift_core import FineTuningStrategy, enable_fine_tuning
from gift_core.allocation import AllocationLimit
from gift_core.errors import ActionError
from gift_core.guard import Guard, Room


def add_in_place(tensor: Tensor) -> None:
    """Write as an optimizer does."""
    with torch.no_grad():
        tensor.add_(1)


def write_past_the_version(tensor: Tensor) -> None:
    """Write one number, unseen by torch's version counter."""
    tensor.data.view(-1)[-1] = 3.0


def flip_the_sign_of_zero(tensor: Tensor) -> None:
    """Change a bit that no comparison of numbers shows."""
    tensor.data.neg_()


def exchange_memory(tensor: Tensor) -> None:
    """Give the tensor another storage with the same values."""
    tensor.data = tensor.data.clone()


def change_dtype(tensor: Tensor) -> None:
    """Convert in place, as ``module.double()`` does."""
    tensor.data = tensor.data.to(torch.complex128 if tensor.is_complex() else torch.float64)


WRITES = (add_in_place, write_past_the_version, flip_the_sign_of_zero, exchange_memory, change_dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.complex64], ids=str)
@pytest.mark.parametrize("shape", [(), (3,), (3, 5), (2, 3, 1, 1)], ids=str)
@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_a_write_is_noticed_and_reversed(write: Callable[[Tensor], None], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Of several tensors alike, the one that was written is named, and gets its memory and every bit back."""
    tensors = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for _ in range(4)]
    addresses = [tensor.data_ptr() for tensor in tensors]
    guard = Guard([*tensors, tensors[0]])

    write(tensors[2])
    written = guard.written()
    guard.put_back()

    assert len(written) == 1
    assert written[0] is tensors[2]
    assert [tensor.data_ptr() for tensor in tensors] == addresses
    assert all(tensor.dtype is dtype and torch.equal(tensor, torch.zeros(shape, dtype=dtype)) for tensor in tensors)
    assert not any(torch.signbit(torch.view_as_real(t) if dtype.is_complex else t).any() for t in map(torch.detach, tensors))


def test_reading_is_no_write() -> None:
    """NaN, views at odd places of a storage, other memory formats and changed flags are no writes."""
    storage = torch.full((11,), float("nan"))
    tensors = [storage[1:7], storage[7:], torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last), torch.empty(0)]
    guard = Guard(tensors)

    for tensor in tensors:
        tensor.requires_grad_()

    assert guard.written() == []


class Packed(Tensor):
    """A tensor of a class of its own, as quantisers make them."""


@pytest.mark.parametrize("pack", [lambda tensor: tensor.as_subclass(Packed), Tensor.to_sparse], ids=["subclass", "sparse"])
def test_a_write_into_a_packed_tensor_is_noticed_and_reversed(pack: Callable[[Tensor], Tensor]) -> None:
    """A tensor that is not a plain one is known by its version: a write in place is named, and its values come back."""
    tensors = [pack(torch.arange(3.0)), pack(torch.arange(3.0))]
    guard = Guard(tensors)
    assert guard.written() == []

    tensors[1].mul_(2)
    written = guard.written()
    guard.put_back()

    assert len(written) == 1
    assert written[0] is tensors[1]
    assert all((tensor.to_dense() if tensor.is_sparse else tensor).tolist() == [0.0, 1.0, 2.0] for tensor in tensors)


def test_a_write_is_found_at_its_site_in_a_large_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many actions run under one guard, the site whose values changed is named and everything is put back."""
    for most in (0, 100, 2**19):
        monkeypatch.setattr("gift_core.tuning.GUARDED_BYTES", most)
        model = mlp()

        def act(*site: Any) -> None:
            if site[2] == "2":
                write_past_the_version(site[4].bias)

        with refused(model, ActionError, "wrote into the base model at '2'"):
            enable_fine_tuning(model, FineTuningStrategy([(lambda *site: site[3] == "Linear", act)]))


def test_watching_the_base_is_no_allocation_of_a_file() -> None:
    """What is copied to watch a base model is not counted as asked for by a file that is smaller than the model."""
    layers = [nn.Linear(128, 128) for _ in range(8)]
    with AllocationLimit(10, ""):
        for _ in range(20):  # more than the limit in all
            room = Room()
            for _ in range(2):
                assert Guard((layer.weight for layer in layers), room).written() == []


def test_a_conjugated_parameter_is_as_it_was() -> None:
    """A parameter that is a view of the conjugate or the negative of its memory counts as written only when it is."""
    numbers = torch.complex(torch.arange(3.0), torch.arange(3.0))
    parameters = [nn.Parameter(numbers.conj()), nn.Parameter(numbers.clone().conj().imag)]
    guard = Guard(parameters)

    assert guard.written() == []
    with torch.no_grad():
        parameters[0].add_(1)
    assert [id(tensor) for tensor in guard.written()] == [id(parameters[0])]
