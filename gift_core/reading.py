"""A path as a caller gives it, and opening a file that somebody else may have put there."""

from __future__ import annotations

import os
import stat
from io import BufferedReader
from pathlib import Path

from gift_core.errors import PathError

# opening a pipe would wait until somebody writes into it; not every platform has each of these
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)


def as_path(path: str | os.PathLike[str]) -> Path:
    """A path as callers give it: text, or anything with ``__fspath__`` that gives text.

    Raises:
        PathError: if it is neither, such as a number, which ``open`` would take for a file that is open already.
    """
    try:
        return Path(path)
    except TypeError as error:
        raise PathError(f"a path is text or a pathlib.Path, got {path!r}: pass the path itself.") from error


def open_regular(path: str | os.PathLike[str]) -> BufferedReader:
    """Open a file to read its bytes, if it is a regular file: a pipe would make the reader wait, and a device need never end.

    What is opened is what is looked at, so that nothing can be put in its place in between. ``os.fstat`` of it gives its size.

    Raises:
        OSError: if it cannot be opened or is no regular file, as `FileNotFoundError` if there is none.
    """
    try:
        handle = os.open(path, _FLAGS)
    except ValueError as error:
        raise OSError(f"no file can be called so ({error})") from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError("it is no regular file")
    return os.fdopen(handle, "rb")
