"""Strategies that save or load wrongly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from broken_strategies.healthy import Healthy, Shift
from gift_core import FineTuningStrategy


def rounded(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """Save fewer bits than there are."""
    value = state_dict[f"{prefix}delta"]
    state_dict[f"{prefix}delta"] = value.bfloat16().to(value.dtype)


class SavesRounded(Healthy):
    """Saves its tensors rounded."""

    @classmethod
    def more(cls, *site: Any) -> None:
        site[4].register_state_dict_post_hook(rounded)


class Lenient:
    """Stands in for ``load_state_dict``: takes what fits, and keeps the model's own tensors for the rest."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, state_dict: dict[str, Tensor], strict: bool = True, assign: bool = False) -> Any:
        own = self.module.state_dict()
        fitting = {key: value for key, value in state_dict.items() if key in own and value.shape == own[key].shape}
        return type(self.module).load_state_dict(self.module, own | fitting, strict, assign)


class LoadsAnything(Healthy):
    """Takes any state dict."""

    @classmethod
    def more(cls, *site: Any) -> None:
        if site[0] is not None:
            site[0].load_state_dict = Lenient(site[0])


def only_alone(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """Save nothing when the model is called ``inner`` in a larger one, as code that compares whole keys does."""
    if prefix.startswith("inner."):
        del state_dict[f"{prefix}delta"]


class ForgetsPrefixes(Healthy):
    """Saves nothing inside a larger model."""

    @classmethod
    def more(cls, *site: Any) -> None:
        site[4].register_state_dict_post_hook(only_alone)


class HidesState(Healthy):
    """Computes with a random tensor that no file holds."""

    class Method(Shift):
        """A shift with a fixed random factor."""

        mix: Tensor

        def init_parameters(self, weight: Tensor) -> None:
            super().init_parameters(weight)
            self.register_buffer("mix", torch.rand_like(weight), persistent=False)

        def reparameterize(self, weight: Tensor) -> Tensor:
            return weight + self.delta * self.mix

    method = Method


BROKEN: dict[str, tuple[type[FineTuningStrategy], str]] = {
    "state_dict_round_trip": (SavesRounded, "a copy that loaded the state dict differs"),
    "state_dict_is_strict": (LoadsAnything, "was accepted"),
    "prefixed_state_dict": (ForgetsPrefixes, "inside a larger model its keys differ"),
    "adapter_file": (HidesState, "gives another answer"),
}
