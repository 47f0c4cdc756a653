"""The example plugins, tested as their authors would: each project alone, with nothing but the core's public names."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PLUGINS = Path(__file__).resolve().parents[2] / "examples" / "plugins"


@pytest.mark.parametrize("name", sorted(folder.name for folder in PLUGINS.iterdir()))
def test_example_plugin_passes_its_own_tests(name: str) -> None:
    """A complete third-party project passes its tests in a process of its own."""
    project = PLUGINS / name
    environment = os.environ | {"PYTHONPATH": str(project / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", "pyproject.toml", "tests"]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=240, check=False)

    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
