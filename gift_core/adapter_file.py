"""One adapter, one file: safetensors, with a JSON description and a digest of its own in the metadata.

Saving is atomic: the path holds the complete old file or the complete new one. Loading validates everything, reports every problem
at once, and only then writes. A file names a strategy, never a module, and nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load as _read_tensors
from safetensors.torch import save_file
from torch import Tensor, nn

from gift_core import __version__
from gift_core.allocation import AllocationLimit
from gift_core.atomic import atomic_path
from gift_core.distributed import is_writer, together, whole, write_whole
from gift_core.errors import (
    AdapterFileError,
    AdapterMismatchError,
    AdapterNotFoundError,
    GiftError,
    PluginError,
    UnknownStrategyError,
)
from gift_core.plugins import find_provider
from gift_core.record import Tuning, adopted_modules, find_tuning, named_tensors, structure_digest, tuned_root, tuning_of
from gift_core.reparameterization import adoptions_of, method_name
from gift_core.selection import no_regular_expressions
from gift_core.state_dict import moved_buffers
from gift_core.strategy import FineTuningStrategy, strategy_from_config
from gift_core.tuning import disable_fine_tuning, enable_fine_tuning

FORMAT = "gift-adapter"
FORMAT_VERSION = 1

#: A description longer than this is refused before it is parsed.
MAX_DESCRIPTION_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class AdapterInfo:
    """What an adapter file says of itself.

    Attributes:
        strategy: the strategy's config, or None for one without a form as data; ``strategy_text`` says it for people.
        provider: the distribution and version that the strategy came from, or None.
        core_version: the gift-core that wrote the file.
        sites: adapted names by module, each with its method.
        structure: digest of the base model's names and shapes.
        base: digest of each adapted base weight.
        tensors: shape and dtype of each tensor in the file.
        digest: SHA-256 over everything else in the file.
        file_bytes: the file's size.
    """

    strategy: dict[str, Any] | None
    strategy_text: str
    provider: dict[str, str | None] | None
    core_version: str
    sites: dict[str, dict[str, str]]
    structure: str
    base: dict[str, str]
    tensors: dict[str, dict[str, Any]]
    digest: str
    file_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON data."""
        return dataclasses.asdict(self)


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
        StateError: if the model is not tuned.
        AdapterFileError: if a trained tensor holds NaN; the message names it.
        AdapterWriteError: if the file cannot be written; what was there is intact.
    """
    root = tuned_root(module)
    own = list(root.parameters())
    with together(own, "save the adapter"):
        tensors = _adapter_tensors(root)
        broken = [key for key, tensor in tensors.items() if _has_nan(tensor)]
        if broken:
            raise AdapterFileError(f"not saved: NaN in {', '.join(broken[:5])}. Load an earlier adapter, or train with a smaller step.")
        description = _describe(root, tensors)
        target = Path(path)
        if is_writer(own):
            with atomic_path(target) as temporary:
                save_file(tensors, temporary, _metadata(description))
    return _as_info(description, target.stat().st_size)


def read_adapter_info(path: str | os.PathLike[str]) -> AdapterInfo:
    """Read what an adapter file says of itself, after checking that it is whole.

    Raises:
        AdapterFileError: if there is none, or it is truncated, corrupted, no adapter or of an unknown format version.
    """
    return _read(path)[0]


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
    """
    info, tensors = _read(path)
    plain = isinstance(module, nn.Module) and not any(find_tuning(child) for child in module.modules())
    if not plain:
        _load_into(tuned_root(module), info, tensors, check_base, str(path))
        return info
    if info.strategy is None:
        raise AdapterMismatchError(
            f"{path} was made with a strategy that has no registered name ({info.strategy_text}): enable that strategy, then load."
        )
    if structure_digest(module) != info.structure:
        raise AdapterMismatchError(
            f"{path} is for another base model: its names and shapes differ from {type(module).__name__}'s. "
            "Load it into the model that it was trained on."
        )
    with _generators_kept(), contextlib.nullcontext() if trusted else _distrust(info):
        enable_fine_tuning(module, _strategy(info))
    try:
        _load_into(module, info, tensors, check_base, str(path))
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
        distribution, version = source.get("distribution"), source.get("version")
        if not distribution or error.name != info.strategy["name"]:
            raise
        message = f"the adapter was made with strategy {error.name!r} of {distribution} {version}, which is not installed."
        raise UnknownStrategyError(
            message, name=error.name, distribution=distribution, version=version, hint=f"Try: pip install {distribution}"
        ) from error


