"""Which installed packages a user of both projects has: what they require, and what that requires, and so on."""

from __future__ import annotations

import importlib.metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

OURS = ("gift-core", "gift-lora-plugin")


def closure(roots: tuple[str, ...] = OURS) -> dict[str, set[str]]:
    """Each package that the roots need here, without their extras, by name, with the names of those that it needs itself."""
    found: dict[str, set[str]] = {}
    done: set[tuple[str, str]] = set()
    waiting = [(str(canonicalize_name(root)), "") for root in roots]
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in done:
            continue
        done.add((name, extra))
        needed = [one for one in _requirements(name) if one.marker is None or one.marker.evaluate({"extra": extra})]
        found.setdefault(name, set()).update(str(canonicalize_name(one.name)) for one in needed)
        waiting += [(str(canonicalize_name(one.name)), wanted) for one in needed for wanted in ("", *one.extras)]
    return found


def installed() -> dict[str, str]:
    """The version of every installed package, by name; ours are left out."""
    every = {str(canonicalize_name(one.metadata["Name"])): one.version for one in importlib.metadata.distributions()}
    return {name: version for name, version in sorted(every.items()) if name not in OURS}


def _requirements(name: str) -> list[Requirement]:
    try:
        return [Requirement(text) for text in importlib.metadata.requires(name) or []]
    except importlib.metadata.PackageNotFoundError:
        return []  # kept by name: whoever looks it up will say that it is missing
