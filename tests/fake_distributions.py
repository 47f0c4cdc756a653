"""Made-up distributions on sys.path, for the tests of discovery, loading and hooks."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

Install = Callable[..., Path]
_numbers = itertools.count()


@pytest.fixture
def install(tmp_path: Path) -> Iterator[Install]:
    """Puts a made-up distribution on sys.path: ``install("dist", "name = module:attribute", module="source")``."""
    with installing(tmp_path) as make:
        yield make


@contextlib.contextmanager
def installing(place: Path) -> Iterator[Install]:
    """The same as a context, for distributions in a folder ``site`` below ``place``."""
    folder = place / "site"
    folder.mkdir()
    path, before = list(sys.path), set(sys.modules)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()

    def make(
        name: str | None,
        *entries: str,
        version: str = "1.0",
        group: str = "gift.strategies",
        metadata: str | None = None,
        site: Path = folder,
        **modules: str,
    ) -> Path:
        site.mkdir(exist_ok=True)
        info = site / f"{(name or f'nameless{next(_numbers)}').replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        lines = f"Name: {name}\nVersion: {version}\nSummary: Made up.\n" if name else "Version: 1.0\n"
        (info / "METADATA").write_text(metadata if metadata is not None else f"Metadata-Version: 2.1\n{lines}")
        (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *entries]) + "\n")
        for module, source in modules.items():
            (site / f"{module}.py").write_text(source)
        return info

    try:
        yield make
    finally:
        sys.path[:] = path
        for module in set(sys.modules) - before:
            if str(getattr(sys.modules[module], "__file__", "")).startswith(str(place)):
                del sys.modules[module]