@contextlib.contextmanager
def _distrust(info: AdapterInfo) -> Iterator[None]:
    """Let the strategy that a file records cost no more than the file does."""
    advice = "If the file is your own, load it with trusted=True; or enable the strategy yourself, then load."
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
    """A digest of a tensor's shape, dtype and every bit; computed where the tensor is, so that only sums are moved.

    Sums of the bit patterns along rows and columns change with any one number, and when rows or columns change places.
    """
    values = whole(tensor.detach())
    if values.is_complex():
        values = torch.view_as_real(values)
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    bits = values.contiguous().view(integer).reshape(values.shape[0] if values.dim() else 1, -1)
    sums = torch.cat([bits.sum(0, dtype=torch.int64), bits.sum(1, dtype=torch.int64)]).cpu()
    return _sha256(f"{tensor.dtype}{list(tensor.shape)}".encode(), sums.numpy().tobytes())


# --- what a model says


def _adapter_tensors(root: nn.Module) -> dict[str, Tensor]:
    tuning = tuning_of(root)
    tensors = _required_tensors(root, tuning)
    moved = moved_buffers(tuning) & {*tuning.statistics, *tuning.buffers}
    tensors |= {key: buffer for key, _, _, buffer in named_tensors(root, buffers=True) if key in moved}
    # safetensors wants each tensor whole, dense and with memory of its own
    return {key: whole(tensor.detach()).to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}


def _required_tensors(root: nn.Module, tuning: Tuning) -> dict[str, Tensor]:
    """What every file of this adapter holds: what trains, and what tuning added; a shared tensor under its first key."""
    wanted = {*tuning.trained, *tuning.adapter}
    first: dict[int, tuple[str, Tensor]] = {}
    for buffers in (False, True):
        for key, _, _, tensor in named_tensors(root, buffers=buffers):
            if key in wanted:
                first.setdefault(id(tensor), (key, tensor))
    return dict(first.values())


def _describe(root: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    tuning = tuning_of(root)
    description: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "strategy": tuning.config,
        "strategy_text": tuning.strategy,
        "provider": _provider(tuning.config),
        "core_version": __version__,
        "sites": _sites(root),
        "structure": tuning.structure,
        "base": _base_digests(root),
        "tensors": {key: {"shape": list(tensor.shape), "dtype": _dtype(tensor)} for key, tensor in tensors.items()},
    }
    return description | {"digest": _digest(description, tensors)}


def _metadata(description: Mapping[str, Any]) -> dict[str, str]:
    return {"format": "pt", FORMAT: json.dumps(description)}


def _provider(config: Mapping[str, Any] | None) -> dict[str, str | None] | None:
    if config is None:
        return None
    try:
        found = find_provider(config["name"])
    except PluginError:
        return None  # a class with a name that no installed package registers
    return {"distribution": found.distribution, "version": found.version}


def _sites(root: nn.Module) -> dict[str, dict[str, str]]:
    return {name: {weight: method_name(method) for weight, method in adoptions_of(module)} for name, module in adopted_modules(root)}


def _base_digests(root: nn.Module) -> dict[str, str]:
    return {
        f"{name}.{weight}" if name else weight: tensor_digest(module._parameters[weight])  # type: ignore[arg-type]
        for name, module in adopted_modules(root)
        for weight, _ in adoptions_of(module)
    }


