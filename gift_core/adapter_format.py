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
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load as _tensors_of_v1
from torch import Tensor

from gift_core.errors import AdapterFileError, AdapterNotFoundError, printable
from gift_core.reading import as_path, open_regular

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
_TORCH_NAMES = {name: str(dtype).removeprefix("torch.") for dtype, name in _NAMES.items()}


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


@dataclasses.dataclass(frozen=True)
class Payload:
    """Tensors, and the memory in which they lie one after another, as a file holds them.

    Attributes:
        tensors: by key, in the order of a file.
        stretches: their numbers, as flat tensors of one dtype each, in that order.
    """

    tensors: Mapping[str, Tensor]
    stretches: list[Tensor]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Payload:
        """Copy whole tensors on the CPU into the order of a file."""
        groups: dict[torch.dtype, list[str]] = {}
        for key in sorted(tensors):
            groups.setdefault(tensors[key].dtype, []).append(key)
        # the largest numbers first, so that each tensor lies where its dtype may be read
        order = sorted(groups, key=lambda dtype: (-dtype.itemsize, str(dtype)))
        with torch.no_grad():
            stretches = [torch.cat([tensors[key].ravel() for key in groups[dtype]]) for dtype in order]
        return cls({key: tensors[key] for dtype in order for key in groups[dtype]}, stretches)

    def parts(self) -> list[memoryview]:
        """The bytes, without a copy."""
        return [stretch.view(torch.uint8).numpy().data for stretch in self.stretches]


def encode(description: Description, payload: Payload) -> tuple[AdapterInfo, bytes]:
    """An adapter as a file: what it says of itself, and its first part, which the parts of the payload follow.

    Raises:
        AdapterFileError: if a tensor's dtype or key has no place in a safetensors file.
    """
    entries, parts = _entries(payload.tensors), payload.parts()
    digest_of_base = base_digest(description.base)
    written = vars(description) | {
        "format_version": FORMAT_VERSION,
        "sites": _grouped(description.sites),
        "base": "".join(description.base[key][:TAG] for key in _weights(description.sites)),
        "base_digest": digest_of_base,
    }
    blank = "0" * (_DIGEST.stop - _DIGEST.start)
    metadata = {"digest": blank, "format": "pt", FORMAT: _compact(written)}
    header = _compact({"__metadata__": metadata, **entries}).encode()
    header += b" " * (-len(header) % 8)
    start = len(header).to_bytes(8, "little") + header
    digest = _digest_of(start, *parts)
    start = start[: _DIGEST.start] + digest.encode() + start[_DIGEST.stop :]
    said = vars(description) | {"base": {key: value[:TAG] for key, value in description.base.items()}, "base_digest": digest_of_base}
    size = len(start) + sum(map(len, parts))
    return AdapterInfo(**said, tensors=_listed(entries), digest=digest, file_bytes=size), start


def decode(path: str | os.PathLike[str]) -> tuple[AdapterInfo, Payload]:
    """Read an adapter file of any version: what it says of itself, and its tensors.

    Raises:
        AdapterFileError: if there is none, or it is truncated, corrupted, no adapter or of an unknown format version.
    """
    file = as_path(path)
    memory = _memory_of(file)
    data = memory.numpy().data
    length = _header_length(data, file)
    if data[8 : _DIGEST.start] != _START:
        return _decode_v1(bytes(data), length, file)
    digest = bytes(data[_DIGEST]).decode(errors="replace")
    if _digest_of(data) != digest:
        raise AdapterFileError(f"{file} is corrupted: its content does not give the digest written in it. Get a fresh copy.")
    header = _json(bytes(data[8 : 8 + length]), file)
    metadata = header.pop("__metadata__")
    if metadata != {"digest": digest, "format": "pt", FORMAT: metadata.get(FORMAT)}:
        raise AdapterFileError(f"{file} is corrupted: its metadata is not as save_adapter writes it. Get a fresh copy.")
    described = _json(metadata[FORMAT], file)
    _check_description(described, file, FORMAT_VERSION, {"sites": _LIST, "base": _TEXT, "base_digest": _TEXT})
    try:
        payload = _placed(header, memory[8 + length :])
        return _info(described, digest, _listed(header), len(data)), payload
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        raise AdapterFileError(f"{file} is not as save_adapter writes it ({printable(error)}): get a fresh copy.") from error


def base_digest(base: Mapping[str, str]) -> str:
    """One digest over the digests of all adapted base weights."""
    return sha256(*(f"{key}={base[key]}".encode("utf-8", "surrogatepass") for key in sorted(base)))


