"""What a run consists of: tasks with an expected duration, and the record that they write into."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks.timing import Budget, Measurement, Samples


@dataclass(frozen=True)
class Settings:
    """How a run is made.

    Attributes:
        quick: small models and few rounds: whether everything works, not how fast it is.
        threads: numbers of threads at which training steps are timed; everything else runs at the first.
        repeats: the most rounds of any measurement; None leaves each its own.
    """

    quick: bool = False
    threads: tuple[int, ...] = (1, 2)
    repeats: int | None = None

    def budget(self, seconds: float, least: int = 5, most: int = 200) -> Budget:
        """The time of one measurement under these settings."""
        if self.quick:
            seconds, least = seconds / 10, min(least, 2)
        if self.repeats is not None:
            most = self.repeats
        return Budget(seconds, min(least, most), most)


@dataclass
class Record:
    """What a run found: samples, and which system was left out of what and why."""

    measurements: list[Measurement] = field(default_factory=list)
    left_out: list[dict[str, str]] = field(default_factory=list)

    def add(self, name: str, unit: str, samples: Samples) -> None:
        """Keep the samples of one measurement."""
        self.measurements.append(Measurement(name, unit, samples))

    def leave_out(self, subject: str, reasons: dict[str, str]) -> None:
        """Keep why systems are missing from the measurements of a subject."""
        self.left_out += [{"subject": subject, "system": system, "reason": reason} for system, reason in reasons.items()]


@dataclass(frozen=True)
class Task:
    """A part of a run.

    Attributes:
        name: said while it runs.
        seconds: how long it takes on the machine of the README.
        run: does it.
    """

    name: str
    seconds: float
    run: Callable[[Record], None]
