"""One adapter, one file: what a tuned model writes into it, and whether one fits a model.

Saving is atomic: the path holds the complete old file or the complete new one. Loading validates everything, reports every problem
at once, and only then writes. A file names a strategy, never a module, and nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Set
from typing import Any

import torch
from torch import Tensor, nn

from gift_core import __version__
from gift_core.adapter_format import AdapterInfo, Description, Payload, base_digest, decode, encode, is_config, sha256_of_each
from gift_core.allocation import AllocationLimit
from gift_core.atomic import atomic_path
from gift_core.distributed import Peers, add_up, agreed, is_made_of_parts, is_sharded, layout_of, own_part, own_slices, whole
from gift_core.errors import (
    AdapterFileError,
    AdapterMismatchError,
    GiftError,
    PluginError,
    StateError,
    StrategyError,
    UnknownStrategyError,
    printable,
)
from gift_core.iterator import Inventory, walk_modules
from gift_core.plan import refuse_unusable
from gift_core.plugins import find_provider
from gift_core.reading import as_path
from gift_core.record import (
    Tuning,
    adopted_modules,
    find_tuning,
    in_turn,
    left_the_model,
    newcomers,
    structure_digest,
    tuned_root,
    tuning_of,
)
from gift_core.reparameterization import adoptions_of, method_name, unsaved_settings
from gift_core.selection import no_regular_expressions
from gift_core.state_dict import moved_buffers
from gift_core.strategy import FineTuningStrategy, strategy_from_config
from gift_core.tuning import disable_fine_tuning, enable_fine_tuning

#: The end of what is said of a file that does not fit.
_FITS = "\nLoad it into a plain base model, or into one that is tuned as the file says."

#: So many bytes of tensors are looked at in one step: what fits into a processor's cache.
_STRETCH = 2**19


@in_turn
def save_adapter(module: nn.Module, path: str | os.PathLike[str]) -> AdapterInfo:
    """Write the trained part of a tuned model into one file, atomically.

    The file holds every trained parameter, and the buffers whose values differ from the base model's. Of a sharded model (FSDP2, tensor
    parallelism) every process takes part: the adapter is gathered, the first process writes, and where one fails all do.

    Args:
        module: a tuned model, or a wrapper around one.
        path: the file; its folder must exist. A file already there is replaced only by a complete new one.

    Returns:
        What the file says of itself.

    Raises:
        StateError: if the model is not tuned, a layer that was tuned is no longer in it, or something trains, came in the place of a
            part of the base or was set on a layer that tuning does not know: the file could not bring it back.
        AdapterFileError: if a trained tensor holds NaN; the message names it.
        AdapterWriteError: if the file cannot be written; what was there is intact.
    """
    peers = Peers(module, "save the adapter", "The file, if there is one, is complete: the old or the new.")
    with peers.alone():
        root = tuned_root(module)
        target = as_path(path)
        tensors = _adapter_tensors(root, _own_tensors(root))
    with peers.exchange():
        description = _describe(root)
        gathered = {key: _on_cpu(tensor) for key, tensor in tensors.items()}
    with peers.alone():
        payload = Payload.of(gathered)
        if broken := _with_nan(payload, payload.tensors):
            raise AdapterFileError(f"not saved: NaN in {', '.join(broken[:5])}. Load an earlier adapter, or train with a smaller step.")
        info, start = encode(description, payload)
        if peers.is_writer:
            with atomic_path(target) as temporary, open(temporary, "wb") as file:
                file.writelines([start, *payload.parts()])
    return info


def read_adapter_info(path: str | os.PathLike[str]) -> AdapterInfo:
    """Read what an adapter file says of itself, after checking that it is whole.

    Raises:
        AdapterFileError: if there is none, or it is truncated, corrupted, no adapter or of an unknown format version.
    """
    return decode(path)[0]


@in_turn
def load_adapter(module: nn.Module, path: str | os.PathLike[str], *, check_base: bool = True, trusted: bool = False) -> AdapterInfo:
    """Load an adapter file into a plain or a tuned model; everything is checked before anything is written.

    A plain model is tuned first, with the strategy that the file names, found among the installed plugins.

    Args:
        module: the base model, or a model tuned with the same strategy.
        path: the file.
        check_base: refuse a base model whose adapted weights are not those that the adapter was trained on. False accepts, say, the
            same base in another dtype.
        trusted: for a plain model, run the recorded strategy's regular expressions, and let it allocate more than the file holds.
            Only for a file of one's own: either can bring a process to a halt.

    Returns:
        What the file says of itself.

    Raises:
        AdapterFileError: if the file is not sound; `AdapterMismatchError` if it is, but does not fit the model.
        PatternError: if the recorded strategy has a regular expression, and the file is not trusted.
        PluginError: if the strategy's plugin is not installed or cannot be used.
        ModelError: if a part of a plain model is scripted or lazy.
    """
    peers = Peers(module, "load the adapter", "Nothing was loaded.")
    with peers.alone():
        info, payload = decode(path)
        plain = isinstance(module, nn.Module) and not any(find_tuning(child) for child in module.modules())
        root = module if plain else tuned_root(module)
    peers.refuse_difference(int(info.digest[:15], 16), f"the processes were given different files, here {path}.")
    if not plain:
        _load_into(root, peers, info, payload, check_base, str(path))
        return info
    if info.strategy is None:
        raise AdapterMismatchError(
            f"{path} was made with a strategy that has no registered name ({printable(info.strategy_text)}): "
            "enable that strategy, then load."
        )
    refuse_unusable(Inventory.of(module))
    if structure_digest(module) != info.structure:
        raise AdapterMismatchError(
            f"{path} is for another base model: its names and shapes differ from {type(module).__name__}'s. "
            "Load it into the model that it was trained on."
        )
    with _generators_kept(), contextlib.nullcontext() if trusted else _distrust(info):
        enable_fine_tuning(module, _strategy(info))
    try:
        _load_into(module, peers, info, payload, check_base, str(path))
    except BaseException:
        disable_fine_tuning(module)
        raise
    return info


def _strategy(info: AdapterInfo) -> FineTuningStrategy:
    assert info.strategy is not None  # the caller has seen to it
    try:
        return strategy_from_config(info.strategy)
    except UnknownStrategyError as error:
        source = info.provider or {}
        distribution, version = (printable(source.get(key) or "") for key in ("distribution", "version"))
        if not distribution or error.name != info.strategy["name"]:
            raise
        message = f"the adapter was made with strategy {error.name!r} of {distribution} {version}, which is not installed."
        raise UnknownStrategyError(
            message, name=error.name, distribution=distribution, version=version, hint=f"Try: pip install {distribution}"
        ) from error


@contextlib.contextmanager
def _distrust(info: AdapterInfo) -> Iterator[None]:
    """Let the strategy that a file records cost no more than the file does."""
    advice = "If the file is your own, load it with trusted=True (gift merge --trusted); or enable the strategy yourself, then load."
    numbers = sum(math.prod(tensor["shape"]) for tensor in info.tensors.values())
    try:
        with no_regular_expressions(advice), AllocationLimit(numbers, advice):
            yield
    except RecursionError as error:
        raise AdapterMismatchError(f"the recorded strategy is nested too deep, or lists too many patterns. {advice}") from error


@contextlib.contextmanager
def _generators_kept() -> Iterator[None]:
    # enabling draws the start of an adapter, and the file is about to replace it
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        yield


def tensor_digest(tensor: Tensor) -> str:
    """A digest of a tensor's shape, dtype and every bit (collective); computed where its parts are, so that only sums are moved.

    Sums of the bit patterns along rows and columns change with any one number, and when rows or columns change places.
    """
    return _digests([tensor.detach()])[0]


def _digests(tensors: list[Tensor]) -> list[str]:
    """`tensor_digest` of each of several tensors of one shape, dtype, device and layout, in a few steps for all."""
    like = tensors[0] if is_made_of_parts(tensors[0]) else whole(tensors[0])
    parts = [own_part(tensor if is_made_of_parts(tensor) else whole(tensor)) for tensor in tensors]
    values = torch.stack(parts) if len(parts) > 1 else parts[0].resolve_conj().resolve_neg()[None]
    if values.is_complex():
        values = torch.view_as_real(values)
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    rows = values.shape[1] if values.dim() > 1 else 1
    sums = _sums(values.reshape(len(tensors), rows, math.prod(values.shape[2:])).view(integer))
    if is_sharded(like) and like.dim():
        sums = _of_the_whole(sums, values.shape, like)
    return sha256_of_each(f"{like.dtype}{list(like.shape)}".encode(), [row.tobytes() for row in sums.cpu().numpy()])


def _of_the_whole(sums: Tensor, shape: torch.Size, like: Tensor) -> Tensor:
    """The `_sums` of sharded tensors, from those of this process's parts of them, which had this ``shape`` (collective)."""
    columns, (rows, *others) = math.prod(shape[2:]), own_slices(like)
    down = sums.new_zeros((len(sums), *like.shape[1:], *shape[1 + like.dim() :]))  # complex numbers are pairs
    across = sums.new_zeros((len(sums), like.shape[0]))
    down[(slice(None), *others)] = sums[:, :columns].view(len(sums), *shape[2:])
    across[:, rows] = sums[:, columns:]
    return add_up(torch.cat([down.reshape(len(sums), -1), across], 1), like)


