"""A limit on the tensors that are made while a file, and not the user, says how large they are.

It counts numbers before they are allocated, whoever asks torch for them: a method, a layer's constructor, the core itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gift_core.errors import AdapterMismatchError

#: So many numbers are always allowed, so that a tiny adapter's method may use a little more than it stores.
FLOOR = 2**16
#: All tensors together may have so many times the numbers of the file: each is made once, and some are only passed through.
TIMES = 8

_KEEPERS = frozenset(getattr(holder, name) for holder in (torch, Tensor) for name in ("tile", "repeat_interleave")) | {Tensor.repeat}
_MAKERS = _KEEPERS | frozenset(
    getattr(holder, name)
    for holder, names in (
        (torch, "empty zeros ones full rand randn randint randperm normal arange linspace logspace eye empty_strided"),
        (torch, "tril_indices triu_indices hann_window hamming_window"),
        (Tensor, "new_empty new_empty_strided new_zeros new_ones new_full"),
    )
    for name in names.split()
)
_REAL_DEVICES_ONLY = ("device", "out", "pin_memory", "generator", "requires_grad")


class AllocationLimit(TorchFunctionMode):
    """Within the context, no new tensor has more numbers than a file, and all together a few times as many.

    Args:
        numbers: how many numbers the file holds.
        advice: what to do where that is too few, for the message.

    Raises:
        AdapterMismatchError: instead of the allocation.
    """

    def __init__(self, numbers: int, advice: str) -> None:
        super().__init__()
        self._single = max(numbers, FLOOR)
        self._left = TIMES * self._single
        self._numbers = numbers
        self._advice = advice

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _MAKERS:
            self._charge(_size(func, args, kwargs or {}))
        return func(*args, **kwargs) if kwargs else func(*args)  # most calls read an attribute, tens of them for each layer

    def _charge(self, numbers: int) -> None:
        self._left -= numbers
        if numbers > self._single or self._left < 0:
            raise AdapterMismatchError(
                f"the recorded strategy asks for a tensor of {numbers:,} numbers, "
                f"and the file holds {self._numbers:,} in all. {self._advice}"
            )


def _size(func: Callable[..., Any], args: tuple[Any, ...], keywords: Mapping[str, Any]) -> int:
    """How many numbers the call would allocate: what the same call gives on the meta device, where nothing is allocated."""
    if args and isinstance(args[0], Tensor):
        if args[0].is_meta:
            return 0
        args = (args[0].detach().to("meta"), *args[1:])
    elif torch.device(keywords.get("device") or "cpu").type == "meta":
        return 0
    rest = {key: value for key, value in keywords.items() if key not in _REAL_DEVICES_ONLY}
    device = {} if func in _KEEPERS else {"device": "meta"}
    try:
        return int(func(*args, **rest, **device).numel())
    except (RuntimeError, TypeError):  # the call itself fails in the same way, and says it better
        return 0
