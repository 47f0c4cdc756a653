"""The command line: what each verb prints, where errors go, and what is imported for it."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file
from torch import nn

from gift_core import enable_fine_tuning, load_adapter, merge_and_unload, save_adapter
from gift_core.cli import main
from gift_core.cli.output import one_line, plain_table

MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.middle = nn.Linear(4, 4)
        self.output = nn.Linear(4, 7, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, x):
        return self.output(self.middle(self.embedding(x)))

def net():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net()

def random(): return Net()
def nothing(): return None
def fails(): raise OSError("no disk")
def exits(): raise SystemExit(0)
def wants(size): return Net()
number = 3
ready = nn.Linear(2, 2)
"""

Gift = Callable[..., Result]
Install = Callable[..., None]


@pytest.fixture
def gift(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gift]:
    """Runs the command line in an empty folder that has a model in ``net.py``."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(MODEL)
    before = set(sys.modules)

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(main, arguments)

    yield run
    for module in set(sys.modules) - before:
        if str(getattr(sys.modules[module], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[module]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Puts a made-up distribution on sys.path: ``install("dist", "name = module:attribute", module="source")``."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))

    def make(name: str, *entries: str, group: str = "gift.strategies", summary: str = "Made up.", **modules: str) -> None:
        info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nSummary: {summary}\n")
        (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *entries]) + "\n")
        for module, source in modules.items():
            (folder / f"{module}.py").write_text(source)

    return make


def python(code: str) -> str:
    """What a new interpreter prints for the code."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


# --- what is imported


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["list"], ["list", "--json"], ["show", "full"], ["demo", "--list"]])
def test_listing_works_without_torch(arguments: list[str]) -> None:
    """Help and every listing work where torch cannot be imported, and draw nothing with rich when piped."""
    code = f"""
import sys
sys.modules["torch"] = None
from gift_core.cli import main
try:
    main({arguments!r})
except SystemExit as end:
    print("code", end.code, "rich" in sys.modules)
"""

    assert python(code).endswith("code 0 False")


def test_a_verb_is_imported_when_it_is_used() -> None:
    """Running one verb imports no other verb's file."""
    code = """
import sys
from gift_core.cli import main
main(["list"], standalone_mode=False)
print(sorted(name for name in sys.modules if name.endswith("_verb")))
"""

    assert python(code).endswith("['gift_core.cli.list_verb']")


# --- list and show


def test_list_prints_aligned_columns(gift: Gift, install: Install) -> None:
    """The table has a line for each strategy, under a header, with columns that start at one place and no colour."""
    install("fake-dist", "fake = m:A", "another-fake = m:B", summary="Does [bold]things[/bold].")

    lines = gift("list").stdout.splitlines()

    rows = [line for line in lines if "fake-dist" in line]
    assert lines[0].split() == ["name", "distribution", "version", "API", "status", "summary"]
    assert {line.index("fake-dist") for line in rows} == {lines[0].index("distribution")}
    assert all(line.endswith("Does [bold]things[/bold].") for line in rows)
    assert "\x1b" not in "".join(lines)


def test_list_as_json_tells_the_state_of_each(gift: Gift, install: Install) -> None:
    """JSON has every entry with its status: ok, conflict or broken, with the reason."""
    install("one-dist", "fake = m:A", "fine = m:A")
    install("two-dist", "fake = m:A", "bad = not-a-module")

    rows = {f"{row['distribution']}:{row['name']}": row for row in json.loads(gift("list", "--json").stdout)}

    assert rows["one-dist:fine"]["status"] == "ok"
    assert rows["one-dist:fake"]["status"] == rows["two-dist:fake"]["status"] == "conflict"
    assert "two-dist:fake" in rows["one-dist:fake"]["reason"]
    assert rows["two-dist:bad"]["status"] == "broken"


def test_list_warns_of_what_cannot_be_used(gift: Gift, install: Install) -> None:
    """Conflicts and broken entries are told on stderr, so that the table stays a table."""
    install("one-dist", "fake = m:A")
    install("two-dist", "fake = m:A", "bad = not-a-module")

    result = gift("list")

    assert result.exit_code == 0
    assert "one-dist:fake or two-dist:fake" in result.stderr
    assert "two-dist: its entry point 'not-a-module'" in result.stderr
    assert "Warning" not in result.stdout


