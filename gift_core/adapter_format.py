"""The bytes of an adapter file: a safetensors file with a JSON description in its metadata, and a digest over every other byte.

Version 2 is written, and read as it is written: the header starts with the digest, at a place of its own, so that a damaged file is
found out before any of it is parsed. A digest is no signature: what it covers is still read as a stranger's. Version 1, whose
digest is over what the file means, is only read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load as _tensors_of_v1
from torch import Tensor

from gift_core.errors import AdapterFileError, AdapterNotFoundError

FORMAT = "gift-adapter"
FORMAT_VERSION = 2

#: A description longer than this is refused before it is parsed.
MAX_DESCRIPTION_BYTES = 16 * 2**20

#: So many characters of a base weight's digest are in a file: enough to name the weight that differs; one digest over all decides.
TAG = 8

_START = b'{"__metadata__":{"digest":"'
_DIGEST = slice(8 + len(_START), 8 + len(_START) + hashlib.sha256().digest_size * 2)

#: The dtypes that safetensors has a name for, by that name.
_DTYPES = {
    name: getattr(torch, attribute)
    for name, attribute in (
        *((f"{letter}{8 * size}", f"{word}{8 * size}") for letter, word in (("I", "int"), ("U", "uint")) for size in (1, 2, 4, 8)),
        *((f"F{bits}", f"float{bits}") for bits in (16, 32, 64)),
        *((f"F8_{kind}", f"float8_{kind.lower()}") for kind in ("E4M3", "E5M2", "E4M3FNUZ", "E5M2FNUZ")),
        ("F8_E4M3", "float8_e4m3fn"),
        ("BF16", "bfloat16"),
        ("BOOL", "bool"),
        ("C64", "complex64"),
    )
    if hasattr(torch, attribute)
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class AdapterInfo:
    """What an adapter file says of itself.

    Attributes:
        strategy: the strategy's config, or None for one without a form as data; ``strategy_text`` says it for people.
        provider: the distribution and version that the strategy came from, or None.
        core_version: the gift-core that wrote the file.
        sites: adapted names by module, each with its method.
        structure: digest of the base model's names and shapes.
        base: the start of a digest of each adapted base weight (all of it in a file of version 1); ``base_digest`` is one over all
            their digests, or None in a file of version 1.
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
    base_digest: str | None
    tensors: dict[str, dict[str, Any]]
    digest: str
    file_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON data."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Description:
    """What a file is to say beside its tensors; the fields are those of `AdapterInfo`, ``base`` holds whole digests."""

    strategy: dict[str, Any] | None
    strategy_text: str
    provider: dict[str, str | None] | None
    core_version: str
    sites: dict[str, dict[str, str]]
    structure: str
    base: dict[str, str]


def encode(description: Description, tensors: Mapping[str, Tensor]) -> tuple[AdapterInfo, bytes, Tensor]:
    """An adapter as a file: what it says of itself, its first part, and the tensors' bytes, which follow.

    Args:
        description: what to say.
        tensors: whole tensors on the CPU.

    Raises:
        AdapterFileError: if a tensor's dtype or key has no place in a safetensors file.
    """
    # the largest numbers first, so that each tensor lies where its dtype may be read
    order = sorted(tensors, key=lambda key: (-tensors[key].element_size(), str(tensors[key].dtype), key))
    payload = torch.cat([torch.empty(0, dtype=torch.uint8), *(tensors[key].reshape(-1).view(torch.uint8) for key in order)])
    written = vars(description) | {
        "format_version": FORMAT_VERSION,
        "sites": _grouped(description.sites),
        "base": "".join(description.base[key][:TAG] for key in _weights(description.sites)),
        "base_digest": base_digest(description.base),
    }
    blank = "0" * (_DIGEST.stop - _DIGEST.start)
    metadata = {"digest": blank, "format": "pt", FORMAT: _compact(written)}
    header = _compact({"__metadata__": metadata, **_entries(order, tensors)}).encode()
    header += b" " * (-len(header) % 8)
    start = len(header).to_bytes(8, "little") + header
    digest = _digest_of(start, payload.numpy().data)
    start = start[: _DIGEST.start] + digest.encode() + start[_DIGEST.stop :]
    return _info(written, digest, tensors, len(start) + payload.numel()), start, payload


