"""Where the samples of a batch lie in the call of a layer: computing some of them apart, and putting the outputs together.

Pure calls and tensors: nothing here knows adapters. A layer that is not listed has its samples along the first axis of every tensor.

========================  ============================================  ===================================
layer                     samples in the arguments                      samples in the output
========================  ============================================  ===================================
recurrent layers          ``input`` by ``batch_first``, or packed;      ``output`` as ``input``, states
                          ``hx`` along axis 1                           along axis 1
MultiheadAttention        ``query``, ``key``, ``value`` by              output as ``query``, weights
                          ``batch_first``; ``attn_mask`` of 3 axes      along axis 0
                          with all heads of a sample together
========================  ============================================  ===================================

Where recurrent layers or attention have time first, linear layers and the like around them do, too: they are called with the samples
along the second axis before such a model pools over time, and along the first afterwards.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from gift_core.errors import SiteError

_CONVOLUTIONS = nn.modules.conv._ConvNd
#: Layers whose second axis is that of the channels, so that the samples cannot lie there.
_CHANNELS_SECOND = (_CONVOLUTIONS, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.PReLU)

#: What an argument may be that is the same for all samples.
_SAME_FOR_ALL = (bool, int, float, complex, str, torch.dtype, torch.device, torch.Size)

#: Rows of a batch, ascending, and what computes them.
Group = tuple[Tensor, Callable[..., Any]]


class _Along(NamedTuple):
    """The axis of the samples in an argument, how many entries each has there, and from how many axes on it has samples at all."""

    axis: int
    each: int = 1
    axes: int = 0


@dataclasses.dataclass(frozen=True)
class BatchCall:
    """One way in which a layer is called with a batch.

    Attributes:
        signature: of its forward.
        inputs: where the samples are by argument; "" stands for all that are not named.
        outputs: the axes of the samples in the tensors that it gives, in order; the last holds for all that follow.
        axes: how many axes the first argument has at least; with fewer it is a single sample.
    """

    signature: inspect.Signature
    inputs: Mapping[str, _Along]
    outputs: tuple[int, ...]
    axes: int

    def misfit(self, call: inspect.BoundArguments, size: int) -> str | None:
        """Which argument is no batch of ``size`` samples, and what it is; None if all are."""
        for at, (name, value) in enumerate(call.arguments.items()):
            along = self._along(name)
            if (other := next(_unknown_in(value), None)) is not None:
                return f"{name} of {type(other).__name__}"
            for tensor in tensors_in(value):
                found = _entries(tensor, along, 0 if at else self.axes)
                if found is not None and found != size * along.each:
                    return f"{name} of {_shape(tensor)}"
        return None

    def apart(self, call: inspect.BoundArguments, groups: Sequence[Group]) -> Any:
        """Compute each group on its rows, and give what a call of all rows gives.

        Raises:
            SiteError: if a tensor of the output has no such rows; the caller adds where.
        """
        parts = [self._part(call, rows, compute) for rows, compute in groups]
        packed = next((value for value in call.arguments.values() if isinstance(value, PackedSequence)), None)
        axes = itertools.chain(self.outputs, itertools.repeat(self.outputs[-1]))
        return _together(parts, [rows for rows, _ in groups], axes, packed)

    def _part(self, call: inspect.BoundArguments, rows: Tensor, compute: Callable[..., Any]) -> Any:
        taken = {name: _rows(value, self._along(name), rows) for name, value in call.arguments.items()}
        part = inspect.BoundArguments(call.signature, taken)
        return compute(*part.args, **part.kwargs)

    def _along(self, name: str) -> _Along:
        return self.inputs.get(name, self.inputs[""])


def is_time_first(module: nn.Module) -> bool:
    """Whether a layer has its samples along the second axis, as recurrent layers and attention do by default."""
    return isinstance(module, (nn.RNNBase, nn.MultiheadAttention)) and not module.batch_first


def batch_calls_of(module: nn.Module, time_first: bool) -> tuple[BatchCall, ...]:
    """The ways in which a plain layer may be called with a batch.

    Args:
        module: the layer.
        time_first: whether the model has layers with their samples along the second axis; others may then have them there, too.

    Raises:
        SiteError: if it is recurrent or attention with a forward of its own, or its gradients depend on the whole batch; the caller
            adds where.
    """
    if getattr(module, "scale_grad_by_freq", False):
        raise SiteError("scales its gradients by how often the whole batch has a token (scale_grad_by_freq)")
    forward = type(module).forward
    signature = inspect.signature(types.MethodType(forward, module))
    if isinstance(module, (nn.RNNBase, nn.MultiheadAttention)):
        if not forward.__module__.startswith("torch.nn."):
            raise SiteError("has a forward of its own, which may have its samples along any axis")
        return (_of_sequences(module, signature),)
    axes = 1 if isinstance(module, nn.Embedding) else len(module.kernel_size) + 2 if isinstance(module, _CONVOLUTIONS) else 2
    ways = [(0, axes)] + ([(1, axes + 1)] if time_first and not isinstance(module, _CHANNELS_SECOND) else [])
    return tuple(BatchCall(signature, {"": _Along(axis)}, (axis,), fewest) for axis, fewest in ways)


def _of_sequences(module: nn.RNNBase | nn.MultiheadAttention, signature: inspect.Signature) -> BatchCall:
    first = int(is_time_first(module))
    if isinstance(module, nn.RNNBase):
        return BatchCall(signature, {"": _Along(first), "hx": _Along(1)}, (first, 1), 3)
    masks = {"key_padding_mask": _Along(0), "attn_mask": _Along(0, module.num_heads, 3)}
    return BatchCall(signature, {"": _Along(first), **masks}, (first, 0), 3)


def _unknown_in(value: Any) -> Iterator[Any]:
    """What may have samples that cannot be told apart."""
    if type(value) in (tuple, list, dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _unknown_in(item)
    elif value is not None and not isinstance(value, (Tensor, PackedSequence, *_SAME_FOR_ALL)):
        yield value


def tensors_in(value: Any) -> Iterator[Tensor | PackedSequence]:
    """The tensors of an argument or an output, in order, and packed sequences whole."""
    if isinstance(value, (Tensor, PackedSequence)):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item)


def _entries(value: Tensor | PackedSequence, along: _Along, axes: int) -> int | None:
    """How many entries lie along the axis of the samples, 0 where there is no such axis, None if the tensor is for all samples."""
    if isinstance(value, PackedSequence):
        return int(value.batch_sizes[0])
    if value.dim() < along.axes:
        return None
    return 0 if value.is_nested or value.dim() < max(axes, along.axis + 1) else value.shape[along.axis]


def _shape(value: Tensor | PackedSequence) -> str:
    if isinstance(value, PackedSequence):
        return f"{int(value.batch_sizes[0])} packed sequences"
    return "a nested tensor" if value.is_nested else str(tuple(value.shape))


# --- some rows of a call


def _rows(value: Any, along: _Along, rows: Tensor) -> Any:
    if isinstance(value, PackedSequence):
        return _rows_of_packed(value, rows)
    if isinstance(value, Tensor):
        if value.dim() < along.axes:
            return value
        split = value.unflatten(along.axis, (-1, along.each))
        return split.index_select(along.axis, rows.to(value.device)).flatten(along.axis, along.axis + 1)
    if isinstance(value, dict):
        return {key: _rows(item, along, rows) for key, item in value.items()}
    return type(value)(_rows(item, along, rows) for item in value) if isinstance(value, (tuple, list)) else value


def _rows_of_packed(packed: PackedSequence, rows: Tensor) -> PackedSequence:
    index, times, ranks = _places(packed, rows)
    order = ranks.argsort().to(packed.data.device)
    return PackedSequence(packed.data.index_select(0, index), times.bincount(), order, order.argsort())


def _places(packed: PackedSequence, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where sequences lie in the packed data, at which time each of these entries is, and the rank of each sequence by length."""
    sizes = packed.batch_sizes
    times = torch.arange(len(sizes)).repeat_interleave(sizes)
    rank_of_entry = torch.arange(len(times)) - (sizes.cumsum(0) - sizes)[times]
    ranks = rows if packed.unsorted_indices is None else packed.unsorted_indices.cpu()[rows]
    index = torch.isin(rank_of_entry, ranks).nonzero().flatten()
    return index.to(packed.data.device), times[index], ranks


# --- and back


def _together(parts: list[Any], rows: list[Tensor], axes: Iterator[int], packed: PackedSequence | None) -> Any:
    first = parts[0]
    if isinstance(first, PackedSequence):
        assert packed is not None  # what gives packed sequences was given some
        index = torch.cat([_places(packed, own)[0] for own in rows])
        data = torch.cat([part.data for part in parts]).index_select(0, index.argsort())
        next(axes)
        return PackedSequence(data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)
    if isinstance(first, Tensor):
        axis = next(axes)
        if wrong := [part for part, own in zip(parts, rows, strict=True) if part.dim() <= axis or part.shape[axis] != len(own)]:
            raise SiteError(f"gives a tensor of {tuple(wrong[0].shape)}, in which its samples do not lie along axis {axis}")
        return torch.cat(parts, axis).index_select(axis, torch.cat(rows).argsort().to(first.device))
    if type(first) in (tuple, list):
        return type(first)(_together(list(items), rows, axes, packed) for items in zip(*parts, strict=True))
    if type(first) is dict:
        return {key: _together([part[key] for part in parts], rows, axes, packed) for key in first}
    if first is None:
        return None
    raise SiteError(f"gives a {type(first).__name__}, of which it is not known what belongs to which sample")