def test_metadata_cannot_write_to_the_terminal(gift: Gift, install: Install) -> None:
    """Control characters in a package's summary are not passed on."""
    install("fake-dist", "fake = m:A", summary="before\x1b[2Jafter\x07")

    output = gift("list").stdout

    assert "before [2Jafter" in output
    assert "\x1b" not in output


def test_show_tells_the_metadata_and_runs_nothing(gift: Gift, install: Install) -> None:
    """Show has where a strategy comes from and how to use it, and does not import it."""
    install("fake-dist", "fake = fake_bomb:A", fake_bomb="raise RuntimeError")

    facts = json.loads(gift("show", "fake", "--json").stdout)
    text = gift("show", "fake").stdout

    assert (facts["distribution"], facts["version"], facts["entry_point"]) == ("fake-dist", "1.0", "fake_bomb:A")
    assert '"fake"' in facts["usage"]["python"]
    assert "--strategy fake" in text
    assert "fake_bomb" not in sys.modules


def test_show_of_a_shared_name_uses_the_way_out(gift: Gift, install: Install) -> None:
    """For a name that two packages provide, the lines to copy have the qualified name."""
    install("one-dist", "fake = m:A")
    install("two-dist", "fake = m:A")

    assert "--strategy two-dist:fake" in gift("show", "two-dist:fake").stdout


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["show", "fakk"], 3, "Error: no strategy named 'fakk'; did you mean 'fake'"),
        (["show", "shared"], 3, "Error: the strategy name 'shared' is provided by fake-dist 1.0 and two-dist 1.0"),
        (["show", "bad"], 1, "Error: strategy 'bad' of fake-dist cannot be used"),
        (["show"], 2, "Missing argument 'NAME'"),
        (["lst"], 2, "No such command 'lst'"),
        (["inspect", "net.py:net", "--strategy", "fake"], 1, "Error: strategy 'fake' of fake-dist 1.0 could not be imported"),
        (["inspect", "net.py:net", "--strategy", "nope"], 3, "Error: no strategy named 'nope'"),
        (["info", "gone.gift"], 3, "Error: there is no adapter file"),
        (["info", "net.py"], 1, "Error: net.py is truncated or no safetensors file"),
        (["demo", "nope"], 3, "Error: no demo named 'nope'"),
    ],
)
def test_errors_are_messages_with_exit_codes(gift: Gift, install: Install, arguments: list[str], code: int, text: str) -> None:
    """An error is a message on stderr; 1 is a failure, 2 wrong usage, 3 not found or in conflict; nothing goes to stdout."""
    install("fake-dist", "fake = fake_bomb:A", "shared = m:A", "bad = not-a-module", fake_bomb="raise RuntimeError('boom')")
    install("two-dist", "shared = m:A")

    result = gift(*arguments)

    assert result.exit_code == code
    assert text in result.stderr
    assert result.stdout == ""


def test_version(gift: Gift) -> None:
    """--version prints the program's name and its distribution's version."""
    from importlib.metadata import version

    assert gift("--version").stdout == f"gift {version('gift-core')}\n"


# --- printing


def in_terminal(arguments: list[str], **environment: str) -> str:
    """What the command prints where stdout is a terminal."""
    ours, theirs = pty.openpty()
    code = f"from gift_core.cli import main; main({arguments!r})"
    variables = {"TERM": "xterm-256color", "COLUMNS": "200"} | environment
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=theirs, stdout=theirs, env={**os.environ, **variables}, close_fds=True
    ) as process:
        os.close(theirs)
        output = b""
        try:
            while block := os.read(ours, 4096):
                output += block
        except OSError:
            pass  # how Linux says that the other end is closed
    os.close(ours)
    assert process.returncode == 0
    return output.decode()


