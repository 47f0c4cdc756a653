"""The Python code that the READMEs and the guide show, run as a reader would run it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
READMES = ("README.md", "gift_lora_plugin/README.md", "docs/guide.md")
PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("name", READMES)
def test_readme_code_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python blocks of a README run from top to bottom, as one program, in an empty folder."""
    text = (ROOT / name).read_text(encoding="utf-8")
    blocks = list(PYTHON_BLOCK.finditer(text))
    monkeypatch.chdir(tmp_path)

    assert blocks, f"{name} shows no Python code"
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks:
        # Blank lines in front make a traceback show the line of the README.
        above = "\n" * text.count("\n", 0, block.start(1))
        exec(compile(above + block[1], str(ROOT / name), "exec"), namespace)
