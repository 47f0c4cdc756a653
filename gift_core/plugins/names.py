"""Names of plugins: when two spellings are one name, which names are near, and what a user's name stands for."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

#: The distribution whose names no other can take.
CORE = "gift-core"


def normalise(distribution: str) -> str:
    """The form in which two spellings of one distribution's name are equal, as in ``Gift_Core`` and ``gift-core``."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def nearest(name: str, names: Iterable[str]) -> list[str]:
    """Up to three of the names, the most similar first."""
    return difflib.get_close_matches(name, sorted(set(names)), n=3, cutoff=0.5)


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: a question with the nearest ones, or a full stop."""
    similar = nearest(name, names)
    return f"; did you mean {' or '.join(map(repr, similar))}?" if similar else "."


def is_called(asked: str, distribution: str, name: str) -> bool:
    """Whether ``name`` or ``distribution:name``, as a user writes it, stands for an entry of a distribution."""
    qualifier, colon, bare = asked.rpartition(":")
    return name == bare and (not colon or normalise(distribution) == normalise(qualifier))


def is_near_miss(name: str, official: str) -> bool:
    """Whether a name could be taken for another: it differs in case, in separators, or by one letter."""
    if name == official:
        return False
    ours, theirs = (re.sub(r"[-_.\s]", "", text).casefold() for text in (name, official))
    return ours == theirs or (min(len(ours), len(theirs)) > 3 and _one_apart(ours, theirs))


def _one_apart(left: str, right: str) -> bool:
    if len(left) == len(right):
        different = [at for at in range(len(left)) if left[at] != right[at]]
        swapped = len(different) == 2 and [left[at] for at in different] == [right[at] for at in reversed(different)]
        return len(different) == 1 or swapped
    short, long = sorted((left, right), key=len)
    return len(long) - len(short) == 1 and any(long[:at] + long[at + 1 :] == short for at in range(len(long)))
