"""Models spread over processes: the few places where a sharded tensor differs from a whole one.

A sharded tensor is a `torch.distributed.tensor.DTensor`, as FSDP2's ``fully_shard`` and tensor parallelism make them. It is told by
name, because importing ``torch.distributed.tensor`` costs more than all of GIFt. What is said to be collective must be called by
every process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gift_core.errors import StateError
from gift_core.record import adopted_modules, tuned_root
from gift_core.reparameterization import original_class_of, trust_mesh, trusts_mesh


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is spread over processes."""
    return type(tensor).__name__ == "DTensor"


def any_sharded(tensors: Iterable[Tensor]) -> bool:
    """Whether any of many tensors is spread over processes."""
    return any(kind.__name__ == "DTensor" for kind in set(map(type, tensors)))


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, gathered if it is sharded (collective)."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def write_whole(target: Tensor, value: Tensor) -> None:
    """Write a whole value, which every process has, into a tensor or into its shards (collective)."""
    if not is_sharded(target):
        target.copy_(value)
        return
    from torch.distributed.tensor import Replicate, distribute_tensor

    sharded: Any = target
    mesh = sharded.device_mesh
    value = value.to(sharded.device, sharded.dtype, copy=True)  # the first process's is written into the others' copies
    agreed: Any = distribute_tensor(value, mesh, [Replicate()] * mesh.ndim)
    sharded.to_local().copy_(_own_part(sharded, agreed.to_local()))


def _own_part(sharded: Any, value: Tensor) -> Tensor:
    """What this process holds of a whole value that is spread like ``sharded``; torch's own way refuses uneven strided parts."""
    # what FSDP2 splits of what tensor parallelism has split is called strided: the later split comes last, wherever it stands
    splits = sorted(enumerate(sharded.placements), key=lambda split: type(split[1]).__name__ == "_StridedShard")
    for dimension, placement in splits:
        if not placement.is_replicate():
            parts = value.chunk(sharded.device_mesh.size(dimension), placement.dim)
            at = sharded.device_mesh.get_coordinate()[dimension]
            value = parts[at] if at < len(parts) else value.narrow(placement.dim, 0, 0)
    return value


def is_writer(tensors: Iterable[Tensor]) -> bool:
    """Whether this process writes what all have gathered: rank 0 of a sharded model, each for itself otherwise."""
    return not any_sharded(tensors) or dist.get_rank() == 0


@contextlib.contextmanager
def together(tensors: Collection[Tensor], what: str) -> Iterator[None]:
    """Let every process of a sharded model fail where one fails (collective); a model that is whole is left alone.

    Raises:
        StateError: in the processes where nothing went wrong, if something did in another.
    """
    device = next(tensor.device.type for tensor in tensors if is_sharded(tensor)) if any_sharded(tensors) else None
    error: BaseException | None = None
    try:
        yield
    except BaseException as raised:
        error = raised
        raise
    finally:
        # a process that has died answers nothing: gloo and NCCL then raise here, or time out
        if device is not None and _anyone_failed(error is not None, device) and error is None:
            raise StateError(f"another process could not {what}: its own error says why.")


def _anyone_failed(failed: bool, device: str) -> bool:
    flag = torch.tensor(float(failed), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag.item())


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
