"""The conformance kit: it passes what is right, and bites what is wrong, for the right reason."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from broken_strategies import broken_api, broken_files, broken_numerics, broken_torch, broken_tuning, loud_import
from broken_strategies.healthy import Healthy, Outspoken
from torch import nn

from gift_core.capabilities import Capabilities
from gift_core.errors import PluginError, StrategyError
from gift_core.strategy import FineTuningStrategy, FullFineTuningStrategy
from gift_core.testing import (
    LEVELS,
    TABLE,
    ReferenceModel,
    Status,
    check_distribution,
    check_strategy,
    iter_checks,
    parametrize_with_checks,
    reference_models,
)
from gift_core.testing.running import candidate_of
from gift_core.testing.table import mandatory_from

ROOT = Path(__file__).resolve().parent.parent
BROKEN: dict[str, tuple[type[FineTuningStrategy], str]] = {
    **broken_api.BROKEN,
    **loud_import.BROKEN,
    **broken_tuning.BROKEN,
    **broken_files.BROKEN,
    **broken_numerics.BROKEN,
    **broken_torch.BROKEN,
}
LIARS = (*broken_tuning.LIARS, *broken_numerics.LIARS)
# enough for every broken strategy to show its fault, and few enough to be quick
FEW = [model for model in reference_models() if model.name in ("mlp", "cnn", "embedding", "tied")]
MLP = [model for model in FEW if model.name == "mlp"]


# --- it bites


def test_every_check_has_its_broken_strategy() -> None:
    """No check is in the table that nothing has been seen to fail."""
    assert set(BROKEN) == set(TABLE)


@pytest.mark.parametrize(("name", "strategy", "reason"), [*((name, *rest) for name, rest in BROKEN.items()), *LIARS])
def test_broken_strategy_fails_its_check_alone(name: str, strategy: type[FineTuningStrategy], reason: str) -> None:
    """A strategy that breaks one promise fails that check, for that reason, and no other check."""
    wrong = [result for result in check_strategy(strategy, models=FEW) if not result.ok]

    assert {result.check for result in wrong} == {name}, "\n".join(map(str, wrong))
    assert any(reason in result.reason for result in wrong), "\n".join(map(str, wrong))


def test_healthy_strategy_passes() -> None:
    """The strategy from which the broken ones differ passes every check on every model that it suits."""
    results = check_strategy(Healthy)
    passed = {result.check for result in results if result.status is Status.PASSED}

    assert [str(result) for result in results if not result.ok] == []
    assert passed == set(TABLE) - {"layers_as_declared", "refuses_as_declared"}


def test_declared_capabilities_are_held_to() -> None:
    """A strategy that declares refusals, chance in training and a wider type, and keeps its word, passes on mixed types."""
    models = [model for model in reference_models() if model.name in ("mlp", "embedding", "shared")]
    results = check_strategy(Outspoken, models=models)
    skipped = {result.model for result in results if "it refuses this model" in result.reason}
    subjects = candidate_of(Outspoken, MLP).subjects

    assert [str(result) for result in results if not result.ok] == []
    assert {result.check for result in results if result.status is Status.PASSED} == set(TABLE)
    assert skipped == {"embedding"}
    assert [(one.dtype, one.added_dtype(one.dtype)) for one in subjects] == [(torch.bfloat16, torch.float32)]


@parametrize_with_checks([FullFineTuningStrategy(), "full"], level="api")
def test_full_keeps_its_word(check: Callable[[], None]) -> None:
    """An instance and a registered name are both taken, and say the right things of themselves."""
    check()


@parametrize_with_checks([FullFineTuningStrategy])
def test_full_conforms(check: Callable[[], None]) -> None:
    """Full fine-tuning keeps every promise that a method keeps."""
    check()


# --- the table


def test_each_check_says_its_promise() -> None:
    """Each check has a promise, a level, and a function short enough to read."""
    for row in TABLE.values():
        lines = row.function.__code__.co_lines()
        length = len({line for *_, line in lines if line})

        assert row.promise.endswith("."), row.name
        assert row.level in LEVELS, row.name
        assert length <= 30, row.name


def test_a_level_runs_those_before_it() -> None:
    """``level`` names the last level that runs."""
    seen = {TABLE[result.check].level for result in iter_checks(Healthy, models=MLP, level="tuning")}

    assert seen == {"api", "tuning"}


@pytest.mark.parametrize(("since", "mandatory"), [("0.1", "0.1"), ("0.2", "0.3"), ("1.4", "1.5")])
def test_a_new_check_is_mandatory_one_minor_version_later(since: str, mandatory: str) -> None:
    """What the first version brought is mandatory from the start; anything newer gets a release of notice."""
    assert mandatory_from(since) == mandatory


def test_a_check_that_is_not_mandatory_yet_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    """The failure of a new check is a warning, which says from when on it will be a failure."""
    new = dataclasses.replace(TABLE["declared_api"], since="8.9", mandatory_from="9.0")
    monkeypatch.setitem(TABLE, "declared_api", new)

    (result,) = [result for result in check_strategy(broken_api.FromTheFuture, models=MLP, level="api") if result.check == new.name]

    assert (result.status, result.ok) == (Status.WARNING, True)
    assert "a failure from gift-core 9.0 on" in result.reason


# --- expected failures


def test_expected_failure_is_reported_as_such() -> None:
    """A declared failure that fails lets the strategy conform, and shows both reasons."""
    results = check_strategy(broken_api.FromTheFuture, models=MLP, level="api", expected_failures={"declared_api": "ahead of time"})

    (result,) = [result for result in results if result.status is Status.EXPECTED_FAILURE]
    assert all(result.ok for result in results)
    assert "ahead of time" in result.reason and "plugin_api is 2" in result.reason


@pytest.mark.parametrize("key", ["declared_api", "unchanged_at_start", "unchanged_at_start[mlp]"])
def test_expected_failure_that_passes_is_reported(key: str) -> None:
    """A declared failure that does not happen is not ok: the declaration is out of date."""
    results = check_strategy(Healthy, models=MLP, level="tuning", expected_failures={key: "it once failed"})

    (wrong,) = [result for result in results if not result.ok]
    assert wrong.status is Status.UNEXPECTED_PASS
    assert "it once failed" in wrong.reason


@pytest.mark.parametrize("key", ["unchanged_at_stat", "unchanged_at_start[nothing]", "declared_api[mlp]"])
def test_expected_failure_must_name_a_check(key: str) -> None:
    """A misspelt declaration is an error that says what was probably meant."""
    with pytest.raises(StrategyError, match="did you mean"):
        check_strategy(Healthy, models=MLP, expected_failures={key: "why"})


def test_a_reason_is_needed() -> None:
    """A failure is expected for a reason, in words."""
    with pytest.raises(StrategyError, match="reason in words"):
        check_strategy(Healthy, models=MLP, expected_failures={"exports": ""})


# --- arguments and isolation


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"strategy": 3}, "got 3"),
        ({"strategy": Healthy, "level": "all"}, "no level 'all'"),
        ({"strategy": Healthy, "models": []}, "one or more ReferenceModel"),
        ({"strategy": Healthy, "models": [nn.Linear(2, 2)]}, "one or more ReferenceModel"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, object], says: str) -> None:
    """What is no strategy, level or model is refused before anything runs."""
    with pytest.raises(StrategyError, match=re.escape(says)):
        check_strategy(**arguments)  # type: ignore[arg-type]


def test_unsuitable_model_is_skipped_with_its_reason() -> None:
    """A model in which nothing matches is skipped, and the result says so."""
    deaf = ReferenceModel("deaf", nn.Identity, lambda: torch.zeros(1))

    results = check_strategy(Healthy, models=[deaf, *MLP], level="tuning")

    skipped = {result.reason for result in results if result.model == "deaf"}
    assert skipped == {"it matches nothing in this model"}
    assert all(result.ok for result in results)


def test_model_of_an_absent_package_is_skipped() -> None:
    """A model whose package is not installed is skipped, and the result says what it needs."""
    far = dataclasses.replace(MLP[0], name="far", package="no_such_package")

    results = check_strategy(Healthy, models=[far, *MLP], level="tuning")

    assert {result.reason for result in results if result.model == "far"} == {"it needs no_such_package, which is not installed"}
    assert all(result.ok for result in results)


def test_complex_models_keep_their_imaginary_parts() -> None:
    """A model with complex weights is given in the types that have complex numbers, with the same values."""
    (model,) = [model for model in reference_models() if model.name == "complex"]
    single, double = (model.fresh(dtype).state_dict() for dtype in (torch.float32, torch.float64))

    assert {tensor.dtype for tensor in double.values()} == {torch.float64, torch.complex128}
    assert all(torch.equal(double[key], tensor.to(double[key].dtype)) for key, tensor in single.items())
    with pytest.raises(TypeError, match=r"torch\.bfloat16"):
        model.fresh(torch.bfloat16)


def test_callers_random_state_is_left_alone() -> None:
    """Checking draws nothing from the caller's generator."""
    before = torch.get_rng_state()

    check_strategy(Healthy, models=MLP, level="files")

    assert torch.equal(torch.get_rng_state(), before)


