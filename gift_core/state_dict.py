"""What a tuned model saves and loads: the trained part, strictly, under the base model's own keys.

The hooks live on the tuned root and get torch's prefix, so that they work at any depth (a child of a larger model, DDP, torch.compile).
They are module-level functions, so that copies and pickles of a model carry them.

Torch's own way takes time with the square of the layers, and copies the frozen base onto itself. Where every layer saves and loads as
`torch.nn.Module` does, `TrainedStateDict` and `LoadsTrainedPart` therefore do the same in one pass; everything else, errors
included, goes torch's way and through the hooks.

A tensor of the base that is absent from a state dict means "the base's own". Statistics of normalisation layers are always part of the
trained part; any other persistent buffer is, once its value differs from the base's.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, MutableMapping, Set
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from gift_core.errors import StateDictError, printable
from gift_core.iterator import Inventory, walk_modules
from gift_core.record import Original, Tuning, find_tuning, newcomers, refuse_incomplete, tuned_root, tuning_of, undisturbed

StateDict = MutableMapping[str, Any]


def install_hooks(root: nn.Module) -> None:
    """Let ``root.state_dict()`` give the trained part, and ``load_state_dict`` take it back."""
    root.register_state_dict_post_hook(_keep_trained_part)
    root.register_load_state_dict_pre_hook(_complete)
    for name, stand_in in (("state_dict", TrainedStateDict), ("load_state_dict", LoadsTrainedPart)):
        if name not in vars(root):  # a replacement of the user's own stays
            setattr(root, name, stand_in(root))


class TrainedStateDict:
    """Stands in for ``root.state_dict``, with its arguments and its answer.

    It holds its owner, so that a deep copy or a pickle of the model gives its own copy's state.
    """

    def __init__(self, root: nn.Module) -> None:
        self.root = root

    def __call__(self, *args: Any, **options: Any) -> Any:
        with undisturbed(self.root):
            return self._saved(*args, **options)

    def _saved(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        root, tuning = self.root, find_tuning(self.root)
        modules = walk_modules(root)
        ours = list(root._state_dict_hooks.values()) == [_keep_trained_part] and not root._state_dict_pre_hooks
        if args or tuning is None or not ours or not _is_plain(modules, _SAVING):
            return type(root).state_dict(root, *args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        if destination is None:
            destination = OrderedDict()
            destination._metadata = OrderedDict()
        if hasattr(destination, "_metadata"):
            versions = destination._metadata
            for name, module in modules:
                versions[prefix + name if name else prefix[:-1]] = {"version": module._version}
        own = _persistent(modules)
        left_out = _left_out(tuning, modules, own)
        for key, tensor in own.items():
            if key not in left_out or tensor.requires_grad:
                destination[prefix + key] = tensor if keep_vars else tensor.detach()
        return destination


class LoadsTrainedPart:
    """Stands in for ``root.load_state_dict``, with its arguments and its answer. It holds its owner, as `TrainedStateDict` does."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root

    def __call__(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        with undisturbed(self.root):
            return self._loaded(state_dict, strict, assign)

    def _loaded(self, state_dict: Mapping[str, Any], strict: bool, assign: bool) -> Any:
        root, tuning = self.root, find_tuning(self.root)
        if tuning is not None and isinstance(state_dict, Mapping) and _load_directly(root, tuning, state_dict, assign):
            return _IncompatibleKeys([], [])
        _refuse_other_things(state_dict)
        if strict:
            modules = walk_modules(root)
            _refuse_half(_twins(_persistent(modules), state_dict.keys()), _extra_states(modules) - state_dict.keys())
        return type(root).load_state_dict(root, state_dict, strict=strict, assign=assign)


#: What a module may override or hook to save or load in a way of its own.
_SAVING = ({"state_dict", "_save_to_state_dict", "get_extra_state"}, ("_state_dict_hooks", "_state_dict_pre_hooks"))
_LOADING = ({"_load_from_state_dict", "set_extra_state"}, ("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"))

_DENSE = frozenset({Tensor, nn.Parameter})

#: What a tensor is like; one that is like another can be written over it. Nested tensors have no shape to ask for.
_LOOKS = attrgetter("shape", "dtype", "layout", "is_meta")

#: A layer of this class adds a counter that an old checkpoint lacks, and else loads as every module does.
_Norm = nn.modules.batchnorm._NormBase


def _is_plain(modules: list[tuple[str, nn.Module]], ways: tuple[set[str], tuple[str, ...]]) -> bool:
    """Whether all modules save, or load, as `torch.nn.Module` does, apart from the hooks and stand-ins of the root."""
    methods, hooks = ways
    plain = {cls: all(_is_torchs(cls, name) for name in methods) for cls in {type(module) for _, module in modules}}
    states = [vars(module) for _, module in modules[1:]]
    hooked = any(any(map(itemgetter(hook), states)) for hook in hooks)
    return all(plain.values()) and not hooked and not any(name in state for name in methods for state in states)


def _is_torchs(cls: type[nn.Module], name: str) -> bool:
    found = getattr(cls, name)
    return found is getattr(nn.Module, name) or (name == "_load_from_state_dict" and found is _Norm._load_from_state_dict)


def _load_directly(root: nn.Module, tuning: Tuning, state_dict: Mapping[str, Any], assign: bool) -> bool:
    """Take what is given, if it is what the model takes and nothing has a say in it but the model; else change nothing."""
    modules = walk_modules(root)
    if not _is_plain(modules, _LOADING) or not _is_hooked_by_us_alone(root) or torch.__future__.get_swap_module_params_on_conversion():
        return False
    own, given = _persistent(modules), state_dict.keys()
    base = _Base.of(tuning, modules, own)
    is_base = base.is_all_in(given)
    if not given <= own.keys() or base.missing(own.keys(), given, is_base) or base.partial(given):
        return False
    if not _fit(list(state_dict.values()), [own[key] for key in state_dict]) or (assign and not _is_assignable(own, state_dict)):
        return False
    values = dict(state_dict)
    if is_base:
        _adopt_base_values(tuning, state_dict, "")
    else:
        values |= {key: value for key, value in _base_buffers(base, own).items() if key not in given and value is not own[key]}
    with torch.no_grad():
        (_assign if assign else _copy)(modules, own, values)
    return True


def _copy(modules: list[tuple[str, nn.Module]], own: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    # a tied tensor is under several keys, of which torch writes the last
    pairs = {id(own[key]): (own[key], value) for key, value in values.items() if own[key] is not value}
    if pairs:
        torch._foreach_copy_([target for target, _ in pairs.values()], [value for _, value in pairs.values()])


def _assign(modules: list[tuple[str, nn.Module]], own: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    held = {key: _held_like(own[key], value) for key, value in values.items()}  # all of them before the first takes its place
    for prefix, module in modules:
        for name in [*module._parameters, *module._buffers]:
            key = f"{prefix}.{name}" if prefix else name
            if key in held:
                setattr(module, name, held[key])


def _is_assignable(own: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> bool:
    is_tied = len({id(own[key]) for key in values}) < len(values)  # torch has a tie end here
    return not is_tied and not any(_untrainable(key, value, own[key]) for key, value in values.items())


def _held_like(own: Tensor, value: Tensor) -> Tensor:
    """What torch's ``assign=True`` puts in the place of ``own``."""
    if not isinstance(own, nn.Parameter):
        return value
    if isinstance(value, nn.Parameter):
        return value.requires_grad_(own.requires_grad)
    return nn.Parameter(value, requires_grad=own.requires_grad)


def _is_hooked_by_us_alone(root: nn.Module) -> bool:
    before: list[Any] = list(root._load_state_dict_pre_hooks.values())
    return [getattr(hook, "hook", None) for hook in before] == [_complete] and not root._load_state_dict_post_hooks


def _fit(values: list[Any], own: list[Tensor]) -> bool:
    if not _DENSE.issuperset(map(type, values)) or not _DENSE.issuperset(map(type, own)) or any(tensor.is_meta for tensor in own):
        return False
    if not any(value.is_nested for value in values) and list(map(_LOOKS, values)) == list(map(_LOOKS, own)):
        return True  # as nearly always; to look for a reason takes longer
    return all(_misfit("", value, tensor) is None for value, tensor in zip(values, own, strict=True))


def _misfit(key: str, value: Any, own: Tensor) -> str | None:
    """Why a value cannot be written over a tensor of the model, which torch would find out when others are written; None if it can."""
    if not isinstance(value, Tensor):
        return f"no tensor: {key}: {type(value).__name__} given"
    if value.is_nested or value.layout is not torch.strided:
        return f"no dense tensor: {key}: layout {'nested' if value.is_nested else value.layout} given"
    if value.shape != own.shape:
        return f"wrong shape: {key}: {tuple(value.shape)} given, {tuple(own.shape)} in the model"
    if value.is_meta and not own.is_meta:
        return f"no values: {key}: a tensor on the meta device given"
    if value.dtype is not own.dtype and (value.is_quantized or (value.is_complex() and not own.is_complex())):
        return f"wrong dtype: {key}: {value.dtype} given, {own.dtype} in the model"
    return None


def _untrainable(key: str, value: Tensor, own: Tensor) -> str | None:
    """Why a value cannot take the place of a tensor, as with ``assign=True``, and the model train; None if it can."""
    if value.is_inference():
        return f"an inference tensor: {key}: made in torch.inference_mode(), it cannot take part in training: clone() it outside"
    if not own.requires_grad:
        return None
    if not (value.is_floating_point() or value.is_complex()):
        return f"wrong dtype: {key}: {value.dtype} given, which cannot train in its place"
    if any(stride == 0 and side > 1 for stride, side in zip(value.stride(), value.shape, strict=True)):
        return f"shared memory: {key}: its numbers are one in memory, which cannot train in its place"
    return None


@contextlib.contextmanager
def full_state_dict(module: nn.Module) -> Iterator[nn.Module]:
    """Within the context, ``state_dict()`` holds everything: the frozen base, under its own keys, and the adapter.

    For tools that need a complete checkpoint (some trainers, exporters). Such a checkpoint loads at any time. A copy of the model
    is not in the context.

    Raises:
        StateError: if the model is not tuned.
    """
    with undisturbed(module):
        tuning = tuning_of(tuned_root(module))
        was, tuning.full = tuning.full, True
    try:
        yield module
    finally:
        tuning.full = was


def classify_keys(tuned: Inventory, base: set[int]) -> dict[str, Any]:
    """Sort the keys of a freshly tuned model into the groups of `Tuning`, and name its modules.

    Args:
        tuned: the model, with its strategy applied.
        base: ``id`` of every parameter and buffer that the model had before; a tensor is the base's own wherever it stands now.
    """
    parameters = [(key, parameter.requires_grad, id(parameter) in base) for key, _, _, parameter in tuned.parameters]
    buffers = [
        (key, isinstance(module, nn.modules.batchnorm._NormBase), id(buffer) in base)
        for key, module, _, buffer in tuned.persistent_buffers
    ]
    return {
        "adapter": [key for key, _, is_base in (*parameters, *buffers) if not is_base],
        "trained": [key for key, trains, _ in parameters if trains],
        "frozen": [key for key, trains, is_base in parameters if not trains and is_base],
        "statistics": [key for key, is_statistic, is_base in buffers if is_statistic and is_base],
        "buffers": [key for key, is_statistic, is_base in buffers if not is_statistic and is_base],
        "modules": [module for _, module in tuned.modules],
    }


def moved_buffers(tuning: Tuning) -> set[str]:
    """Keys of the buffers, statistics included, whose values differ from the base's."""
    return {original.full_name for original in tuning.originals if original.is_buffer and original.has_moved()}


def _keep_trained_part(module: nn.Module, state_dict: StateDict, prefix: str, local_metadata: dict[str, Any]) -> None:
    if (tuning := find_tuning(module)) is not None:
        modules = walk_modules(module)
        own = _persistent(modules)
        for key in _left_out(tuning, modules, own) - _training(own):
            state_dict.pop(prefix + key, None)


def _left_out(tuning: Tuning, modules: list[tuple[str, nn.Module]], own: Mapping[str, Tensor]) -> set[str]:
    """Keys of what is the base's own, and no part of a state dict unless it trains now."""
    if tuning.full:
        return set()
    refuse_incomplete(tuning, modules, own, "no state dict")
    moved = moved_buffers(tuning) if tuning.buffers else set()
    return {*tuning.frozen, *tuning.buffers} - moved - newcomers(tuning, modules)


def _training(own: Mapping[str, Tensor]) -> set[str]:
    return {key for key, tensor in own.items() if tensor.requires_grad}


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
    modules = walk_modules(module)
    own = _persistent(modules)
    given = {key[len(prefix) :] for key in state_dict if key.startswith(prefix)}
    twins = _twins(own, given)
    given |= twins.keys()
    base = _Base.of(tuning, modules, own)
    is_base = base.is_all_in(given)
    if strict:
        # torch would copy until it meets the first misfit and skip the rest: everything is checked before anything is written
        values = {key: state_dict[prefix + key] for key in sorted((given & own.keys()) - twins.keys())}
        problems = _wrong_keys(base, own.keys(), given - _extra_states(modules), is_base)
        _refuse(problems + _wrong_values(own, values, bool(local_metadata.get("assign_to_params_buffers"))))
    if is_base:
        _adopt_base_values(tuning, {**state_dict, **{prefix + key: state_dict[prefix + twin] for key, twin in twins.items()}}, prefix)
        supplied = {key: own[key] for key in tuning.adapter}
    else:
        supplied = {key: own[key] for key in base.frozen & own.keys()} | _base_buffers(base, own)
    for key, tensor in supplied.items():
        state_dict.setdefault(prefix + key, tensor)
    if local_metadata.get("assign_to_params_buffers"):
        _keep_ties(tuning, own, state_dict, prefix)


def _keep_ties(tuning: Tuning, own: Mapping[str, Tensor], state_dict: StateDict, prefix: str) -> None:
    """Give what trains under several keys as one tensor under all of them; torch would make one for each, and end the tie."""
    names: dict[int, list[str]] = {}
    for key in tuning.trained:
        if key in own:
            names.setdefault(id(own[key]), []).append(key)
    for keys in names.values():
        given = [value for key in keys if isinstance(value := state_dict.get(prefix + key), Tensor)]
        if len(keys) > 1 and given:
            state_dict.update(dict.fromkeys((prefix + key for key in keys), _held_like(own[keys[0]], given[-1])))


class _Base(NamedTuple):
    """What is the base's own now: the keys of parameters and of buffers that do not train, and did not come after tuning."""

    tuning: Tuning
    frozen: set[str]
    buffers: set[str]

    @classmethod
    def of(cls, tuning: Tuning, modules: list[tuple[str, nn.Module]], own: Mapping[str, Tensor]) -> _Base:
        new = newcomers(tuning, modules)
        return cls(tuning, set(tuning.frozen) - new - _training(own), set(tuning.buffers) - new)

    def is_all_in(self, given: Set[str]) -> bool:
        """Whether a state dict is a whole checkpoint of the original model."""
        return bool(self.frozen) and given >= self.frozen and given.isdisjoint(self.tuning.adapter)

    def missing(self, own: Set[str], given: Set[str], is_base: bool) -> set[str]:
        # what the module has and the tuning does not know was added since
        return {*own} - given - self.frozen - self.buffers - (set(self.tuning.adapter) if is_base else set())

    def partial(self, given: Set[str]) -> set[str]:
        """Keys of the frozen base that are given where others of it are not."""
        found = self.frozen & given
        return found if len(found) != len(self.frozen) else set()


def _wrong_keys(base: _Base, own: Set[str], given: Set[str], is_base: bool) -> list[str]:
    missing = base.missing(own, given, is_base)
    if not any(map(_is_counter, given)):
        missing = {key for key in missing if not _is_counter(key)}  # a checkpoint older than the counter: torch knows its version
    return [
        *(f"missing: {key}" for key in sorted(missing)),
        *(f"unexpected: {key}" for key in sorted(given - own)),
        *(f"only a part of the frozen base is given: {key}" for key in sorted(base.partial(given))[:3]),
    ]


def _wrong_values(own: Mapping[str, Tensor], values: Mapping[str, Any], assign: bool) -> list[str]:
    found = [_misfit(key, value, own[key]) or (_untrainable(key, value, own[key]) if assign else None) for key, value in values.items()]
    return [reason for reason in found if reason is not None]


def _refuse_other_things(state_dict: object) -> None:
    if not isinstance(state_dict, Mapping):
        _refuse([f"{type(state_dict).__name__} given, no mapping of names to tensors"])
        return
    _refuse([f"unexpected: {key!r:.80}, of type {type(key).__name__}, as a name" for key in state_dict if not isinstance(key, str)][:5])
    versions = getattr(state_dict, "_metadata", None) or {}
    if not isinstance(versions, Mapping) or not all(map(_is_version, versions.values())):
        _refuse(["its _metadata is not what torch writes: leave it out, by dict(state_dict)"])


def _is_version(entry: object) -> bool:
    return isinstance(entry, Mapping) and type(entry.get("version")) in (int, type(None))


def _extra_states(modules: list[tuple[str, nn.Module]]) -> set[str]:
    """Keys under which layers take states of their own."""
    taking = (name for name, module in modules if type(module).set_extra_state is not nn.Module.set_extra_state)
    return {f"{name}._extra_state" if name else "_extra_state" for name in taking}


def _refuse_half(twins: Mapping[str, str], missing: Set[str]) -> None:
    # torch would find out when it has written the rest
    _refuse(
        [f"missing: {key} (tied to {twin}, which is given: strict=False takes it from there)" for key, twin in twins.items()]
        + [f"missing: {key} (strict=False leaves it as it is)" for key in sorted(missing)]
    )


def _refuse(problems: list[str]) -> None:
    if problems:
        raise StateDictError(
            "the state dict does not fit the tuned model; nothing was loaded.\n  "
            + "\n  ".join(map(printable, problems))
            + "\nLoad the trained part of such a model, or a whole checkpoint of the original one."
        )


def _twins(own: Mapping[str, Tensor], given: Set[str]) -> dict[str, str]:
    """Keys of tied tensors that are given under another key alone, with that key; a safetensors file holds each tensor once."""
    key_of = {id(own[key]): key for key in given if key in own}
    return {key: key_of[id(tensor)] for key, tensor in own.items() if key not in given and id(tensor) in key_of}


def _persistent(modules: list[tuple[str, nn.Module]]) -> dict[str, Tensor]:
    """What a state dict holds of these modules, in torch's order."""
    own: dict[str, Tensor] = {}
    for name, module in modules:
        parameters, buffers = module._parameters, module._buffers
        if not parameters and not buffers:
            continue
        prefix = f"{name}." if name else ""
        for key, parameter in parameters.items():
            if parameter is not None:
                own[prefix + key] = parameter
        if buffers:
            scratch = module._non_persistent_buffers_set
            own.update((prefix + key, buffer) for key, buffer in buffers.items() if buffer is not None and key not in scratch)
    return own


def _is_counter(key: str) -> bool:
    return key.rpartition(".")[2] == "num_batches_tracked"


def _adopt_base_values(tuning: Tuning, state_dict: Mapping[str, Any], prefix: str) -> None:
    # the checkpoint is of the original model: its values are the originals from now on
    for original in tuning.originals:
        value = state_dict.get(prefix + original.full_name)
        if isinstance(value, torch.Tensor) and value.shape == original.value.shape:
            original.value = value.detach().to(original.value.device, original.value.dtype, copy=True)


def _base_buffers(base: _Base, own: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {original.full_name: original for original in base.tuning.originals if original.is_buffer}
    return {key: _base_value(found.get(key), own[key]) for key in base.buffers if key in own}


def _base_value(original: Original | None, current: Tensor) -> Tensor:
    if original is None or not original.has_moved():
        return current
    return original.value.to(current.device, current.dtype, copy=True)  # assign=True puts it into the model
