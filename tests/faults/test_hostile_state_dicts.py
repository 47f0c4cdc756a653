"""State dicts of strangers: what a tuned model does not take is refused before anything is written, and by an error of ours."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from fault_table import RecordFaults
from low_rank import LowRankStrategy
from models import cnn, fingerprint, input_for, tensor_bytes, train
from torch import Tensor, nn

from gift_core import FineTuningStrategy, FullFineTuningStrategy, disable_fine_tuning, enable_fine_tuning, merge_strategies
from gift_core.errors import StateDictError

#: What makes a value of a stranger out of the tensor that belongs there.
Value = Callable[[Tensor], Any]


def strategy() -> FineTuningStrategy:
    """One that adapts a layer and trains another."""
    return merge_strategies(LowRankStrategy(rank=2, targets="conv"), FullFineTuningStrategy("head"))


def tuned(steps: int = 0) -> nn.Module:
    """A tuned model, trained so many steps."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        enable_fine_tuning(model := cnn(), strategy())
        train(model, input_for(cnn), steps)
    return model


def state() -> dict[str, Tensor]:
    """A state dict that fits, with values of its own."""
    return {key: value.clone() for key, value in tuned(steps=2).state_dict().items()}


def given(content: Any, nested: bool) -> Any:
    """The same for a model in which the tuned one is the first child."""
    return {f"0.{key}": value for key, value in content.items()} if nested else content


def tries(content: Any, *, nested: bool, assign: bool) -> tuple[int, int, int]:
    """Whether a load was silent, left the model between two states, and raised what is none of ours."""
    model = tuned()
    target = nn.Sequential(model) if nested else model
    before = fingerprint(model)
    silent = foreign = 0
    try:
        target.load_state_dict(given(content, nested), assign=assign)
        silent = 1
    except StateDictError as error:
        str(error).encode()
    except Exception:
        foreign = 1
    return silent, int(fingerprint(model) != before), foreign


def made(value: Value, tensor: Tensor) -> Any:
    """The stranger's value; torch warns of some kinds when they are made."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return value(tensor)


VALUES: dict[str, Value] = {
    "text": lambda tensor: "text",
    "nothing": lambda tensor: None,
    "number": lambda tensor: 1.5,
    "list": lambda tensor: tensor.tolist(),
    "array": lambda tensor: tensor.numpy(),
    "state dict": lambda tensor: {"weight": tensor},
    "class": lambda tensor: Tensor,
    "sparse": lambda tensor: tensor.to_sparse(),
    "compressed sparse": lambda tensor: torch.sparse_coo_tensor(torch.zeros(tensor.dim(), 0), [], tensor.shape),
    "of another backend": lambda tensor: torch.ones(2, 2).to_mkldnn(),
    "nested": lambda tensor: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "quantised": lambda tensor: torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.quint8),
    "meta": lambda tensor: tensor.to("meta"),
    "complex": lambda tensor: tensor.to(torch.complex64),
    "fewer dimensions": lambda tensor: tensor.flatten()[:1].reshape(()),
    "more dimensions": lambda tensor: tensor[None],
    "one number more": lambda tensor: torch.cat([tensor, tensor[:1]]),
    "no numbers": lambda tensor: tensor[:0],
    "more numbers than memory": lambda tensor: torch.ones(1).expand(2**40),
    "could be broadcast": lambda tensor: tensor[:1],
}


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("nested", [False, True], ids=["alone", "nested"])
@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_a_value_that_is_none(value: Value, nested: bool, assign: bool, record_faults: RecordFaults) -> None:
    """What is no dense tensor of the right shape is refused wherever it stands: first, last, adapter, kept weight or statistic."""
    keys = [key for key, tensor in state().items() if tensor.dim()]

    results = [tries(state() | {key: made(value, state()[key])}, nested=nested, assign=assign) for key in keys]

    silent, half, foreign = (sum(column) for column in zip(*results, strict=True))
    record_faults("hostile state dicts", len(keys), silent=silent, half=half, foreign=foreign)


UNTRAINABLE: dict[str, Value] = {
    "whole numbers": lambda tensor: tensor.to(torch.int64),
    "truth values": lambda tensor: tensor > 0,
    "one number many times": lambda tensor: torch.ones(1).expand(tensor.shape),
    "one row many times": lambda tensor: tensor[:1].expand(tensor.shape),
}


@pytest.mark.parametrize("nested", [False, True], ids=["alone", "nested"])
@pytest.mark.parametrize("value", UNTRAINABLE.values(), ids=UNTRAINABLE)
def test_a_value_that_cannot_train(value: Value, nested: bool, record_faults: RecordFaults) -> None:
    """``assign=True`` puts no tensor in the place of a trained one that could not be trained, and writes nothing else either."""
    keys = [key for key in state() if not key.startswith("bn")]

    results = [tries(state() | {key: made(value, state()[key])}, nested=nested, assign=True) for key in keys]

    silent, half, foreign = (sum(column) for column in zip(*results, strict=True))
    record_faults("hostile state dicts", len(keys), silent=silent, half=half, foreign=foreign)


KEYS: list[str] = ["", ".", "conv", "conv.", ".conv.thin_left", "conv.weight.", "conv.thin", "_extra_state", "conv._extra_state"]
KEYS += ["head.__class__", "../up", "\ud800", "bn.running_mean\0", "x" * 100_000, "merged_weight", "0.conv.thin_left"]


@pytest.mark.parametrize("nested", [False, True], ids=["alone", "nested"])
@pytest.mark.parametrize("key", KEYS, ids=lambda key: ascii(key)[:20])
def test_a_key_that_is_none(key: str, nested: bool, record_faults: RecordFaults) -> None:
    """A key of nothing that the model has is refused, in addition to all that fit and in the place of each."""
    contents = [state() | {key: torch.ones(2)}]
    contents += [{key if name == lost else name: value for name, value in state().items()} for lost in state()]

    results = [tries(content, nested=nested, assign=assign) for content in contents for assign in (False, True)]

    silent, half, foreign = (sum(column) for column in zip(*results, strict=True))
    record_faults("hostile state dicts", len(results), silent=silent, half=half, foreign=foreign)


def labelled(metadata: Any) -> OrderedDict[str, Tensor]:
    """A state dict that fits but for one key, with a label like torch's on it."""
    content = OrderedDict(state())
    del content["bn.num_batches_tracked"]  # where torch asks the label for a version
    content._metadata = metadata  # type: ignore[attr-defined]
    return content


