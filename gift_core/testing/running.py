"""Running the table of checks on a strategy."""

from __future__ import annotations

import contextlib
import difflib
import random
import warnings
from collections.abc import Iterable, Iterator, Mapping

import torch

from gift_core import __version__
from gift_core.errors import GiftWarning, StrategyError
from gift_core.strategy import FineTuningStrategy, as_strategy

# each enters its checks into the table, in this order
from gift_core.testing import api_checks, file_checks, numeric_checks, torch_checks, tuning_checks  # noqa: F401
from gift_core.testing.models import ReferenceModel, reference_models
from gift_core.testing.results import CheckResult, CheckSkipped, Status
from gift_core.testing.subject import Candidate, Subject
from gift_core.testing.table import LEVELS, TABLE, Check, Level, up_to

#: What can be checked: a strategy, its class where that needs no arguments, or its registered name.
Checkable = FineTuningStrategy | type[FineTuningStrategy] | str


def check_strategy(
    strategy: Checkable,
    *,
    models: Iterable[ReferenceModel] | None = None,
    level: Level = "torch",
    expected_failures: Mapping[str, str] | None = None,
) -> list[CheckResult]:
    """Hold a strategy to everything that a strategy promises.

    Args:
        strategy: an instance, a class that needs no arguments, or a registered name.
        models: what to try it on; None means `reference_models`.
        level: the last level to run, of ``api``, ``tuning``, ``files``, ``numerics`` and ``torch``; those before it run too.
        expected_failures: reasons by check, ``{"exports": "..."}``, or by check and model, ``{"exports[lstm]": "..."}``. Strict: what
            is declared and does not fail is reported, as `Status.UNEXPECTED_PASS`.

    Returns:
        One result for each check and model, in the order of the table. The strategy conforms if all are ``ok``.

    Raises:
        StrategyError: if an argument names no check, model or level, or the strategy is none.
    """
    return list(iter_checks(strategy, models=models, level=level, expected_failures=expected_failures))


def iter_checks(
    strategy: Checkable,
    *,
    models: Iterable[ReferenceModel] | None = None,
    level: Level = "torch",
    expected_failures: Mapping[str, str] | None = None,
) -> Iterator[CheckResult]:
    """Give the results of `check_strategy` one by one, as they come; takes and raises the same."""
    candidate = candidate_of(strategy, models)
    expected = checked_expectations(expected_failures, candidate.models)
    checks = checks_of(level)
    return (result for check in checks for result in run_check(check, candidate, expected))


def candidate_of(strategy: Checkable, models: Iterable[ReferenceModel] | None = None) -> Candidate:
    """Take a strategy and models as users give them.

    Raises:
        StrategyError: if the strategy or a model is none.
    """
    chosen = tuple(reference_models() if models is None else models)
    if not chosen or not all(isinstance(model, ReferenceModel) for model in chosen):
        raise StrategyError(f"models takes one or more ReferenceModel(name, build, inputs), got {chosen!r}.")
    return Candidate(as_strategy(_instance(strategy) if isinstance(strategy, type) else strategy), chosen)


def _instance(cls: type[FineTuningStrategy]) -> FineTuningStrategy:
    try:
        return cls()
    except TypeError as error:
        raise StrategyError(f"{cls.__name__} needs arguments ({error}): pass an instance.") from error


def checks_of(level: Level) -> list[Check]:
    """The checks that run at a level.

    Raises:
        StrategyError: if there is no such level.
    """
    if level not in LEVELS:
        raise StrategyError(f"there is no level {level!r}: choose one of {', '.join(LEVELS)}.")
    return up_to(level)


def checked_expectations(expected: Mapping[str, str] | None, models: Iterable[ReferenceModel]) -> dict[str, str]:
    """Check that ``expected_failures`` names checks and models that exist, each with a reason.

    Raises:
        StrategyError: if not; the message has the nearest name.
    """
    known = [*TABLE, *(f"{name}[{model.name}]" for name, row in TABLE.items() if row.scope == "model" for model in models)]
    for key, reason in (expected or {}).items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            question = f"; did you mean {near[0]!r}?" if near else f": the checks are {', '.join(TABLE)}."
            raise StrategyError(f"expected_failures names {key!r}, which is no check{question}")
        if not isinstance(reason, str) or not reason.strip():
            raise StrategyError(f"expected_failures[{key!r}] needs a reason in words, got {reason!r}: say why.")
    return dict(expected or {})


def run_check(check: Check, candidate: Candidate, expected: Mapping[str, str]) -> Iterator[CheckResult]:
    """Run one check, on every model if it is about models, and hold the results against what was expected."""
    failed: set[str] = set()
    keys = [check.name]
    for result in _results(check, candidate):
        own = f"{check.name}[{result.model}]"
        keys.append(own)
        key = own if own in expected else check.name
        if result.status in (Status.FAILED, Status.WARNING) and key in expected:
            failed.add(key)
            result = CheckResult(check.name, result.model, Status.EXPECTED_FAILURE, f"{expected[key]} ({result.reason})")
        yield result
    for key in dict.fromkeys(keys):
        if key in expected and key not in failed:
            reason = f"declared as an expected failure ({expected[key]}), and it did not fail: take the declaration back"
            model = key[len(check.name) + 1 : -1] or None
            yield CheckResult(check.name, model, Status.UNEXPECTED_PASS, reason)


def _results(check: Check, candidate: Candidate) -> Iterator[CheckResult]:
    if check.needs and not getattr(candidate.capabilities, check.needs):
        yield CheckResult(check.name, None, Status.SKIPPED, f"it declares {check.needs}=False")
    elif check.scope == "strategy":
        yield _result(check, candidate, None)
    else:
        for subject in candidate.subjects:
            yield _result(check, subject, subject.model.name)


def _result(check: Check, target: Candidate | Subject, model: str | None) -> CheckResult:
    with _isolated():
        try:
            if isinstance(target, Subject) and target.refusal:
                raise CheckSkipped(target.refusal)
            check.function(target)
        except CheckSkipped as skipped:
            return CheckResult(check.name, model, Status.SKIPPED, str(skipped))
        except Exception as error:
            reason = str(error) if isinstance(error, AssertionError) and str(error) else f"{type(error).__name__}: {error}"
            status = Status.FAILED if check.is_mandatory(__version__) else Status.WARNING
            note = "" if status is Status.FAILED else f" (a failure from gift-core {check.mandatory_from} on)"
            return CheckResult(check.name, model, status, reason + note)
    return CheckResult(check.name, model, Status.PASSED)


@contextlib.contextmanager
def _isolated() -> Iterator[None]:
    # a check neither depends on what ran before it, nor leaves a trace in the caller's generators
    mine = random.getstate()
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", GiftWarning)
        torch.manual_seed(0)
        random.seed(0)
        try:
            yield
        finally:
            random.setstate(mine)
