"""Copies and pickles of a model that computes as its base just now: they are of the tuned model.

`tuning_disabled` takes a model apart and knows how to put it together again, but a copy made meanwhile leaves the context behind. So it
carries the way back with it, and goes it as soon as it is complete.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from gift_core.record import Tuning, tuning_of
from gift_core.reparameterization import class_from, class_parts, refresh_caches
from gift_core.structure import Change, Snapshot, undo


def exchange_values(tuning: Tuning) -> None:
    """Swap the current values with the originals: pointers move, data does not."""
    for original in tuning.originals:
        if (tensor := original.current()) is not None:
            value = tensor.data
            tensor.data = original.value.to(tensor.device, tensor.dtype)
            original.value = value


def copy_as_tuned(root: nn.Module, tuned: Snapshot) -> None:
    """Let copies and pickles of ``root``, which computes as its base now, be of the model in the snapshot; restoring it ends that."""
    root.__dict__[_REDUCE] = _ReducesAsTuned(root, tuned)


#: What `copy` and `pickle` ask an object for; they ask the object itself before its class.
_REDUCE = "__reduce_ex__"


class _ReducesAsTuned:
    def __init__(self, root: nn.Module, tuned: Snapshot) -> None:
        self.root = root
        self.tuned = tuned

    def __call__(self, protocol: Any) -> tuple[Any, ...]:
        reduced: Any = type(self.root).__reduce_ex__(self.root, protocol)
        make, arguments, state = reduced[:3]
        own = {key: value for key, value in state.items() if value is not self}
        changes = self.tuned.changes_since()
        return _make_asleep, (make, arguments), (own, _WayBack.of(self.root, changes, self.tuned.flags))


@dataclasses.dataclass
class _WayBack:
    """From the base to the tuned model. A generated class cannot be pickled, so that classes are held in parts."""

    root: nn.Module
    changes: list[Change]
    classes: list[tuple[nn.Module, Any]]
    flags: list[tuple[nn.Module, str, bool]]

    @classmethod
    def of(cls, root: nn.Module, changes: list[Change], flags: list[tuple[nn.Module, str, bool]]) -> _WayBack:
        classes = [(change.module, class_parts(change.cls)) for change in changes if change.cls is not None]
        return cls(root, list(map(_only_back, changes)), classes, flags)

    def go(self, root: nn.Module) -> None:
        if root is not self.root:
            return  # a shallow copy, whose modules are those of the model itself
        undo(self.changes)
        for module, parts in self.classes:
            object.__setattr__(module, "__class__", class_from(parts))
        refresh_caches(root)
        Snapshot([], self.flags).restore_flags()
        exchange_values(tuning_of(root))


def _only_back(change: Change) -> Change:
    """What of a change is needed to undo it, without what makes itself anew and cannot be pickled."""
    attributes = {key: (old, None) for key, (old, _) in change.attributes.items() if key not in (_REDUCE, "_flat_weight_refs")}
    entries = {place: {key: (old, None) for key, (old, _) in pairs.items()} for place, pairs in change.entries.items()}
    return Change(change.module, None, attributes, entries, change.order)


def _make_asleep(make: Any, arguments: tuple[Any, ...]) -> nn.Module:
    root: nn.Module = make(*arguments)
    object.__setattr__(root, "__class__", _asleep_class(type(root)))
    return root


class _Asleep:
    """A copy without its state; given that, it has everything to become the tuned model."""

    _awake: type[nn.Module]

    def __setstate__(self, state: tuple[dict[str, Any], _WayBack]) -> None:
        own, way_back = state
        root: Any = self
        object.__setattr__(root, "__class__", self._awake)
        root.__setstate__(own)
        way_back.go(root)


def _asleep_class(cls: type[nn.Module]) -> type[nn.Module]:
    return type(cls.__name__, (_Asleep, cls), {"_awake": cls})