@pytest.mark.parametrize("arguments", [["list"], ["show", "full"]])
def test_colour_is_for_terminals_that_want_it(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal gets colour, unless NO_COLOR is set."""
    monkeypatch.delenv("NO_COLOR", raising=False)

    assert "\x1b[" in in_terminal(arguments)
    assert "\x1b[" not in in_terminal(arguments, NO_COLOR="1")


def test_a_plain_table_is_aligned() -> None:
    """Columns are as wide as their widest cell, two spaces apart, without spaces at the end."""
    table = plain_table([["a", "bbb"], ["cccc", ""]], ["x", "y"])

    assert table == "x     y\na     bbb\ncccc"


@pytest.mark.parametrize(("value", "text"), [("a\nb\tc", "a b c"), (None, "null"), ([1, 2], "[1, 2]"), (" x\x00", "x")])
def test_a_cell_is_one_line(value: object, text: str) -> None:
    """Whatever a cell holds, it is one line of printable text."""
    assert one_line(value) == text


# --- models


def test_a_torchvision_model_is_built_by_name(gift: Gift) -> None:
    """torchvision:NAME is that model, with random weights."""
    pytest.importorskip("torchvision")

    report = json.loads(gift("inspect", "torchvision:resnet18", "--strategy", "full", "--target", "fc", "--json").stdout)

    assert report["before"]["numbers"] == 11_689_512
    assert report["trainable"]["numbers"] == 512 * 1000 + 1000


def test_a_missing_torchvision_is_said(gift: Gift, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without torchvision the error says how to get it."""
    monkeypatch.setitem(sys.modules, "torchvision", None)

    result = gift("inspect", "torchvision:resnet18", "--strategy", "full")

    assert result.exit_code != 0
    assert "pip install torchvision" in result.stderr


@pytest.mark.parametrize("model", ["net.py:net", "net:net", "./net.py:Net", "net:ready"])
def test_the_forms_of_model(gift: Gift, model: str) -> None:
    """A file and a module of the folder one is in both work, with a function, a class or a module."""
    result = gift("inspect", model, "--strategy", "full")

    assert result.exit_code == 0, result.stderr


def test_a_model_in_a_package(gift: Gift, tmp_path: Path) -> None:
    """package.module:callable is found in a package of the folder one is in, and the search path stays as it was."""
    (tmp_path / "fake_pkg").mkdir()
    (tmp_path / "fake_pkg" / "__init__.py").write_text("")
    (tmp_path / "fake_pkg" / "nets.py").write_text("from fake_pkg.inner import net")
    (tmp_path / "fake_pkg" / "inner.py").write_text(MODEL)
    before = list(sys.path)

    result = gift("inspect", "fake_pkg.nets:net", "--strategy", "full")

    assert result.exit_code == 0, result.stderr
    assert sys.path == before


@pytest.mark.parametrize(
    ("model", "code", "text"),
    [
        ("resnet18", 2, "'resnet18' is not of the form torchvision:resnet18, package.module:callable or file.py:callable"),
        ("net.py:", 2, "is not of the form"),
        (":net", 2, "is not of the form"),
        ("torchvision:resnet81", 3, "torchvision has no model 'resnet81'; did you mean 'resnet18'"),
        ("nett.py:net", 3, "there is no file 'nett.py'; did you mean 'net.py'"),
        ("gone/net.py:net", 3, "there is no file"),
        ("nett:net", 3, "there is no module 'nett'; did you mean 'net'"),
        ("torch.nnn:Linear", 3, "there is no module 'torch.nnn'; did you mean 'nn'"),
        ("not-a-module:net", 3, "is no module name"),
        ("net.py:nett", 3, "net.py has no 'nett'; did you mean 'net'"),
        ("net.py:nothing", 1, "net.py:nothing gave None"),
        ("net.py:number", 1, "net.py:number is of type int"),
        ("net.py:fails", 1, "calling net.py:fails raised OSError: no disk"),
        ("net.py:exits", 1, "calling net.py:exits ended the program"),
        ("net.py:wants", 1, "net.py:wants wants arguments (missing a required argument: 'size')"),
        ("bomb.py:net", 1, "importing 'bomb.py' raised RuntimeError: boom"),
        ("bomb:net", 1, "importing 'bomb' raised RuntimeError: boom"),
        ("lacking.py:net", 1, "raised ModuleNotFoundError: No module named 'not_there_at_all'"),
        ("lacking:net", 1, "raised ModuleNotFoundError: No module named 'not_there_at_all'"),
    ],
)
def test_a_model_that_cannot_be_built(gift: Gift, tmp_path: Path, model: str, code: int, text: str) -> None:
    """Every way to fail says what was looked for, what is nearest, and whose error it is."""
    (tmp_path / "bomb.py").write_text("raise RuntimeError('boom')")
    (tmp_path / "lacking.py").write_text("import not_there_at_all")

    result = gift("inspect", model, "--strategy", "full")

    assert text in result.stderr
    assert result.exit_code == code
    assert result.exception is None or isinstance(result.exception, SystemExit)


# --- inspect


def test_inspect_reports_what_enabling_does(gift: Gift, tmp_path: Path) -> None:
    """The report is the one that enabling the same strategy gives, as text and as JSON, and no file is written."""
    files = sorted(tmp_path.rglob("*"))
    arguments = ["inspect", "net.py:net", "--strategy", "full", "--target", "middle", "--target", "output"]

    text, data = gift(*arguments).stdout, json.loads(gift(*arguments, "--json").stdout)

    report = enable_fine_tuning(_net(tmp_path), _full(["middle", "output"]))
    assert text == f"{report}\n"
    assert data == {"model": "net.py:net", **json.loads(json.dumps(report.to_dict()))}
    assert [path for path in sorted(tmp_path.rglob("*")) if "__pycache__" not in path.parts] == files


STRATEGY = """
from gift_core import FullFineTuningStrategy
seen = []
def make(number=1, text="", flag=False, targets=None):
    seen.append((number, text, flag))
    return FullFineTuningStrategy(targets)
def anything(**parameters):
    seen.append(parameters)
    return FullFineTuningStrategy()
"""


def test_set_values_are_json_or_text(gift: Gift, install: Install) -> None:
    """A value that reads as JSON is that, any other is text; a text may hold an equals sign."""
    install("fake-dist", "fake = fake_made:make", "any = fake_made:anything", fake_made=STRATEGY)

    first = gift("inspect", "net.py:net", "--strategy", "fake", "--set", "number=8", "--set", "text=a=b", "--set", "flag=true")
    second = gift("inspect", "net.py:net", "--strategy", "any", "--set", 'x={"y": [1]}', "--exclude", "middle")

    assert (first.exit_code, second.exit_code) == (0, 0), first.stderr + second.stderr
    assert sys.modules["fake_made"].seen == [(8, "a=b", True), {"x": {"y": [1]}, "exclude": ["middle"]}]


@pytest.mark.parametrize(
    ("options", "code", "text"),
    [
        (["--set", "numbre=8"], 2, "strategy 'fake' has no parameter 'numbre'; did you mean 'number'?"),
        (["--set", "number"], 2, "'number' is not of the form KEY=VALUE"),
        (["--set", "=8"], 2, "is not of the form KEY=VALUE"),
        (["--set", "number=8", "--set", "number=9"], 2, "'number' is given twice"),
        (["--set", "targets=middle", "--target", "output"], 2, "targets is given twice"),
        (["--exclude", "middle"], 2, "--exclude: strategy 'fake' has no parameter 'exclude'"),
        (["--target", "midle"], 1, "middle"),
    ],
)
def test_a_parameter_that_cannot_be_used(gift: Gift, install: Install, options: list[str], code: int, text: str) -> None:
    """A parameter that is unknown, malformed or given twice is wrong usage, with the nearest name; a bad value is a failure."""
    install("fake-dist", "fake = fake_made:make", fake_made=STRATEGY)

    result = gift("inspect", "net.py:net", "--strategy", "fake", *options)

    assert text in result.stderr
    assert result.exit_code == code


# --- info and merge


def _net(folder: Path, name: str = "net") -> nn.Module:
    namespace: dict[str, object] = {"__name__": "a_net"}
    exec((folder / "net.py").read_text(), namespace)
    model = namespace[name]()  # type: ignore[operator]
    assert isinstance(model, nn.Module)
    return model


def _full(targets: list[str]) -> object:
    from gift_core import FullFineTuningStrategy

    return FullFineTuningStrategy(targets)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter of the model in ``net.py`` with values of its own."""
    model = _net(tmp_path)
    enable_fine_tuning(model, _full(["middle"]))  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    path = tmp_path / "adapter.safetensors"
    save_adapter(model, path)
    return path


def test_info_tells_what_the_file_says(gift: Gift, adapter: Path) -> None:
    """JSON is what reading the file gives; the table names the strategy, where it came from and every tensor."""
    from gift_core import read_adapter_info

    info = read_adapter_info(adapter).to_dict()
    text = gift("info", str(adapter)).stdout

    assert json.loads(gift("info", str(adapter), "--json").stdout) == info
    assert "FullFineTuningStrategy" in text
    assert "gift-core" in text
    assert all(name in text for name in info["tensors"])


def _merged(folder: Path, adapter: Path) -> dict[str, torch.Tensor]:
    model = _net(folder)
    load_adapter(model, adapter)
    return dict(merge_and_unload(model).state_dict())


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    """Two state dicts are equal, keys in any order."""
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


def test_merge_writes_the_merged_state_dict(gift: Gift, adapter: Path, tmp_path: Path) -> None:
    """The file holds what merging in Python gives, under the base model's keys, tied weights under both of theirs."""
    result = gift("merge", "net.py:net", "adapter.safetensors", "-o", "out.safetensors")

    assert result.exit_code == 0, result.stderr
    assert_same(load_file(tmp_path / "out.safetensors"), _merged(tmp_path, adapter))
    assert set(load_file(tmp_path / "out.safetensors")) == set(_net(tmp_path).state_dict())


@pytest.mark.parametrize("name", ["base.safetensors", "base.pt"])
def test_merge_loads_the_base(gift: Gift, adapter: Path, tmp_path: Path, name: str) -> None:
    """--weights gives a model with random values those that the adapter was trained on, from either kind of file."""
    state = {key: value.clone() for key, value in _net(tmp_path).state_dict().items()}
    if name.endswith(".pt"):
        torch.save(state, name)
    else:
        from safetensors.torch import save_file

        save_file(state, name)

    result = gift("merge", "net.py:random", str(adapter), "--weights", name, "-o", "out.safetensors")

    assert result.exit_code == 0, result.stderr
    assert_same(load_file(tmp_path / "out.safetensors"), _merged(tmp_path, adapter))


def test_merge_overwrites_only_when_told_to(gift: Gift, adapter: Path, tmp_path: Path) -> None:
    """A file in the way is left alone, and named; --force replaces it."""
    output = tmp_path / "out.safetensors"
    output.write_text("precious")

    refused = gift("merge", "net.py:net", str(adapter), "-o", "out.safetensors")

    assert refused.exit_code == 1
    assert "--force" in refused.stderr
    assert output.read_text() == "precious"
    assert gift("merge", "net.py:net", str(adapter), "-o", "out.safetensors", "--force").exit_code == 0
    assert_same(load_file(output), _merged(tmp_path, adapter))


class _Code:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("ran"),))


