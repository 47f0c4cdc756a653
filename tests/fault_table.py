"""What a kind of fault did, as numbers, and many of them as a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

#: The fixture ``record_faults(kind, cases, silent=0, half=0, foreign=0, lost=0)`` of the repository's conftest.py.
RecordFaults = Callable[..., None]


@dataclasses.dataclass(frozen=True)
class Faults:
    """What a kind of fault did.

    Attributes:
        kind: the fault, in a few words.
        cases: how often it was tried.
        silent: how often nothing was said and the result was wrong.
        half: how often a model or a file was left between two states.
        foreign: how often an error left that is not one of GIFt's.
        lost: how often something was gone that had been there, saved or trained.
    """

    kind: str
    cases: int
    silent: int = 0
    half: int = 0
    foreign: int = 0
    lost: int = 0

    @property
    def clean(self) -> bool:
        """Whether every case ended as promised."""
        return not (self.silent or self.half or self.foreign or self.lost)


def table(rows: Sequence[Faults]) -> list[str]:
    """The rows as aligned lines, equal kinds added up, with a last line that sums all."""
    header = [field.name for field in dataclasses.fields(Faults)]
    numbers: dict[str, list[int]] = {}
    for kind, *counts in map(dataclasses.astuple, rows):
        numbers[kind] = [a + b for a, b in zip(numbers.get(kind, [0] * len(counts)), counts, strict=True)]
    numbers["all"] = [sum(column) for column in zip(*numbers.values(), strict=True)]
    texts = [header, *([kind, *(f"{count:,}" for count in counts)] for kind, counts in numbers.items())]
    widths = [max(len(row[column]) for row in texts) for column in range(len(header))]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in texts]
