"""What an adapted layer has besides tensors: how its weight is read, and which variant of the method is at work.

Settings are values: layers that agree share one object, so that thousands of layers, and the adapters between which they are
switched, hold one reference each.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from gift_core.errors import SiteError
from gift_lora_plugin.initialization import check_initialization
from gift_lora_plugin.layouts import ATTENTION_PARTS, Kind, Layout, kind_of, layout_of_kind

#: More numbers than this have no place in a process, whatever the machine: 64-bit systems address 2 ** 47 bytes for one.
_MOST_NUMBERS = 2**47


@dataclasses.dataclass(frozen=True)
class Settings:
    r"""What layers have in common that are adapted alike.

    Attributes:
        layout: how the weight is read.
        scaling: :math:`s`, the factor of the update.
        dropout: the dropout probability.
        init: where the factors start, one of `INITIALIZATIONS`.
        dora: whether a magnitude is learnt apart from the direction.
        given: what the strategy gave, where something was set on the layer itself since; no part of the value.
    """

    layout: Layout
    scaling: float
    dropout: float
    init: str
    dora: bool
    given: Settings | None = dataclasses.field(default=None, compare=False, repr=False)


def settings_of(
    module: nn.Module,
    name: str,
    shape: Sequence[int],
    *,
    rank: int,
    alpha: float | None = None,
    dropout: float = 0.0,
    rslora: bool = False,
    dora: bool = False,
    init: str = "kaiming",
    conv_layout: str = "balanced",
    attention: Iterable[str] = ATTENTION_PARTS,
    parameter_layout: str | None = None,
) -> Settings:
    """The settings of one weight.

    Args:
        module: the layer, adopted or not.
        name: of the weight in it.
        shape: of the weight.
        rank: of the update, at least 1.
        alpha: numerator of the scaling; None means the rank.
        dropout: the dropout probability.
        rslora: divide by the root of the rank instead.
        dora: whether a magnitude is learnt apart from the direction.
        init: where the factors start.
        conv_layout: as in `layout_of_kind`.
        attention: as in `layout_of_kind`.
        parameter_layout: as in `layout_of_kind`.

    Raises:
        SiteError: if the weight is no matrix, the rank is more than memory can hold, or the start cannot be had.
    """
    choices = (conv_layout, tuple(attention), parameter_layout)
    return _settings(kind_of(module), name, tuple(shape), rank, alpha, dropout, rslora, dora, init, *choices)


@functools.lru_cache(maxsize=1024)
def _settings(
    kind: Kind,
    name: str,
    shape: tuple[int, ...],
    rank: int,
    alpha: float | None,
    dropout: float,
    rslora: bool,
    dora: bool,
    init: str,
    conv_layout: str,
    attention: tuple[str, ...],
    parameter_layout: str | None,
) -> Settings:
    layout = layout_of_kind(kind, name, shape, conv_layout=conv_layout, attention=attention, parameter_layout=parameter_layout)
    numbers = rank * (layout.rows + layout.columns) * (layout.blocks or 1)
    if numbers > _MOST_NUMBERS:
        raise SiteError(
            f"rank {rank} would take {numbers} numbers for its {name!r}, more than any memory holds; beyond rank {layout.max_rank} "
            "they are of no use to a weight of this shape: lower the rank."
        )
    scaling = scaling_of(rank, alpha, rslora)
    check_initialization(init, rank, layout.rows, layout.columns, scaling)
    return Settings(layout, scaling, dropout, init, dora)


def scaling_of(rank: int, alpha: float | None, rslora: bool = False) -> float:
    r"""The scaling :math:`\alpha / r`, or :math:`\alpha / \sqrt{r}` for rsLoRA; an ``alpha`` of None is the rank.

    Source: Kalajdzievski 2023, arXiv:2312.03732, theorem 3.2.
    """
    return (rank if alpha is None else alpha) / (math.sqrt(rank) if rslora else rank)


def shared_setting(name: str) -> Any:
    """An attribute of a layer that is read from its `Settings`; writing it gives this layer settings of its own."""

    def read(layer: Any) -> Any:
        return getattr(layer.lora_settings, name)

    def write(layer: Any, value: Any) -> None:
        now = layer.lora_settings
        layer.lora_settings = dataclasses.replace(now, **{name: value}, given=now.given or now)

    return property(read, write)
