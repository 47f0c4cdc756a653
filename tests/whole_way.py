"""What must be true of every model: training moves the adapter alone, files and merging keep its answers, undoing gives back the base.

Each promise is one function of a `Subject`; a library's test file says which subjects it has, and puts each through all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from models import fingerprint, tensor_bytes
from torch import Tensor, nn

from gift_core import (
    disable_fine_tuning,
    enable_fine_tuning,
    load_adapter,
    merge,
    merge_and_unload,
    save_adapter,
    tuning_disabled,
    unmerge,
)
from gift_core.reparameterization import is_adopted
from gift_lora_plugin import LoRAAllFineTuningStrategy


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model to put through everything.

    Attributes:
        build: gives a new model, in eval mode, with the same values each time.
        answer: what the model computes from one input, as one tensor.
        loss: a number to train on, from the same input.
    """

    build: Callable[[], nn.Module]
    answer: Callable[[nn.Module], Tensor]
    loss: Callable[[nn.Module], Tensor]


def tune(subject: Subject, **parameters: Any) -> nn.Module:
    """The subject's model with LoRA enabled, after two steps of training, in eval mode."""
    model = subject.build()
    enable_fine_tuning(model, LoRAAllFineTuningStrategy(**{"rank": 1} | parameters))
    step(subject, model, times=2)
    return model


def step(subject: Subject, model: nn.Module, times: int) -> None:
    """Steps of Adam in training mode, which move whatever gets a gradient, however small."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, eps=1e-20)
    model.train()
    for seed in range(times):
        torch.manual_seed(seed)
        optimizer.zero_grad()
        subject.loss(model).backward()
        optimizer.step()
    model.eval()


@torch.no_grad()
def answer(subject: Subject, model: nn.Module) -> Tensor:
    """What the model computes, without a graph."""
    return subject.answer(model)


def assert_close(actual: Tensor, expected: Tensor, bound: float = 1e-4) -> None:
    """Equal within ``bound`` of the largest number; 1e-4 is what single precision's rounding makes of a deep network."""
    assert expected.isfinite().all()
    assert (actual - expected).abs().max() <= bound * expected.abs().max()


def a_step_moves_the_adapter_alone(subject: Subject, folder: Path) -> None:
    """Enabling changes no bit of the answer; training moves every trainable tensor and no frozen one, and changes the loss."""
    model = subject.build()
    base = answer(subject, model)
    enable_fine_tuning(model, LoRAAllFineTuningStrategy(rank=1))
    assert torch.equal(answer(subject, model), base)
    with torch.no_grad():
        loss = subject.loss(model)
    before = {name: tensor_bytes(parameter) for name, parameter in model.named_parameters()}

    # B starts at zero and lets no gradient to A before it has moved; neither does a head that starts at zero
    step(subject, model, times=3)

    for name, parameter in model.named_parameters():
        assert (tensor_bytes(parameter) != before[name]) is parameter.requires_grad, name
    with torch.no_grad():
        assert subject.loss(model) != loss


def a_file_carries_the_answers(subject: Subject, folder: Path) -> None:
    """A plain model that loads the adapter answers with the same bits."""
    model = tune(subject)
    save_adapter(model, folder / "adapter.safetensors")

    fresh = subject.build()
    base = answer(subject, fresh)
    load_adapter(fresh, folder / "adapter.safetensors")

    tuned = answer(subject, model)
    assert torch.equal(answer(subject, fresh.eval()), tuned)
    assert not torch.equal(tuned, base)


def merging_keeps_the_answers(subject: Subject, folder: Path) -> None:
    """A merged model answers as the unmerged one does, up to rounding; unmerging brings the bits back."""
    model = tune(subject)
    tuned = answer(subject, model)

    merge(model)
    assert_close(answer(subject, model), tuned)

    unmerge(model)
    assert torch.equal(answer(subject, model), tuned)


def unloading_leaves_a_plain_model(subject: Subject, folder: Path) -> None:
    """An unloaded model has the classes and keys of the base and the answers of the tuned model, up to rounding."""
    model, plain = tune(subject), subject.build()
    tuned = answer(subject, model)

    merge_and_unload(model)

    assert_close(answer(subject, model), tuned)
    assert [(name, type(module)) for name, module in model.named_modules()] == [
        (name, type(module)) for name, module in plain.named_modules()
    ]
    assert list(model.state_dict()) == list(plain.state_dict())


def disabling_gives_back_the_base(subject: Subject, folder: Path) -> None:
    """Switched off, a tuned model answers with the base's bits; disabled, it is the base again, in every byte, class and flag."""
    model = subject.build()
    original, base = fingerprint(model), answer(subject, model)
    enable_fine_tuning(model, LoRAAllFineTuningStrategy(rank=1))
    step(subject, model, times=1)

    with tuning_disabled(model):
        assert torch.equal(answer(subject, model), base)
    disable_fine_tuning(model)

    assert torch.equal(answer(subject, model), base)
    assert fingerprint(model) == original
    assert not any(map(is_adopted, model.modules()))


PROMISES: dict[str, Callable[[Subject, Path], None]] = {
    promise.__name__: promise
    for promise in (
        a_step_moves_the_adapter_alone,
        a_file_carries_the_answers,
        merging_keeps_the_answers,
        unloading_leaves_a_plain_model,
        disabling_gives_back_the_base,
    )
}
