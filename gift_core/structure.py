"""What a model is made of, as something that can be compared and put back.

A snapshot holds, for every module of a tree, its class and its attributes (parameters, buffers, children, hooks, flags, plain values),
and for every parameter its ``requires_grad``. It copies no tensor: values are the business of whoever changes them.

Undo works from the difference of two snapshots. It touches only what changed between them, so that what a user did since (a hook, a
mode, a move to another device) stays.
"""

from __future__ import annotations

import dataclasses
import enum
import operator
from collections.abc import Iterable, Mapping, MutableMapping, MutableSet
from typing import Any, NamedTuple

from torch import nn

from gift_core.iterator import walk_modules

_CONTAINERS = (dict, set, list)


class Absent(enum.Enum):
    """Stands for "there was nothing of that name"; an enum, so that copies and pickles stay identical to it."""

    ABSENT = enum.auto()


ABSENT = Absent.ABSENT


class _Module(NamedTuple):
    """One module: its class, its attributes, and of the containers among them a copy where one holds something."""

    module: nn.Module
    cls: type
    attributes: dict[str, Any]
    contents: list[tuple[Any, Any]]
    empty: list[Any]

    @classmethod
    def of(cls, module: nn.Module) -> _Module:
        attributes = module.__dict__.copy()
        held = [value for value in attributes.values() if isinstance(value, _CONTAINERS)]
        # most are empty, and a model has millions of them: they are not copied
        contents = [(value, value.copy()) for value in held if value]
        return cls(module, type(module), attributes, contents, [value for value in held if not value])


@dataclasses.dataclass
class Change:
    """What became different about one module: its class before, if it has another now, and (before, after) pairs by name.

    Each side of a pair may be `ABSENT`.
    """

    module: nn.Module
    cls: type | None
    attributes: dict[str, tuple[Any, Any]]
    entries: dict[str, dict[Any, tuple[Any, Any]]]
    order: dict[str, list[Any]]


@dataclasses.dataclass
class Snapshot:
    """The structure of a tree of modules at one moment."""

    modules: list[_Module]
    flags: list[tuple[nn.Module, str, bool]]

    def changes_since(self) -> list[Change]:
        """What is different now from when the snapshot was taken, for the modules it holds."""
        return [change for change in map(_compare, self.modules) if change is not None]

    def restore(self) -> None:
        """Put back the structure and the flags, to the state of the snapshot."""
        undo(self.changes_since())
        self.restore_flags()

    def restore_flags(self) -> None:
        """Put back each parameter's ``requires_grad``, by name, so that parameters replaced since are reached."""
        for module, name, requires_grad in self.flags:
            parameter = module._parameters.get(name)
            if parameter is not None and parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)


def take_snapshot(root: nn.Module) -> Snapshot:
    """Record the structure of ``root`` and everything below it."""
    modules = list(dict.fromkeys(module for _, module in walk_modules(root)))
    flags = [(m, name, p.requires_grad) for m in modules for name, p in m._parameters.items() if p is not None]
    return Snapshot([_Module.of(module) for module in modules], flags)


def added(before: Mapping[Any, Any], after: Mapping[Any, Any]) -> dict[Any, Any] | None:
    """What stands in ``after`` behind all that ``before`` held, the usual change; None if anything else is different."""
    # compared in C, because this runs several times for every module of a model
    size, names = len(before), list(after)
    if len(names) < size or not all(map(operator.is_, before.values(), after.values())):
        return None
    if not all(map(operator.is_, before, names)):
        return None
    return {name: after[name] for name in names[size:]}


def undo(changes: Iterable[Change]) -> None:
    """Reverse changes; whatever they do not mention stays as it is now."""
    for change in changes:
        if change.cls is not None:
            object.__setattr__(change.module, "__class__", change.cls)  # nn.Module's own way takes six times as long
        for key, (old, _) in change.attributes.items():
            _put(change.module.__dict__, key, old)
        for key, entries in change.entries.items():
            _undo_container(change.module.__dict__[key], entries, change.order[key])


def _compare(old: _Module) -> Change | None:
    module, now = old.module, old.module.__dict__
    cls = old.cls if type(module) is not old.cls else None
    attributes = {} if _is_same(old.attributes, now) else _difference(old.attributes, now)
    touched = [(held, copied) for held, copied in old.contents if not _is_same(copied, held)]
    if any(old.empty):
        touched += [(held, type(held)()) for held in filter(None, old.empty)]
    if not (cls or attributes or touched):
        return None
    change = Change(module, cls, attributes, {}, {})
    for held, copied in touched:
        name = next(key for key, value in old.attributes.items() if value is held)
        change.entries[name], change.order[name] = _difference(copied, held), list(copied)
    return change


def _is_same(before: Any, after: Any) -> bool:
    """Whether a container holds what it held, in the same order."""
    if isinstance(before, set):
        return bool(before == after)
    if len(before) != len(after) or not all(map(operator.is_, before, after)):
        return False
    return isinstance(before, list) or all(map(operator.is_, before.values(), after.values()))


def _difference(before: Any, after: Any) -> dict[Any, tuple[Any, Any]]:
    """What is different, as (before, after) by key; nothing where it is the order alone."""
    if isinstance(before, list):
        return {"list": (list(before), list(after))}
    if isinstance(before, set):
        return {key: (key in before, key in after) for key in before ^ after}
    if (new := added(before, after)) is not None:
        return {key: (ABSENT, value) for key, value in new.items()}
    changed = {key: (old, now) for key, old in before.items() if (now := after.get(key, ABSENT)) is not old}
    return changed | {key: (ABSENT, value) for key, value in after.items() if key not in before}


def _undo_container(container: Any, entries: dict[Any, tuple[Any, Any]], order: list[Any]) -> None:
    if isinstance(container, list):
        container[:] = entries["list"][0]
    elif isinstance(container, MutableSet):
        for key, (was_in, _) in entries.items():
            (container.add if was_in else container.discard)(key)
    else:
        for key, (old, _) in entries.items():
            _put(container, key, old)
        reorder(container, order)


def _put(mapping: MutableMapping[Any, Any], key: Any, value: Any) -> None:
    if value is ABSENT:
        mapping.pop(key, None)
    else:
        mapping[key] = value


def reorder(container: MutableMapping[Any, Any], order: list[Any]) -> None:
    """Put the keys of a registry into an order, others after them: it is the order of the state dict's keys."""
    first = {key: container[key] for key in order if key in container}
    rest = {key: value for key, value in container.items() if key not in first}
    if list(container) != [*first, *rest]:
        container.clear()
        container.update(first | rest)
