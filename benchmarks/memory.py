"""Bytes that one step keeps for its backward pass, and the most it holds at once."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile


def saved_bytes(forward: Callable[[], Tensor], modules: list[nn.Module]) -> int:
    """Bytes of the storages that a forward pass saves for backward, each once, without the tensors that ``modules`` own anyway."""
    owned = {_address(tensor) for module in modules for tensor in _tensors(module)}
    saved: dict[int, int] = {}
    held: list[Tensor] = []  # a storage that were freed now could lend its address to the next

    def pack(tensor: Tensor) -> Tensor:
        if _address(tensor) not in owned:
            saved[_address(tensor)] = tensor.untyped_storage().nbytes()
            held.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    del loss
    return sum(saved.values())


def peak_bytes(step: Callable[[], object]) -> int:
    """The most bytes that a step holds above what was held before it, from the allocator's own record."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    held = most = 0
    for _, change in sorted(_allocations(record), key=lambda event: event[0]):
        held += change
        most = max(most, held)
    return most


def _allocations(record: profile) -> list[tuple[int, int]]:
    # the public list of events leaves out the allocations inside operators
    assert record.profiler is not None and record.profiler.kineto_results is not None
    return [(event.start_ns(), event.nbytes()) for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]


def _tensors(module: nn.Module) -> list[Tensor]:
    # not module.parameters(): a system may have it give the trainable ones alone
    return [tensor for _, tensor in (*module.named_parameters(), *module.named_buffers())]


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