def sha256(*parts: bytes) -> str:
    """The SHA-256 of several parts, each told apart from the next by its length."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(_length(part))
        digest.update(part)
    return digest.hexdigest()


def sha256_of_each(first: bytes, others: Iterable[bytes]) -> list[str]:
    """`sha256` of two parts, for each second part."""
    start = _length(first) + first
    return [hashlib.sha256(b"".join((start, _length(other), other))).hexdigest() for other in others]


def _length(part: bytes) -> bytes:
    return len(part).to_bytes(8, "little")


# --- version 2


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _digest_of(*parts: bytes | memoryview) -> str:
    """Over everything but the place where the digest itself stands, which is in the first part."""
    digest = hashlib.sha256(memoryview(parts[0])[: _DIGEST.start])
    for part in (memoryview(parts[0])[_DIGEST.stop :], *parts[1:]):
        digest.update(part)
    return digest.hexdigest()


def _entries(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    at = 0
    for key, tensor in tensors.items():
        if tensor.dtype not in _NAMES or key == "__metadata__":
            raise AdapterFileError(f"not saved: a safetensors file has no place for {key!r} ({tensor.dtype}): convert or exclude it.")
        end = at + tensor.numel() * tensor.dtype.itemsize
        found[key] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    return found


def _listed(entries: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {key: {"shape": entry["shape"], "dtype": _TORCH_NAMES[entry["dtype"]]} for key, entry in entries.items()}


def _placed(entries: Mapping[str, Any], memory: Tensor) -> Payload:
    """The tensors of a file's memory behind its header: one after another, without gap or overlap, to its last byte."""
    if memory.storage_offset() % 8:
        memory = memory.clone()  # where numbers of every dtype may be read
    tensors: dict[str, Tensor] = {}
    stretches: list[Tensor] = []
    at = 0
    for dtype, group in itertools.groupby(entries.items(), key=lambda item: _DTYPES[item[1]["dtype"]]):
        counts, start = {}, at
        for key, entry in group:
            counts[key] = _count(entry["shape"])
            if entry["data_offsets"] != [at, at := at + counts[key] * dtype.itemsize] or entry.keys() != _ENTRY:
                raise ValueError("its tensors lie elsewhere than it says")
        if at > len(memory):
            raise ValueError("its tensors end behind its end")
        stretches.append(memory[start:at].view(dtype))
        parts = zip(counts, stretches[-1].split(list(counts.values())), strict=True)
        tensors.update({key: torch.reshape(part, entries[key]["shape"]) for key, part in parts})
    if at != len(memory):
        raise ValueError("it goes on behind its tensors")
    return Payload(tensors, stretches)


_ENTRY = {"dtype", "shape", "data_offsets"}


def _count(shape: Any) -> int:
    count = 1
    for side in shape if type(shape) is list else [None]:
        if type(side) is not int or side < 0:
            raise ValueError("a shape is a list of numbers from 0 up")
        count *= side
    return count


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
            if not isinstance(site, str) or not isinstance(method, str) or weight in (adapted := sites.setdefault(site, {})):
                raise ValueError("its sites are no names, or occur twice")
            adapted[weight] = method
    return sites


def _info(written: Mapping[str, Any], digest: str, tensors: dict[str, dict[str, Any]], file_bytes: int) -> AdapterInfo:
    sites, tags = _ungrouped(written["sites"]), written["base"]
    listed = [f"{site}.{weight}" if site else weight for _, weight, names in written["sites"] for site in names]
    if len(tags) != TAG * len(listed):
        raise ValueError("it has not one digest per adapted weight")
    base = {key: tags[TAG * place : TAG * (place + 1)] for place, key in enumerate(listed)}
    same = {key: written[key] for key in ("strategy", "strategy_text", "provider", "core_version", "structure", "base_digest")}
    return AdapterInfo(**same, sites=sites, base=base, tensors=tensors, digest=digest, file_bytes=file_bytes)


# --- what is read of every version


def _memory_of(file: Path) -> Tensor:
    try:
        with open_regular(file) as handle:
            memory = torch.empty(os.fstat(handle.fileno()).st_size, dtype=torch.uint8, device="cpu")
            return memory[: handle.readinto(memory.numpy().data)]
    except FileNotFoundError as error:
        raise AdapterNotFoundError(f"there is no adapter file at {file}: check the path.") from error
    except (OSError, RuntimeError) as error:  # no regular file, one larger than the memory
        raise AdapterFileError(f"{file} cannot be read: {error}. Name an adapter file.") from error


