"""Models spread over processes: the few places where a sharded tensor differs from a whole one.

A sharded tensor is a `torch.distributed.tensor.DTensor`, as FSDP2's ``fully_shard`` and tensor parallelism make them. It is told by
name, because importing ``torch.distributed.tensor`` costs more than all of GIFt. What is said to be collective must be called by
every process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gift_core.errors import GiftError, StateError
from gift_core.record import adopted_modules, tuned_root
from gift_core.reparameterization import original_class_of, trust_mesh, trusts_mesh


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is spread over processes."""
    return type(tensor).__name__ == "DTensor"


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, gathered if it is sharded (collective)."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def agreed(target: Tensor, value: Tensor) -> Tensor:
    """This process's part of a whole value for ``target``, as the first process has it (collective)."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    sharded: Any = target
    mesh = sharded.device_mesh
    value = value.to(sharded.device, sharded.dtype, copy=True)  # the first process's is written into the others' copies
    same: Any = distribute_tensor(value, mesh, [Replicate()] * mesh.ndim)
    part: Tensor = same.to_local()[own_slices(target)]
    return part.clone() if part.numel() < value.numel() else part  # a view would hold all of it


def write_whole(target: Tensor, value: Tensor) -> None:
    """Write a whole value, which every process has, into a tensor or into its shards (collective)."""
    if is_sharded(target):
        own_part(target).copy_(agreed(target, value))
    else:
        target.copy_(value)


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: all of it, if it is not sharded."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def own_slices(tensor: Tensor) -> tuple[slice, ...]:
    """Where in the whole of a tensor this process's part lies, by dimension; torch's own way refuses uneven strided parts."""
    sharded: Any = tensor
    held = [range(size) for size in tensor.shape]
    # what FSDP2 splits of what tensor parallelism has split is called strided: the later split comes last, wherever it stands
    for dimension in sorted(_splits(tensor), key=lambda dimension: type(sharded.placements[dimension]).__name__ == "_StridedShard"):
        across = sharded.placements[dimension].dim
        size = -(-len(held[across]) // sharded.device_mesh.size(dimension))
        at = sharded.device_mesh.get_coordinate()[dimension] * size
        held[across] = held[across][at : at + size]
    return tuple(slice(each.start, each.stop) for each in held)


def layout_of(tensor: Tensor) -> Any:
    """How a tensor is spread; equal for those whose parts lie alike, None for whole ones."""
    sharded: Any = tensor
    return (sharded.device_mesh, tuple(sharded.placements)) if is_sharded(tensor) else None


def is_made_of_parts(tensor: Tensor) -> bool:
    """Whether every process holds a part of a tensor, or all of it, as it is; otherwise it is a sum or the like of what they hold."""
    return not is_sharded(tensor) or all(
        placement.is_replicate() or type(placement).__name__ in _SPLITTING
        for placement in tensor.placements  # type: ignore[attr-defined]
    )


def add_up(numbers: Tensor, parts: Tensor) -> Tensor:
    """The sum of the numbers of the processes that hold different parts of a sharded tensor (collective)."""
    sharded: Any = parts
    numbers = numbers.to(sharded.device_mesh.device_type)
    for dimension in _splits(parts):
        dist.all_reduce(numbers, group=sharded.device_mesh.get_group(dimension))
    return numbers


_SPLITTING = ("Shard", "_StridedShard")


def _splits(tensor: Tensor) -> list[int]:
    """The dimensions of its mesh over which a sharded tensor is split."""
    placements: Any = tensor.placements if is_sharded(tensor) else ()  # type: ignore[attr-defined]
    return [dimension for dimension, placement in enumerate(placements) if type(placement).__name__ in _SPLITTING]


class Peers:
    """The processes over which a model is sharded, and what they do as one. Of a whole model each process is alone, and waits for none.

    Work is done in steps: each process `alone`, where one that fails lets all fail, or in `exchange`. A process that has ended, or
    never comes, is an error in the others, at the latest when the process group's timeout is over.

    Args:
        module: the model, the same on all processes.
        what: what they do, for messages.
        after: what is the case after a failure, likewise.
    """

    def __init__(self, module: Any, what: str, after: str) -> None:
        self._device = _device_of(module)
        self._what = what
        self._after = after

    @property
    def is_writer(self) -> bool:
        """Whether this process writes what all have gathered: rank 0 of a sharded model, each for itself otherwise."""
        return self._device is None or dist.get_rank() == 0

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """A step that exchanges nothing and fails in every process if it fails in one (collective).

        Raises:
            StateError: in the processes where nothing went wrong, if something did in another, or if one has ended.
        """
        try:
            yield
        except BaseException:
            with contextlib.suppress(StateError):  # what happened here says more than that another has ended
                self._highest(1)
            raise
        if self._highest(0):
            raise StateError(f"another process could not {self._what}: its own error says why. {self._after}")

    @contextlib.contextmanager
    def exchange(self) -> Iterator[None]:
        """A step that all take together, tensor by tensor in one order.

        Raises:
            StateError: if another process has ended or does not come.
        """
        try:
            yield
        except RuntimeError as error:  # of gloo, NCCL and the like, which have no class in common
            if self._device is None or isinstance(error, GiftError):
                raise
            raise StateError(
                f"could not {self._what}: the processes of the sharded model could not reach each other ({type(error).__name__}: "
                f"{error}). See which of them has ended and why, and start all anew. {self._after}"
            ) from error

    def refuse_difference(self, number: int, message: str) -> None:
        """Raise an error in every process if they do not all have the same number of less than 63 bits (collective).

        Raises:
            StateError: if so.
        """
        if self._highest(number) != -self._highest(-number):
            raise StateError(f"could not {self._what}: {message} {self._after}")

    def _highest(self, number: int) -> int:
        if self._device is None:
            return number
        with self.exchange():
            highest = torch.tensor(number, dtype=torch.int64, device=self._device)
            dist.all_reduce(highest, op=dist.ReduceOp.MAX)
            return int(highest.item())


def _device_of(module: Any) -> str | None:
    """Where the parts of a sharded model are; None for a whole one."""
    if not isinstance(module, nn.Module) or not dist.is_available() or not dist.is_initialized():
        return None
    tensors = (tensor for each in module.modules() for tensor in (*each._parameters.values(), *each._buffers.values()))
    return next((tensor.device.type for tensor in tensors if tensor is not None and is_sharded(tensor)), None)


@contextlib.contextmanager
def plain_layers(module: nn.Module) -> Iterator[nn.Module]:
    """Within the context, adapted layers are of their original classes, for tools that replace a layer's parameters.

    Tensor parallelism reads ``layer.weight`` and puts a sharded one in its place::

        enable_fine_tuning(model, "lora")
        with plain_layers(model):
            parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})

    The adapter's own tensors are then sharded or replicated as the plan's style has it, and the layers compute with what they find.
    Nothing may run forward within the context.

    FSDP2 comes after the context, over the other dimension of the mesh: ``fully_shard(model, mesh=mesh["dp"])``.

    Args:
        module: a tuned model that is not merged.

    Raises:
        StateError: if it is not tuned, is merged or under FSDP2 already, or the tool inside changed a layer's class.
    """
    root = tuned_root(module)
    adopted = [(name, layer, type(layer)) for name, layer in adopted_modules(root)]
    if any(cls._is_merged for _, _, cls in adopted):  # type: ignore[attr-defined]
        raise StateError("the model is merged: call unmerge(model) first.")
    for name, layer, _ in adopted:
        if any(is_sharded(weight) and not trusts_mesh(layer, weight) for weight in layer._parameters.values() if weight is not None):
            raise StateError(
                f"{name!r} is sharded already: parallelize_module comes first, in plain_layers, and fully_shard afterwards."
            )
    for _, layer, _ in adopted:
        layer.__class__ = original_class_of(layer)
    try:
        yield module
    finally:
        changed = [name for name, layer, cls in adopted if type(layer) is not cls._original_class]  # type: ignore[attr-defined]
        for _, layer, cls in adopted:
            layer.__class__ = cls
            trust_mesh(layer)
    if changed:
        raise StateError(
            f"within plain_layers, {', '.join(changed[:3])} became of another class, which is taken back: what belongs there leaves a "
            "layer's class alone, as parallelize_module does. Call fully_shard after the context."
        )
