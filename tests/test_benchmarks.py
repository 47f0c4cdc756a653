"""The benchmark's arithmetic and its honesty; never how fast anything is."""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import report
from benchmarks.__main__ import main
from benchmarks.bars import BARS, Bar
from benchmarks.formula import NotEqual, Results, check, compare, differs_by
from benchmarks.memory import peak_bytes, saved_bytes
from benchmarks.models import MODELS, Model, mlp
from benchmarks.plan import Record, Settings
from benchmarks.suites import SUITES, enabling, states, training
from benchmarks.systems import BESIDE, Gift, GiftBalanced, System, Unsupported
from benchmarks.timing import SELDOM, Budget, Case, Measurement, Summary, interleave

ROOT = Path(__file__).resolve().parent.parent
TINY = mlp(4, width=8, batch=3, rank=2)
CONVOLUTIONS = Model(
    "convolutions",
    "two small ones and a head",
    2,
    lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 3, (1, 2), bias=False), nn.Flatten(), nn.Linear(3 * 4 * 3, 2)),
    lambda: {"x": torch.randn(2, 2, 6, 6)},
    lambda model, batch: model(batch["x"]).square().mean(),
)
QUICK = Settings(quick=True, threads=(1,), repeats=2)


# --- rounds and ratios


def test_a_ratio_is_taken_within_a_round() -> None:
    """A busy moment that falls on a whole round leaves its ratio as it is."""
    measurement = Measurement("m", "s", {"mine": [1.0, 10.0, 1.0], "theirs": [2.0, 20.0, 2.0]})

    assert measurement.ratio("mine", "theirs") == Summary(0.5, 0.5, 0.5, 3)


def test_the_summary_is_the_median_and_the_quartiles() -> None:
    """Of one to five, the middle is three and the middle half lies from two to four; one sample has no spread."""
    assert Summary.of([5.0, 1.0, 4.0, 2.0, 3.0]) == Summary(3.0, 2.0, 4.0, 5)
    assert Summary.of([7.0]) == Summary(7.0, 7.0, 7.0, 1)
    with pytest.raises(ValueError, match="no samples"):
        Summary.of([])


def test_rounds_that_do_not_pair_are_refused() -> None:
    """Samples of unequal number cannot be divided round by round."""
    with pytest.raises(ValueError, match="one sample per round"):
        Measurement("m", "s", {"mine": [1.0], "theirs": [1.0, 2.0]})


def test_each_round_starts_with_another_system() -> None:
    """Every case runs once a round, in an order that rotates, after what prepares it."""
    order: list[str] = []
    cases = {name: Case(lambda given: order.append(given), lambda name=name: name) for name in "abc"}  # type: ignore[misc]

    samples = interleave(cases, Budget(seconds=0, least=3, most=3))

    assert "".join(order) == "abc" + "abc" + "bca" + "cab"  # once each before the first round
    assert {name: len(values) for name, values in samples.items()} == {"a": 3, "b": 3, "c": 3}


def test_a_case_that_runs_seldom_is_in_the_first_rounds_alone() -> None:
    """Later rounds go without it, and a ratio with it is of the rounds in which both ran."""
    runs: list[str] = []
    cases = {name: Case(lambda _, name=name: runs.append(name), lambda: None) for name in ("often", "seldom")}  # type: ignore[misc]

    samples = interleave(cases, Budget(seconds=0, least=5, most=5), {"seldom"})

    assert (runs.count("often"), runs.count("seldom")) == (1 + 5, 1 + SELDOM)
    assert [value is None for value in samples["seldom"]] == [False] * SELDOM + [True] * (5 - SELDOM)
    assert None not in samples["often"]
    measurement = Measurement("m", "s", {"often": [1.0, 1.0, 9.0], "seldom": [2.0, 2.0, None]})
    assert measurement.ratio("seldom", "often") == Summary(2.0, 2.0, 2.0, 2)
    assert measurement.value("seldom").rounds == 2


def test_a_short_case_is_repeated_for_one_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call below the clock's noise runs many times for one sample, which is the time of one call."""
    calls: list[None] = []
    clock = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock) * 1e-5)  # each reading is ten microseconds after the last

    samples = interleave({"short": Case(lambda _: calls.append(None))}, Budget(seconds=1, least=1, most=1))

    assert len(calls) == 2 + 200
    assert samples["short"] == [pytest.approx(1e-5 / 200)]


