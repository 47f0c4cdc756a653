"""Places that take no file, or take it badly: what was saved stays, the error is ours, and nothing else is left behind."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_table import RecordFaults
from models import mlp
from torch import nn

from gift_core import enable_fine_tuning, load_adapter, read_adapter_info, save_adapter, strategy_from_file
from gift_core.errors import AdapterFileError, AdapterNotFoundError, AdapterWriteError, GiftError, StrategyFileError


def tuned(value: float = 0.0) -> nn.Module:
    """A tuned model whose adapter says which one it is."""
    enable_fine_tuning(model := mlp(), "full")
    with torch.no_grad():
        next(iter(model.parameters())).fill_(value)
    return model


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """An adapter that was saved before."""
    save_adapter(tuned(1.0), tmp_path / "adapter.safetensors")
    return tmp_path / "adapter.safetensors"


# --- a disk that is full, a system call that fails


CALLS = ("mkdir", "open", "fsync", "chmod", "replace")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS, errno.EACCES], ids=errno.errorcode.get)
@pytest.mark.parametrize("call", CALLS)
def test_a_call_that_fails(call: str, code: int, path: Path, monkeypatch: pytest.MonkeyPatch, record_faults: RecordFaults) -> None:
    """Whichever system call of a save fails, the old file is whole, nothing else stays, and the error names the path."""
    before = path.read_bytes()
    model = tuned(2.0)
    place = "builtins.open" if call == "open" else f"os.{call}"
    real = open if call == "open" else getattr(os, call)

    def fails(*arguments: Any, **keywords: Any) -> Any:
        if str(path.parent) in str(arguments[0]) or isinstance(arguments[0], int):
            raise OSError(code, os.strerror(code))
        return real(*arguments, **keywords)

    silent = foreign = 0
    with monkeypatch.context() as patched:
        patched.setattr(place, fails)
        try:
            save_adapter(model, path)
            silent = 1
        except AdapterWriteError as error:
            assert isinstance(error.__cause__, OSError) and error.__cause__.errno == code
            assert str(path) in str(error)
        except Exception:
            foreign = 1

    lost = int(path.read_bytes() != before or os.listdir(path.parent) != [path.name])
    record_faults("failing system calls", 1, silent=silent, foreign=foreign, lost=lost)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if not sys.platform.startswith("linux") or os.geteuid() or subprocess.run(mount, capture_output=True, timeout=30).returncode:
        pytest.skip("no right to mount a small disk; the limit on a file's size stands for it in test_adapter_file.py")
    yield folder
    subprocess.run(["umount", str(folder)], check=True, timeout=30)


def test_a_disk_that_is_full(small_disk: Path, record_faults: RecordFaults) -> None:
    """A real disk without room refuses the new adapter, keeps the old one, and has its room back."""
    path = small_disk / "adapter.safetensors"
    save_adapter(tuned(1.0), path)
    before, room = path.read_bytes(), free(small_disk)
    enable_fine_tuning(large := nn.Linear(200, 200), "full")
    silent = foreign = 0

    for _ in range(5):
        try:
            save_adapter(large, path)
            silent += 1
        except AdapterWriteError:
            pass
        except Exception:
            foreign += 1

    lost = int(path.read_bytes() != before or os.listdir(small_disk) != [path.name] or free(small_disk) != room)
    record_faults("full disk", 5, silent=silent, foreign=foreign, lost=lost)


def free(folder: Path) -> int:
    """The free bytes of a disk."""
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


# --- places that are not what they should be


def _folder(path: Path) -> Path:
    path.unlink()
    path.mkdir()
    return path


def _link_to_folder(path: Path) -> Path:
    path.rename(path.with_name("kept"))
    (path.parent / "folder").mkdir()
    path.symlink_to("folder")
    return path


def _circle(path: Path) -> Path:
    path.unlink()
    path.symlink_to(path.name)
    return path


def _below_a_file(path: Path) -> Path:
    return path / "adapter.safetensors"


def _no_folder(path: Path) -> Path:
    return path.parent / "missing" / "adapter.safetensors"


def _long(path: Path) -> Path:
    return path.parent / ("n" * 400)


def _pipe(path: Path) -> Path:
    path.unlink()
    os.mkfifo(path)
    return path


def _endless(path: Path) -> Path:
    path.unlink()
    path.symlink_to("/dev/zero")
    return path


def _null(path: Path) -> Path:
    return path.parent / "adapter\0.safetensors"


def _surrogate(path: Path) -> Path:
    return path.parent / ("\ud800" * 200)


PLACES = [_folder, _link_to_folder, _circle, _below_a_file, _no_folder, _long, _null, _surrogate]
POSIX_PLACES = [_pipe, _endless] if hasattr(os, "mkfifo") and os.path.exists("/dev/zero") else []


@pytest.mark.timeout(60)
@pytest.mark.parametrize("place", [*PLACES, *POSIX_PLACES])
def test_a_place_that_is_no_file(place: Callable[[Path], Path], path: Path, record_faults: RecordFaults) -> None:
    """Saving to and loading from what is no file are errors of ours, and leave every file as it was."""
    target = place(path)
    before = contents(path.parent)
    foreign = silent = 0

    for attempt in (lambda: save_adapter(tuned(2.0), target), lambda: load_adapter(mlp(), target), lambda: read_adapter_info(target)):
        try:
            attempt()
            silent += 1
        except GiftError:
            pass
        except Exception:
            foreign += 1

    record_faults("places that take no file", 3, silent=silent, foreign=foreign, lost=int(contents(path.parent) != before))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with names are POSIX")
@pytest.mark.timeout(60)
def test_a_strategy_file_that_is_a_pipe(tmp_path: Path) -> None:
    """A pipe in the place of a strategy file is refused, instead of waiting for somebody to write into it."""
    os.mkfifo(tmp_path / "strategy.toml")

    with pytest.raises(StrategyFileError, match=r"strategy.toml cannot be read: it is no regular file"):
        strategy_from_file(tmp_path / "strategy.toml")


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file below a folder with its bytes; links and folders have none."""
    return {
        str(item.relative_to(folder)): item.read_bytes() if item.is_file() and not item.is_symlink() else None
        for item in sorted(folder.rglob("*"))
    }


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has other rights")
def test_a_right_that_was_lost(path: Path, record_faults: RecordFaults) -> None:
    """A user who may no longer write the folder, or read the file, is told so; the file is as it was."""
    before = path.read_bytes()
    model = tuned(2.0)
    cases: list[tuple[Callable[[], object], int, int]] = [
        (lambda: save_adapter(model, path), 0o555, 0o644),
        (lambda: load_adapter(mlp(), path), 0o755, 0o000),
        (lambda: load_adapter(mlp(), path), 0o000, 0o644),
        (lambda: save_adapter(model, path), 0o000, 0o644),
    ]
    bad = []
    for attempt, folder_mode, file_mode in cases:
        path.chmod(file_mode)
        path.parent.chmod(folder_mode)
        try:
            bad.append(without_rights(attempt))
        finally:
            path.parent.chmod(0o755)
            path.chmod(0o644)

    lost = int(path.read_bytes() != before or os.listdir(path.parent) != [path.name])
    record_faults("lost permissions", len(cases), silent=bad.count("silent"), foreign=bad.count("foreign"), lost=lost)


