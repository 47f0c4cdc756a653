"""Interleaved rounds and paired ratios; nothing here knows models or libraries.

In a round every case runs once, and each round starts with another case, so that a busy moment of the machine falls on all of them.
A ratio is taken within a round; its median over the rounds, with its quartiles, is the figure.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

#: A sample shorter than this repeats its case, so that the clock's own noise stays small.
SHORTEST_SAMPLE = 0.002


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
    """Samples of several systems, one of each per round.

    Attributes:
        name: ``suite/subject``, with ``/2 threads`` or the like behind it where that differs.
        unit: of the samples, ``s``, ``bytes`` or ``us``.
        samples: by system; position i of each list is round i.
    """

    name: str
    unit: str
    samples: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len({len(values) for values in self.samples.values()}) > 1:
            raise ValueError(f"{self.name}: each system needs one sample per round.")

    def ratio(self, system: str, reference: str) -> Summary:
        """Summarize ``system`` over ``reference``, round by round."""
        pairs = zip(self.samples[system], self.samples[reference], strict=True)
        return Summary.of([mine / theirs for mine, theirs in pairs])

    def value(self, system: str) -> Summary:
        """Summarize the samples of ``system`` themselves."""
        return Summary.of(self.samples[system])


def interleave(cases: Mapping[str, Case], budget: Budget) -> dict[str, list[float]]:
    """Time every case once per round, in seconds per call; each case has run once before the first round."""
    names = list(cases)
    calls = {name: _calls_per_sample(case) for name, case in cases.items()}
    samples: dict[str, list[float]] = {name: [] for name in names}
    start = time.perf_counter()
    for done in range(budget.most):
        if done >= budget.least and time.perf_counter() - start > budget.seconds:
            break
        first = done % len(names)
        gc.collect()
        for name in names[first:] + names[:first]:
            samples[name].append(_seconds(cases[name], calls[name]))
    return samples


def _calls_per_sample(case: Case) -> int:
    once = max(_seconds(case, 1), _seconds(case, 1) if case.prepare is None else 0.0, 1e-9)
    return 1 if case.prepare is not None else max(1, min(1000, round(SHORTEST_SAMPLE / once)))


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
