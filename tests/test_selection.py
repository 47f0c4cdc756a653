from __future__ import annotations

import fnmatch
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gift_core.errors import GiftError, PatternError
from gift_core.selection import MAX_REGEX_LENGTH, as_patterns, compile_pattern, layer_index_of

NAMES = ["conv1", "layer1.0.conv1", "layer4.1.bn2", "layer4", "blocks.7.attn.qkv", "blocks.17.attn", "head", ""]


def matching(pattern: str, names: list[str] = NAMES, module: nn.Module | None = None) -> list[str]:
    """The names that a pattern matches, for one module."""
    matches = compile_pattern(pattern)
    return [name for name in names if matches(name, module or nn.ReLU())]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("conv1", ["conv1"]),
        ("*conv1", ["conv1", "layer1.0.conv1"]),
        ("*.conv1", ["layer1.0.conv1"]),
        ("layer4.*", ["layer4.1.bn2"]),
        ("layer4*", ["layer4.1.bn2", "layer4"]),
        ("layer[!4].*", ["layer1.0.conv1"]),
        ("blocks.?.attn*", ["blocks.7.attn.qkv"]),
        ("CONV1", []),
        ("re:layer[34]\\..*", ["layer4.1.bn2"]),
        ("re:layer4", ["layer4"]),
        ("re:.*conv.", ["conv1", "layer1.0.conv1"]),
        ("layer:7", ["blocks.7.attn.qkv"]),
        ("layer:0-7", ["layer1.0.conv1", "layer4.1.bn2", "blocks.7.attn.qkv"]),
        ("layer:7-", ["blocks.7.attn.qkv", "blocks.17.attn"]),
        ("layer:0,17", ["layer1.0.conv1", "blocks.17.attn"]),
        ("layer: 0 , 2 - 8 ", ["layer1.0.conv1", "blocks.7.attn.qkv"]),
        ("layer:5-2", []),
    ],
)
def test_each_kind_of_pattern_selects_by_the_full_name(pattern: str, names: list[str]) -> None:
    """Globs, regular expressions and layer ranges cover the whole dotted name, and case counts."""
    assert matching(pattern) == names


def test_types_match_subclasses_by_name() -> None:
    """``type:`` looks at the class and its bases, as a glob."""

    class Mine(nn.Conv2d): ...

    module = Mine(1, 1, 1)

    for pattern in ("type:Mine", "type:Conv2d", "type:Conv*", "type:Module"):
        assert matching(pattern, ["x"], module) == ["x"]
    for pattern in ("type:Conv1d", "type:conv2d", "type:Linear"):
        assert matching(pattern, ["x"], module) == []


@given(st.from_regex(r"[a-c.*?]{1,6}", fullmatch=True), st.from_regex(r"[a-c.]{0,6}", fullmatch=True))
def test_a_pattern_without_a_kind_is_a_glob(pattern: str, name: str) -> None:
    """For any text the answer is the standard library's, case counting."""
    assert compile_pattern(pattern)(name, None) is fnmatch.fnmatchcase(name, pattern)


def test_an_unknown_kind_is_a_glob() -> None:
    """A colon alone makes no kind: names may hold one."""
    assert matching("a:b", ["a:b"]) == ["a:b"]


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("", "''"),
        (None, "None"),
        (3, "3"),
        ("re:[", "re:["),
        ("re:", "re:"),
        ("type:", "type:"),
        ("layer:", "layer:"),
        ("layer:x", "layer:x"),
        ("layer:-1", "layer:-1"),
        ("layer:1,,2", "layer:1,,2"),
        ("layer:²", "layer:²"),
        ("re:" + "a" * (MAX_REGEX_LENGTH + 1), str(MAX_REGEX_LENGTH)),
    ],
)
def test_an_unreadable_pattern_is_named(pattern: object, says: str) -> None:
    """A pattern that cannot be read is a PatternError, a GiftError and a ValueError, that repeats it."""
    with pytest.raises(PatternError, match=re.escape(says)) as caught:
        compile_pattern(pattern)  # type: ignore[arg-type]

    assert isinstance(caught.value, GiftError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("given", "read"),
    [(None, None), ("conv1", ("conv1",)), (["a", "b"], ("a", "b")), (("a",), ("a",)), (iter(["a"]), ("a",))],
)
def test_patterns_come_alone_or_as_a_list(given: object, read: object) -> None:
    """None stays None, one pattern and any iterable of them become a tuple."""
    assert as_patterns(given, "targets") == read  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [[], (), 7, [""], ["re:["], [None], [["a"]]])
def test_a_bad_list_of_patterns_is_refused(bad: object) -> None:
    """An empty list is no silent "everything" or "nothing", and each item is checked when it is given."""
    with pytest.raises(PatternError):
        as_patterns(bad, "targets")  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [[], 7])
def test_the_argument_is_named(bad: object) -> None:
    """The message says which argument is meant."""
    with pytest.raises(PatternError, match="exclude"):
        as_patterns(bad, "exclude")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "index"), [("blocks.7.attn.2", 7), ("0", 0), ("layer4.bn", None), ("", None), ("a.²", None), ("a.007", 7)]
)
def test_the_layer_index_is_the_first_number_of_a_name(name: str, index: int | None) -> None:
    """Only a whole part of the dotted name counts."""
    assert layer_index_of(name) == index


def test_a_regular_expression_may_have_a_thousand_characters() -> None:
    """One of a thousand characters is read, and one of a thousand and one is refused."""
    assert matching("re:" + "a?" * 500, ["a" * 500, "b"]) == ["a" * 500]
    with pytest.raises(PatternError, match="of 1001 characters is refused; 1000 are allowed"):
        compile_pattern("re:" + "a" * 1001)