WHOLE: dict[str, Callable[[], Any]] = {
    "nothing": lambda: None,
    "list": lambda: list(state().items()),
    "text": lambda: "conv.thin_left",
    "bytes": lambda: b"PK",
    "tensor": lambda: torch.ones(3),
    "model": tuned,
    "number as key": lambda: state() | {1: torch.ones(1)},
    "nothing as key": lambda: {None: torch.ones(1)} | state(),
    "bytes as key": lambda: state() | {b"conv.thin_left": torch.ones(1)},
    "tuple as key": lambda: state() | {("conv", "thin_left"): torch.ones(1)},
    "tensor as key": lambda: state() | {torch.ones(1): torch.ones(1)},
    "metadata of text": lambda: labelled("x"),
    "metadata of numbers": lambda: labelled({"bn": 3}),
    "version of text": lambda: labelled({"bn": {"version": "2"}}),
    "version of a list": lambda: labelled({"": {"version": [2]}}),
    "empty": dict,
}


@pytest.mark.parametrize("content", WHOLE.values(), ids=WHOLE)
def test_what_is_no_state_dict(content: Callable[[], Any], record_faults: RecordFaults) -> None:
    """What is no mapping of names to tensors, or has a label that torch would stumble over, is refused."""
    results = [tries(content(), nested=False, assign=assign) for assign in (False, True)]

    silent, half, foreign = (sum(column) for column in zip(*results, strict=True))
    record_faults("hostile state dicts", len(results), silent=silent, half=half, foreign=foreign)


def overlapping(tensor: Tensor) -> Tensor:
    """Numbers of which each is part of many rows."""
    return torch.arange(1.0, tensor.numel() + 1).as_strided(tensor.shape, [1] * tensor.dim())


ODD: dict[str, Value] = {
    "one number many times": lambda tensor: torch.full((1,), 2.0).expand(tensor.shape),
    "overlapping": overlapping,
    "every second": lambda tensor: torch.arange(2.0 * tensor.numel())[::2].reshape(tensor.shape),
    "the other way round in memory": lambda tensor: tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor.flip(0),
    "double": lambda tensor: tensor.double(),
    "half": lambda tensor: tensor.half(),
    "whole numbers": lambda tensor: torch.ones(tensor.shape, dtype=torch.int64),
    "parameter": lambda tensor: nn.Parameter(tensor.clone()) if tensor.is_floating_point() else tensor,
    "result of a computation": lambda tensor: torch.ones(tensor.shape, requires_grad=True) * 3,
    "array that is only read": lambda tensor: torch.from_numpy(np.broadcast_to(np.float32(4), tuple(tensor.shape)).copy()),
    "infinite": lambda tensor: torch.full(tensor.shape, float("inf")),
}


@pytest.mark.parametrize("nested", [False, True], ids=["alone", "nested"])
@pytest.mark.parametrize("value", ODD.values(), ids=ODD)
def test_an_odd_tensor_is_its_numbers(value: Value, nested: bool) -> None:
    """A tensor of the right shape loads as a plain copy of it does, however it lies in memory, and the base is untouched."""
    model, plain = tuned(), tuned()
    content = {key: made(value, tensor) if tensor.is_floating_point() else tensor for key, tensor in state().items()}
    copies = {key: tensor.detach().clone(memory_format=torch.contiguous_format) for key, tensor in content.items()}

    (nn.Sequential(model) if nested else model).load_state_dict(given(content, nested))
    plain.load_state_dict(copies)

    assert bits(model) == bits(plain)
    assert bits(disable_fine_tuning(model)) == bits(cnn())


def bits(model: nn.Module) -> dict[str, bytes]:
    """All that a model holds, by name."""
    return {key: tensor_bytes(value) for key, value in (*model.named_parameters(), *model.named_buffers())}
