"""``gift convert``: finding formats, handing over what the user said, and the exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.shell_completion import BashComplete
from click.testing import CliRunner, Result
from torch import nn

from gift_core import enable_fine_tuning, load_adapter, save_adapter
from gift_core.cli import main

Install = Callable[..., Path]

#: A format that writes down how it was called.
FORMAT = """
from gift_core.errors import AdapterFormatError

class Text:
    def export(self, adapter, target, *, model=None, force=False, colour=None, size=1):
        if colour == "ultraviolet":
            raise AdapterFormatError("there is no ink of that colour.")
        target.write_text(f"export {adapter.name} {type(model).__name__} {force} {colour} {size}")
        return {"letters": 3, "file_bytes": 1234, "notes": ["it is all text"]}

    def import_(self, source, adapter, *, model=None, force=False):
        adapter.write_text(f"import {source.name} {type(model).__name__} {force}")
        return {}

TEXT = Text()
HALF = object()
"""
MODEL = """
from torch import nn
def net(): return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Conv2d(4, 16, 3))
"""


@pytest.fixture
def text(install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, with a model in ``net.py``, where the format ``text`` is installed."""
    install("gift-text", "text = fake_text:TEXT", "half = fake_text:HALF", group="gift.formats", fake_text=FORMAT)
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "net.py").write_text(MODEL)
    monkeypatch.chdir(folder)
    return folder


def gift(*arguments: str) -> Result:
    """Run the command line."""
    return CliRunner().invoke(main, arguments)


def test_a_format_gets_what_was_said(text: Path) -> None:
    """The format is called with both paths, the model and its own settings; its report is printed, and its notes go to stderr."""
    done = gift("convert", "a.st", "--to", "text", "out", "--model", "net.py:net", "--set", "size=2", "--set", "colour=red", "--force")

    assert done.exit_code == 0, done.output
    assert (text / "out").read_text() == "export a.st Sequential True red 2"
    assert done.stdout.split() == ["written", "out", "letters", "3", "size", "1.2", "kB"]
    assert done.stderr == "Note: it is all text.\n"


def test_the_other_way_and_json(text: Path) -> None:
    """--from calls the import; --json prints the report as data."""
    done, data = gift("convert", "dir", "--from", "text", "a.st"), gift("convert", "a", "--to", "text", "b", "--json")

    assert done.exit_code == 0, done.output
    assert (text / "a.st").read_text() == "import dir NoneType False"
    assert json.loads(data.stdout) == {"target": "b", "letters": 3, "file_bytes": 1234, "notes": ["it is all text"]}


def test_whose_digests_a_file_holds_is_said(text: Path) -> None:
    """An import with a model and without its weights notes that the file belongs to what the model's function gave."""
    torch.save(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Conv2d(4, 16, 3)).state_dict(), "base.pt")
    imported = ["convert", "dir", "--from", "text", "a.st", "--model", "net.py:net"]
    bare, data, full = gift(*imported), gift(*imported, "--json"), gift(*imported, "--weights", "base.pt")

    assert [done.exit_code for done in (bare, data, full)] == [0, 0, 0]
    assert bare.stderr.startswith("Note: without --weights the adapter file belongs to the weights that MODEL's function gave")
    assert len(json.loads(data.stdout)["notes"]) == 1
    assert full.stderr == ""


def test_formats_are_listed(text: Path) -> None:
    """--list and gift list --all name the formats and their packages, without importing them."""
    table, data = gift("convert", "--list"), json.loads(gift("convert", "--list", "--json").stdout)
    row = next(line for line in json.loads(gift("list", "--all", "--json").stdout) if line["name"] == "text")

    assert "text" in table.stdout
    assert {"name": "text", "distribution": "gift-text", "version": "1.0"} in data
    assert (row["kind"], row["status"]) == ("format", "ok")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["a", "b"], 2, "say either --to FORMAT or --from FORMAT"),
        (["a", "b", "--to", "text", "--from", "text"], 2, "say either --to"),
        (["a", "--to", "text"], 2, "name SOURCE and TARGET"),
        (["a", "b", "--to", "text", "--weights", "net.py"], 2, "name it too"),
        (["a", "b", "--to", "text", "--model", "net"], 2, "is not of the form"),
        (["a", "b", "--to", "text", "--set", "color=red"], 2, "did you mean 'colour'?"),
        (["a", "b", "--from", "text", "--set", "size=1"], 2, "It takes: nothing."),
        (["a", "b", "--to", "text", "--set", "model=1"], 2, "takes no 'model' here"),
        (["a", "b", "--to", "tex"], 3, "no format named 'tex'; did you mean 'text'"),
        (["a", "b", "--to", "half"], 1, "has no function 'export'"),
        (["a", "b", "--to", "text", "--model", "nowhere.py:net"], 3, "there is no file"),
        (["a", "b", "--to", "text", "--set", "colour=ultraviolet"], 1, "Error: there is no ink of that colour."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_usage_is_said(text: Path, arguments: list[str], code: int, message: str) -> None:
    """What is missing, unknown or contradictory ends the command with a message and its code, and writes nothing."""
    done = gift("convert", *arguments)

    assert (done.exit_code, message in done.stderr.replace("\n", " ")) == (code, True), done.output
    assert not (text / "b").exists()


def test_formats_are_completed(text: Path) -> None:
    """The shell completes the names of formats after --to and --from."""
    for option in ("--to", "--from"):
        found = BashComplete(main, {}, "gift", "_GIFT_COMPLETE").get_completions(["convert", "a", option], "te")

        assert [item.value for item in found] == ["text"]


def test_peft_both_ways(text: Path) -> None:
    """With the reference plugin, an adapter goes to PEFT's files and back, and computes the same."""
    pytest.importorskip("gift_lora_plugin")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Conv2d(4, 16, 3))
    torch.save(model.state_dict(), "base.pt")
    state = {key: value.clone() for key, value in model.state_dict().items()}
    enable_fine_tuning(model, "lora")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    save_adapter(model, "a.safetensors")
    base = ["--model", "net.py:net", "--weights", "base.pt"]
    out = gift("convert", "a.safetensors", "--to", "peft", "dir", "--model", "net.py:net")
    back = gift("convert", "dir", "--from", "peft", "b.safetensors", *base)
    again = gift("convert", "dir", "--from", "peft", "b.safetensors", *base)
    without = gift("convert", "dir", "--from", "peft", "c.safetensors")

    assert [done.exit_code for done in (out, back, again, without)] == [0, 0, 1, 1], [
        done.output for done in (out, back, again, without)
    ]
    assert "overwrite" in again.stderr
    assert "--model" in without.stderr
    fresh = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Conv2d(4, 16, 3))
    fresh.load_state_dict(state)
    load_adapter(fresh, "b.safetensors")
    for x, layer in ((torch.randn(2, 4), 0), (torch.randn(1, 4, 5, 5), 2)):
        torch.testing.assert_close(fresh[layer](x), model[layer](x))


def test_listing_formats_needs_no_torch() -> None:
    """Formats are listed, and wrong usage is told, without importing torch."""
    code = "import sys; sys.modules['torch'] = None; from gift_core.cli import main; main(['convert', '--list'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)

    assert (done.returncode, done.stderr) == (0, "")
    assert "distribution" in done.stdout
