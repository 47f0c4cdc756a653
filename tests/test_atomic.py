"""Writing one file whole or not at all."""

from __future__ import annotations

import contextlib
import os
import stat
import time
from pathlib import Path

import pytest

from gift_core.atomic import ABANDONED_AFTER_SECONDS, atomic_path
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


def test_the_content_is_on_the_disk_before_it_takes_the_files_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The complete content is forced to the disk before the rename, so that a power cut leaves the old file or the new one whole."""
    events: list[tuple[str, str]] = []
    force, rename = os.fsync, os.replace

    def forced(handle: int) -> None:
        force(handle)
        events.append(("forced", os.pread(handle, 100, 0).decode()))

    def renamed(source: Path, target: Path) -> None:
        events.append(("renamed", Path(source).read_text()))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", forced)
    monkeypatch.setattr(os, "replace", renamed)
    with atomic_path(tmp_path / "saved") as temporary:
        temporary.write_text("new")

    assert events == [("forced", "new"), ("renamed", "new")]


def test_a_link_is_written_through(tmp_path: Path) -> None:
    """Saving to a symbolic link, or a chain of them, replaces the file at its end; the links stay what they are."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "7").write_text("old")
    (tmp_path / "latest").symlink_to(Path("runs") / "7")
    (tmp_path / "best").symlink_to("latest")
    with atomic_path(tmp_path / "best") as temporary:
        assert temporary.is_relative_to(tmp_path / "runs")  # on the disk of the file, where a rename is possible
        temporary.write_text("new")

    assert (tmp_path / "runs" / "7").read_text() == "new"
    assert os.readlink(tmp_path / "best") == "latest"
    assert [file.name for file in (tmp_path / "runs").iterdir()] == ["7"]


def test_a_link_to_a_file_that_is_not_there_yet(tmp_path: Path) -> None:
    """A link that points to nothing makes the file it points to; one whose folder is missing is an error."""
    (tmp_path / "latest").symlink_to("first")
    (tmp_path / "lost").symlink_to(Path("missing") / "file")
    with atomic_path(tmp_path / "latest") as temporary:
        temporary.write_text("new")
    with pytest.raises(AdapterWriteError, match="lost"), atomic_path(tmp_path / "lost"):
        pass

    assert (tmp_path / "first").read_text() == "new"
    assert (tmp_path / "latest").is_symlink()


def test_a_circle_of_links(tmp_path: Path) -> None:
    """Links that lead in a circle are an error, and stay."""
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(AdapterWriteError, match="could not be written"), atomic_path(tmp_path / "a") as temporary:
        temporary.write_text("new")

    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with names are POSIX")
def test_what_is_no_regular_file_is_kept(tmp_path: Path) -> None:
    """A pipe or a device is refused, and never replaced by a file."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(AdapterWriteError, match="no regular file"), atomic_path(tmp_path / "pipe"):
        pass

    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert os.listdir(tmp_path) == ["pipe"]


def test_a_writer_with_temporary_files_of_its_own(tmp_path: Path) -> None:
    """What a writer leaves beside the file that it was given goes too, whether it succeeds or fails."""
    for failing in (False, True):
        with contextlib.suppress(AdapterWriteError), atomic_path(tmp_path / "saved") as temporary:
            temporary.with_name("mine").write_text("left over")
            temporary.write_text("new")
            if failing:
                raise OSError("the disk is full")

    assert os.listdir(tmp_path) == ["saved"]


def test_what_a_killed_process_left_is_swept(tmp_path: Path) -> None:
    """Saving removes temporary folders of the same target that are abandoned, and nothing else."""
    abandoned, written, other = (tmp_path / f".{name}.tmp" for name in (f"saved.{'0' * 32}", f"saved.{'1' * 32}", f"other.{'0' * 32}"))
    for folder in (abandoned, written, other, tmp_path / ".saved.mine.tmp", tmp_path / f"saved.{'0' * 32}.tmp"):
        folder.mkdir()
        (folder / "saved").write_text("half")
        for item in (folder / "saved", folder):
            os.utime(item, 2 * (time.time() - 2 * ABANDONED_AFTER_SECONDS,))
    os.utime(written / "saved")
    with atomic_path(tmp_path / "saved") as temporary:
        temporary.write_text("new")

    left = {file.name for file in tmp_path.iterdir()}
    assert left == {"saved", written.name, other.name, ".saved.mine.tmp", f"saved.{'0' * 32}.tmp"}


def test_an_error_about_a_file_inside_stays_as_it_is(tmp_path: Path) -> None:
    """Where a file written within the block cannot be written, the error that leaves is the one that names that file."""
    with (
        pytest.raises(AdapterWriteError, match=r"absent.inner could not be written") as caught,
        atomic_path(tmp_path / "outer") as outer,
    ):
        outer.write_bytes(b"x")
        with atomic_path(tmp_path / "absent" / "inner"):
            pass

    assert "outer could not" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
