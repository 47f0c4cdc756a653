"""The curated index of plugins."""

from __future__ import annotations

import importlib.util
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "plugins"


@pytest.fixture
def builder() -> ModuleType:
    """The program that builds the page."""
    spec = importlib.util.spec_from_file_location("build_index", FOLDER / "build_index.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_page_is_what_the_table_gives(builder: ModuleType) -> None:
    """index.md was built from the index.toml beside it."""
    page = (FOLDER / "index.md").read_text(encoding="utf-8")

    assert page == builder.render(builder.read_plugins())


def test_entries_name_what_the_projects_declare(builder: ModuleType) -> None:
    """An entry with a folder lists the distribution, the strategies and the licence of the project there."""
    for plugin in builder.read_plugins():
        if plugin["folder"]:
            place = ROOT if plugin["folder"] == "gift_core" else ROOT / plugin["folder"]
            project = tomllib.loads((place / "pyproject.toml").read_text(encoding="utf-8"))["project"]

            assert project["name"] == plugin["distribution"]
            assert sorted(project["entry-points"]["gift.strategies"]) == plugin["strategies"]
            assert project["license"] == plugin["licence"]


@pytest.mark.parametrize(
    ("change", "message"),
    [('folder = "nowhere"\nsource = ""', "no folder 'nowhere'"), ('folder = ""\nsource = ""', "one of the two"), ("", "has the keys")],
)
def test_wrong_entry_is_refused(builder: ModuleType, tmp_path: Path, change: str, message: str) -> None:
    """An entry that leads nowhere, or lacks a key, is an error that names its distribution."""
    entry = '[[plugin]]\ndistribution = "gift-x"\nstrategies = ["x"]\nsummary = ""\npaper = ""\nlicence = "MIT"\n'
    (tmp_path / "index.toml").write_text(entry + change)

    with pytest.raises(ValueError, match=f"gift-x.*{message}"):
        builder.read_plugins(tmp_path / "index.toml")