def decode(path: str | os.PathLike[str]) -> tuple[AdapterInfo, dict[str, Tensor]]:
    """Read an adapter file of any version: what it says of itself, and its tensors.

    Raises:
        AdapterFileError: if there is none, or it is truncated, corrupted, no adapter or of an unknown format version.
    """
    file = Path(path)
    data = _bytes_of(file)
    length = _header_length(data, file)
    if data[8 : _DIGEST.start] != _START:
        return _decode_v1(data, length, file)
    digest = data[_DIGEST].decode(errors="replace")
    if _digest_of(data) != digest:
        raise AdapterFileError(f"{file} is corrupted: its content does not give the digest written in it. Get a fresh copy.")
    header = _json(data[8 : 8 + length], file)
    metadata = header.pop("__metadata__")
    if metadata != {"digest": digest, "format": "pt", FORMAT: metadata.get(FORMAT)}:
        raise AdapterFileError(f"{file} is corrupted: its metadata is not as save_adapter writes it. Get a fresh copy.")
    described = _json(metadata[FORMAT], file)
    _check_description(described, file, FORMAT_VERSION, {"sites": list, "base": str, "base_digest": str})
    try:
        tensors = _placed(header, data[8 + length :])
        return _info(described, digest, tensors, len(data)), tensors
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        raise AdapterFileError(f"{file} is not as save_adapter writes it ({error}): get a fresh copy.") from error


def base_digest(base: Mapping[str, str]) -> str:
    """One digest over the digests of all adapted base weights."""
    return sha256(*(f"{key}={base[key]}".encode("utf-8", "surrogatepass") for key in sorted(base)))


