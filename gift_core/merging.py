"""Merged weights: the base model's speed with the tuned model's answers, and back, bit for bit.

The frozen tensors are kept while merged, so that unmerging restores them instead of subtracting.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from gift_core.errors import SiteError, StateError
from gift_core.iterator import Inventory
from gift_core.record import adopted_modules, in_turn, refuse_incomplete, set_tuning, tuned_root, tuning_of
from gift_core.reparameterization import adoptions_of, effective_weight, is_opaque, refresh_caches, set_merged
from gift_core.structure import ABSENT, Snapshot, undo


@in_turn
def merge(module: nn.Module) -> None:
    """Let a tuned model compute with merged weights, for inference. It needs the memory of the adapted weights once more.

    What it saves does not change. Training a merged model is refused, and a load or an optimizer step while merged is picked up. So is
    any other write that torch counts, and a tensor that takes another's place. A write into the numbers behind ``parameter.data``, as
    ``parameter.data.copy_(average)``, leaves no trace that could be looked for at the base model's speed: `unmerge` and `merge` again
    after it.

    Raises:
        StateError: if the model is not tuned or merged already.
        SiteError: if a weight is sharded or packed; nothing is merged then.
    """
    root = tuned_root(module)
    tuning = tuning_of(root)
    if tuning.merged:
        raise StateError("the model is merged already: unmerge(model) undoes it.")
    _refuse_opaque(root)
    done: list[nn.Module] = []
    try:
        for _, adopted in adopted_modules(root):
            set_merged(adopted, True)
            done.append(adopted)
    except BaseException:
        for adopted in done:
            set_merged(adopted, False)
        raise
    tuning.merged = True


@in_turn
def unmerge(module: nn.Module) -> None:
    """Let a merged model compute from the frozen base and the adapter again. The frozen bits were never touched.

    Raises:
        StateError: if the model is not merged.
    """
    root = tuned_root(module)
    tuning = tuning_of(root)
    if not tuning.merged:
        raise StateError("the model is not merged: merge(model) does it.")
    for _, adopted in adopted_modules(root):
        set_merged(adopted, False)
    tuning.merged = False


@contextlib.contextmanager
def merged(module: nn.Module) -> Iterator[nn.Module]:
    """`merge` within the context, `unmerge` after it, also after an error."""
    merge(module)
    try:
        yield module
    finally:
        unmerge(module)


@in_turn
def merge_and_unload(module: nn.Module) -> nn.Module:
    """Turn a tuned model into a plain one with tuned weights, in place: original classes and keys, all of the state dict.

    A weight that is tied to one that was not adapted becomes a tensor of its own, because the two differ from now on.

    Returns:
        The model.

    Raises:
        StateError: if the model is not tuned, its adapter belongs to a set that is in use, or a tuned layer is no longer in it.
        SiteError: if a method of the strategy is no function of a weight (a replaced module), or a weight is sharded or packed.
    """
    root = tuned_root(module)
    tuning = tuning_of(root)
    if tuning.governed_by() is not None:
        raise StateError("the base belongs to several adapters: call release() on their set first, which leaves the one in use.")
    held = Inventory.of(root)
    refuse_incomplete(tuning, held.modules, {item[0] for item in (*held.parameters, *held.buffers)}, "not unloaded")
    _refuse_opaque(root)
    if tuning.merged:
        unmerge(root)
    weights = _effective_weights(root)
    _refuse_replaced(root, weights)
    holders: dict[int, int] = {}
    for _, _, _, parameter in held.parameters:
        holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    undo(tuning.changes)
    Snapshot([], tuning.flags).restore_flags()
    for owner, name, weight in weights:
        frozen = owner._parameters[name]
        assert frozen is not None  # it was adapted
        if holders[id(frozen)] > 1:
            owner._parameters[name] = nn.Parameter(weight, requires_grad=frozen.requires_grad)
        else:
            frozen.data = weight
    refresh_caches(root)
    set_tuning(root, None)
    return module


def _effective_weights(root: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    with torch.inference_mode(False), torch.no_grad():
        # a copy, because a method may hand out the frozen tensor itself
        return [
            (adopted, name, effective_weight(adopted, name).clone(memory_format=torch.preserve_format))
            for _, adopted in adopted_modules(root)
            for name, _ in adoptions_of(adopted)
        ]


def _refuse_replaced(root: nn.Module, weights: list[tuple[nn.Module, str, Tensor]]) -> None:
    adopted = {id(owner) for owner, _, _ in weights}
    replaced = [
        f"{type(old).__name__} {name!r} by {'nothing' if new is ABSENT else type(new).__name__}"
        for change in tuning_of(root).changes
        if id(change.module) not in adopted
        for name, (old, new) in change.entries.get("_modules", {}).items()
    ]
    if replaced:
        raise SiteError(f"a replaced module has no merged form ({'; '.join(replaced)}): keep the model tuned, or save_adapter it.")


def _refuse_opaque(root: nn.Module) -> None:
    for name, adopted in adopted_modules(root):
        for weight, _ in adoptions_of(adopted):
            frozen = adopted._parameters[weight]
            if frozen is None or is_opaque(frozen):
                raise SiteError(
                    f"{name}.{weight} is sharded or packed ({type(frozen).__name__}) and cannot be merged in place: save_adapter it "
                    "and merge on one process, with the whole base model."
                )
