"""How `nox -s faults` counts: what is noted, and what a test that notes nothing stands for."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from fault_table import Faults, table

ROOT = Path(__file__).parent.parent

SOURCE = """
import pytest

def test_fine(): ...
def test_wrong(): assert 1 == 2
def test_silent():
    with pytest.raises(ValueError): ...
def test_foreign(): raise ValueError
def test_skipped(): pytest.skip("not here")
def test_noted(record_faults): record_faults("flips", 5)
def test_noted_and_lost(record_faults): record_faults("flips", 5, lost=1)
@pytest.fixture
def broken(): raise ValueError
def test_of_a_broken_fixture(broken): ...
"""


def rows_of(folder: Path, **environment: str) -> tuple[list[Faults], str]:
    """What a run of `SOURCE` notes, and what it prints."""
    (folder / "test_made_up.py").write_text(SOURCE)
    shutil.copy(ROOT / "conftest.py", folder)
    (folder / "pytest.ini").write_text(f"[pytest]\npythonpath = {ROOT / 'tests'}\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, timeout=120)
    noted = folder / "rows"
    return [Faults(**json.loads(line)) for line in noted.read_text().splitlines()] if noted.exists() else [], done.stdout


def test_every_test_of_the_matrix_counts(tmp_path: Path) -> None:
    """A test that notes nothing is one case: silent where a promise was broken without a word, foreign where another error left."""
    rows, printed = rows_of(tmp_path, GIFT_FAULTS_FILE=str(tmp_path / "rows"))

    assert rows == [
        Faults("made up", 1),
        Faults("made up", 1, silent=1),
        Faults("made up", 1, silent=1),
        Faults("made up", 1, foreign=1),
        Faults("flips", 5),
        Faults("flips", 5, lost=1),
        Faults("made up", 1, foreign=1),
    ]
    assert table(rows)[-1] in printed


def test_elsewhere_only_what_is_noted_counts(tmp_path: Path) -> None:
    """Without the file that the matrix is noted in, the table has the rows of the tests that note one."""
    rows, printed = rows_of(tmp_path, GIFT_FAULTS_FILE="")

    assert not rows
    assert table([Faults("flips", 10, lost=1)])[-1] in printed
