"""The limit on what is allocated while a file says how large it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gift_core.allocation import FLOOR, TIMES, AllocationLimit
from gift_core.errors import AdapterMismatchError

HUGE = 10**13  # 36 TiB of float32: what is not refused fails
ONE = torch.ones(1)

CALLS: dict[str, Callable[[], object]] = {
    "empty": lambda: torch.empty(HUGE),
    "zeros": lambda: torch.zeros((2, HUGE)),
    "ones": lambda: torch.ones(HUGE, dtype=torch.int8),
    "full": lambda: torch.full((HUGE,), 1.0),
    "rand": lambda: torch.rand(HUGE, generator=torch.Generator()),
    "randn": lambda: torch.randn(HUGE, requires_grad=True),
    "randint": lambda: torch.randint(0, 5, (HUGE,)),
    "normal": lambda: torch.normal(0.0, 1.0, (HUGE,)),
    "arange": lambda: torch.arange(HUGE),
    "eye": lambda: torch.eye(10**7),
    "empty_strided": lambda: torch.empty_strided((HUGE,), (1,)),
    "new_empty": lambda: ONE.new_empty(HUGE),
    "new_zeros": lambda: ONE.new_zeros(2, HUGE),
    "new_ones": lambda: nn.Parameter(ONE).new_ones((HUGE,)),
    "new_full": lambda: ONE.new_full((HUGE,), 2.0),
    "repeat": lambda: ONE.repeat(HUGE),
    "tile": lambda: torch.tile(ONE, (HUGE,)),
    "a layer": lambda: nn.Linear(10**7, 10**7),
    "an embedding": lambda: nn.Embedding(HUGE, 2),
    "pinned": lambda: torch.empty(HUGE, pin_memory=True),
    "on a device by name": lambda: torch.empty(HUGE, device="cpu"),
    "on a device that is not there": lambda: torch.empty(HUGE, device="mps:7"),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_more_than_the_file_holds(call: Callable[[], object]) -> None:
    """Whoever asks torch for more numbers than the file holds is refused before they are allocated, with the advice."""
    with pytest.raises(AdapterMismatchError, match=r"holds 100 in all\. Do so\."), AllocationLimit(100, "Do so."):
        call()


def test_many_tensors_are_counted_together() -> None:
    """Tensors that are small one by one are refused when they are too many."""
    made = []
    with pytest.raises(AdapterMismatchError), AllocationLimit(10, ""):
        for _ in range(TIMES + 1):
            made.append(torch.zeros(FLOOR))

    assert len(made) == TIMES


def test_what_fits_is_made_as_without() -> None:
    """Within the limit every call gives what it gives without it, and a file of more numbers allows more."""
    with AllocationLimit(4 * FLOOR, ""):
        torch.manual_seed(0)
        inside = [torch.randn(4 * FLOOR), torch.zeros(3, dtype=torch.int8), ONE.repeat(2, 3), nn.Linear(3, 4).weight]
    torch.manual_seed(0)
    outside = [torch.randn(4 * FLOOR), torch.zeros(3, dtype=torch.int8), ONE.repeat(2, 3), nn.Linear(3, 4).weight]

    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))
    assert inside[0].device == outside[0].device


def test_the_meta_device_costs_nothing() -> None:
    """What has a shape and no memory is not counted."""
    with AllocationLimit(10, ""):
        big: Tensor = torch.empty(HUGE, device="meta")
        big.new_zeros(HUGE)

    assert big.numel() == HUGE


def test_a_call_that_fails_by_itself() -> None:
    """A call with arguments that torch refuses raises what torch raises."""
    with pytest.raises(RuntimeError, match="negative"), AllocationLimit(10, ""):
        torch.zeros(-1)
    with pytest.raises(TypeError), AllocationLimit(10, ""):
        torch.zeros("3")
