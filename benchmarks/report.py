"""From the record of a run to JSON and back, and to the tables that people read. A table never rounds what it compares."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.bars import BARS, Bar
from benchmarks.plan import Record, Settings
from benchmarks.suites.evaluating import BASE
from benchmarks.suites.training import LIMIT
from benchmarks.timing import Measurement, Summary

VERSION = 1
BEGIN, END = "<!-- results: written by the program -->", "<!-- end of results -->"

_DISTRIBUTIONS = (
    "torch",
    "gift-core",
    "gift-lora-plugin",
    "peft",
    "loralib",
    "lycoris-lora",
    "torchvision",
    "timm",
    "transformers",
    "diffusers",
)


@dataclass(frozen=True)
class Verdict:
    """A bar, what was measured, and whether it is met; no summary where the run did not measure it."""

    bar: Bar
    summary: Summary | None

    @property
    def met(self) -> bool | None:
        """Whether the median is within the bar."""
        return None if self.summary is None else self.summary.median <= self.bar.bar

    @property
    def word(self) -> str:
        """For the table."""
        if self.summary is None:
            return "not measured"
        if self.bar.goal is not None and self.summary.median <= self.bar.goal:
            return "goal"
        return "yes" if self.met else "no"


# --- data


def to_data(record: Record, settings: Settings, seconds: float) -> dict[str, Any]:
    """Everything about a run as plain JSON data: the samples, so that any figure can be taken again."""
    return {
        "version": VERSION,
        "machine": machine(),
        "settings": asdict(settings) | {"threads": list(settings.threads)},
        "seconds": round(seconds, 1),
        "measurements": [
            {"name": one.name, "unit": one.unit, "samples": {name: _rounded(values) for name, values in one.samples.items()}}
            for one in record.measurements
        ],
        "left_out": record.left_out,
        "bars": [_bar_data(verdict) for verdict in verdicts(record.measurements)],
    }


def from_data(data: dict[str, Any]) -> Record:
    """The record that `to_data` was given.

    Raises:
        ValueError: if the data is of another version.
    """
    if data.get("version") != VERSION:
        raise ValueError(f"results of version {data.get('version')!r}, and this program reads {VERSION}: run it again.")
    return Record([Measurement(one["name"], one["unit"], one["samples"]) for one in data["measurements"]], list(data["left_out"]))


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    installed = {name: _version(name) for name in _DISTRIBUTIONS}
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {name: version for name, version in installed.items() if version},
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
    }


def verdicts(measurements: Iterable[Measurement], bars: Sequence[Bar] = BARS) -> list[Verdict]:
    """Every bar with what was measured."""
    found = {one.name: one for one in measurements}
    return [Verdict(bar, _summary(bar, found.get(bar.measurement))) for bar in bars]


def _summary(bar: Bar, measurement: Measurement | None) -> Summary | None:
    if measurement is None or not {bar.system, bar.reference or bar.system} <= set(measurement.samples):
        return None
    return measurement.value(bar.system) if bar.reference is None else measurement.ratio(bar.system, bar.reference)


def _bar_data(verdict: Verdict) -> dict[str, Any]:
    return asdict(verdict.bar) | {"measured": asdict(verdict.summary) if verdict.summary else None, "met": verdict.met}


def _rounded(values: Sequence[float | None]) -> list[float | None]:
    return [None if value is None else float(f"{value:.6g}") for value in values]


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


# --- tables


def markdown(data: dict[str, Any]) -> str:
    """All tables of a run, in Markdown."""
    record = from_data(data)
    by_suite = {suite: [one for one in record.measurements if one.name.startswith(suite + "/")] for suite in _SECTIONS}
    parts = [_machine_text(data), _bars_table(record.measurements)]
    parts += [f"### {title}\n\n{table(by_suite[suite])}" for suite, (title, table) in _SECTIONS.items() if by_suite[suite]]
    parts += [f"### Left out\n\n{_left_out(record.left_out)}"] if record.left_out else []
    return "\n\n".join(parts) + "\n"


def insert(page: str, text: str) -> str:
    """A page with the text between its two markers.

    Raises:
        ValueError: if the page has no markers.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no {BEGIN} ... {END}.")
    return f"{before}{BEGIN}\n\n{text}\n{END}{after}"


