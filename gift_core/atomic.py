"""Writing a file so that its path holds the complete old content or the complete new one, never a part.

This holds after a power cut too, where the file system renames in one step: the content is on the disk before the file takes its place.
The folder is not forced to the disk after it. That would make a save take half as long again, to decide no more than which of the two
complete files a power cut in the next few seconds leaves.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import safetensors

from gift_core.errors import AdapterWriteError

#: A temporary folder in which nothing was written for so long belongs to a process that died, and is swept by the next save.
ABANDONED_AFTER_SECONDS = 3600.0


@contextlib.contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """A temporary file on the disk of ``target`` that takes its place when the block ends well, and vanishes when it does not.

    It lies in a folder of its own beside ``target``, because a writer may make temporary files of its own next to it. Where ``target``
    is a symbolic link, the file that it points to is replaced and the link stays. What a killed process left behind is removed by the
    next save to ``target`` that is an hour later.

    Raises:
        AdapterWriteError: if the file cannot be written; what was at ``target`` is intact.
    """
    folder = None
    try:
        place = _followed(target)
        folder = place.parent / f".{place.name}.{uuid.uuid4().hex}.tmp"
        os.mkdir(folder, 0o700)
        temporary = folder / place.name
        mode = place.stat().st_mode if place.exists() else _new_file_mode(temporary)
        yield temporary
        os.chmod(temporary, stat.S_IMODE(mode))  # the writer may have made a file of its own there, for its owner alone
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, place)
        _sweep(place)
    except AdapterWriteError:
        raise  # it speaks of another file, written inside of the block
    except (OSError, safetensors.SafetensorError) as error:
        raise AdapterWriteError(
            f"{target} could not be written: {error}. What was there is intact: free the place, or choose another."
        ) from error
    finally:
        if folder is not None:
            _remove(folder)


def _followed(target: Path) -> Path:
    try:
        with contextlib.suppress(FileNotFoundError):
            os.lstat(target)
    except ValueError as error:
        raise OSError(f"no file can be called so ({error})") from error
    place = Path(os.path.realpath(target)) if target.is_symlink() else target
    if place.is_symlink():
        raise OSError("the symbolic link leads in a circle")
    if place.exists() and not place.is_file():
        # a device or a pipe would be replaced by a file, which is not what its owner meant
        raise IsADirectoryError(f"{place} is a folder") if place.is_dir() else OSError(f"{place} is no regular file")
    return place


def _sweep(place: Path) -> None:
    ours = re.compile(rf"\.{re.escape(place.name)}\.[0-9a-f]{{32}}\.tmp")
    with contextlib.suppress(OSError):
        for folder in [Path(entry) for entry in os.scandir(place.parent) if ours.fullmatch(entry.name)]:
            if time.time() - _last_written(folder) > ABANDONED_AFTER_SECONDS:
                _remove(folder)


def _last_written(folder: Path) -> float:
    return max(item.lstat().st_mtime for item in (folder, *folder.iterdir()))


def _remove(folder: Path) -> None:
    try:
        os.rmdir(folder)  # empty, unless a writer failed or left something there
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)


def _new_file_mode(path: Path) -> int:
    # what the user's umask gives a new file; asking for the umask itself would change it for other threads
    handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return os.fstat(handle).st_mode
    finally:
        os.close(handle)