def without_rights(attempt: Callable[[], object]) -> str:
    """What an attempt gives for a user who has no other rights than those of the files: silent, ours or foreign."""
    answers = ("silent", "ours", "foreign")
    if os.geteuid() != 0:
        return answers[outcome_of(attempt)]
    child = os.fork()  # root may do everything, and becomes another user, which is for good
    if child == 0:
        os.setuid(65534)
        os._exit(outcome_of(attempt))
    return answers[os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])]


def outcome_of(attempt: Callable[[], object]) -> int:
    """0 if it works, 1 for an error of ours, 2 for another."""
    try:
        attempt()
        return 0
    except GiftError:
        return 1
    except BaseException:
        return 2


# --- links and readers


def test_a_link_keeps_pointing(path: Path) -> None:
    """Saving through a link changes the file that it points to, and a reader of the link finds the new adapter."""
    link = path.with_name("latest.safetensors")
    link.symlink_to(path.name)

    info = save_adapter(tuned(2.0), link)

    assert link.is_symlink()
    assert read_adapter_info(path) == read_adapter_info(link) == info


def test_a_missing_file_behind_a_link(tmp_path: Path) -> None:
    """A link to nothing is a missing adapter."""
    (tmp_path / "link").symlink_to("nothing")

    with pytest.raises(AdapterNotFoundError):
        read_adapter_info(tmp_path / "link")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not replace a file that is open; the save is refused")
def test_readers_see_one_file_or_the_other(path: Path, record_faults: RecordFaults) -> None:
    """While one thread saves again and again, every read gives a whole file, the one before or the one after."""
    models = [tuned(1.0), tuned(2.0)]
    whole = set()
    for model in models:
        whole.add(save_adapter(model, path).digest)
    stop = threading.Event()
    failed: list[BaseException] = []
    seen: set[str] = set()
    reads = [0]

    def read() -> None:
        while not stop.is_set():
            try:
                seen.add(read_adapter_info(path).digest)
                reads[0] += 1
            except BaseException as error:
                failed.append(error)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for number in range(100):
        save_adapter(models[number % 2], path)
    stop.set()
    for reader in readers:
        reader.join(60)

    lost = sum(isinstance(error, AdapterFileError) for error in failed)
    record_faults("reads while saving", reads[0], silent=len(seen - whole), lost=lost, foreign=len(failed) - lost)
