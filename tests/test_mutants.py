"""Mutation testing: what is changed, which changes are drawn, and what docs/mutants.md says of the result."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("cosmic_ray", reason="needs cosmic-ray: pip install -e '.[checks]'")

from mutants import BAR, ENOUGH, PAGE, TESTS, files, page, survivors, table
from mutations import change, meaning, places, sample

ROOT = Path(__file__).parent.parent

SOURCE = '''
from typing import TYPE_CHECKING

Number = int | float
if TYPE_CHECKING:
    LIMIT = 1 + 1


def larger(a: int | None, b: int = 3) -> int | None:
    """The larger."""
    for one in (a, b):
        if one == 7:
            raise ValueError(f"{one + 1} is too much")
    return [x for x, _ in zip([a], [b], strict=True)][0] if a > b else -b


def other(a):
    return not a
'''


def test_only_what_runs_is_changed() -> None:
    """No mutant differs from the original in nothing but a type, a message's text or ``strict`` of ``zip``; each is a program."""
    drawn = sample("larger", SOURCE, 1, 1, 1)

    assert {one.function for one in drawn} == {"", "larger", "other"}
    assert all(meaning(one.source) not in (None, meaning(SOURCE)) for one in drawn)
    assert {"if one == 7:", "return not a"} <= {one.before for one in drawn}
    for kept in ("Number = int | float", "LIMIT = 1 + 1", "a: int | None", "-> int | None:", "{one + 1} is", "strict=True"):
        assert all(kept in one.source for one in drawn)


@pytest.mark.parametrize(
    ("text", "other", "same"),
    [
        ("x: int | None = 1", "x: int & None = 1", True),
        ("x: int = 1", "x: int = 2", False),
        ("raise E(f'{a + b}')", "raise E(f'{a - b}')", True),
        ("raise E(a + b)", "raise E(a - b)", False),
        ("y = f'{a + b}'", "y = f'{a - b}'", False),
        ("zip(a, b, strict=True)", "zip(a, b, strict=False)", True),
        ("sort(a, reverse=True)", "sort(a, reverse=False)", False),
        ("x = 1  # one", "x = 1  # two", True),
    ],
)
def test_what_a_program_means(text: str, other: str, same: bool) -> None:
    """Two programs mean the same if they differ only in what the machine does not run or no test could see."""
    assert (meaning(text) == meaning(other)) is same


@pytest.mark.parametrize("text", ["x = = 1", "x is 'text'"])
def test_what_is_no_program_has_no_meaning(text: str) -> None:
    """A text that does not compile, or compiles with a warning, is no mutant."""
    assert meaning(text) is None


def test_a_place_counts_once() -> None:
    """Whatever the number of operators that can replace it, each place gives one mutant at the most."""
    found = places("def f(a, b):\n    return a + b == 3\n")

    assert [(place.kind, len(place.ways) > 1) for place in found] == [
        ("ReplaceBinaryOperator", True),
        ("ReplaceComparisonOperator", True),
        ("NumberReplacer", True),
    ]


def test_the_sample_follows_from_the_seed() -> None:
    """The same seed draws the same mutants, another seed others."""
    first, again, other = (sample("larger", SOURCE, seed, 4, 2) for seed in (1, 1, 2))

    assert first == again != other


def test_an_edit_elsewhere_leaves_the_sample() -> None:
    """Lines added before a function, and a new function after it, change no mutant of its own."""
    edited = f"import os\n\n{SOURCE}\n\ndef third(a):\n    return a\n"

    drawn, after = (sample("larger", text, 1, 2, 5) for text in (SOURCE, edited))

    assert [(one.function, one.operator, one.before) for one in drawn] == [(one.function, one.operator, one.before) for one in after]


def test_a_change_is_shown_with_its_line() -> None:
    """What differs is shown with what stands around it, no more than the line."""
    assert change("x\na = b + c\ny", "x\na = b - c\ny") == ("a = b + c", "a = b - c")
    assert change("@cache\ndef f():\n", "def f():\n") == ("@cache\ndef f():", "def f():")
    words = " ".join(f"word{number}" for number in range(30))
    assert change(words, words.replace("word15", "other")) == tuple(
        f"… word12 word13 word14 {word} word16 word17 word18 …" for word in ("word15", "other")
    )


