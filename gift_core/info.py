"""Counts, tables, and the report of what tuning does to a model."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

Row = list[Any]


def collect_trainable_parameters(module: nn.Module) -> tuple[list[Row], int]:
    """List what trains.

    Returns:
        The rows ``[index, name, shape, count]``, one for each trainable parameter (a shared one counts once), and the sum of
        the counts.
    """
    trainable = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    rows: list[Row] = [[i, name, list(parameter.shape), parameter.numel()] for i, (name, parameter) in enumerate(trainable)]
    return rows, sum(row[3] for row in rows)


def table_info(rows: Iterable[Sequence[Any]], header: Sequence[Any]) -> str:
    """Draw rows as aligned text: a rule, the header, a rule, the rows, a rule."""
    lines = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    rule = "-" * len(text[0])
    return "\n".join([rule, text[0], rule, *text[1:], rule])


@dataclasses.dataclass(frozen=True)
class Count:
    """How much of a model: tensors, the numbers in them, and their size in bytes."""

    tensors: int
    numbers: int
    bytes: int

    @classmethod
    def of(cls, parameters: Iterable[nn.Parameter]) -> Count:
        """Count parameters."""
        found = list(parameters)
        numbers = [parameter.numel() for parameter in found]
        return cls(len(found), sum(numbers), sum(n * parameter.element_size() for n, parameter in zip(numbers, found, strict=True)))

    def __str__(self) -> str:
        return f"{self.numbers:,} in {self.tensors} tensors, {self.bytes / 1e6:.2f} MB"


@dataclasses.dataclass(frozen=True)
class CapMatches:
    """What one cap matched: itself as text, whether it is for modules or parameters, and the full names of its sites."""

    kind: str
    cap: str
    sites: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Report:
    """What a strategy does to a model: which cap matched which sites, what is frozen, and the counts before and after.

    Attributes:
        strategy: the strategy as text.
        caps: one entry for each cap, in order of precedence, those of nested strategies after their parent's.
        frozen: full names of the parameters that no cap wanted.
        shared: modules and parameters that the model holds under several names, ``other = first``.
        cautions: what the user should read.
        before: everything the model holds; ``trainable_before`` the part that trained.
        after: the same with the strategy applied; None in a plan, which applies nothing.
    """

    strategy: str
    caps: tuple[CapMatches, ...]
    frozen: tuple[str, ...]
    shared: tuple[str, ...]
    cautions: tuple[str, ...]
    before: Count
    trainable_before: Count
    after: Count | None = None
    trainable: Count | None = None

    @property
    def total_after(self) -> int:
        """Numbers in the model after tuning, adapters included; before, in a plan."""
        return (self.after or self.before).numbers

    @property
    def trainable_after(self) -> int:
        """Numbers that train after tuning; before, in a plan."""
        return (self.trainable or self.trainable_before).numbers

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON data."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        rows = [[match.kind, match.cap, len(match.sites), _some(match.sites)] for match in self.caps]
        lines = [self.strategy, table_info(rows, ["cap for", "rule", "matched", "sites"])]
        return "\n".join([*lines, *(f"{name}: {value}" for name, value in self._facts())])

    def _repr_html_(self) -> str:
        cells = "".join(
            f"<tr><td>{match.kind}</td><td><code>{html.escape(match.cap)}</code></td><td>{len(match.sites)}</td>"
            f"<td>{html.escape(_some(match.sites))}</td></tr>"
            for match in self.caps
        )
        facts = "".join(f"<li><b>{name}</b>: {html.escape(value)}</li>" for name, value in self._facts())
        head = "<tr><th>cap for</th><th>rule</th><th>matched</th><th>sites</th></tr>"
        return f"<p><code>{html.escape(self.strategy)}</code></p><table>{head}{cells}</table><ul>{facts}</ul>"

    def _facts(self) -> list[tuple[str, str]]:
        facts = [("trainable before", f"{self.trainable_before} (of {self.before.numbers:,})")]
        if self.trainable is not None and self.after is not None:
            share = self.trainable.numbers / max(1, self.after.numbers)
            facts.append(("trainable after", f"{self.trainable} ({share:.2%} of {self.after.numbers:,})"))
        facts.append(("frozen by no cap", f"{len(self.frozen)} parameters"))
        return facts + [("shared", name) for name in self.shared] + [("caution", text) for text in self.cautions]


def _some(names: Sequence[str], most: int = 4) -> str:
    shown = ", ".join(name or "(root)" for name in names[:most])
    return f"{shown}, ... {names[-1]}" if len(names) > most else shown