# --- equality


@pytest.mark.parametrize("model", [TINY, CONVOLUTIONS], ids=["linear", "convolutions"])
def test_ours_agrees_with_the_formula(model: Model) -> None:
    """Both layouts give the loss and the gradients of the formula, so that they are timed."""
    agree, refused = check(model, (Gift, GiftBalanced))

    assert (agree, refused) == ([Gift, GiftBalanced], {})


def test_a_system_that_computes_another_thing_is_not_timed() -> None:
    """A scaling that is off by a hundredth is found, and the reason says what differs and by how much."""

    class Wrong(Gift):
        name = "wrong"

        def enable(self, model: nn.Module) -> None:
            super().enable(model)
            for name in self.setting.targets:
                model.get_submodule(name).lora_scaling *= 1.01  # type: ignore[operator]

    agree, refused = check(TINY, (Wrong,))

    assert agree == []
    assert "differs from the formula's by" in refused["wrong"]


def test_gradients_that_are_missing_or_of_other_layers_are_refused() -> None:
    """Equal losses are not enough: every layer's gradient must be there and finite."""
    one, zero = torch.ones(2, 2), torch.zeros(2, 2)
    loss = torch.tensor(1.0)

    compare(Results(loss, {"a": (one, one)}), Results(loss, {"a": (one, one)}))
    for wrong in ({}, {"a": (one, zero)}, {"a": (one, one), "b": (one, one)}, {"a": (one, one * float("nan"))}):
        with pytest.raises(NotEqual):
            compare(Results(loss, wrong), Results(loss, {"a": (one, one)}))


def test_differences_are_relative_to_the_largest_number() -> None:
    """A difference counts against the largest expected number; another shape or a NaN is infinitely far."""
    expected = torch.tensor([0.0, 10.0])

    assert differs_by(torch.tensor([1.0, 10.0]), expected) == pytest.approx(0.1)
    assert differs_by(torch.tensor([1.0]), expected) == float("inf")
    assert differs_by(torch.tensor([float("nan"), 10.0]), expected) == float("inf")


def test_a_peer_that_is_not_installed_is_left_out_with_its_reason() -> None:
    """A missing library is a line of the report and no failure."""

    class Absent(System):
        name = "absent"
        requires = "a_library_that_nobody_has"

    agree, refused = check(TINY, (Absent, Gift))

    assert agree == [Gift]
    assert refused == {"absent": "a_library_that_nobody_has is not installed"}
    with pytest.raises(Unsupported, match="not installed"):
        states.tuned(TINY, Absent)


# --- bytes


def test_saved_bytes_are_counted_once_and_without_parameters() -> None:
    """A product saves its input, not the weight that the model owns anyway, and two views of one storage count once."""
    layer = nn.Linear(4, 3, bias=False)
    x = torch.randn(5, 4)

    assert saved_bytes(lambda: layer(x).sum(), [layer]) == x.nbytes
    assert saved_bytes(lambda: (layer(x[:2]) + layer(x[1:3])).sum(), [layer]) == x.nbytes


def test_peak_bytes_are_those_of_the_largest_moment() -> None:
    """What is freed before the next tensor is made does not add up."""

    def step() -> None:
        for _ in range(3):
            torch.empty(1000, dtype=torch.float32)

    assert 4000 <= peak_bytes(step) < 8000


# --- bars and the report


def run_of(samples: dict[str, list[float]], settings: Settings = QUICK) -> dict[str, object]:
    """The data of a run that made one measurement."""
    record = Record()
    record.add("train/resnet18/1 thread", "s", samples)
    record.leave_out("train/resnet18", {"loralib": "not | installed"})
    return report.to_data(record, settings, 1.0)


