"""The shape of the core: which way its imports point, what it must not know, and what must work without torch."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
import tokenize
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CORE = ROOT / "gift_core"
FILES = sorted(CORE.rglob("*.py"))
WITHOUT_TORCH = "import sys; sys.modules['torch'] = None; "


def order() -> list[str]:
    """The modules of the core as CONTRIBUTING.md lists them, lowest first."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    block = re.search(r"^## The modules of the core$.*?^```text\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)

    assert block is not None
    return [line.split()[0] for line in block[1].splitlines()]


def module_of(file: Path) -> str:
    """The module of the list a file belongs to; empty for the package's own ``__init__``."""
    first = file.relative_to(CORE).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def imported_names(file: Path) -> Iterator[tuple[int, str]]:
    """Every absolute name that a file imports, wherever in the file, with its line; ``from a import b`` gives ``a.b``."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield node.lineno, "." * node.level
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def place(file: Path, line: int) -> str:
    """Where something is, as an editor understands it."""
    return f"{file.relative_to(ROOT).as_posix()}:{line}"


# --- direction


def test_every_module_is_drawn() -> None:
    """The list in CONTRIBUTING.md names the modules of the core, each once and no other."""
    drawn = order()

    assert sorted(drawn) == sorted({module_of(file) for file in FILES} - {""})


def test_imports_point_one_way() -> None:
    """A module of the core imports only modules that CONTRIBUTING.md lists above it, also inside functions and for types."""
    drawn = order()
    # The package's __init__ gives the names of everything except the command line.
    rank = {"": drawn.index("cli") - 0.5} | {name: float(position) for position, name in enumerate(drawn)}
    wrong = []
    for file in FILES:
        mine = module_of(file)
        for line, name in imported_names(file):
            parts = name.split(".")
            if parts[0] != "gift_core" or name == "gift_core.__version__":
                continue
            # A name that is no module is one of the lazy names of __init__, which hide where they come from.
            target = parts[1] if len(parts) > 1 and parts[1] in rank else ""
            if target != mine and rank[target] >= rank[mine]:
                wrong.append(f"{place(file, line)} {mine or '__init__'} imports {name}")

    assert wrong == []


def test_imports_are_absolute() -> None:
    """The core writes the whole name of what it imports, so that the direction can be read."""
    relative = [place(file, line) for file in FILES for line, name in imported_names(file) if name.startswith(".")]

    assert relative == []


# --- what the core must not know


def test_core_imports_no_plugin_and_no_torchvision() -> None:
    """Nothing in the core imports torchvision or a plugin."""
    foreign = [
        f"{place(file, line)} {name}"
        for file in FILES
        for line, name in imported_names(file)
        if name.split(".")[0] == "torchvision" or re.match(r"gift_\w+_plugin\b", name)
    ]

    assert foreign == []


def test_core_names_no_method() -> None:
    """The code of the core never says LoRA; comments and docstrings may, as an example."""
    found = [
        f"{place(file, token.start[0])} {token.string}"
        for file in FILES
        for token in code_tokens(file)
        if "lora" in token.string.lower()
    ]

    assert found == []


def code_tokens(file: Path) -> Iterator[tokenize.TokenInfo]:
    """The tokens of a file without comments and without strings that stand alone, as docstrings do."""
    alone = {
        (node.lineno, node.col_offset)
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    }
    with tokenize.open(file) as source:
        for token in tokenize.generate_tokens(source.readline):
            if token.type != tokenize.COMMENT and token.start not in alone:
                yield token


# --- what works without torch


def run_without_torch(code: str) -> subprocess.CompletedProcess[str]:
    """Run a program in which importing torch fails."""
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH + code], capture_output=True, text=True, encoding="utf-8", timeout=60, check=False
    )


def test_torch_is_blocked() -> None:
    """The tests below prove something: in their programs, importing torch fails."""
    done = run_without_torch("import torch")

    assert done.returncode == 1
    assert "ModuleNotFoundError" in done.stderr


def test_import_needs_no_torch() -> None:
    """``import gift_core`` brings neither torch nor anything else that is installed, and lists its names."""
    done = run_without_torch(
        "before = set(sys.modules); import gift_core; assert 'enable_fine_tuning' in dir(gift_core);"
        "new = {name.split('.')[0] for name in set(sys.modules) - before};"
        "print(sorted(new - set(sys.stdlib_module_names)))"
    )

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == "['gift_core']"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--help"], ["list", "show", "inspect", "info", "merge", "demo"]),
        (["list"], ["full", "merged", "lora", "lora-linear", "lora-conv"]),
        (["list", "--json"], ["lora-conv"]),
        (["show", "lora"], ["gift-lora-plugin"]),
    ],
    ids=" ".join,
)
def test_listing_needs_no_torch(arguments: list[str], expected: list[str]) -> None:
    """Help and the listing commands answer without torch."""
    done = run_without_torch(f"from gift_core.cli import main; sys.argv = {['gift', *arguments]!r}; main()")

    assert (done.returncode, done.stderr) == (0, "")
    assert [text for text in expected if text not in done.stdout] == []


# --- the two distributions


@pytest.mark.parametrize("folder", [".", "gift_lora_plugin"])
def test_versions_agree(folder: str) -> None:
    """A package, its project file and what is installed state one version."""
    project = tomllib.loads((ROOT / folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    package = __import__(project["name"].replace("-", "_"))

    assert package.__version__ == project["version"] == importlib.metadata.version(project["name"])


@pytest.mark.parametrize("package", ["gift_core", "gift_lora_plugin/src/gift_lora_plugin"])
def test_packages_are_typed(package: str) -> None:
    """Both packages tell type checkers that they carry types."""
    assert (ROOT / package / "py.typed").is_file()
