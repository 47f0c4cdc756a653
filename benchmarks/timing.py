"""Interleaved rounds and paired ratios; nothing here knows models or libraries.

In a round every case runs once, and each round starts with another case, so that a busy moment of the machine falls on all of them.
A ratio is taken within a round; its median over the rounds, with its quartiles, is the figure. Cases of which no bar speaks run in the
first round alone: the time goes to the others.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

#: A sample shorter than this repeats its case, so that the clock's own noise stays small.
SHORTEST_SAMPLE = 0.002

#: So many rounds, the first, have the cases that run seldom.
SELDOM = 1

#: Seconds or other numbers by system; position i of each list is round i, and None where the system did not run in it.
Samples = Mapping[str, Sequence[float | None]]


@dataclass(frozen=True)
class Case:
    """What one system does in a round.

    Attributes:
        run: the timed call; it gets what `prepare` gave.
        prepare: what comes before and is not timed; None where the call can be repeated as it is.
    """

    run: Callable[[Any], object]
    prepare: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Budget:
    """How long a measurement may take: rounds run until the seconds are spent, within the two bounds."""

    seconds: float
    least: int = 5
    most: int = 200


@dataclass(frozen=True)
class Summary:
    """The middle of some samples, and where their middle half lies."""

    median: float
    q1: float
    q3: float
    rounds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        """Summarize at least one value; a single one has no spread."""
        if not values:
            raise ValueError("no samples to summarize.")
        if len(values) == 1:
            return cls(values[0], values[0], values[0], 1)
        q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, q1, q3, len(values))


@dataclass
class Measurement:
    """Samples of several systems, one of each per round, or None.

    Attributes:
        name: ``suite/subject``, with ``/2 threads`` or the like behind it where that differs.
        unit: of the samples, ``s``, ``bytes`` or ``us``.
        samples: by system.
    """

    name: str
    unit: str
    samples: Samples = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len({len(values) for values in self.samples.values()}) > 1:
            raise ValueError(f"{self.name}: each system needs one sample per round.")

    def ratio(self, system: str, reference: str) -> Summary:
        """Summarize ``system`` over ``reference``, round by round, where both ran."""
        pairs = zip(self.samples[system], self.samples[reference], strict=True)
        return Summary.of([mine / theirs for mine, theirs in pairs if mine is not None and theirs is not None])

    def value(self, system: str) -> Summary:
        """Summarize the samples of ``system`` themselves."""
        return Summary.of([sample for sample in self.samples[system] if sample is not None])


def interleave(cases: Mapping[str, Case], budget: Budget, seldom: Collection[str] = ()) -> dict[str, list[float | None]]:
    """Time every case once per round, in seconds per call; each case has run once before the first round.

    Those that run ``seldom`` do so in the first `SELDOM` rounds.
    """
    names = list(cases)
    calls = {name: _calls_per_sample(case) for name, case in cases.items()}
    samples: dict[str, list[float | None]] = {name: [] for name in names}
    start = time.perf_counter()
    for done in range(budget.most):
        if done >= budget.least and time.perf_counter() - start > budget.seconds:
            break
        first = done % len(names)
        gc.collect()
        for name in names[first:] + names[:first]:
            samples[name].append(None if done >= SELDOM and name in seldom else _seconds(cases[name], calls[name]))
    return samples


def _calls_per_sample(case: Case) -> int:
    once = _seconds(case, 1)
    if case.prepare is not None or once >= 2 * SHORTEST_SAMPLE:
        return 1
    once = max(once, _seconds(case, 1), 1e-9)
    return max(1, min(1000, round(SHORTEST_SAMPLE / once)))


def _seconds(case: Case, calls: int) -> float:
    given = case.prepare() if case.prepare is not None else None
    with _collector_off():
        start = time.perf_counter()
        for _ in range(calls):
            case.run(given)
        return (time.perf_counter() - start) / calls


@contextmanager
def _collector_off() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
