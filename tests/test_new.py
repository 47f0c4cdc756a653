"""``gift new``: what it makes, what it refuses, and that what it makes is a plugin that works."""

from __future__ import annotations

import doctest
import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import tomllib
import venv
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from gift_core.cli import main
from gift_core.errors import PluginConflictError
from gift_core.scaffold import KINDS, Names, ScaffoldError, TargetExistsError, create_project, derive_names

ROOT = Path(__file__).resolve().parent.parent
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
OFFLINE = ["install", "--quiet", "--no-deps", "--no-index"]

New = Callable[..., Result]


@pytest.fixture
def new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> New:
    """Runs ``gift new`` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(main, ["new", *arguments])


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """What a program prints; it must succeed."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": "", "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def texts(project: Path) -> dict[str, str]:
    """Every file of a project by its path."""
    return {str(path.relative_to(project)): path.read_text(encoding="utf-8") for path in project.rglob("*") if path.is_file()}


# --- names


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ("houlsby", ("gift-houlsby-plugin", "gift_houlsby_plugin", "houlsby", "Houlsby")),
        ("gift-my-method-plugin", ("gift-my-method-plugin", "gift_my_method_plugin", "my-method", "MyMethod")),
        ("some/where/Übung mit  Gewichten!", ("gift-ubung-mit-gewichten-plugin", "gift_ubung_mit_gewichten_plugin")),
        ("2fast", ("gift-2fast-plugin", "gift_2fast_plugin", "2fast", "Gift2fast")),
        ("fine_tuning", ("gift-fine-tuning-plugin", "gift_fine_tuning_plugin", "fine-tuning", "GiftFineTuning")),
        ("gift-plugin", ("gift-plugin-plugin", "gift_plugin_plugin", "plugin", "Plugin")),
        ("class", ("gift-class-plugin", "gift_class_plugin", "class", "Class")),
    ],
)
def test_names_come_from_the_folder(folder: str, expected: tuple[str, ...]) -> None:
    """A folder's name gives all others, whether or not it is spelt as a plugin's is."""
    names = derive_names(Path(folder))

    assert names[: len(expected)] == expected


def test_given_names_are_kept() -> None:
    """A name that is given is used as it is; the strategy is called after the distribution."""
    names = derive_names(Path("x"), "My.Cool_Plugin", "cool", "Ada")

    assert names == Names("My.Cool_Plugin", "cool", "my-cool", "MyCool", "Ada")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x", "--name", "-x"], "no valid distribution name"),
        (["x", "--name", "a b"], "no valid distribution name"),
        (["x", "--name", "übung"], "no valid distribution name"),
        (["x", "--package", "2x"], "no valid package name"),
        (["x", "--package", "a-b"], "no valid package name"),
        (["x", "--package", "class"], "no valid package name"),
        (["x", "--package", "é"], "no valid package name"),
        (["x", "--package", "json"], "is taken"),
        (["x", "--package", "gift_core"], "is taken"),
        (["x", "--name", "class"], "no valid package name"),
        (["x", "--author", "a\nb"], "one line of text"),
        (["x", "--author", " "], "one line of text"),
        (["ß"], "--name"),
        (["x", "--kind", "other"], "other"),
    ],
)
def test_bad_names_are_refused(new: New, tmp_path: Path, arguments: list[str], message: str) -> None:
    """A name that cannot be used is wrong usage, the message says which, and nothing is made."""
    result = new(*arguments)

    assert (result.exit_code, list(tmp_path.iterdir())) == (2, [])
    assert message in result.stderr


def test_installed_names_are_refused(new: New) -> None:
    """A strategy's name that is installed already is a conflict, whoever has it."""
    with pytest.raises(PluginConflictError, match="full"):
        derive_names(Path("full"))

    assert new("lora").exit_code == 3


# --- files


