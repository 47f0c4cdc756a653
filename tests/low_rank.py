"""A small registered method with a size, so that the tests of files need no plugin."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gift_core import FineTuningStrategy, Reparameterization
from gift_core.factories import is_instance, reparameterize, selects
from gift_core.plugins import register_strategy, unregister_strategy


class LowRank(Reparameterization):
    """The weight plus a product of two thin matrices."""

    thin_left: nn.Parameter
    thin_right: nn.Parameter

    def init_parameters(self, weight: Tensor, *, rank: int) -> None:
        rows, columns = weight.shape[0], weight[0].numel()
        self.thin_left = nn.Parameter(weight.new_zeros(rows, rank))
        self.thin_right = nn.Parameter(torch.full((rank, columns), 0.5, dtype=weight.dtype))

    def reparameterize(self, weight: Tensor) -> Tensor:
        return weight + (self.thin_left @ self.thin_right).view_as(weight)


class LowRankStrategy(FineTuningStrategy):
    """Adapts Linear layers and convolutions with `LowRank`."""

    name = "low-rank-of-the-tests"

    def __init__(self, rank: int = 2, targets: str | Iterable[str] | None = None, note: Any = None) -> None:
        check = (is_instance("Linear") | is_instance("Conv2d")) & selects(targets)
        super().__init__([(check, reparameterize(LowRank), {"rank": rank})])


class Claiming(LowRankStrategy):
    """A strategy whose adapter's file says that it was another one: how a stranger writes a sound file that lies."""

    def __init__(self, says: Mapping[str, Any]) -> None:
        super().__init__()
        self.says = says

    def to_config(self) -> dict[str, Any]:
        return dict(self.says)


@pytest.fixture
def low_rank() -> Iterator[type[LowRankStrategy]]:
    """The strategy, registered while the test runs."""
    register_strategy(LowRankStrategy.name, LowRankStrategy)
    yield LowRankStrategy
    unregister_strategy(LowRankStrategy.name)
