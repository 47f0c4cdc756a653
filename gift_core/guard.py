"""The base's own values while actions run: a write into them is noticed, and reversed.

A write past torch's version counter (through ``.data``) shows in the bits alone, so that the values are copied before and compared
after. Tensors of one shape are copied and compared together: the cost is that of reading memory, not that of many small calls.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gift_core.record import bits_of, same_bits

_PLAIN = (Tensor, nn.Parameter)

#: The most that is copied of the base at one time while actions run, unless one site alone has more: what fits into a cache.
GUARDED_BYTES = 2**19

#: What is read a second time, to be compared.
_AGAIN = -1


class Room:
    """Memory for copies that one guard after another may use: to get it anew from the system takes longer than to copy."""

    def __init__(self) -> None:
        self._held: dict[object, Tensor] = {}

    def stacked(self, use: int, tensors: list[Tensor]) -> Tensor:
        """Dense tensors of one shape, dtype and device behind one another, in place of what had the same ``use`` before."""
        size = len(tensors) * tensors[0].nbytes
        held = self._held.get(key := (use, tensors[0].device))
        if held is None or held.nbytes < size:
            # made of the tensors, because a limit may be on what is asked for by size alone
            made = torch.stack(tensors)
            if size <= GUARDED_BYTES:
                self._held[key] = made.flatten().view(torch.uint8)
            return made
        return torch.stack(tensors, out=held[:size].view(tensors[0].dtype).view(len(tensors), *tensors[0].shape))


class Guard:
    """Holds the values of some tensors, each once.

    Args:
        tensors: of any type, shape, dtype and device. Those that are no plain dense tensors are held by their version counter and a
            copy, because they have no bits that could be compared.
        room: where the copies are kept; of guards with one room only the latest counts.
    """

    def __init__(self, tensors: Iterable[Tensor], room: Room | None = None) -> None:
        self._room = room or Room()
        self._tensors = list({id(tensor): tensor for tensor in tensors}.values())
        self._looks = [_look(tensor) for tensor in self._tensors]
        self._aliases = [tensor.data for tensor in self._tensors]
        self._groups = list(_alike(self._looks))
        self._values = [self._read(group, use) for use, group in enumerate(self._groups)]

    def written(self) -> list[Tensor]:
        """The tensors whose values, type or memory are not what they were."""
        return [self._tensors[at] for at, _ in self._written()]

    def put_back(self) -> None:
        """Give every tensor its memory and its values back, in place."""
        with torch.no_grad():
            for at, value in self._written():
                self._tensors[at].data = self._aliases[at]  # it may have been exchanged
                self._aliases[at].copy_(value)

    def _read(self, group: Sequence[int], use: int) -> Tensor:
        if len(group) == 1:
            return self._aliases[group[0]].clone()[None]
        return self._room.stacked(use, [self._aliases[at] for at in group])

    def _written(self) -> list[tuple[int, Tensor]]:
        return [item for group, values in zip(self._groups, self._values, strict=True) for item in self._written_of(group, values)]

    def _written_of(self, group: Sequence[int], values: Tensor) -> list[tuple[int, Tensor]]:
        touched = {at for at in group if _look(self._tensors[at]) != self._looks[at]}
        if not touched and (self._looks[group[0]][-1] is None or not _differ(self._read(group, _AGAIN), values)):
            return []
        return [
            (at, value) for at, value in zip(group, values, strict=True) if at in touched or not same_bits(self._aliases[at], value)
        ]


def _differ(now: Tensor, then: Tensor) -> bool:
    """Whether any bit is different, several times faster than torch compares; ``now`` is lost."""
    return bool(bits_of(now).bitwise_xor_(bits_of(then)).view(torch.uint8).any())


#: The version of a tensor; its address and strides; and its shape, dtype and device, or None where it is no plain dense tensor.
_Look = tuple[int, tuple[Any, ...], tuple[Any, ...] | None]


def _look(tensor: Tensor) -> _Look:
    """What shows that a tensor was written, or has other memory, without a look at its numbers."""
    if not _is_plain(tensor):
        return tensor._version, (), None
    return tensor._version, (tensor.data_ptr(), tensor.stride()), (tensor.shape, tensor.dtype, tensor.device)


def _is_plain(tensor: Tensor) -> bool:
    dense = tensor.layout is torch.strided and not tensor.is_meta
    return type(tensor) in _PLAIN and dense and not (tensor.is_conj() or tensor.is_neg())


def _alike(looks: Iterable[_Look]) -> Iterator[list[int]]:
    """The places of tensors that can be stacked."""
    groups: dict[object, list[int]] = {}
    for at, (_, _, kind) in enumerate(looks):
        groups.setdefault(at if kind is None else kind, []).append(at)
    yield from groups.values()
