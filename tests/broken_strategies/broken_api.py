"""Strategies that say something wrong of themselves."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from broken_strategies.healthy import Healthy, Shift
from gift_core import FineTuningStrategy
from gift_core.factories import reparameterize


class TwoWords(Healthy):
    """Has a name that nobody can type."""

    name = "two words"


class FromTheFuture(Healthy):
    """Was written for another generation of the plugin API."""

    plugin_api = 2


class BareDict(Healthy):
    """Declares its capabilities as a dict."""

    capabilities = {"layers": ["Linear"]}  # type: ignore[assignment] # noqa: RUF012


class TakesATensor(Healthy):
    """Has a parameter that is no JSON data."""

    def __init__(self, start: Tensor = torch.zeros(())) -> None:  # noqa: B008
        super().__init__()


class HoldsALambda(FineTuningStrategy):
    """Holds a function that cannot be pickled."""

    name = "lambda"

    def __init__(self) -> None:
        super().__init__(module_caps=[(lambda *site: isinstance(site[4], nn.Linear), reparameterize(Shift))])


BROKEN: dict[str, tuple[type[FineTuningStrategy], str]] = {
    "declared_name": (TwoWords, "'two words' has a colon or a space"),
    "declared_api": (FromTheFuture, "plugin_api is 2"),
    "declared_capabilities": (BareDict, "not gift_core.capabilities.Capabilities"),
    "config_round_trip": (TakesATensor, "no plain JSON data"),
    "strategy_is_data": (HoldsALambda, "pickle"),
}