def sha256(*parts: bytes) -> str:
    """The SHA-256 of several parts, each told apart from the next by its length."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


# --- version 2


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _digest_of(*parts: bytes | memoryview) -> str:
    """Over everything but the place where the digest itself stands, which is in the first part."""
    digest = hashlib.sha256(memoryview(parts[0])[: _DIGEST.start])
    for part in (memoryview(parts[0])[_DIGEST.stop :], *parts[1:]):
        digest.update(part)
    return digest.hexdigest()


def _entries(order: list[str], tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    at = 0
    for key in order:
        tensor = tensors[key]
        if tensor.dtype not in _NAMES or key == "__metadata__":
            raise AdapterFileError(f"not saved: a safetensors file has no place for {key!r} ({tensor.dtype}).")
        found[key] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at := at + tensor.nbytes]}
    return found


def _placed(entries: Mapping[str, Any], payload: bytes) -> dict[str, Tensor]:
    """The tensors of a payload: one after another, without gap or overlap, to its last byte."""
    raw = torch.frombuffer(bytearray(payload), dtype=torch.uint8) if payload else torch.empty(0, dtype=torch.uint8)
    tensors: dict[str, Tensor] = {}
    at = 0
    for dtype, group in itertools.groupby(entries.items(), key=lambda item: _DTYPES[item[1]["dtype"]]):
        keys, shapes = zip(*((key, entry["shape"]) for key, entry in group), strict=True)
        counts = [_count(shape) for shape in shapes]
        for key, count in zip(keys, counts, strict=True):
            if entries[key]["data_offsets"] != [at, at := at + count * dtype.itemsize] or set(entries[key]) != _ENTRY:
                raise ValueError("its tensors lie elsewhere than it says")
        if at > len(payload):
            raise ValueError("its tensors end behind its end")
        stretch = raw[at - sum(counts) * dtype.itemsize : at].view(dtype)
        tensors.update((key, part.view(shape)) for key, part, shape in zip(keys, stretch.split(counts), shapes, strict=True))
    if at != len(payload):
        raise ValueError("it goes on behind its tensors")
    return tensors


_ENTRY = {"dtype", "shape", "data_offsets"}


def _count(shape: Any) -> int:
    if not isinstance(shape, list) or not all(type(side) is int and side >= 0 for side in shape):
        raise ValueError("a shape is a list of numbers from 0 up")
    return math.prod(shape)


def _weights(sites: Mapping[str, Mapping[str, str]]) -> Iterable[str]:
    """The keys of the adapted weights, in the order in which a file lists their sites."""
    return (f"{site}.{weight}" if site else weight for _, weight, names in _grouped(sites) for site in names)


def _grouped(sites: Mapping[str, Mapping[str, str]]) -> list[tuple[str, str, list[str]]]:
    groups: dict[tuple[str, str], list[str]] = {}
    for site, adapted in sites.items():
        for weight, method in adapted.items():
            groups.setdefault((method, weight), []).append(site)
    return [(method, weight, names) for (method, weight), names in groups.items()]


def _ungrouped(groups: Iterable[Any]) -> dict[str, dict[str, str]]:
    sites: dict[str, dict[str, str]] = {}
    for method, weight, names in groups:
        for site in names:
            if not all(isinstance(text, str) for text in (site, method)) or weight in sites.get(site, ()):
                raise ValueError("its sites are no names, or occur twice")
            sites.setdefault(site, {})[weight] = method
    return sites


def _info(written: Mapping[str, Any], digest: str, tensors: Mapping[str, Tensor], file_bytes: int) -> AdapterInfo:
    sites, tags = _ungrouped(written["sites"]), written["base"]
    listed = [f"{site}.{weight}" if site else weight for _, weight, names in written["sites"] for site in names]
    if len(tags) != TAG * len(listed):
        raise ValueError("it has not one digest per adapted weight")
    base = {key: tags[TAG * place : TAG * (place + 1)] for place, key in enumerate(listed)}
    same = {key: written[key] for key in ("strategy", "strategy_text", "provider", "core_version", "structure", "base_digest")}
    shown = {key: {"shape": list(tensor.shape), "dtype": _dtype(tensor)} for key, tensor in tensors.items()}
    return AdapterInfo(**same, sites=sites, base=base, tensors=shown, digest=digest, file_bytes=file_bytes)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


# --- what is read of every version


def _bytes_of(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except FileNotFoundError as error:
        raise AdapterNotFoundError(f"there is no adapter file at {file}: check the path.") from error
    except (OSError, ValueError) as error:  # a ValueError is about a path that cannot be one
        raise AdapterFileError(f"{file} cannot be read: {error}.") from error


def _header_length(data: bytes, file: Path) -> int:
    if len(data) < 8 or not 2 <= (length := int.from_bytes(data[:8], "little")) <= len(data) - 8:
        raise AdapterFileError(f"{file} is truncated or no safetensors file ({len(data)} bytes): get a fresh copy.")
    if length > MAX_DESCRIPTION_BYTES:
        raise AdapterFileError(f"{file} describes itself in {length:,} bytes; {MAX_DESCRIPTION_BYTES:,} are allowed.")
    return length


def _json(text: Any, file: Path) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except (ValueError, TypeError, RecursionError) as error:
        raise AdapterFileError(f"{file}: its description cannot be read ({type(error).__name__}: {error}).") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key occurs twice")
    return dict(pairs)


def _check_description(described: Any, file: Path, version: int, further: Mapping[str, type]) -> None:
    if not isinstance(described, dict):
        raise AdapterFileError(f"{file}: the adapter's description is no JSON object.")
    found = described.get("format_version")
    if type(found) is not int or found != version:
        raise AdapterFileError(f"{file} has format version {found!r}, this gift-core reads 1 and {FORMAT_VERSION}: upgrade gift-core.")
    expected: dict[str, Any] = {
        "strategy": (dict, type(None)),
        "strategy_text": str,
        "provider": (dict, type(None)),
        "core_version": str,
        "structure": str,
        **further,
    }
    for key, kind in expected.items():
        if not isinstance(described.get(key, ...), kind):
            raise AdapterFileError(f"{file}: {key!r} is missing from its description or of the wrong kind.")


# --- version 1


def _decode_v1(data: bytes, length: int, file: Path) -> tuple[AdapterInfo, dict[str, Tensor]]:
    try:
        described, tensors = _description_v1(data[8 : 8 + length], file), _tensors_of_v1(data)
    except (safetensors.SafetensorError, KeyError, RuntimeError, TypeError, AttributeError) as error:
        raise AdapterFileError(f"{file} is truncated or no safetensors file ({error}): get a fresh copy.") from error
    _check_description(described, file, 1, {"sites": dict, "base": dict, "tensors": dict, "digest": str})
    if _digest_v1(described, tensors) != described["digest"]:
        raise AdapterFileError(f"{file} is corrupted: its content does not give the digest written in it. Get a fresh copy.")
    listed = {key: {"shape": list(tensor.shape), "dtype": _dtype(tensor)} for key, tensor in tensors.items()}
    if listed != described["tensors"]:
        raise AdapterFileError(f"{file} is corrupted: its tensors are not those that its description lists.")
    kept = {key: described[key] for key in (field.name for field in dataclasses.fields(AdapterInfo)) if key in described}
    return AdapterInfo(**kept | {"base_digest": None, "file_bytes": len(data)}), tensors


def _description_v1(text: bytes, file: Path) -> dict[str, Any]:
    header = _json(text, file)
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or FORMAT not in metadata:
        raise AdapterFileError(f"{file} is no GIFt adapter: it has no {FORMAT!r} metadata. GIFt reads what save_adapter wrote.")
    described = _json(metadata[FORMAT], file)
    # the digest covers what the text means; other spellings of the same, as in 1e-05 and 1E-05, are damage too
    if metadata != {"format": "pt", FORMAT: json.dumps(described)}:
        raise AdapterFileError(f"{file} is corrupted: its metadata is not as save_adapter writes it. Get a fresh copy.")
    return described  # type: ignore[no-any-return]


def _digest_v1(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    said = json.dumps({key: value for key, value in description.items() if key != "digest"}, sort_keys=True)
    parts = [said.encode()]
    for key in sorted(tensors):
        parts += [key.encode(), tensors[key].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()]
    return sha256(*parts)