def read(path: Path) -> dict[str, Any]:
    """Read the JSON of a run."""
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data


def _machine_text(data: dict[str, Any]) -> str:
    here, versions = data["machine"], ", ".join(f"{name} {version}" for name, version in data["machine"]["versions"].items())
    busy = f" Load when it started: {here['load']}." if here["load"] is not None else ""
    quick = " (quick: the figures mean little)" if data["settings"]["quick"] else ""
    return (
        f"{here['processor']}, {here['cores']} cores, {here['system']}, Python {here['python']}; {versions}. "
        f"The run took {data['seconds'] / 60:.1f} minutes{quick}.{busy}"
    )


def _bars_table(measurements: Sequence[Measurement]) -> str:
    rows = [
        [
            verdict.bar.what,
            _spread(verdict.summary) if verdict.summary else "-",
            str(verdict.summary.rounds) if verdict.summary else "-",
            f"{verdict.bar.bar:g}",
            "-" if verdict.bar.goal is None else f"{verdict.bar.goal:g}",
            verdict.word,
            verdict.bar.source,
        ]
        for verdict in verdicts(measurements)
    ]
    return "### Bars\n\n" + _table(["GIFt", "median [quartiles]", "rounds", "bar", "goal", "met", "the bar"], rows)


def _over(reference: str) -> Any:
    def table(measurements: list[Measurement]) -> str:
        def cell(one: Measurement, system: str) -> str:
            if reference not in one.samples:
                return _amount(one.value(system).median, one.unit)
            return _spread(one.ratio(system, reference))

        return _by_system(measurements, cell, reference)

    return table


def _absolute(measurements: list[Measurement]) -> str:
    return _by_system(measurements, lambda one, system: _amount(one.value(system).median, one.unit), None)


def _by_system(measurements: list[Measurement], cell: Any, reference: str | None) -> str:
    systems = list(dict.fromkeys(name for one in measurements for name in one.samples if name != reference))
    rows = []
    for one in measurements:
        beside = [_amount(one.value(reference).median, one.unit) if reference in one.samples else "-"] if reference else []
        rows.append([one.name.partition("/")[2], *beside, *(cell(one, name) if name in one.samples else "-" for name in systems)])
    return _table(["", *([reference] if reference else []), *systems], rows)


def _growth(measurements: list[Measurement]) -> str:
    rows = [
        [
            one.name.partition("/")[2],
            *(_amount(one.value(name).median, one.unit) for name in ("few", "many")),
            _spread(one.ratio("many", "ten times few")),
        ]
        for one in measurements
    ]
    return _table(["", "some", "ten times as many", "over linear"], rows)


_SECTIONS = {
    "train": ("Training step over the limit", _over(LIMIT)),
    "enable": ("Enabling", _absolute),
    "state": ("States, files, merging, switching", _absolute),
    "memory": ("Bytes of a step over the limit", _over(LIMIT)),
    "eval": ("Inference over the base model", _over(BASE)),
    "import": ("Import, after torch", _absolute),
    "growth": ("Growth of GIFt's cost", _growth),
}


def _left_out(rows: list[dict[str, str]]) -> str:
    unique = list({(row["subject"], row["system"], row["reason"]): row for row in rows}.values())
    return _table(["what", "system", "why"], [[row["subject"], row["system"], _plain(row["reason"])] for row in unique])


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _plain(text: str) -> str:
    return text.replace("|", "/").replace("<", "(").replace(">", ")")[:160]


def _spread(summary: Summary) -> str:
    digits = 0 if summary.median >= 10 else 2 if summary.median >= 0.1 else 4
    median, q1, q3 = (f"{value:.{digits}f}" for value in (summary.median, summary.q1, summary.q3))
    return median if summary.rounds == 1 else f"{median} [{q1}, {q3}]"


def _amount(value: float, unit: str) -> str:
    if unit == "s":
        return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.2f} s"
    if unit == "bytes":
        return f"{value / 2**20:.2f} MiB"
    return f"{value:.3g} {unit}"