BAD_WEIGHTS = {
    "no_safetensors": ("base.safetensors", lambda path: path.write_text("nothing"), "cannot be read as safetensors"),
    "no_pickle": ("base.pt", lambda path: path.write_text("nothing"), "cannot be read as a state dict"),
    "code": ("base.pt", lambda path: torch.save({"a": _Code()}, path), "Files that need code to be read are refused"),
    "checkpoint": ("base.pt", lambda path: torch.save({"state_dict": {}, "epoch": 3}, path), "holds a dict with state_dict, epoch"),
    "list": ("base.pt", lambda path: torch.save([1], path), "holds a list"),
    "other_model": ("base.pt", lambda path: torch.save({"a": torch.ones(1)}, path), "does not fit the model"),
    "absent": ("base.pt", lambda path: None, "does not exist"),
}


@pytest.mark.parametrize(("name", "make", "text"), BAD_WEIGHTS.values(), ids=BAD_WEIGHTS.keys())
def test_base_weights_that_cannot_be_used(
    gift: Gift, adapter: Path, tmp_path: Path, name: str, make: Callable[[Path], object], text: str
) -> None:
    """A base file that is no state dict of the model is an error that says so; no code in it runs and nothing is written."""
    make(tmp_path / name)

    result = gift("merge", "net.py:random", str(adapter), "--weights", name, "-o", "out.safetensors")

    assert result.exit_code in (1, 2)
    assert text in result.stderr
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out.safetensors").exists()


