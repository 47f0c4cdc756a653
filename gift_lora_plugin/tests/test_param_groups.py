"""LoRA+: every trainable parameter in one group, B at its own rate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from gift_core import FineTuningStrategy, FullFineTuningStrategy, enable_fine_tuning
from gift_core.errors import GiftError, ParameterError, StateError
from gift_core.factories import keep_trainable, name_is
from gift_lora_plugin import LoRAAllFineTuningStrategy, lora_plus_param_groups


class Model(nn.Module):
    """An embedding, a recurrent layer, a normalisation and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 6)
        self.recurrent = nn.LSTM(6, 5, batch_first=True)
        self.norm = nn.LayerNorm(5)
        self.head = nn.Linear(5, 4)


def tuned(**params: Any) -> nn.Module:
    """A model with LoRA on everything and a trained normalisation."""
    torch.manual_seed(0)
    model = Model()
    lora = LoRAAllFineTuningStrategy(**{"rank": 2, "targets": ["table", "recurrent", "head"]} | params)
    caps = [(name_is("norm"), keep_trainable()), *lora.module_caps]
    enable_fine_tuning(model, FineTuningStrategy(module_caps=caps, para_caps=lora.para_caps))
    return model


def by_name(groups: list[dict[str, Any]]) -> dict[str, float]:
    """The rate of each parameter, by the parameter's name."""
    return {name: group["lr"] for group in groups for name in group["param_names"]}


@pytest.mark.parametrize("variant", [{}, {"use_dora": True}, {"freeze_A": True}, {"train_bias": True}, {"init": "pissa"}], ids=str)
def test_every_trainable_parameter_is_in_one_group(variant: dict[str, Any]) -> None:
    """Each trainable parameter is in exactly one group, under its name: B at lr * ratio, and everything else at lr."""
    model = tuned(**variant)
    groups = lora_plus_param_groups(model, 1e-3, 8)
    given = [(name, id(p)) for group in groups for name, p in zip(group["param_names"], group["params"], strict=True)]
    trainable = [(name, id(p)) for name, p in model.named_parameters() if p.requires_grad]

    assert sorted(given) == sorted(trainable)
    assert by_name(groups) == {name: 8e-3 if name.endswith("lora_B") else 1e-3 for name, _ in trainable}
    assert [group["name"] for group in groups] == ["base", "lora_B"]


def test_embeddings_may_have_their_own_rate() -> None:
    """With ``embedding_lr`` both factors of embeddings have that rate, and nothing else has it."""
    groups = lora_plus_param_groups(tuned(), 1e-3, 8, embedding_lr=5e-6)

    assert {name for name, rate in by_name(groups).items() if rate == 5e-6} == {"table.lora_A", "table.lora_B"}
    assert [group["name"] for group in groups] == ["base", "lora_B", "embedding"]


def test_there_is_no_empty_group() -> None:
    """A group without parameters is left out."""
    model = nn.Sequential(nn.Linear(4, 3))
    enable_fine_tuning(model, LoRAAllFineTuningStrategy(rank=2, freeze_A=True))

    assert [group["name"] for group in lora_plus_param_groups(model, 1e-3)] == ["lora_B"]


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_an_optimizer_takes_the_groups(optimizer: Any) -> None:
    """An optimizer steps with each group's rate, and its state goes into a new one."""
    model = nn.Sequential(nn.Linear(4, 3))
    enable_fine_tuning(model, LoRAAllFineTuningStrategy(rank=2))
    made = optimizer(lora_plus_param_groups(model, 1e-3, 4))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    made.step()
    moved = {name: (p - before[name]).abs().max().item() for name, p in model.named_parameters() if p.requires_grad}
    again = optimizer(lora_plus_param_groups(model, 1e-3, 4))
    again.load_state_dict(made.state_dict())

    assert moved["0.lora_B"] == pytest.approx(4e-3, rel=1e-3)
    assert moved["0.lora_A"] == pytest.approx(1e-3, rel=2e-2)
    assert [group["lr"] for group in again.param_groups] == [1e-3, 4e-3]


def test_a_shared_layer_counts_once() -> None:
    """Parameters under two names are in one group once."""
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, layer)
    enable_fine_tuning(model, LoRAAllFineTuningStrategy(rank=2))

    assert sorted(by_name(lora_plus_param_groups(model, 1e-3))) == ["0.lora_A", "0.lora_B"]


def test_a_wrapped_model_is_seen_through() -> None:
    """A tuned model inside another gives its groups, under the names that it has there."""
    assert "0.head.lora_B" in by_name(lora_plus_param_groups(nn.Sequential(tuned()), 1e-3))


@pytest.mark.parametrize("name", ["lr", "ratio", "embedding_lr"])
@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), "1e-3", True])
def test_a_rate_that_is_none_is_refused(name: str, value: Any) -> None:
    """A rate or ratio that is no finite number above zero is an error that names it."""
    with pytest.raises(ParameterError, match=rf"^{name} must be a finite number above zero, got {value!r}"):
        lora_plus_param_groups(tuned(), **{"lr": 1e-3} | {name: value})


@pytest.mark.parametrize("full", [False, True])
def test_a_model_without_lora_is_refused(full: bool) -> None:
    """A plain model, and one tuned by another method, are errors that say what to do."""
    model = nn.Sequential(nn.Linear(4, 3))
    if full:
        enable_fine_tuning(model, FullFineTuningStrategy())

    with pytest.raises(StateError, match="has no LoRA that trains: call enable_fine_tuning") as caught:
        lora_plus_param_groups(model, 1e-3)
    assert isinstance(caught.value, GiftError)
