"""What adapted layers share: one object for layers that are adapted alike, and a refusal of what no memory holds."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gift_core import adopt, enable_fine_tuning, load_adapter, plan_fine_tuning, save_adapter
from gift_core.errors import AdapterMismatchError, GiftError, SiteError, StateError
from gift_lora_plugin import LoRA, LoRAAllFineTuningStrategy
from gift_lora_plugin.settings import scaling_of, settings_of


def tuned(**parameters: Any) -> Any:
    """Two Linear layers alike, a third, and a convolution."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3), nn.Conv2d(4, 4, 3))
    enable_fine_tuning(model, LoRAAllFineTuningStrategy(**parameters))
    return model


def test_layers_adapted_alike_share_their_settings() -> None:
    """Layers of one kind and shape with the same parameters hold the same object, in one model and in another."""
    model, other, stronger = tuned(rank=2), tuned(rank=2), tuned(rank=2, lora_alpha=4)

    assert model[0].lora_settings is model[1].lora_settings is other[0].lora_settings
    assert len({id(layer.lora_settings) for layer in (*model, stronger[0])}) == 4


def test_the_single_settings_are_attributes_of_the_layer() -> None:
    """A layer shows its scaling, dropout, layout and variant as the formula has them."""
    layer = tuned(rank=2, lora_alpha=3, lora_dropout=0.25, use_dora=True, init="orthogonal")[2]

    assert (layer.lora_scaling, layer.lora_dropout, layer.lora_init, layer.lora_dora) == (1.5, 0.25, "orthogonal", True)
    assert (layer.lora_layout.rows, layer.lora_layout.columns) == (3, 6)


def test_a_setting_that_is_written_is_the_layers_own() -> None:
    """Another scaling for one layer changes what this layer computes, as the formula says, and no other layer."""
    model = tuned(rank=2, lora_alpha=2)
    with torch.no_grad():
        model[0].lora_B.normal_()

    model[0].lora_scaling = 0.5

    update = model[0].weight - model[0]._parameters["weight"]
    torch.testing.assert_close(update, 0.5 * model[0].lora_B @ model[0].lora_A)
    assert model[1].lora_scaling == 1.0
    assert model[1].lora_settings is settings_of(model[1], "weight", (6, 6), rank=2, alpha=2)


def test_a_setting_that_is_written_keeps_the_model_from_a_file(tmp_path: Path) -> None:
    """A file holds what the strategy says, so that saving, and loading into such a model, is refused by name; set back, it is not."""
    model, path = tuned(rank=2, lora_alpha=2), tmp_path / "adapter"
    save_adapter(model, path)

    model[0].lora_scaling = 0.5
    model[0].lora_dropout = 0.25

    with pytest.raises(StateError, match="not saved: 0: its lora_scaling"):
        save_adapter(model, tmp_path / "other")
    with pytest.raises(AdapterMismatchError, match="0: its lora_scaling"):
        load_adapter(model, path)
    assert not (tmp_path / "other").exists()

    model[0].lora_scaling, model[0].lora_dropout = 1.0, 0.0
    save_adapter(model, tmp_path / "other")
    load_adapter(model, path)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_settings_are_copied_with_their_layer(copied: Any) -> None:
    """A copy of the model has equal settings, shared among its layers as they were, and writing them leaves the original alone."""
    model = tuned(rank=2)
    again = copied(model)

    assert again[0].lora_settings == model[0].lora_settings
    assert again[0].lora_settings is again[1].lora_settings

    again[0].lora_scaling = 7.0

    assert model[0].lora_scaling == again[1].lora_scaling == 1.0


def test_each_weight_of_a_layer_has_settings() -> None:
    """Settings of a weight that is not called ``weight`` stand under its name, as its tensors do."""
    layer = nn.LSTM(3, 5)
    enable_fine_tuning(layer, LoRAAllFineTuningStrategy(rank=2, lora_alpha=6))
    held: Any = layer

    assert held.weight_ih_l0_lora_settings.layout.shape == (20, 3)
    assert held.weight_hh_l0_lora_settings.layout.shape == (20, 5)
    assert held.weight_ih_l0_lora_settings.scaling == scaling_of(2, 6) == 3.0


@pytest.mark.parametrize("rank", [2**47, 10**30, 10**400])
@pytest.mark.parametrize("choices", [{}, {"use_rslora": True}, {"lora_alpha": 1.0}, {"init": "pissa"}], ids=str)
def test_a_rank_that_no_memory_holds_is_refused(rank: int, choices: dict[str, Any]) -> None:
    """Before anything is drawn or changed, with the layer, the rank and what to do; also where a pattern asks for it."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3))

    for strategy in (
        LoRAAllFineTuningStrategy(rank=rank, **choices),
        LoRAAllFineTuningStrategy(rank=2, rank_pattern={"0": rank}, **choices),
    ):
        for act in (plan_fine_tuning, enable_fine_tuning):
            with pytest.raises(SiteError, match=rf"at '0' \(Linear\).*rank {rank} .*more than any memory holds.*lower the rank"):
                act(model, strategy)
    with pytest.raises(SiteError, match="lower the rank"):
        adopt(nn.Linear(6, 6), LoRA, rank=rank)


def test_an_unknown_param_of_a_cap_is_refused_when_planned() -> None:
    """A cap with params that the method does not take, or without its rank, is an error of ours before anything changes."""
    from gift_core import FineTuningStrategy
    from gift_core.factories import everything, reparameterize

    for params, says in (({"rank": 2, "depth": 3}, "depth"), ({}, "rank")):
        model = nn.Linear(4, 4)
        with pytest.raises(GiftError, match=says):
            plan_fine_tuning(model, FineTuningStrategy([(everything(), reparameterize(LoRA), params)]))

        assert type(model) is nn.Linear