def _sums(bits: Tensor) -> Tensor:
    """Sums of every matrix along its columns, then along its rows; a part at a time, so that it is read from memory once."""
    rows_at_once = max(1, _stretch_on(bits.device) // max(1, bits[:, :1].nbytes))
    down, across = bits.new_zeros((bits.shape[0], bits.shape[2]), dtype=torch.int64), []
    for part in bits.split(rows_at_once, 1):
        words = part.to(torch.int64)  # once for both sums, which would each do it
        down += words.sum(1)
        across.append(words.sum(2))
    return torch.cat([down, *across], 1)


def _stretch_on(device: torch.device) -> int:
    return _STRETCH if device.type == "cpu" else 256 * _STRETCH  # elsewhere a step costs more than what it reads


# --- what a model says


def _own_tensors(root: nn.Module) -> dict[str, Tensor]:
    held = Inventory.of(root)
    return {key: tensor for tensors in (held.parameters, held.buffers) for key, _, _, tensor in tensors}


def _adapter_tensors(root: nn.Module, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tuning = tuning_of(root)
    if gone := {*tuning.trained, *tuning.adapter} - own.keys():
        raise StateError(left_the_model(gone, "not saved"))
    _refuse_unknown(tuning, newcomers(tuning, walk_modules(root)), own)
    if reasons := _unsaved(adopted_modules(root)):
        raise StateError(f"not saved: {reasons[0]}.")
    tensors = _required_tensors(tuning, own)
    for key in sorted(moved_buffers(tuning) & {*tuning.statistics, *tuning.buffers}):
        tensors[key] = own[key]
    return tensors


def _unsaved(adopted: Iterable[tuple[str, nn.Module]]) -> list[str]:
    """Of layers that no file can bring back as they are: which, and why."""
    return [f"{name or 'the root'}: {reason}" for name, module in adopted for reason in unsaved_settings(module)]


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_cpu and not is_sharded(tensor) else whole(tensor.detach()).cpu()


def _refuse_unknown(tuning: Tuning, new: Set[str], own: Mapping[str, Tensor]) -> None:
    """Refuse to leave out what training moves, and what the tuned model computes with in the place of the base."""
    known = {*tuning.trained, *tuning.adapter}
    if exchanged := new & {*tuning.frozen, *tuning.buffers, *tuning.statistics}:
        raise StateError(
            f"not saved: {_some(exchanged)} came in the place of the base's own after tuning, and are no part of an adapter. "
            f"{_KEEP_IT}."
        )
    if unknown := {key for key, tensor in own.items() if tensor.requires_grad and key not in known}:
        raise StateError(
            f"not saved: {_some(unknown)} train and are no part of the adapter, because they were added or let train after tuning. "
            f"{_KEEP_IT}. To leave them out, freeze them: requires_grad_(False)."
        )


#: What to do about a part of a model that no adapter file holds.
_KEEP_IT = (
    "To keep them, let a strategy train them: disable_fine_tuning(model), put them in, and enable merge_strategies([...]) with "
    "FullFineTuningStrategy(targets=...), or a cap with keep_trainable(). model.state_dict() holds them meanwhile"
)


def _some(keys: Iterable[str]) -> str:
    found = sorted(keys)
    return ", ".join(found[:5]) + (", ..." if len(found) > 5 else "")


def _required_tensors(tuning: Tuning, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What every file of this adapter holds: what trains, and what tuning added; a shared tensor under its first key."""
    wanted = {*tuning.trained, *tuning.adapter}
    first: dict[int, tuple[str, Tensor]] = {}
    for key, tensor in own.items():
        if key in wanted:
            first.setdefault(id(tensor), (key, tensor))
    return dict(first.values())


def _describe(root: nn.Module) -> Description:
    tuning, adopted = tuning_of(root), list(adopted_modules(root))
    return Description(
        strategy=_as_data(tuning.config),
        strategy_text=tuning.strategy,
        provider=_provider(tuning),
        core_version=__version__,
        sites=_sites(adopted),
        structure=tuning.structure,
        base=_base_digests(adopted),
    )


def _as_data(config: Any) -> dict[str, Any] | None:
    if config is None:
        return None
    if not is_config(config):
        raise StrategyError(
            f"not saved: the strategy's to_config gives {config!r}; return a text under 'name' and a dict under 'parameters'."
        )
    try:
        return json.loads(json.dumps(config))  # type: ignore[no-any-return]
    except (TypeError, ValueError, RecursionError) as error:
        raise StrategyError(f"not saved: the strategy's to_config gives no plain JSON data ({error}): return plain values.") from error


def _provider(tuning: Tuning) -> dict[str, str | None] | None:
    # kept, because the code that tuned the model stays what it was, and a save into a folder on sys.path has all metadata read anew
    if tuning.provider is None and tuning.config is not None:
        with contextlib.suppress(PluginError):  # a class with a name that no installed package registers
            found = find_provider(tuning.config["name"])
            tuning.provider = {"distribution": found.distribution, "version": found.version}
    return tuning.provider


def _sites(adopted: Iterable[tuple[str, nn.Module]]) -> dict[str, dict[str, str]]:
    found = {name: adoptions_of(module) for name, module in adopted}
    said = {adoptions: {weight: method_name(method) for weight, method in adoptions} for adoptions in set(found.values())}
    return {name: said[adoptions].copy() for name, adoptions in found.items()}


def _base_digests(adopted: Iterable[tuple[str, nn.Module]]) -> dict[str, str]:
    alike: dict[Any, dict[str, Tensor]] = {}
    for name, module in adopted:
        for weight, _ in adoptions_of(module):
            tensor = module._parameters[weight]
            assert tensor is not None  # adoption checked it
            kind = (tensor.shape, tensor.dtype, tensor.device, layout_of(tensor))
            alike.setdefault(kind, {})[f"{name}.{weight}" if name else weight] = tensor
    return {key: digest for tensors in alike.values() for key, digest in _digests_by_key(tensors)}


def _digests_by_key(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Of tensors of one shape, dtype, device and layout; as many in one step as `_STRETCH` bounds, at least one."""
    items = list(tensors.items())
    step = max(1, _stretch_on(items[0][1].device) // max(1, items[0][1].nbytes))
    for start in range(0, len(items), step):
        keys, values = zip(*items[start : start + step], strict=True)
        with torch.no_grad():
            digests = _digests([value.detach() for value in values])
        yield from zip(keys, digests, strict=True)


def _with_nan(payload: Payload, keys: Iterable[str]) -> list[str]:
    """Which of the tensors hold NaN; one look at all numbers says whether any does."""
    return [key for key in keys if _has_nan(payload.tensors[key])] if any(map(_has_nan, payload.stretches)) else []


def _has_nan(tensor: Tensor) -> bool:
    if not tensor.numel() or not (tensor.is_floating_point() or tensor.is_complex()):
        return False
    if tensor.element_size() == 1:
        return bool(tensor.isnan().any())  # of eight bits torch knows little else
    numbers = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return bool(torch.aminmax(numbers).max.isnan())  # NaN if any is; takes a tenth of the time of looking at each


# --- fitting a file to a model


def _load_into(root: nn.Module, peers: Peers, info: AdapterInfo, payload: Payload, check_base: bool, path: str) -> None:
    tuning, own, tensors = tuning_of(root), _own_tensors(root), payload.tensors
    with peers.alone():
        _refuse_misfit(path, _mismatches(root, own, info, payload))
    if check_base:
        with peers.exchange():
            digests = _base_digests(adopted_modules(root))
        with peers.alone():
            _refuse_misfit(path, _other_base(digests, info))
    originals = {original.full_name: original for original in tuning.originals if original.is_buffer}
    with torch.no_grad():
        with peers.exchange():  # all that others have a part in, before the first value is written
            parts = {key: agreed(own[key], tensors[key]) if is_sharded(own[key]) else tensors[key] for key in sorted(tensors)}
        if parts:
            torch._foreach_copy_([own_part(own[key]) for key in parts], list(parts.values()))
        for key, original in originals.items():
            if key not in tensors and (buffer := original.current()) is not None:
                buffer.copy_(original.value)  # absent from the file: the base's own


def _refuse_misfit(path: str, problems: list[str]) -> None:
    if problems:
        listed = "\n  ".join(map(printable, problems))
        raise AdapterMismatchError(f"{path} does not fit this model; nothing was loaded.\n  {listed}{_FITS}")


def _mismatches(root: nn.Module, own: Mapping[str, Tensor], info: AdapterInfo, payload: Payload) -> list[str]:
    tuning, tensors, adopted = tuning_of(root), payload.tensors, list(adopted_modules(root))
    problems = [] if tuning.structure == info.structure else ["the base model has other names or shapes"]
    if tuning.config != info.strategy:
        problems += _config_differences(tuning.config, _as_read_today(info.strategy))
    if (sites := _sites(adopted)) != info.sites:
        only = [sorted(set(a) - set(b)) for a, b in ((info.sites, sites), (sites, info.sites))]
        problems.append(f"other sites are adapted: in the file alone {only[0] or 'none'}, in the model alone {only[1] or 'none'}")
    problems += _unsaved(adopted)
    required = set(_required_tensors(tuning, own))
    allowed = required | ({*tuning.statistics, *tuning.buffers} & own.keys())
    problems += [f"missing: {key}" for key in sorted(required - tensors.keys())]
    problems += [f"unexpected: {key}" for key in sorted(tensors.keys() - allowed)]
    shared = [key for key in tensors if key in allowed]
    problems += [
        f"{key} is {tuple(tensors[key].shape)} in the file, {tuple(own[key].shape)} in the model"
        for key in shared
        if tensors[key].shape != own[key].shape
    ]
    problems += [reason for key in shared if (reason := _lost_digits(key, tensors[key], own[key]))]
    problems += [f"{key} holds NaN" for key in _with_nan(payload, shared)]
    return problems


def _lost_digits(key: str, value: Tensor, own: Tensor) -> str | None:
    """Why a value of another dtype than the model's would be another value there; None if it is the same, or rounded."""
    if value.dtype is own.dtype:
        return None
    target = own.dtype.to_real() if own.is_complex() and value.is_floating_point() else own.dtype
    if value.is_complex() is not target.is_complex or not (
        value.is_complex() or (value.is_floating_point() and target.is_floating_point)
    ):
        return f"{key} is {value.dtype} in the file, {own.dtype} in the model"
    if value.is_floating_point() and bool((value.to(target).isinf() & value.double().isfinite()).any()):
        return f"{key} holds numbers that {own.dtype} has no room for"
    return None


def _other_base(digests: Mapping[str, str], info: AdapterInfo) -> list[str]:
    other = [key for key, digest in digests.items() if not digest.startswith(info.base.get(key) or "no digest")]
    if not other and info.base_digest in (None, base_digest(digests)):
        return []
    shown = ", ".join(other[:3]) + (", ..." if len(other) > 3 else "")
    return [
        f"{len(other) or 'some'} of {len(info.base)} adapted base weights are not what it was trained on ({shown})",
        "load the right base weights first, or pass check_base=False if you know that they go together",
    ]


def _as_read_today(config: dict[str, Any] | None) -> dict[str, Any] | None:
    """A file's config with the defaults of parameters that the strategy has gained since the file was written."""
    try:
        return None if config is None else strategy_from_config(config).to_config()
    except GiftError:
        return config  # compared as it is written, which names what differs


def _config_differences(model: dict[str, Any] | None, file: dict[str, Any] | None) -> list[str]:
    if model is None or file is None or model == file:
        return []
    if model.get("name") != file.get("name"):
        return [f"the model is tuned with {model.get('name')!r}, the file was made with {file.get('name')!r}"]
    ours, theirs = model.get("parameters", {}), file.get("parameters", {})
    keys = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    return [f"{key} is {ours.get(key)!r} in the model, {theirs.get(key)!r} in the file" for key in keys]