def test_merge_into_another_base_is_refused(gift: Gift, adapter: Path, tmp_path: Path) -> None:
    """An adapter of one model is not merged into another, and nothing is written."""
    result = gift("merge", "net.py:ready", str(adapter), "-o", "out.safetensors")

    assert result.exit_code == 1
    assert "another base model" in result.stderr
    assert not (tmp_path / "out.safetensors").exists()


def test_merge_runs_a_files_regular_expressions_where_it_is_trusted(gift: Gift, tmp_path: Path) -> None:
    """An adapter whose strategy has a regular expression is merged with ``--trusted``; without, a message says so."""
    enable_fine_tuning(model := _net(tmp_path), _full(["re:middle"]))  # type: ignore[arg-type]
    save_adapter(model, path := tmp_path / "adapter.safetensors")

    refused = gift("merge", "net.py:net", str(path), "-o", "out.safetensors")
    assert refused.exit_code == 1 and "--trusted" in refused.stderr
    assert not (tmp_path / "out.safetensors").exists()

    assert gift("merge", "net.py:net", str(path), "-o", "out.safetensors", "--trusted").exit_code == 0
    assert_same(load_file(tmp_path / "out.safetensors"), dict(merge_and_unload(model).state_dict()))


def test_merge_where_nothing_can_be_written(gift: Gift, adapter: Path) -> None:
    """A folder that is not there is a message, not a traceback."""
    result = gift("merge", "net.py:net", str(adapter), "-o", "gone/out.safetensors")

    assert result.exit_code == 1
    assert "could not be written" in result.stderr


