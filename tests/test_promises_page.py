"""docs/promises.md: each promise is held by tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "promises.md"
REFERENCE = re.compile(r"`([\w/]+\.py)::(\w+)`")


def promises() -> list[str]:
    """The lines of the page's tables, without their heads."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    return [line for line in lines if not line.startswith(("| promise", "|---"))]


def test_every_promise_names_a_test() -> None:
    """No line of the page is without a test."""
    assert len(promises()) > 60
    assert not [line for line in promises() if not REFERENCE.search(line)]


@pytest.mark.parametrize("path", sorted({path for path, _ in REFERENCE.findall(PAGE.read_text(encoding="utf-8"))}))
def test_the_tests_named_exist(path: str) -> None:
    """Each file that the page names is there, and has the tests that the page names in it."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    tests = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    named = {name for there, name in REFERENCE.findall(PAGE.read_text(encoding="utf-8")) if there == path}

    assert all(name.startswith("test_") for name in named)
    assert not named - tests
