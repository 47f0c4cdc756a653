"""What a strategy says of itself, as plain data that tools can show and checks can hold it to."""

from __future__ import annotations

import dataclasses
from typing import Any

from gift_core.errors import StrategyError


@dataclasses.dataclass(frozen=True)
class Capabilities:
    """What a strategy promises beyond what every strategy does; `gift_core.testing` checks each promise.

    Attributes:
        layers: names of the layer classes that it adapts, subclasses included, such as ``("Linear", "Conv2d")``; empty states none.
        mergeable: whether `gift_core.merge_and_unload` gives a plain model with the tuned model's answers.
        identity_at_start: whether a freshly enabled model computes exactly what the base model computes.
        dtypes: names of the torch types in which it works.

    Raises:
        StrategyError: if a value has another type.
    """

    layers: tuple[str, ...] = ()
    mergeable: bool = True
    identity_at_start: bool = True
    dtypes: tuple[str, ...] = ("float32", "float64", "bfloat16")

    def __post_init__(self) -> None:
        for key in ("layers", "dtypes"):
            value = getattr(self, key)
            if not isinstance(value, tuple) or not all(isinstance(item, str) and item for item in value):
                raise StrategyError(f"Capabilities: {key} is a tuple of names such as ('Linear',), got {value!r}.")
        for key in ("mergeable", "identity_at_start"):
            if not isinstance(getattr(self, key), bool):
                raise StrategyError(f"Capabilities: {key} is True or False, got {getattr(self, key)!r}.")
        if not self.dtypes:
            raise StrategyError("Capabilities: dtypes is empty, so the strategy would work nowhere: name at least one.")

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON data."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(self).items()}