def test_reference_models_are_what_they_say() -> None:
    """Each reference model is new each time, has the same values, and computes a finite answer."""
    for model in reference_models():
        first, second = model.fresh(), model.fresh()
        answers = [one(model.example()) for one in (first, second)]

        assert first is not second, model.name
        assert torch.equal(answers[0], answers[1]), model.name
        assert answers[0].isfinite().all(), model.name


def test_capabilities_refuse_what_they_are_not() -> None:
    """A declaration of the wrong type is refused where it is written."""
    wrongs = [{"layers": "Linear"}, {"refuses": ["Linear"]}, {"dtypes": ()}, {"mergeable": "yes"}, {"random_in_training": 1}]
    for wrong in (*wrongs, {"adapter_dtype": torch.float32}, {"adapter_dtype": ""}):
        with pytest.raises(StrategyError, match=f"Capabilities: {next(iter(wrong))}"):
            Capabilities(**wrong)  # type: ignore[arg-type]


def test_kit_needs_no_pytest() -> None:
    """Checking a strategy imports no test runner."""
    code = (
        "import sys; sys.modules['pytest'] = None; from gift_core.testing import check_strategy;"
        "print(check_strategy('full', level='api')[0])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)

    assert (done.returncode, done.stderr) == (0, "")
    assert "passed" in done.stdout


# --- pytest


CASES = """
import pytest
from broken_strategies.broken_api import FromTheFuture
from broken_strategies.healthy import Healthy
from gift_core.testing import parametrize_with_checks, reference_models

MLP = [model for model in reference_models() if model.name == "mlp"]

@parametrize_with_checks([Healthy, FromTheFuture], models=MLP, level="api")
def test_plain(check):
    check()

@parametrize_with_checks([FromTheFuture], models=MLP, level="api", expected_failures={"declared_api": "ahead"})
def test_expected(check):
    check()

@parametrize_with_checks([Healthy], models=MLP, level="api", expected_failures={"declared_api": "ahead"})
def test_strict(check):
    check()
"""


def test_cases_report_to_pytest(tmp_path: Path) -> None:
    """A failure, an expected failure and a declared failure that passes each reach pytest as what they are."""
    (tmp_path / "test_cases.py").write_text(CASES, encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rA",
        "-p",
        "no:cacheprovider",
        "-o",
        f"pythonpath={ROOT / 'tests'}",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300, check=False)

    assert "PASSED test_cases.py::test_plain[Healthy()-declared_name]" in done.stdout, done.stdout + done.stderr
    assert "FAILED test_cases.py::test_plain[FromTheFuture()-declared_api]" in done.stdout, done.stdout
    assert "XFAIL test_cases.py::test_expected[FromTheFuture()-declared_api]" in done.stdout, done.stdout
    assert "FAILED test_cases.py::test_strict[Healthy()-declared_api]" in done.stdout, done.stdout
    assert "2 failed" in done.stdout


# --- distributions


def test_own_distribution_conforms() -> None:
    """The core is packaged as it asks of others."""
    assert [str(result) for result in check_distribution("gift-core") if not result.ok] == []


def test_unknown_distribution_names_the_nearest() -> None:
    """A misspelt distribution is an error with the nearest installed name."""
    with pytest.raises(PluginError, match="gift-core"):
        check_distribution("gift-cor")


def test_badly_packaged_distribution_is_told_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each fault of a package has its own result, and all are reported at once."""
    info = tmp_path / "gift_bad-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: gift-bad\nVersion: 1.0\nRequires-Dist: gift-core==0.1\n", encoding="utf-8"
    )
    (info / "entry_points.txt").write_text("[gift.strategies]\nother = gift_bad:Bad\n", encoding="utf-8")
    (info / "RECORD").write_text("gift_bad/__init__.py,,\ntests/__init__.py,,\n", encoding="utf-8")
    for package in ("gift_bad", "tests"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    text = "from gift_core.strategy import FullFineTuningStrategy\nclass Bad(FullFineTuningStrategy):\n    name = 'bad'\n"
    (tmp_path / "gift_bad" / "__init__.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)

    wrong = {result.check: result.reason for result in check_distribution("gift-bad") if not result.ok}

    said = {
        "states_metadata": "description, requires-python, readme",
        "states_licence": "states no licence",
        "requires_gift_core": "names no oldest version",
        "entry_points_agree": "whose name is 'bad'",
        "is_typed": "gift_bad has no py.typed",
        "keeps_its_place": "top-level tests",
    }
    assert set(wrong) == set(said)
    assert all(text in wrong[check] for check, text in said.items()), wrong


# --- the page for authors


def test_the_page_names_every_check() -> None:
    """docs/plugins/conformance.md has a line for each check, with its level."""
    text = (ROOT / "docs/plugins/conformance.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| (\w+) \|", text, re.MULTILINE))

    assert {name: row.level for name, row in TABLE.items()} == rows


def test_the_page_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The code of docs/plugins/conformance.md runs from top to bottom, and prints what the page shows."""
    text = (ROOT / "docs/plugins/conformance.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    shown = re.findall(r"^```text\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    page = types.ModuleType("conformance_page")  # a real module, as an author's own, so that pickle finds what it defines
    monkeypatch.setitem(sys.modules, page.__name__, page)

    for block in blocks:
        exec(compile(block, "conformance.md", "exec"), vars(page))

    assert capsys.readouterr().out == "".join(shown)