# --- demo

DEMO = """
def main(argv):
    print(argv)
    return 0 if not argv else 7
def late(argv):
    import not_there_at_all
def usage(argv):
    import argparse
    argparse.ArgumentParser(prog="fake").parse_args(argv)
"""


def test_demo_hands_its_arguments_on(gift: Gift, install: Install) -> None:
    """What follows the name goes to the demo as it is, options too, and its return value is the exit code."""
    install("fake-dist", "fake = fake_demo:main", group="gift.demos", fake_demo=DEMO)

    plain, full = gift("demo", "fake"), gift("demo", "fake", "--epochs", "3", "--help", "x")

    assert (plain.stdout, plain.exit_code) == ("[]\n", 0)
    assert (full.stdout, full.exit_code) == ("['--epochs', '3', '--help', 'x']\n", 7)


def test_the_default_demo_gets_options_too(gift: Gift, monkeypatch: pytest.MonkeyPatch, install: Install) -> None:
    """Without a name, options belong to the default demo."""
    from gift_core.cli import demo_verb

    install("fake-dist", "fake = fake_demo:main", group="gift.demos", fake_demo=DEMO)
    monkeypatch.setattr(demo_verb, "DEFAULT", "fake")

    assert gift("demo").stdout == "[]\n"
    assert gift("demo", "--epochs", "3").stdout == "['--epochs', '3']\n"


def test_demos_are_listed(gift: Gift, install: Install) -> None:
    """--list names the demos and their packages and runs none; --json gives the same as data."""
    install("fake-dist", "fake = fake_bomb:main", group="gift.demos", fake_bomb="raise RuntimeError")

    table, data = gift("demo", "--list").stdout, json.loads(gift("demo", "--list", "--json").stdout)

    assert ["fake", "fake-dist", "1.0"] in [line.split() for line in table.splitlines()]
    assert {"name": "fake", "distribution": "fake-dist", "version": "1.0"} in data


@pytest.mark.parametrize(("attribute", "source"), [("main", "import not_there_at_all"), ("late", DEMO)])
def test_what_a_demo_misses_is_said_with_the_command(gift: Gift, install: Install, attribute: str, source: str) -> None:
    """A module that is missing, at import or later, gives the command that installs the extra."""
    install("fake-dist", f"fake = fake_demo:{attribute}", group="gift.demos", fake_demo=source)

    result = gift("demo", "fake")

    assert result.exit_code == 1
    assert "needs the module 'not_there_at_all'" in result.stderr
    assert "pip install 'fake-dist[demo]'" in result.stderr


def test_a_demo_may_end_by_itself(gift: Gift, install: Install) -> None:
    """A demo that parses arguments with argparse ends with argparse's code."""
    install("fake-dist", "fake = fake_demo:usage", group="gift.demos", fake_demo=DEMO)

    assert gift("demo", "fake", "--help").exit_code == 0
    assert gift("demo", "fake", "--wrong").exit_code == 2
