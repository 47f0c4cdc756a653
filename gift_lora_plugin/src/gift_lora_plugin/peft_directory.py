"""The two files of a PEFT adapter: reading them with limits, and writing both or none."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import safetensors
from safetensors.torch import load as parse_tensors
from safetensors.torch import save_file
from torch import Tensor

from gift_core import atomic_path, open_regular
from gift_core.errors import AdapterFileError, AdapterNotFoundError, AdapterWriteError, printable
from gift_lora_plugin.peft_problems import shortened

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
#: What PEFT wrote before safetensors: a pickle, which runs code when it is read.
PICKLE_FILE = "adapter_model.bin"

#: What the keys of the tensors start with.
PREFIX = "base_model.model."

#: A configuration longer than this is refused before it is parsed.
MAX_CONFIG_BYTES = 16 * 2**20
#: Tensors whose names and shapes take more than this are refused before they are parsed.
MAX_HEADER_BYTES = 16 * 2**20


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What a conversion from or to PEFT's files has carried over.

    Attributes:
        layers: how many layers have LoRA.
        modules_to_save: the modules that are trained in full.
        bias: which biases are trained, in PEFT's words: ``none``, ``lora_only`` or ``all``.
        file_bytes: the size of what was written, or read.
        notes: what a user should know, and changes no answer of the model as it is.
    """

    layers: int
    modules_to_save: tuple[str, ...]
    bias: str
    file_bytes: int
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON data."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(self).items()}


def read_config_file(directory: Path) -> dict[str, Any]:
    """The configuration as JSON data.

    Raises:
        AdapterFileError: if the file is not there, too large or no JSON object.
    """
    file = directory / CONFIG_FILE
    with _opened(file) as handle:
        if (size := os.fstat(handle.fileno()).st_size) > MAX_CONFIG_BYTES:
            raise AdapterFileError(f"{file} has {size:,} bytes; {MAX_CONFIG_BYTES:,} are allowed: get a fresh copy.")
        encoded = handle.read(size)
    try:
        data = json.loads(encoded.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{file} cannot be read as JSON ({type(error).__name__}: {error}): get a fresh copy.") from error
    if not isinstance(data, dict):
        raise AdapterFileError(f"{file} holds no JSON object: it is no configuration of PEFT. Get a fresh copy.")
    return data


def read_tensors_file(directory: Path) -> dict[str, Tensor]:
    """All tensors by key.

    Raises:
        AdapterFileError: if the file is not there or no safetensors file; nothing is ever unpickled.
    """
    file = directory / TENSORS_FILE
    if not file.exists() and (directory / PICKLE_FILE).exists():
        raise AdapterFileError(
            f"{directory} holds {PICKLE_FILE}, a pickle, which could run code: load it with PEFT where you trust it, and save it "
            "there with save_pretrained(directory), which writes safetensors."
        )
    with _opened(file) as handle:
        start = handle.read(8)
        if (length := int.from_bytes(start, "little")) > MAX_HEADER_BYTES:
            raise AdapterFileError(f"{file} lists its tensors in {length:,} bytes; {MAX_HEADER_BYTES:,} are allowed: get a fresh copy.")
        data = start + handle.read(os.fstat(handle.fileno()).st_size)
    try:
        return parse_tensors(data)
    except (safetensors.SafetensorError, KeyError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        reason = shortened(printable(error))
        raise AdapterFileError(f"{file} is truncated or no safetensors file ({reason}): get a fresh copy.") from error


def write_files(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], *, force: bool) -> int:
    """Write both files; a reader finds the complete old pair, the complete new one, or no configuration.

    Returns:
        The bytes written.

    Raises:
        AdapterWriteError: if one cannot be written, or is there and ``force`` is false; what was there is intact.
    """
    files = _places(directory)
    _restore(files)
    there = [file.name for file in files if os.path.lexists(file)]
    if there and not force:
        raise AdapterWriteError(f"{directory} holds {' and '.join(there)} already: choose another folder, or overwrite with force.")
    text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False) + "\n"
    # safetensors wants each tensor whole and with memory of its own
    apart = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
    with _folder(directory), _set_aside(files) as set_aside, atomic_path(files[0]) as config_path, atomic_path(files[1]) as path:
        save_file(apart, path, {"format": "pt"})
        config_path.write_text(text, encoding="utf-8")
        # neither configuration may ever stand beside the other's tensors: it would give them another scaling
        set_aside()
    return sum(file.stat().st_size for file in files)


