"""What a tuned model saves and loads: the trained part, strictly, under the base model's own keys.

The hooks live on the tuned root and get torch's prefix, so that they work at any depth (a child of a larger model, DDP, torch.compile).
They are module-level functions, so that copies and pickles of a model carry them.

A tensor of the base that is absent from a state dict means "the base's own". Statistics of normalisation layers are always part of the
trained part; any other persistent buffer is, once its value differs from the base's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from gift_core.errors import StateDictError
from gift_core.record import Original, Tuning, find_tuning, named_tensors, tuned_root, tuning_of

StateDict = MutableMapping[str, Any]


def install_hooks(root: nn.Module) -> None:
    """Let ``root.state_dict()`` give the trained part, and ``load_state_dict`` take it back."""
    root.register_state_dict_post_hook(_keep_trained_part)
    root.register_load_state_dict_pre_hook(_complete)


@contextlib.contextmanager
def full_state_dict(module: nn.Module) -> Iterator[nn.Module]:
    """Within the context, ``state_dict()`` holds everything: the frozen base, under its own keys, and the adapter.

    For tools that need a complete checkpoint (some trainers, exporters). Such a checkpoint loads at any time.

    Raises:
        StateError: if the model is not tuned.
    """
    tuning = tuning_of(tuned_root(module))
    was, tuning.full = tuning.full, True
    try:
        yield module
    finally:
        tuning.full = was


def classify_keys(root: nn.Module, base: set[int]) -> dict[str, Any]:
    """Sort the keys of a freshly tuned model into the groups of `Tuning`.

    Args:
        root: the model, with its strategy applied.
        base: ``id`` of every parameter and buffer that the model had before; a tensor is the base's own wherever it stands now.
    """
    parameters = [(key, parameter.requires_grad, id(parameter) in base) for key, _, _, parameter in named_tensors(root, buffers=False)]
    buffers = [
        (key, isinstance(module, nn.modules.batchnorm._NormBase), id(buffer) in base)
        for key, module, name, buffer in named_tensors(root, buffers=True)
        if name not in module._non_persistent_buffers_set
    ]
    return {
        "adapter": [key for key, _, is_base in (*parameters, *buffers) if not is_base],
        "trained": [key for key, trains, _ in parameters if trains],
        "frozen": [key for key, trains, is_base in parameters if not trains and is_base],
        "statistics": [key for key, is_statistic, is_base in buffers if is_statistic and is_base],
        "buffers": [key for key, is_statistic, is_base in buffers if not is_statistic and is_base],
    }


def moved_buffers(tuning: Tuning) -> set[str]:
    """Keys of the buffers, statistics included, whose values differ from the base's."""
    return {original.full_name for original in tuning.originals if original.is_buffer and original.has_moved()}


def _keep_trained_part(module: nn.Module, state_dict: StateDict, prefix: str, local_metadata: dict[str, Any]) -> None:
    tuning = find_tuning(module)
    if tuning is None or tuning.full:
        return
    moved = moved_buffers(tuning) if tuning.buffers else set()
    for key in (*tuning.frozen, *(key for key in tuning.buffers if key not in moved)):
        state_dict.pop(prefix + key, None)


def _complete(
    module: nn.Module,
    state_dict: StateDict,
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Supply what the trained part leaves out, after checking that it is the trained part, or a whole checkpoint."""
    tuning = find_tuning(module)
    if tuning is None:
        return
    own = _persistent(module)
    given = {key[len(prefix) :] for key in state_dict if key.startswith(prefix)}
    is_base = bool(tuning.frozen) and given.issuperset(tuning.frozen) and given.isdisjoint(tuning.adapter)
    if strict:
        _refuse_misfits(tuning, own, given, state_dict, prefix, is_base)
    if is_base:
        _adopt_base_values(tuning, state_dict, prefix)
        supplied = {key: own[key] for key in tuning.adapter}
    else:
        supplied = {key: own[key] for key in tuning.frozen} | _base_buffers(tuning, own)
    for key, tensor in supplied.items():
        state_dict.setdefault(prefix + key, tensor)


def _refuse_misfits(tuning: Tuning, own: dict[str, Tensor], given: set[str], state_dict: StateDict, prefix: str, is_base: bool) -> None:
    # torch would copy until it meets the first misfit and skip the rest: everything is checked before anything is written
    # what the module has and the tuning does not know was added since
    missing = set(own) - given - set(tuning.frozen) - set(tuning.buffers) - (set(tuning.adapter) if is_base else set())
    if not any(map(_is_counter, given)):
        missing = {key for key in missing if not _is_counter(key)}  # a checkpoint older than the counter: torch knows its version
    frozen_given = given & set(tuning.frozen)
    partial = frozen_given if len(frozen_given) != len(set(tuning.frozen)) else set()
    misshapen = [
        f"{key}: {_shape(state_dict[prefix + key])} given, {tuple(own[key].shape)} in the model"
        for key in sorted(given & set(own))
        if _shape(state_dict[prefix + key]) != tuple(own[key].shape)
    ]
    unknown = sorted(key for key in given - set(own) if not key.endswith("_extra_state"))
    problems = [
        *(f"missing: {key}" for key in sorted(missing)),
        *(f"unexpected: {key}" for key in unknown),
        *(f"only a part of the frozen base is given: {key}" for key in sorted(partial)[:3]),
        *(f"wrong shape: {line}" for line in misshapen),
    ]
    if problems:
        raise StateDictError(
            "the state dict does not fit the tuned model; nothing was loaded.\n  "
            + "\n  ".join(problems)
            + "\nA tuned model takes its trained part, or a whole checkpoint of the original model."
        )


def _persistent(root: nn.Module) -> dict[str, Tensor]:
    own = {key: parameter for key, _, _, parameter in named_tensors(root, buffers=False)}
    persistent = {
        key: buffer for key, module, name, buffer in named_tensors(root, buffers=True) if name not in module._non_persistent_buffers_set
    }
    return own | persistent


def _is_counter(key: str) -> bool:
    return key.rpartition(".")[2] == "num_batches_tracked"


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def _adopt_base_values(tuning: Tuning, state_dict: StateDict, prefix: str) -> None:
    # the checkpoint is of the original model: its values are the originals from now on
    for original in tuning.originals:
        value = state_dict.get(prefix + original.full_name)
        if isinstance(value, torch.Tensor) and value.shape == original.value.shape:
            original.value = value.detach().to(original.value.device, original.value.dtype, copy=True)


def _base_buffers(tuning: Tuning, own: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {original.full_name: original for original in tuning.originals if original.is_buffer}
    return {key: _base_value(found.get(key), own[key]) for key in tuning.buffers if key in own}


def _base_value(original: Original | None, current: Tensor) -> Tensor:
    return current if original is None or not original.has_moved() else original.value.to(current.device, current.dtype)