RESULTS = {
    "record": [
        {"function": "_once", "before": "a in b", "after": "a not in b", "killed": True},
        {"function": "Original.current", "before": "a < b", "after": "a <= b", "killed": False},
    ],
    "guard": [{"function": "", "before": "X = 1", "after": "X = 2", "killed": False}],
}


def test_the_counts() -> None:
    """Each module has its counts, and the last line has all of them."""
    assert table(RESULTS)[2:] == ["| record | 2 | 1 | 1 | 50 % |", "| guard | 1 | 0 | 1 | 0 % |", "| all | 3 | 1 | 2 | 33 % |"]


def test_reasons_stay_with_their_survivors() -> None:
    """A new result keeps the reasons of the survivors that are on the page already, and says which have none."""
    known = "- `record.Original.current`: `a < b` → `a <= b`. They are never equal."
    text = f"# Mutants\n\n## Result\n\n{known}\n- `gone.f`: `a` → `b`. Gone.\n"

    after = page(text, RESULTS)

    assert after.startswith("# Mutants\n\n## Result\n") and "gone" not in after
    assert known in after.splitlines()
    assert "- `guard`: `X = 1` → `X = 2`. Not looked at yet." in after.splitlines()
    assert page(after, RESULTS) == after
    assert len(survivors(RESULTS)) == 2


def test_every_module_has_tests_that_exist() -> None:
    """The modules that are mutated are there, and so are the tests that they meet."""
    for module, (first, more) in TESTS.items():
        assert (ROOT / "gift_core" / f"{module}.py").is_file()
        assert first and all((ROOT / file).is_file() for file in files(f"{first} {more}"))


PROBE = """
import sys
from pathlib import Path
from forked import ForkedTests

folder = Path(sys.argv[1])
tests = ForkedTests(folder / "copy", Path(sys.argv[2]))
for name in ("good", "bad", "slow", "broken"):
    outcome = tests.run([f"tests/test_{name}.py"], 3 if name == "slow" else 60)
    print(name, outcome.passed, outcome.reason)
(folder / "copy" / "gift_core").rename(folder / "gift_core")
sys.path.append(str(folder))
try:
    tests.run(["tests/test_good.py"], 60)
except RuntimeError as error:
    print(error)
"""


def test_tests_run_against_the_copy_alone(tmp_path: Path) -> None:
    """A fork imports the copy afresh; a failure, a hang and a file that cannot be read are told; another gift_core is an error."""
    files = {
        "gift_core/__init__.py": "VALUE = 3",
        "pyproject.toml": "[tool.pytest.ini_options]\n",
        "tests/test_good.py": "def test_it():\n    import gift_core\n    assert gift_core.VALUE == 3",
        "tests/test_bad.py": "import gift_core\ndef test_it():\n    assert gift_core.VALUE == 4",
        "tests/test_slow.py": "import gift_core, time\ndef test_it():\n    time.sleep(100)",
        "tests/test_broken.py": "import gift_core.absent",
    }
    for name, text in files.items():
        place = tmp_path / "copy" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)

    environment = os.environ | {"PYTHONPATH": str(ROOT / "tools")}
    command = [sys.executable, "-c", PROBE, str(tmp_path), str(ROOT)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200)

    assert done.stdout.splitlines()[:4] == [
        "good True ",
        "bad False tests/test_bad.py::test_it",
        "slow False no end within 3 s",
        "broken False tests/test_broken.py",
    ], done.stderr
    assert "another gift_core than that in" in done.stdout.splitlines()[4]


def test_the_page_says_enough() -> None:
    """docs/mutants.md has counts that add up, enough of them, over the bar, and a reason for each survivor."""
    text = PAGE.read_text(encoding="utf-8").split("## Result")[1]
    rows = re.findall(r"^\| ([\w/]+) \| (\d+) \| (\d+) \| (\d+) \|", text, re.MULTILINE)
    counts = {name: [int(number) for number in numbers] for name, *numbers in rows}
    tried, killed, survived = counts.pop("all")
    listed = [line for line in text.splitlines() if line.startswith("- `") and "` → `" in line]

    assert set(counts) <= set(TESTS)
    assert [tried, killed, survived] == [sum(column) for column in zip(*counts.values(), strict=True)]
    assert tried >= ENOUGH and 100 * killed >= BAR * tried and survived == len(listed)
    assert not [line for line in listed if "Not looked at" in line or len(line.split("`. ", 1)[1]) < 20]