@pytest.mark.parametrize(("mine", "word"), [(0.79, "goal"), (0.80, "goal"), (0.94, "yes"), (0.95, "no")])
def test_a_bar_is_met_up_to_its_value(mine: float, word: str) -> None:
    """The median is compared as it is, not as it is printed; a goal is better than a bar."""
    bar = Bar("step", "m", "GIFt", "PEFT", 0.94, 0.80)
    verdict = report.verdicts([Measurement("m", "s", {"GIFt": [mine], "PEFT": [1.0]})], [bar])[0]

    assert (verdict.word, verdict.met) == (word, word != "no")


def test_what_was_not_measured_is_neither_met_nor_missed() -> None:
    """A bar without samples, of the whole measurement or of one system, says so."""
    bars = [Bar("a", "m", "GIFt", "PEFT", 1.0, None), Bar("b", "absent", "GIFt", None, 1.0, None)]

    found = report.verdicts([Measurement("m", "s", {"GIFt": [1.0]})], bars)

    assert [(one.word, one.met) for one in found] == [("not measured", None)] * 2


def test_the_data_of_a_run_reads_back() -> None:
    """JSON keeps every sample, the reasons, the machine and the bars, and gives the same tables."""
    data = run_of({"GIFt": [1.0, 2.0], "PEFT": [2.0, 2.0], "limit": [1.0, 1.0]})
    again = json.loads(json.dumps(data))

    assert set(again) == {"version", "machine", "settings", "seconds", "measurements", "left_out", "bars"}
    assert set(again["machine"]) == {"processor", "cores", "system", "python", "versions", "load"}
    assert report.from_data(again).measurements[0].samples["GIFt"] == [1.0, 2.0]
    assert {key for bar in again["bars"] for key in bar} == {field.name for field in dataclasses.fields(Bar)} | {"measured", "met"}
    assert report.markdown(again) == report.markdown(data)
    assert "not / installed" in report.markdown(data)


def test_data_of_another_version_is_refused() -> None:
    """Results that mean something else are not read as if they did not."""
    with pytest.raises(ValueError, match="run it again"):
        report.from_data({"version": 0})


def test_a_page_gets_its_tables_between_the_markers() -> None:
    """The rest of the page stays, and a page without markers is refused."""
    page = f"above\n{report.BEGIN}\nold\n{report.END}\nbelow"

    assert report.insert(page, "new\n") == f"above\n{report.BEGIN}\n\nnew\n\n{report.END}\nbelow"
    with pytest.raises(ValueError, match="no <!--"):
        report.insert("above", "new")


def test_the_readme_shows_the_results_that_are_kept() -> None:
    """The tables of the README are those of results.json, where there is one."""
    kept = ROOT / "benchmarks" / "results.json"
    page = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    text = report.markdown(report.read(kept)) if kept.exists() else ""

    assert page == (report.insert(page, text) if text else page)
    assert page.count(report.BEGIN) == page.count(report.END) == 1


def test_every_bar_names_a_measurement_that_a_whole_run_makes() -> None:
    """Each bar belongs to a suite, and each model of the benchmark has its bar at two threads."""
    wanted = {f"train/{model.name}/2 threads" for model in MODELS}

    assert {bar.measurement.partition("/")[0] for bar in BARS} <= set(SUITES)
    assert wanted <= {bar.measurement for bar in BARS}
    assert all(bar.goal is None or bar.goal <= bar.bar for bar in BARS)


# --- the program


def test_a_tiny_run_measures_steps_and_enabling() -> None:
    """The suites fill the record, with a sample of every system in the first round, and of those that bars speak of in every one."""
    record = Record()

    training.measure(TINY, 0.1, QUICK, record)
    enabling.measure(4, 0.1, QUICK, record)
    states.measure("state/round trip", states.round_trip, TINY, QUICK, record)

    found = {one.name: one for one in record.measurements}
    assert list(found) == ["train/mlp4/1 thread", "enable/4 layers", "enable/4 layers/each", "state/round trip"]
    assert {"GIFt", "limit"} <= set(found["train/mlp4/1 thread"].samples)
    for one in found.values():
        for name, values in one.samples.items():
            assert [bool(value) for value in values] == [True, name not in BESIDE]


def test_the_program_refuses_what_it_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    """A misspelt suite is refused with the names that there are."""
    with pytest.raises(SystemExit):
        main(["--suite", "trian"])

    assert "train" in capsys.readouterr().err