def _header_length(data: memoryview, file: Path) -> int:
    if len(data) < 8 or not 2 <= (length := int.from_bytes(data[:8], "little")) <= len(data) - 8:
        raise AdapterFileError(f"{file} is truncated or no safetensors file ({len(data)} bytes): get a fresh copy.")
    if length > MAX_DESCRIPTION_BYTES:
        raise AdapterFileError(f"{file} describes itself in {length:,} bytes; {MAX_DESCRIPTION_BYTES:,} are allowed: get a fresh copy.")
    return length


def _json(text: Any, file: Path) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except (ValueError, TypeError, RecursionError) as error:
        raise AdapterFileError(
            f"{file}: its description cannot be read ({type(error).__name__}: {error}). Get a fresh copy."
        ) from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _check_description(described: Any, file: Path, version: int, further: Mapping[str, _Kind]) -> None:
    if not isinstance(described, dict):
        raise AdapterFileError(f"{file}: the adapter's description is no JSON object: get a fresh copy.")
    found = described.get("format_version")
    if type(found) is not int or found != version:
        raise AdapterFileError(f"{file} has format version {found!r}, this gift-core reads 1 and {FORMAT_VERSION}: upgrade gift-core.")
    expected = {
        "strategy": _CONFIG,
        "strategy_text": _TEXT,
        "provider": _SOURCE,
        "core_version": _TEXT,
        "structure": _TEXT,
        **further,
    }
    for key, (is_sound, words) in expected.items():
        if key not in described or not is_sound(described[key]):
            raise AdapterFileError(f"{file}: its description has no {key!r} that is {words}: get a fresh copy.")


def is_config(value: object) -> bool:
    """Whether it is what a file may say of its strategy: a table with a name, and a table of parameters if it has any."""
    return isinstance(value, dict) and _is_text(value.get("name")) and isinstance(value.get("parameters", {}), dict)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_source(value: object) -> bool:
    fields = [value.get(key, ...) for key in ("distribution", "version")] if isinstance(value, dict) else [...]
    return all(field is None or _is_text(field) for field in fields)


def _is_table(value: object, of: Callable[[object], bool] = _is_text) -> bool:
    return isinstance(value, dict) and all(map(of, value.values()))


#: A kind of value in a description: a check, and what a message calls it.
_Kind = tuple[Callable[[Any], bool], str]

_TEXT: _Kind = (_is_text, "text")
_LIST: _Kind = (lambda value: isinstance(value, list), "a list")
_TEXTS: _Kind = (_is_table, "a table of texts")
_SITES: _Kind = (lambda value: _is_table(value, _is_table), "a table of tables of texts")
_CONFIG: _Kind = (lambda value: value is None or is_config(value), "null, or a table with a text 'name' and a table 'parameters'")
_SOURCE: _Kind = (lambda value: value is None or _is_source(value), "null, or a table with 'distribution' and 'version', texts")


# --- version 1


def _decode_v1(data: bytes, length: int, file: Path) -> tuple[AdapterInfo, Payload]:
    try:
        described, tensors = _description_v1(data[8 : 8 + length], file), _tensors_of_v1(data)
    except (safetensors.SafetensorError, KeyError, RuntimeError, TypeError, AttributeError) as error:
        raise AdapterFileError(f"{file} is truncated or no safetensors file ({printable(error)}): get a fresh copy.") from error
    _check_description(described, file, 1, {"sites": _SITES, "base": _TEXTS, "digest": _TEXT})
    if _digest_v1(described, tensors) != described["digest"]:
        raise AdapterFileError(f"{file} is corrupted: its content does not give the digest written in it. Get a fresh copy.")
    listed = {key: {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")} for key, tensor in tensors.items()}
    if listed != described.get("tensors"):
        raise AdapterFileError(f"{file} is corrupted: its tensors are not those that its description lists. Get a fresh copy.")
    kept = {key: described[key] for key in (field.name for field in dataclasses.fields(AdapterInfo)) if key in described}
    info = AdapterInfo(**kept | {"base_digest": None, "file_bytes": len(data)})
    return info, Payload(tensors, [tensor.reshape(-1) for tensor in tensors.values()])


def _description_v1(text: bytes, file: Path) -> dict[str, Any]:
    header = _json(text, file)
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or FORMAT not in metadata:
        raise AdapterFileError(f"{file} is no GIFt adapter: it has no {FORMAT!r} metadata. Pass a file that save_adapter wrote.")
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