def _places(directory: Path) -> list[Path]:
    """Where the two files lie: a symbolic link stays, and what it points to is replaced."""
    try:
        files = [Path(os.path.realpath(directory / name)) for name in (CONFIG_FILE, TENSORS_FILE)]
    except (OSError, ValueError) as error:
        raise AdapterWriteError(f"{directory} cannot be written: {error}. Choose another folder.") from error
    if files[0] == files[1]:
        raise AdapterWriteError(f"{directory}: {CONFIG_FILE} and {TENSORS_FILE} lead to one file, {files[0]}: remove one of the links.")
    return files


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[BinaryIO]:
    try:
        with open_regular(file) as handle:
            yield handle
    except FileNotFoundError as error:
        raise AdapterNotFoundError(f"there is no {file.name} in {file.parent}: name the folder that PEFT wrote.") from error
    except (OSError, MemoryError) as error:
        raise AdapterFileError(f"{file} cannot be read: {error}. Name the folder that PEFT wrote.") from error


@contextlib.contextmanager
def _folder(directory: Path) -> Iterator[None]:
    is_new = not directory.exists()
    try:
        directory.mkdir(exist_ok=True)
    except OSError as error:
        raise AdapterWriteError(f"{directory} could not be made: {error}. Choose another folder.") from error
    try:
        yield
    except BaseException:
        if is_new:
            with contextlib.suppress(OSError):
                directory.rmdir()
        raise


@contextlib.contextmanager
def _set_aside(files: Sequence[Path]) -> Iterator[Callable[[], None]]:
    """Gives a function that moves the files away; they come back if the block fails, and go for good if it ends well."""
    ending = f"{uuid.uuid4().hex}.old"
    aside = {file: _aside(file, ending) for file in files}
    moved: list[Path] = []

    def move() -> None:
        for file in files:
            if os.path.lexists(file):
                os.replace(file, aside[file])
            moved.append(file)

    try:
        yield move
    except BaseException:
        for file in moved:
            if os.path.lexists(aside[file]):
                os.replace(aside[file], file)
            else:
                file.unlink(missing_ok=True)
        raise
    # with them go those of an export that was killed after it had written both files
    for old in [old for file in files for old in _all_aside(file)]:
        old.unlink(missing_ok=True)


def _restore(files: Sequence[Path]) -> None:
    """Bring back the pair that a killed export had set aside: the configuration comes last, as it is written."""
    if os.path.lexists(files[0]) or not (found := _all_aside(files[0])):
        return
    latest = max(found, key=lambda old: old.lstat().st_ctime_ns)
    ending = latest.name.removeprefix(f".{files[0].name}.")
    try:
        for file in reversed(files):
            if os.path.lexists(old := _aside(file, ending)):
                os.replace(old, file)
    except OSError as error:
        raise AdapterWriteError(
            f"{files[0].parent}: an earlier pair of files could not be brought back: {error}. Move it back, or choose another folder."
        ) from error


def _aside(file: Path, ending: str) -> Path:
    return file.with_name(f".{file.name}.{ending}")


def _all_aside(file: Path) -> list[Path]:
    ours = re.compile(rf"\.{re.escape(file.name)}\.[0-9a-f]{{32}}\.old")
    if not file.parent.is_dir():
        return []
    return [old for old in file.parent.iterdir() if ours.fullmatch(old.name)]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key occurs twice")
    return dict(pairs)


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")
