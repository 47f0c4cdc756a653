"""The checks as pytest cases; pytest itself is imported only when a case is made."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from gift_core.errors import GiftWarning
from gift_core.testing.models import ReferenceModel
from gift_core.testing.results import CheckResult, Status
from gift_core.testing.running import Checkable, candidate_of, checked_expectations, checks_of, run_check
from gift_core.testing.subject import Candidate
from gift_core.testing.table import Check, Level


def parametrize_with_checks(
    strategies: Iterable[Checkable],
    *,
    models: Iterable[ReferenceModel] | None = None,
    level: Level = "torch",
    expected_failures: Mapping[str, str] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Turn a test with an argument ``check`` into one case for each strategy and check; the test calls ``check()``.

    A case fails with the reasons of every model, is skipped where the check applies to none, and is an expected failure where that
    was declared. Takes and raises what `check_strategy` does.
    """
    import pytest

    cases = []
    for strategy in strategies:
        candidate = candidate_of(strategy, models)
        expected = checked_expectations(expected_failures, candidate.models)
        label = type(candidate.strategy).__name__ if len(repr(candidate.strategy)) > 60 else repr(candidate.strategy)
        cases += [pytest.param(functools.partial(_run, row, candidate, expected), id=f"{label}-{row.name}") for row in checks_of(level)]
    return pytest.mark.parametrize("check", cases)


def _run(check: Check, candidate: Candidate, expected: Mapping[str, str]) -> None:
    """Run one check as a test: raise, skip, or expect a failure."""
    import pytest

    __tracebackhide__ = True
    results = list(run_check(check, candidate, expected))
    if wrong := [result for result in results if not result.ok]:
        pytest.fail(f"{candidate.strategy!r} breaks a promise: {check.promise}\n{_lines(wrong)}", pytrace=False)
    if warned := [result for result in results if result.status is Status.WARNING]:
        warnings.warn(_lines(warned), GiftWarning, stacklevel=2)
    if declared := [result for result in results if result.status is Status.EXPECTED_FAILURE]:
        pytest.xfail(_lines(declared))
    if all(result.status is Status.SKIPPED for result in results):
        pytest.skip(_lines(results))


def _lines(results: list[CheckResult]) -> str:
    return "\n".join(str(result) for result in results)
