"""``gift check``: what it takes, what it answers, and the code it ends with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from gift_core import FineTuningStrategy, register_strategy
from gift_core.cli import main
from gift_core.cli.check_verb import LEVELS
from gift_core.factories import everything, keep_trainable
from gift_core.plugins import unregister_strategy
from gift_core.testing import LEVELS as KIT_LEVELS
from gift_core.testing import check_distribution, check_strategy


class Misnamed(FineTuningStrategy):
    """A strategy whose name nobody can type."""

    name = "mis named"

    def __init__(self) -> None:
        super().__init__(para_caps=[(everything(), keep_trainable())])


@pytest.fixture
def misnamed() -> Iterator[str]:
    """A registered strategy that breaks one promise."""
    register_strategy("misnamed", Misnamed)
    yield "misnamed"
    unregister_strategy("misnamed")


def check(*arguments: str) -> Result:
    """Run ``gift check``, no further than its first level."""
    return CliRunner().invoke(main, ["check", *arguments, "--level", "api"])


def test_levels_are_those_of_the_kit() -> None:
    """The command offers the levels that the kit has."""
    assert LEVELS == KIT_LEVELS


def test_a_strategy_that_conforms() -> None:
    """A name is checked by the kit, and what the kit answers is what is printed."""
    result = check("full", "--json")

    assert result.exit_code == 0
    assert json.loads(result.stdout) == [{"subject": "full", **one.to_dict()} for one in check_strategy("full", level="api")]


def test_a_strategy_that_fails(misnamed: str) -> None:
    """A broken promise ends the command with code 1, and is told with its reason."""
    result = check(misnamed)

    assert result.exit_code == 1
    assert "declared_name: failed" in result.stderr
    assert "mis named" in result.stderr


@pytest.mark.parametrize("subject", ["gift-lora-plugin", "Gift_Lora.Plugin", "path"])
def test_a_distribution(subject: str) -> None:
    """A distribution, however it is spelt, and the folder of its project: packaging first, then each of its strategies."""
    folder = Path(__file__).resolve().parent.parent / "gift_lora_plugin"
    result = check(str(folder) if subject == "path" else subject, "--json")
    rows = json.loads(result.stdout)

    assert result.exit_code == 0
    assert [row["check"] for row in rows][:6] == [one.check for one in check_distribution("gift-lora-plugin")]
    assert list(dict.fromkeys(row["subject"] for row in rows))[1:] == ["lora", "lora-conv", "lora-linear"]


@pytest.mark.parametrize(
    ("subject", "message"), [("ful", "did you mean 'full'"), ("./nowhere", "no pyproject.toml"), (".", "pip install -e")]
)
def test_what_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, subject: str, message: str) -> None:
    """Neither a strategy, nor a distribution, nor an installed project: code 3, and what to do."""
    monkeypatch.chdir(tmp_path)
    if subject == ".":
        (tmp_path / "pyproject.toml").write_text("[project]\nname = 'gift-absent-plugin'\n")

    result = check(subject)

    assert result.exit_code == 3
    assert message in result.stderr


def test_a_project_without_a_name(tmp_path: Path) -> None:
    """A project file that states no name is an error that names the file."""
    (tmp_path / "pyproject.toml").write_text("[project]\n")

    result = check(str(tmp_path))

    assert result.exit_code == 1
    assert "states no project name" in result.stderr
