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
        refuses: names of the layer classes of which it refuses some or all, at planning time, with a `SiteError` that names the layer;
            ``"Parameter"`` stands for parameters that it is asked to adapt on their own. What the core refuses need not be named.
        mergeable: whether `gift_core.merge_and_unload` gives a plain model with the tuned model's answers.
        identity_at_start: whether a freshly enabled model computes exactly what the base model computes.
        random_in_training: whether training mode draws random numbers, as dropout does; eval mode never may.
        adapter_dtype: name of the torch type in which it keeps what it adds to a model, such as ``"float32"`` on ``bfloat16``; in a
            model of a wider type it is that type (`torch.promote_types`). None is the model's own type. The effective weights and the
            answers have the model's type either way.
        dtypes: names of the torch types of models on which it works.

    Raises:
        StrategyError: if a value has another type.
    """

    layers: tuple[str, ...] = ()
    refuses: tuple[str, ...] = ()
    mergeable: bool = True
    identity_at_start: bool = True
    random_in_training: bool = False
    adapter_dtype: str | None = None
    dtypes: tuple[str, ...] = ("float32", "float64", "bfloat16")

    def __post_init__(self) -> None:
        for key in ("layers", "refuses", "dtypes"):
            value = getattr(self, key)
            if not isinstance(value, tuple) or not all(isinstance(item, str) and item for item in value):
                raise StrategyError(f"Capabilities: {key} is a tuple of names such as ('Linear',), got {value!r}.")
        for key in ("mergeable", "identity_at_start", "random_in_training"):
            if not isinstance(getattr(self, key), bool):
                raise StrategyError(f"Capabilities: {key} is True or False, got {getattr(self, key)!r}.")
        if self.adapter_dtype is not None and not (isinstance(self.adapter_dtype, str) and self.adapter_dtype):
            raise StrategyError(f"Capabilities: adapter_dtype is a name such as 'float32', or None, got {self.adapter_dtype!r}.")
        if not self.dtypes:
            raise StrategyError("Capabilities: dtypes is empty, so the strategy would work nowhere: name at least one.")

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON data."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(self).items()}
