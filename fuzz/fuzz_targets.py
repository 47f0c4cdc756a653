"""What is fuzzed: functions of bytes that a stranger wrote. An error that is not one of GIFt's leaves them, and is a finding.

They need no fuzzer: the tests replay the seeds, which hold every past finding, through these same functions.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import importlib_metadata
import torch
from adapter_headers import with_header
from click.testing import CliRunner
from torch import nn

from gift_core import FineTuningStrategy, disable_fine_tuning, enable_fine_tuning, load_adapter, read_adapter_info, save_adapter
from gift_core.cli import main
from gift_core.errors import GiftError, GiftWarning
from gift_core.factories import is_instance, keep_trainable
from gift_core.plugins.discovery import NOUNS, details, discover
from gift_core.strategy_file import SUFFIXES, strategy_from_file

#: Parts the metadata of a made-up distribution from its entry points.
SEPARATOR = b"\n===\n"


def adapter_file(data: bytes) -> None:
    """The bytes are an adapter file that is read, and loaded into a plain model."""
    path = _folder() / "adapter"
    path.write_bytes(data)
    with _only_ours():
        read_adapter_info(path)
    _load(path)


def described_adapter(data: bytes) -> None:
    """The bytes are a sound file's header, which is read, shown, and loaded into a plain and a tuned model."""
    path = _folder() / "described"
    path.write_bytes(with_header(sound_file(), data))
    for options in ([], ["--json"]):
        shown = CliRunner().invoke(main, ["info", str(path), *options])
        if shown.exception and not isinstance(shown.exception, SystemExit):
            raise shown.exception
    _load(path)
    _load_into_a_tuned_model(path)


def recorded_strategy(data: bytes) -> None:
    """The bytes are what a sound adapter file says of its strategy, as JSON."""
    path = _folder() / "recorded"
    try:
        says = json.loads(data)
        enable_fine_tuning(model := _model(), _Claiming(says))
        save_adapter(model, path)
    except Exception:
        return  # no file can say this
    _load(path)


def strategy_file(data: bytes) -> None:
    """The bytes are a strategy file, in each of the languages."""
    for suffix in SUFFIXES:
        path = _folder() / f"strategy{suffix}"
        path.write_bytes(data)
        with _only_ours():
            strategy_from_file(path)


def entry_points(data: bytes) -> None:
    """The bytes are the metadata and the entry points of an installed distribution, which are listed and shown."""
    metadata, _, entries = data.rpartition(SEPARATOR)
    site = _folder() / "site"
    info = site / "fuzzed-1.0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_bytes(metadata or b"Metadata-Version: 2.1\nName: fuzzed\nVersion: 1.0\n")
    (info / "entry_points.txt").write_bytes(entries)
    os.utime(site)  # else what was read of it before would be taken
    with _only_on_the_path(site):
        for group in NOUNS:
            found = discover(group)
            for one in found.providers:
                found.near_miss(one)
                str(details(one))
            str((found.broken, found.conflicts))


def file_name(data: bytes) -> None:
    """The bytes are a file's name, in a folder that is empty, which is read, loaded and written."""
    try:
        text = data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        text = data.decode("utf-8", "surrogateescape")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / text.replace("/", "_").replace("\\", "_")
        for read in (read_adapter_info, strategy_from_file, _load):
            with _only_ours():
                read(path)
        for suffix in SUFFIXES:
            with _only_ours():
                strategy_from_file(f"{path}{suffix}")
        enable_fine_tuning(model := _model(), "full")
        with _only_ours():
            save_adapter(model, path)
            _load(path)


#: Each target by the name of its folder of seeds.
TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target for target in (adapter_file, described_adapter, recorded_strategy, strategy_file, entry_points, file_name)
}


class _Claiming(FineTuningStrategy):
    """A strategy whose file says that it was another one."""

    def __init__(self, says: dict[str, Any]) -> None:
        super().__init__([(is_instance("Linear"), keep_trainable())])
        self._says = says

    def to_config(self) -> dict[str, Any]:
        return self._says


def _model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def _load(path: Path) -> None:
    model = _model()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with _only_ours():
        load_adapter(model, path)
        disable_fine_tuning(model)
    after = model.state_dict()
    if list(before) != list(after) or not all(torch.equal(before[key], after[key]) for key in before):
        raise AssertionError("the model is not as it was")


def _load_into_a_tuned_model(path: Path) -> None:
    enable_fine_tuning(model := _model(), "full")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    loaded = False
    with _only_ours():
        load_adapter(model, path, check_base=False)
        loaded = True
    if not loaded and not all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items()):
        raise AssertionError("a file was loaded in part")


@functools.cache
def sound_file() -> bytes:
    """An adapter file whose header the target `described_adapter` takes the place of."""
    enable_fine_tuning(model := _model(), "full")
    save_adapter(model, _folder() / "sound")
    return (_folder() / "sound").read_bytes()


@contextlib.contextmanager
def _only_ours() -> Iterator[None]:
    with warnings.catch_warnings(), contextlib.suppress(GiftError):
        warnings.simplefilter("ignore", GiftWarning)
        warnings.simplefilter("ignore", SyntaxWarning)  # of the parser of check expressions
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            yield
        except GiftError as error:
            str(error)  # a message must not fail either
            raise


@contextlib.contextmanager
def _only_on_the_path(site: Path) -> Iterator[None]:
    before = list(sys.path)
    sys.path[:] = [str(site)]
    try:
        yield
    finally:
        sys.path[:] = before
        importlib_metadata.MetadataPathFinder.invalidate_caches()


@functools.cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
