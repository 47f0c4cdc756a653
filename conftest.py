"""Counting what faults did, over the tests of both projects; ``nox -s faults`` runs the matrix of them and shows the table."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
from fault_table import Faults, RecordFaults, table

#: Names a file to which each row is added as a line of JSON. Then tests that note no row of their own are cases, too.
ENVIRONMENT = "GIFT_FAULTS_FILE"

_rows = pytest.StashKey[list[Faults]]()
_noted = pytest.StashKey[bool]()


@pytest.fixture
def record_faults(request: pytest.FixtureRequest) -> RecordFaults:
    """Notes a row of the table, and fails the test unless it is clean: ``record_faults("bit flips", 500, silent=len(silent))``."""

    def record(kind: str, cases: int, **counts: int) -> None:
        row = Faults(kind, cases, **counts)
        request.node.stash[_noted] = True
        _note(request.config, row)
        assert cases, f"{kind}: nothing was tried"
        assert row.clean, row

    return record


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> object:
    """Of a matrix, count a test that notes nothing as a case: what was not as promised as silent, any other error as foreign."""
    report: pytest.TestReport = yield
    ended = report.when == "call" or report.failed  # a fixture may do the work, and fail
    if os.environ.get(ENVIRONMENT) and ended and not report.skipped and not item.stash.get(_noted, False):
        item.stash[_noted] = True
        wrong = call.excinfo is not None and call.excinfo.errisinstance((AssertionError, pytest.fail.Exception))
        kind = item.path.stem.removeprefix("test_").replace("_", " ")
        _note(item.config, Faults(kind, 1, silent=int(wrong), foreign=int(report.failed and not wrong)))
    return report


def _note(config: pytest.Config, row: Faults) -> None:
    config.stash.setdefault(_rows, []).append(row)
    if target := os.environ.get(ENVIRONMENT):
        with Path(target).open("a", encoding="utf-8") as file:
            file.write(json.dumps(dataclasses.asdict(row)) + "\n")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the table."""
    if rows := config.stash.get(_rows, []):
        terminalreporter.section("faults")
        for line in table(rows):
            terminalreporter.write_line(line)
