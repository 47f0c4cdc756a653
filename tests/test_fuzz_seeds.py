"""The fuzz targets over their seeds, without a fuzzer: what was found once stays found."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz_targets import TARGETS

from gift_core import read_adapter_info
from gift_core.errors import StrategyFileError
from gift_core.strategy_file import strategy_from_file

SEEDS = Path(__file__).parent.parent / "fuzz" / "seeds"
FOUND = sorted(SEEDS.glob("*/*"))
MEGABYTE = 2**20

#: As long as a strategy file may be, of what once took time by the square of its length.
LONG = {
    "key of many parts": "a." * (MEGABYTE // 2 - 8) + "a = 1\n",
    "quoted key of many parts": '"\\"" . ' * (MEGABYTE // 7 - 8) + "a = 1\n",
    "key behind a long string": 'x = { a = """\n""", ' + "b." * (MEGABYTE // 2 - 40) + 'b = "1" }',
    "quotes without end": 'x = """' + '\\"""' * (MEGABYTE // 4 - 8) + "\\",
    "quotes in quotes": "x = " + "'\"" * (MEGABYTE // 2 - 8),
    "table of many parts": "[" + "a." * (MEGABYTE // 2 - 8) + "a]\n",
    "list behind spaces": "x = [\n[" + " " * (MEGABYTE - 20) + '"x" ],\n]\n',
    "one long word": "a" * (MEGABYTE - 10) + " = 1\n",
    "many values": '{"a": [' + "[], " * (MEGABYTE // 4 - 8) + "[]]}",
    "many lines": '{"a": [' + "1,\n" * (MEGABYTE // 3 - 8) + "1]}",
}


@pytest.mark.parametrize("seed", FOUND, ids=lambda seed: f"{seed.parent.name}-{seed.name}")
def test_every_seed_is_survived(seed: Path) -> None:
    """Whatever a stranger wrote, only errors of GIFt leave, and the model is as it was."""
    TARGETS[seed.parent.name](seed.read_bytes())


@pytest.mark.parametrize("name", ["sound-full", "sound-low-rank"])
def test_the_sound_seeds_are_taken(name: str) -> None:
    """The files that the fuzzer starts from pass every check, so that what it makes of them gets far."""
    assert read_adapter_info(SEEDS / "adapter_file" / name).strategy


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.toml", "\n\nx = " + "9" * 5000, "it is no TOML"),
        ("a.toml", "\n\n" + "a." * 60 + "a = 1", "line 3: a key has more than 50 parts"),
        ("a.toml", "\n\n" + "a." * 50 + "a = 1", "line 3: a key has more than 50 parts"),
        ("a.toml", "\n\n" + "x." * 49 + "a = 1", "line 3: there is no key 'x'"),
        ("a.toml", "x = [\n'" + "a." * 60 + "']", "line 1: there is no key 'x'"),
        ("a.toml", 'x = """\n' + "a." * 60 + '"""', "line 1: there is no key 'x'"),
        ("a.toml", "x = '''\n" + "a." * 60 + "''' # " + "a." * 60, "line 1: there is no key 'x'"),
        ("a.toml", 'x = { a = """\n""", ' + "b." * 60 + 'b = "1" }', "line 2: a key has more than 50 parts"),
        ("a.json", '{"a": ' + "[" * 900 + "]" * 900 + "}", "a.json"),
        ("a\0.toml", None, "cannot be read"),
        ("\ud800.json", None, "cannot be read"),
    ],
)
def test_findings_are_told(name: str, text: str | None, says: str, tmp_path: Path) -> None:
    """A strategy file or path that once raised a foreign error, or took forever, is refused as what it is."""
    if text is not None:
        (tmp_path / name).write_text(text)

    with pytest.raises(StrategyFileError, match=says):
        strategy_from_file(tmp_path / name)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
def test_long_strategy_files_take_no_square_of_time(text: str) -> None:
    """A strategy file of the greatest length allowed is read or refused, not pondered for hours."""
    TARGETS["strategy_file"](text.encode())
