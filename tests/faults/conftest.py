"""Counting what faults did, over all tests of this folder; ``nox -s faults`` runs them and shows the table."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
from fault_table import Faults, RecordFaults, table
from low_rank import low_rank

__all__ = ["low_rank", "record_faults"]

#: Names a file to which each row is added as a line of JSON.
ENVIRONMENT = "GIFT_FAULTS_FILE"

_rows = pytest.StashKey[list[Faults]]()


@pytest.fixture
def record_faults(request: pytest.FixtureRequest) -> RecordFaults:
    """Notes a row of the table, and fails the test unless it is clean: ``record_faults("bit flips", 500, silent=len(silent))``."""

    def record(kind: str, cases: int, **counts: int) -> None:
        row = Faults(kind, cases, **counts)
        request.config.stash.setdefault(_rows, []).append(row)
        if target := os.environ.get(ENVIRONMENT):
            with Path(target).open("a", encoding="utf-8") as file:
                file.write(json.dumps(dataclasses.asdict(row)) + "\n")
        assert cases, f"{kind}: nothing was tried"
        assert row.clean, row

    return record


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the table."""
    if rows := config.stash.get(_rows, []):
        terminalreporter.section("faults")
        for line in table(rows):
            terminalreporter.write_line(line)