def _digest(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    said = json.dumps({key: value for key, value in description.items() if key != "digest"}, sort_keys=True)
    parts = [said.encode()]
    for key in sorted(tensors):
        parts += [key.encode(), tensors[key].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()]
    return _sha256(*parts)


def _sha256(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _has_nan(tensor: Tensor) -> bool:
    return bool((tensor.is_floating_point() or tensor.is_complex()) and torch.isnan(tensor).any())


# --- the file


def _read(path: str | os.PathLike[str]) -> tuple[AdapterInfo, dict[str, Tensor]]:
    file = Path(path)
    data = _bytes_of(file)
    try:
        described, tensors = _description_of(data, file), _read_tensors(data)
    except (safetensors.SafetensorError, KeyError, RuntimeError, TypeError, AttributeError) as error:
        raise AdapterFileError(f"{file} is truncated or no safetensors file ({error}): get a fresh copy.") from error
    _check_description(described, file)
    if _digest(described, tensors) != described["digest"]:
        raise AdapterFileError(f"{file} is corrupted: its content does not give the digest written in it. Get a fresh copy.")
    listed = {key: {"shape": list(tensor.shape), "dtype": _dtype(tensor)} for key, tensor in tensors.items()}
    if listed != described["tensors"]:
        raise AdapterFileError(f"{file} is corrupted: its tensors are not those that its description lists.")
    return _as_info(described, len(data)), tensors


def _bytes_of(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except FileNotFoundError as error:
        raise AdapterNotFoundError(f"there is no adapter file at {file}: check the path.") from error
    except (OSError, ValueError) as error:  # a ValueError is about a path that cannot be one
        raise AdapterFileError(f"{file} cannot be read: {error}.") from error


def _description_of(data: bytes, file: Path) -> dict[str, Any]:
    if len(data) < 8 or not 2 <= (length := int.from_bytes(data[:8], "little")) <= len(data) - 8:
        raise AdapterFileError(f"{file} is truncated or no safetensors file ({len(data)} bytes): get a fresh copy.")
    if length > MAX_DESCRIPTION_BYTES:
        raise AdapterFileError(f"{file} describes itself in {length:,} bytes; {MAX_DESCRIPTION_BYTES:,} are allowed.")
    header = _json(data[8 : 8 + length], file)
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or FORMAT not in metadata:
        raise AdapterFileError(f"{file} is no GIFt adapter: it has no {FORMAT!r} metadata. GIFt reads what save_adapter wrote.")
    described = _json(metadata[FORMAT], file)
    if not isinstance(described, dict):
        raise AdapterFileError(f"{file}: the adapter's description is no JSON object.")
    # the digest covers what the text means; other spellings of the same, as in 1e-05 and 1E-05, are damage too
    if metadata != _metadata(described):
        raise AdapterFileError(f"{file} is corrupted: its metadata is not as save_adapter writes it. Get a fresh copy.")
    return described


def _json(text: Any, file: Path) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except (ValueError, TypeError, RecursionError) as error:
        raise AdapterFileError(f"{file}: its description cannot be read ({type(error).__name__}: {error}).") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key occurs twice")
    return dict(pairs)


def _check_description(described: dict[str, Any], file: Path) -> None:
    version = described.get("format_version")
    if version != FORMAT_VERSION:
        raise AdapterFileError(f"{file} has format version {version!r}, this gift-core reads {FORMAT_VERSION}: upgrade gift-core.")
    expected: dict[str, Any] = {
        "strategy": (dict, type(None)),
        "strategy_text": str,
        "provider": (dict, type(None)),
        "core_version": str,
        "sites": dict,
        "structure": str,
        "base": dict,
        "tensors": dict,
        "digest": str,
    }
    for key, kind in expected.items():
        if not isinstance(described.get(key, ...), kind):
            raise AdapterFileError(f"{file}: {key!r} is missing from its description or of the wrong kind.")


def _as_info(described: Mapping[str, Any], file_bytes: int) -> AdapterInfo:
    names = [field.name for field in dataclasses.fields(AdapterInfo) if field.name != "file_bytes"]
    return AdapterInfo(**{name: described[name] for name in names}, file_bytes=file_bytes)


# --- fitting a file to a model


def _load_into(root: nn.Module, info: AdapterInfo, tensors: Mapping[str, Tensor], check_base: bool, path: str) -> None:
    tuning = tuning_of(root)
    with together(root.parameters(), "load the adapter"):
        problems = _mismatches(root, tuning, info, tensors, check_base)
        if problems:
            raise AdapterMismatchError(f"{path} does not fit this model; nothing was loaded.\n  " + "\n  ".join(problems))
    own = {key: tensor for buffers in (False, True) for key, _, _, tensor in named_tensors(root, buffers=buffers)}
    originals = {original.full_name: original for original in tuning.originals if original.is_buffer}
    with torch.no_grad():
        for key in sorted(tensors):  # the processes of a sharded model must take them in one order
            write_whole(own[key], tensors[key])
        for key, original in originals.items():
            if key not in tensors and (buffer := original.current()) is not None:
                buffer.copy_(original.value)  # absent from the file: the base's own


def _mismatches(root: nn.Module, tuning: Tuning, info: AdapterInfo, tensors: Mapping[str, Tensor], check_base: bool) -> list[str]:
    problems = [] if tuning.structure == info.structure else ["the base model has other names or shapes"]
    problems += _config_differences(tuning.config, _as_read_today(info.strategy))
    if (sites := _sites(root)) != info.sites:
        only = [sorted(set(a) - set(b)) for a, b in ((info.sites, sites), (sites, info.sites))]
        problems.append(f"other sites are adapted: in the file alone {only[0] or 'none'}, in the model alone {only[1] or 'none'}")
    own = {key: tensor for buffers in (False, True) for key, _, _, tensor in named_tensors(root, buffers=buffers)}
    required = set(_required_tensors(root, tuning))
    allowed = required | {*tuning.statistics, *tuning.buffers}
    problems += [f"missing: {key}" for key in sorted(required - set(tensors))]
    problems += [f"unexpected: {key}" for key in sorted(set(tensors) - allowed)]
    for key in sorted(set(tensors) & allowed):
        if tensors[key].shape != own[key].shape:
            problems.append(f"{key} is {tuple(tensors[key].shape)} in the file, {tuple(own[key].shape)} in the model")
        if _has_nan(tensors[key]):
            problems.append(f"{key} holds NaN")
    if check_base and not problems:
        other = [key for key, digest in _base_digests(root).items() if info.base.get(key) != digest]
        shown = ", ".join(other[:3]) + (", ..." if len(other) > 3 else "")
        if other:
            problems.append(f"{len(other)} of {len(info.base)} adapted base weights are not what it was trained on ({shown})")
            problems.append("load the right base weights first, or pass check_base=False if you know that they go together")
    return problems


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
