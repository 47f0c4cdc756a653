"""Writing a file so that its path holds the complete old content or the complete new one, never a part."""

from __future__ import annotations

import contextlib
import os
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path

import safetensors

from gift_core.errors import AdapterWriteError


@contextlib.contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """A temporary file beside ``target`` that takes its place when the block ends well, and vanishes when it does not.

    Raises:
        AdapterWriteError: if the file cannot be written; what was at ``target`` is intact.
    """
    temporary = target.parent / f".{target.name}.{uuid.uuid4().hex}.tmp"
    try:
        if target.is_dir():
            raise IsADirectoryError(f"{target} is a folder")
        mode = target.stat().st_mode if target.exists() else _new_file_mode(temporary)
        yield temporary
        os.chmod(temporary, stat.S_IMODE(mode))  # the writer may have made a file of its own there, for its owner alone
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
        _sync_folder(target.parent)
    except (OSError, safetensors.SafetensorError) as error:
        raise AdapterWriteError(f"{target} could not be written: {error}. What was there is intact.") from error
    finally:
        with contextlib.suppress(OSError):  # a folder that took no file has none to remove
            temporary.unlink()


def _new_file_mode(path: Path) -> int:
    # what the user's umask gives a new file; asking for the umask itself would change it for other threads
    handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return os.fstat(handle).st_mode
    finally:
        os.close(handle)


def _sync_folder(folder: Path) -> None:
    # the rename itself must survive a power cut; not every system lets a folder be opened
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
