"""Writing one file whole or not at all."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from gift_core.atomic import atomic_path
from gift_core.errors import AdapterWriteError


def mode_of(path: Path) -> int:
    """The permission bits of a file."""
    return stat.S_IMODE(path.stat().st_mode)


def test_new_file_gets_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    """A saved file can be read by whom the umask lets read, as if it had been opened and written."""
    (tmp_path / "plain").write_text("x")
    with atomic_path(tmp_path / "saved") as temporary:
        temporary.unlink()
        os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600))

    assert mode_of(tmp_path / "saved") == mode_of(tmp_path / "plain")


def test_replaced_file_keeps_its_permissions(tmp_path: Path) -> None:
    """Saving over a file keeps who may read it."""
    (tmp_path / "saved").write_text("old")
    (tmp_path / "saved").chmod(0o640)
    with atomic_path(tmp_path / "saved") as temporary:
        temporary.write_text("new")

    assert (tmp_path / "saved").read_text() == "new"
    assert mode_of(tmp_path / "saved") == 0o640


def test_failed_block_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    """Whatever goes wrong while writing, the path holds the old content and no temporary stays."""
    (tmp_path / "saved").write_text("old")
    with pytest.raises(AdapterWriteError, match="disk"), atomic_path(tmp_path / "saved") as temporary:
        temporary.write_text("half")
        raise OSError("the disk is full")

    assert [file.name for file in tmp_path.iterdir()] == ["saved"]
    assert (tmp_path / "saved").read_text() == "old"
