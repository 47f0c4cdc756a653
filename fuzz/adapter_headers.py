"""The header of an adapter file, taken out, changed and put back with a length and a digest that agree, as anyone can do."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator
from random import Random
from typing import Any

#: How the header of a file of ours starts; the digest follows.
START = b'{"__metadata__":{"digest":"'

#: Where in the metadata the adapter describes itself, as JSON within JSON.
DESCRIPTION = "gift-adapter"

#: What stands in a header after a mutation in the place of something else.
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 10**9, 10**30, 1.5, 1e308),
    *("", "x", "\x00", "\ud800", "a.b", "0.weight", "0" * 64, "../x", "re:.*", "full", "x" * 3000),
    *([], [[]], [None], ["x"], [1, 2], [[1, 2, 3]], [["x", "weight", ["0"]]], [["x", ["weight"], ["0"]]], [["x", "weight", [["0"]]]]),
    *({}, {"a": 1}, {"name": "full"}, {"name": "full", "parameters": None}, {"name": ["full"], "parameters": {}}),
    *({"name": "full", "parameters": "x"}, {"name": "full", "parameters": {"targets": {"a": 1}}}),
    *({"distribution": "x"}, {"distribution": [1], "version": {"a": 1}}, {"distribution": "\x1b[2J", "version": None}),
]
KEYS = ["x", "self", "cls", "name", "rank", "targets", "exclude", ""]


def header_of(data: bytes) -> dict[str, Any]:
    """The header of a sound file."""
    header: dict[str, Any] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return header


def with_header(data: bytes, header: bytes) -> bytes:
    """The file with another header, its length and its digest put right."""
    changed = len(header).to_bytes(8, "little") + header + data[8 + int.from_bytes(data[:8], "little") :]
    place = changed.index(START) + len(START) if header.startswith(START) else len(changed)
    digest = hashlib.sha256(changed[:place] + changed[place + 64 :]).hexdigest().encode() if place < len(changed) else b""
    return changed[:place] + digest + changed[place + 64 :]


def compact(header: object) -> str:
    """JSON as a header has it."""
    return json.dumps(header, separators=(",", ":"))


def described(data: bytes, **says: Any) -> bytes:
    """The file with other values in its adapter's description."""
    header = header_of(data)
    header["__metadata__"][DESCRIPTION] = compact(json.loads(header["__metadata__"][DESCRIPTION]) | says)
    return with_header(data, compact(header).encode())


def mutated_header(data: bytes, random: Random) -> bytes:
    """The header with one to three values changed, left out or added, in the description or in the entries of the tensors."""
    header = header_of(data)
    metadata = header.pop("__metadata__")
    if random.random() < 0.7:
        metadata[DESCRIPTION] = compact(_mutated(json.loads(metadata[DESCRIPTION]), random))
    else:
        header = _mutated(header, random)
    return compact({"__metadata__": metadata, **header}).encode()


def _mutated(value: Any, random: Random) -> Any:
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        *way, last = random.choice([place for place in _places(value) if place] or [()]) or [None]
        if last is None:
            return value
        holder = value
        for part in way:
            holder = holder[part]
        chance = random.random()
        if chance < 0.6:
            holder[last] = copy.deepcopy(random.choice(VALUES))
        elif chance < 0.75:
            del holder[last]
        elif isinstance(holder, dict):
            holder[random.choice(KEYS)] = copy.deepcopy(random.choice(VALUES))
        else:
            holder.insert(random.randrange(len(holder) + 1), copy.deepcopy(random.choice(VALUES)))
    return value


def _places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield at
    for part in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from _places(value[part], (*at, part))