@pytest.mark.parametrize("there", ["file", "folder", "broken link"])
def test_existing_target_is_refused(new: New, tmp_path: Path, there: str) -> None:
    """Whatever is at the target stays as it is."""
    target = tmp_path / "mine"
    {"file": target.touch, "folder": target.mkdir, "broken link": lambda: target.symlink_to("nowhere")}[there]()

    result = new("mine")

    assert result.exit_code == 2
    assert "exists already" in result.stderr
    with pytest.raises(TargetExistsError):
        create_project(target, derive_names(target))


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a file cannot be written, there is no project and nothing temporary."""

    def full(*_: object, **__: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", full)

    with pytest.raises(ScaffoldError, match="no space left"):
        create_project(tmp_path / "mine", derive_names(Path("mine")))

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", KINDS)
def test_no_token_is_left(new: New, tmp_path: Path, kind: str) -> None:
    """Neither contents nor paths keep a word of the source, and every name is where it belongs."""
    result = new("mine", "--kind", kind, "--author", 'Ada "the\\first" O\'Neil')

    files = texts(tmp_path / "mine")
    assert result.exit_code == 0
    assert [path for path, text in files.items() if re.search("template|GIFt authors", path + text, re.IGNORECASE)] == []
    project = tomllib.loads(files["pyproject.toml"])["project"]
    assert project["authors"] == [{"name": 'Ada "the\\first" O\'Neil'}]
    assert project["entry-points"] == {"gift.strategies": {"mine": "gift_mine_plugin:MineStrategy"}}
    assert 'Ada "the\\first" O\'Neil' in files["LICENSE"]
    assert str(Path(".github/workflows/publish.yml")) in files


def test_names_that_look_like_tokens_are_safe(new: New, tmp_path: Path) -> None:
    """What the user says is put in once, also where it looks like something that is replaced."""
    new("gift-template-plugin", "--author", "template of Template")

    text = (tmp_path / "gift-template-plugin" / "LICENSE").read_text(encoding="utf-8")
    assert "Copyright (c) 2026 template of Template\n" in text


@pytest.mark.parametrize("kind", KINDS)
def test_generated_code_is_typed_and_tidy(new: New, tmp_path: Path, kind: str) -> None:
    """What is generated passes strict type checking and the linter."""
    new("mine", "--kind", kind)
    project = tmp_path / "mine"

    run(sys.executable, "-m", "ruff", "check", project, cwd=ROOT)
    run(sys.executable, "-m", "ruff", "format", "--check", project, cwd=ROOT)
    run(sys.executable, "-m", "mypy", "--strict", "--cache-dir", ROOT / ".mypy_cache", project / "src", cwd=ROOT)


def test_workflows_are_pinned_and_least_privileged() -> None:
    """Every action is pinned by its full commit, with its version; only the job that uploads may ask for a token."""
    workflows = sorted((ROOT / "plugins_template" / ".github" / "workflows").glob("*.yml"))
    lines = [line.strip() for file in workflows for line in file.read_text(encoding="utf-8").splitlines()]
    used = [line for line in lines if "uses:" in line]

    assert len(workflows) == 2
    assert [line for line in used if not re.fullmatch(r"- uses: [\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line)] == []
    publish = (workflows[0].parent / "publish.yml").read_text(encoding="utf-8")
    assert publish.count("id-token: write") == 1
    assert publish.index("id-token: write") > publish.index("\n  deploy:\n")
    assert lines.count("contents: read") == 2
    assert [line for line in lines if line.endswith(": write") and "id-token" not in line] == []


# --- what is made works


@pytest.mark.parametrize(
    ("kind", "folder", "strategy", "level"),
    [
        # the tests below check the first two up to the last level
        ("caps", "2 fast", "2-fast", "tuning"),
        ("reparameterization", "gift-fine_tuning-plugin", "fine-tuning", "tuning"),
        ("module", "class", "class", "torch"),
    ],
    ids=KINDS,
)
def test_a_new_plugin_works(new: New, tmp_path: Path, kind: str, folder: str, strategy: str, level: str) -> None:
    """A project of each kind, under an awkward name, installs, passes its tests, is listed, and conforms."""
    assert new(folder, "--kind", kind).exit_code == 0
    project, site = tmp_path / folder, tmp_path / "site"
    run(*PIP, *OFFLINE, "--no-build-isolation", "--target", site, project, cwd=tmp_path)
    gift = [sys.executable, "-c", "from gift_core.cli import main; main()"]

    # conformance is what `gift check` runs, and once is enough
    run(sys.executable, "-m", "pytest", "-q", "tests/test_strategy.py", cwd=project, PYTHONPATH=str(site))
    listed = {row["name"]: row for row in json.loads(run(*gift, "list", "--json", cwd=tmp_path, PYTHONPATH=str(site)))}
    results = json.loads(run(*gift, "check", project, "--json", "--level", level, cwd=tmp_path, PYTHONPATH=str(site)))

    assert listed[strategy]["status"] == "ok"
    assert {row["status"] for row in results} == {"passed", "skipped"}
    assert {row["subject"] for row in results} == {strategy, derive_names(Path(folder)).distribution}


def test_built_wheels_work_outside_the_repository(tmp_path: Path) -> None:
    """From the built core alone: make a plugin, build it, install it, run its tests, list it and check it."""
    dist, project = tmp_path / "dist", tmp_path / "gift-outer-plugin"
    python = environment(tmp_path / "venv")
    gift = [python, "-c", "from gift_core.cli import main; main()"]
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, ROOT, cwd=tmp_path)
    install(python, dist, "gift_core", cwd=tmp_path)
    where = run(python, "-c", "import gift_core; print(gift_core.__file__)", cwd=tmp_path)

    run(*gift, "new", project, cwd=tmp_path)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, project, cwd=tmp_path)
    install(python, dist, "gift_outer_plugin", cwd=tmp_path)
    listed = {row["name"]: row["status"] for row in json.loads(run(*gift, "list", "--json", cwd=tmp_path))}
    run(python, "-m", "pytest", "-q", "tests", cwd=project)
    run(*gift, "check", "gift-outer-plugin", "--level", "api", cwd=tmp_path)

    assert Path(where.strip()).is_relative_to(tmp_path)
    assert listed["outer"] == "ok"
    assert len(list(dist.glob("gift_outer_plugin-0.1.0*"))) == 2


def test_the_first_plugin_page_is_real(tmp_path: Path) -> None:
    """Every command of the page prints what the page shows, and the code it shows is in the project."""
    page = (ROOT / "docs" / "plugins" / "first-plugin.md").read_text(encoding="utf-8")
    python = environment(tmp_path / "venv", ROOT)
    folder = tmp_path
    wrong = []
    for command, expected in transcript(page):
        if command[0] == "cd":
            folder /= command[1]
            continue
        printed = in_terminal(python, command, folder)
        if not doctest.OutputChecker().check_output(expected, printed, doctest.ELLIPSIS):
            wrong.append(f"{shlex.join(command)}\n{printed}")
    code = (folder / "src" / "gift_output_scale_plugin" / "strategy.py").read_text(encoding="utf-8")
    shown = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)

    assert wrong == []
    assert len(shown) == 2
    assert [block for block in shown if block not in code] == []


def transcript(page: str) -> list[tuple[list[str], str]]:
    """The commands of a page's console blocks, each with what it is shown to print."""
    blocks = re.findall(r"^```console\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    steps = [step for block in blocks for step in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]]
    return [(shlex.split(step.partition("\n")[0]), step.partition("\n")[2]) for step in steps]


def in_terminal(python: Path, command: list[str], folder: Path) -> str:
    """What a command of the page prints, errors included."""
    program, *arguments = command
    if program == "pip":
        # what it would fetch is here already
        run(*PIP, "--python", python, *OFFLINE, "--no-build-isolation", "-e", folder, cwd=folder)
        return "\n"
    starts = {"gift": ["-c", "from gift_core.cli import main; main()"], "pytest": ["-m", "pytest"]}
    done = subprocess.run(
        [str(python), *starts[program], *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": "", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        timeout=280,
        check=False,
    )
    return done.stdout


def environment(folder: Path, *sources: Path) -> Path:
    """An environment that shares what is installed here, except what is installed editable, and adds sources; its Python."""
    venv.create(folder, with_pip=False)
    scope = {"base": str(folder), "platbase": str(folder)}
    purelib = Path(sysconfig.get_path("purelib", "venv", scope))
    # a plain path: the .pth files in there, which make the editable packages importable, are not read
    (purelib / "shared.pth").write_text("\n".join(map(str, [sysconfig.get_path("purelib"), *sources])) + "\n", encoding="utf-8")
    return Path(sysconfig.get_path("scripts", "venv", scope)) / Path(sys.executable).name


def install(python: Path, dist: Path, name: str, cwd: Path) -> None:
    """Put a built wheel, and nothing else, into an environment."""
    (wheel,) = dist.glob(f"{name}-*.whl")
    run(*PIP, "--python", python, *OFFLINE, "--force-reinstall", "--ignore-installed", wheel, cwd=cwd)
