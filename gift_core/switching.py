"""Arrangements: what stands where in a model under one adapter, and exchanging one arrangement for another.

Switching moves pointers, never values. What is out of the model meanwhile catches up when it comes back: with a move to another device
or dtype, and with the training mode, of the module that it belongs to.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gift_core.errors import StateError
from gift_core.record import RECORD_ATTRIBUTE, Original, Tuning, named_tensors
from gift_core.reparameterization import refresh_caches
from gift_core.structure import ABSENT, Change, reorder

#: Device and dtype of a module's first tensor, None where there is none, and its training mode.
World = tuple[torch.device | None, torch.dtype | None, bool]


class Slot:
    """One place of a model that differs under some adapter, with what the base has there while an adapter is in use."""

    __slots__ = ("base", "base_world", "is_held", "is_users", "key", "mapping", "place")

    def __init__(self, mapping: Any, key: Any, place: Place) -> None:
        self.mapping = mapping
        self.key = key
        self.place = place
        self.base: Any = ABSENT
        self.base_world: World = place.world()
        self.is_users = False
        self.is_held = False  # whether a strategy's mode stands here now, and not the user's

    def put(self, value: Any) -> None:
        """Let ``value`` stand here; `ABSENT` clears the place."""
        if value is ABSENT:
            self.mapping.pop(self.key, None)
        else:
            self.mapping[self.key] = value


class Place:
    """A module in whose registries something is exchanged, and the tensor that tells where the module is."""

    __slots__ = ("anchor", "key", "module")

    def __init__(self, module: nn.Module, anchor: dict[str, Any], key: str) -> None:
        self.module = module
        self.anchor = anchor
        self.key = key

    def world(self) -> World:
        """Where the module is now."""
        tensor = self.anchor.get(self.key)
        training = self.module.__dict__["training"]  # torch's own lookup of a missing attribute is slow, and this runs per layer
        return (None, None, training) if tensor is None else (tensor.device, tensor.dtype, training)


@dataclasses.dataclass(eq=False)
class Arrangement:
    """What stands where under one adapter; without slots, the base model.

    Attributes:
        slots: the places that differ from the base; ``values`` what stands there, as of the last time the adapter was in use.
        classes: modules that change class: (module, class here, class of the base).
        modes: training flags that the strategy itself sets, with their values.
        orders: registries whose keys are in another order than the base's: (registry, order of the base, order here).
        parked: the place of each value that may have to catch up, by its position.
        worlds: where these places were when the adapter was last in use.
        originals: what the record knows of the base's values: (entry, slot, the value given to it).
    """

    slots: tuple[Slot, ...] = ()
    values: list[Any] = dataclasses.field(default_factory=list)
    classes: tuple[tuple[nn.Module, type, type], ...] = ()
    modes: tuple[tuple[Slot, bool], ...] = ()
    orders: tuple[tuple[dict[Any, Any], list[Any], list[Any]], ...] = ()
    parked: dict[Place, list[int]] = dataclasses.field(default_factory=dict)
    worlds: list[World] = dataclasses.field(default_factory=list)
    originals: list[tuple[Original, Slot, Tensor | None]] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self.entries = [(slot.mapping, slot.key) for slot in self.slots]  # plain pairs, because a switch goes through all of them
        self.members = frozenset(self.slots)
        self._beyond: weakref.WeakKeyDictionary[Arrangement, list[Slot]] = weakref.WeakKeyDictionary()
        self.modules = frozenset(module for module, _, _ in self.classes)
        self.recurrent = tuple({place.module for place in self.parked if isinstance(place.module, nn.RNNBase)})

    def read(self) -> None:
        """Note what stands in the slots now: a load or a move may have replaced it."""
        self.values = [mapping.get(key, ABSENT) for mapping, key in self.entries]
        self.worlds = [place.world() for place in self.parked]

    def beyond(self, other: Arrangement) -> list[Slot]:
        """The slots that another arrangement does not have."""
        if other not in self._beyond:
            self._beyond[other] = [slot for slot in self.slots if slot not in other.members]
        return self._beyond[other]


def switch(source: Arrangement, target: Arrangement) -> None:
    """Exchange one arrangement, which is in use, for another; all or nothing.

    Raises:
        StateError: if the model went to the meta device, to which what was out of it cannot follow.
    """
    is_written = False
    try:
        _leave_modes(source)  # first, so that a mode of the strategy's own is not taken for the user's
        source.read()
        for slot in target.beyond(source):
            slot.base = slot.mapping.get(slot.key, ABSENT)
            slot.base_world = slot.place.world()
        _catch_up(_late_of_the_base(source, target))
        _catch_up(_late(source, target))  # after a module that comes back itself, because it tells where its adapter's tensors belong
        is_written = True
        _write(source, target)
        _enter_modes(target)
    except BaseException:  # the model is on meta, memory ran out, or an interrupt came between two assignments
        if is_written:
            _undo(source, target)
        _enter_modes(source)
        raise


def _undo(source: Arrangement, target: Arrangement) -> None:
    for slot, _ in target.modes:
        if slot.is_held:
            slot.put(slot.base)
            slot.is_held = False
    for slot in source.beyond(target):
        slot.put(slot.base)  # what is taken out altogether comes back in its order
    _write(target, source)


def _write(source: Arrangement, target: Arrangement) -> None:
    _return_base_values(source)
    for slot in source.beyond(target):
        slot.put(slot.base)
    for (mapping, key), value in zip(target.entries, target.values, strict=True):
        if value is ABSENT:
            mapping.pop(key, None)
        else:
            mapping[key] = value
    for module, _, cls in source.classes:
        if module not in target.modules:
            module.__class__ = cls
    for module, cls, _ in target.classes:
        if type(module) is not cls:
            module.__class__ = cls
    for container, order, _ in source.orders:
        reorder(container, order)
    for container, _, order in target.orders:
        reorder(container, order)
    for module in {*source.recurrent, *target.recurrent}:
        refresh_caches(module)
    _show_base_values(target)


def _leave_modes(arrangement: Arrangement) -> None:
    for slot, value in arrangement.modes:
        slot.is_users |= slot.is_held and slot.mapping[slot.key] is not value  # the user's mode is every adapter's from then on
        if slot.is_held and not slot.is_users:
            slot.put(slot.base)
        slot.is_held = False


def _enter_modes(arrangement: Arrangement) -> None:
    # each step may be done again after an interrupt
    for slot, value in arrangement.modes:
        if not slot.is_users:
            if not slot.is_held:
                slot.base = slot.mapping[slot.key]
                slot.is_held = True
            slot.put(value)


# --- the base's own values, of which the record of a tuned model knows


def _show_base_values(arrangement: Arrangement) -> None:
    for at, (original, slot, _) in enumerate(arrangement.originals):
        original.value = slot.base.detach()
        arrangement.originals[at] = (original, slot, original.value)


def _return_base_values(arrangement: Arrangement) -> None:
    # loading a checkpoint of the base gave the record another value
    for original, slot, given in arrangement.originals:
        if given is not None and original.value is not given:
            with torch.no_grad():
                slot.base.copy_(original.value)


# --- catching up


def _late(source: Arrangement, target: Arrangement) -> Iterator[tuple[Any, World, World]]:
    """What of an adapter is about to come back to a place that has moved or changed its mode since: (thing, world then, world now)."""
    known = dict(zip(source.parked, source.worlds, strict=True))
    for (place, positions), then in zip(target.parked.items(), target.worlds, strict=True):
        if (now := known.get(place) or place.world()) != then:
            yield from ((target.values[at], then, now) for at in positions)


def _late_of_the_base(source: Arrangement, target: Arrangement) -> Iterator[tuple[Any, World, World]]:
    """The same for what the base has in place of the adapter that is in use."""
    for slot in source.beyond(target):
        if isinstance(slot.base, (Tensor, nn.Module)) and (now := slot.place.world()) != slot.base_world:
            yield slot.base, slot.base_world, now


def _catch_up(late: Iterable[tuple[Any, World, World]]) -> None:
    for thing, then, now in list(late):
        device = now[0] if now[0] != then[0] else None
        if device is not None and device.type == "meta":
            raise StateError("the model was moved to the meta device, where tensors have no values: move it back before you switch.")
        has_moved = device is not None or now[1] != then[1]
        move = functools.partial(_moved, device=device, then=then[1], now=now[1])
        if isinstance(thing, nn.Module):
            if has_moved:
                thing._apply(move)  # as `to` does, which would make every number complex, or lose the parts of complex ones
            if now[2] != then[2]:
                thing.train(now[2])
        elif isinstance(thing, Tensor) and has_moved:
            _move(thing, move)


def _move(tensor: Tensor, move: Callable[[Tensor], Tensor]) -> None:
    # the object stays, so that optimizers keep their parameters
    if tensor.grad is not None:
        grad = move(tensor.grad.detach())
        tensor.grad = None
        tensor.data = move(tensor.detach())
        tensor.grad = grad
    else:
        tensor.data = move(tensor.detach())


def _moved(tensor: Tensor, *, device: torch.device | None, then: torch.dtype | None, now: torch.dtype | None) -> Tensor:
    return tensor.to(device=device, dtype=tensor.dtype if now is None or now == then else _followed(tensor.dtype, then, now))


def _followed(dtype: torch.dtype, then: torch.dtype | None, now: torch.dtype) -> torch.dtype:
    """The dtype of a tensor whose place went from one dtype to another."""
    if not all(each.is_floating_point or each.is_complex for each in (dtype, now)):
        return dtype
    if now.is_complex != (then is not None and then.is_complex) or now.is_complex == dtype.is_complex:
        return now
    return now.to_real() if now.is_complex else dtype  # real beside complex numbers stays so, as the other way about in `double()`


# --- reading an arrangement off a tuned model


class Surveyor:
    """Finds what tuning changed in one model; the slots of several adapters at one place are the same object."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self._slots: dict[tuple[int, Any], Slot] = {}
        self._places: dict[nn.Module, Place] = {}
        self._added: set[int] = set()  # ids of the tensors that are the adapter's at hand

    def arrangement(self, tuning: Tuning, *, keep_objects: bool) -> Arrangement:
        """The arrangement of a model as enabling left it.

        What trains of the base gets objects of its own for the adapter, and the base its values back.

        Args:
            tuning: the record of the model.
            keep_objects: leave the objects that train to the adapter, so that an optimizer keeps them, and give copies to the base;
                otherwise the base has its own back.
        """
        found: dict[Slot, Any] = {}
        self._added = _added_by(tuning, self.root)
        swapped = self._swap(tuning, keep_objects)  # may run out of memory, so it comes first
        for slot, before, after in self._changed(tuning.changes):
            slot.base, found[slot] = before, after
        record = self._slot(self.root.__dict__, RECORD_ATTRIBUTE, self.root)
        record.base, found[record] = ABSENT, tuning
        originals = []
        for slot, base, own, original in swapped:
            slot.base, found[slot] = base, own
            slot.put(own)
            if original is not None:
                originals.append((original, slot, None))
        arrangement = self._arrangement(tuning, found, originals)
        _show_base_values(arrangement)
        return arrangement

    def _arrangement(self, tuning: Tuning, found: dict[Slot, Any], originals: list[Any]) -> Arrangement:
        modes = {slot: value for slot, value in found.items() if slot.key == "training" and isinstance(value, bool)}
        for slot in modes:
            slot.is_held = True  # by enabling
        slots = [slot for slot in found if slot not in modes]
        parked: dict[Place, list[int]] = {}
        for at, slot in enumerate(slots):
            slot.base_world = slot.place.world()
            if isinstance(found[slot], (Tensor, nn.Module)) or isinstance(slot.base, (Tensor, nn.Module)):
                parked.setdefault(slot.place, []).append(at)
        result = Arrangement(
            slots=tuple(slots),
            classes=tuple((change.module, type(change.module), change.cls) for change in tuning.changes if change.cls is not None),
            modes=tuple(modes.items()),
            orders=tuple(_orders(tuning.changes)),
            parked=parked,
            originals=originals,
        )
        result.read()
        return result

    def _swap(self, tuning: Tuning, keep_objects: bool) -> list[tuple[Slot, Tensor, Tensor, Original | None]]:
        originals = {id(original.current()): original for original in tuning.originals}
        held = [
            (self._slot(module._buffers if buffers else module._parameters, name, module), tensor)
            for buffers in (False, True)
            for _, module, name, tensor in named_tensors(self.root, buffers=buffers)
            if id(tensor) in originals
        ]
        copies = {id(tensor): _copy(tensor) for _, tensor in held}
        result = []
        for slot, tensor in held:
            copied, original = copies[id(tensor)], originals.pop(id(tensor), None)
            base, own = (copied, tensor) if keep_objects else (tensor, copied)
            if original is not None:
                with torch.no_grad():
                    base.copy_(original.value)
                if not original.is_buffer:
                    base.requires_grad_(False)  # as all of the base is while an adapter is in use
            result.append((slot, base, own, original))
        return result

    def _changed(self, changes: Iterable[Change]) -> Iterator[tuple[Slot, Any, Any]]:
        for change in changes:
            own = change.module.__dict__
            for key, (before, after) in change.attributes.items():
                yield self._slot(own, key, change.module), before, after
            for attribute, entries in change.entries.items():
                view = _view(change.attributes.get(attribute, (own.get(attribute),))[0])
                for key, (before, after) in entries.items():
                    yield self._slot(view, key, change.module), _value(view, before), _value(view, after)

    def _slot(self, mapping: Any, key: Any, module: nn.Module) -> Slot:
        identity = (id(getattr(mapping, "container", mapping)), key)
        if identity not in self._slots:
            self._slots[identity] = Slot(mapping, key, self._place(module))
        return self._slots[identity]

    def _place(self, module: nn.Module) -> Place:
        if module not in self._places:
            # Of a module without tensors it is another's. Known debt: an adapter that comes later may replace just that one, and a move
            # while it is in use is then not seen here.
            nowhere: tuple[dict[str, Any], str] = ({}, "")
            candidates = itertools.chain([module], self.root.modules())
            self._places[module] = Place(module, *next(filter(None, map(self._anchor, candidates)), nowhere))
        return self._places[module]

    def _anchor(self, module: nn.Module) -> tuple[dict[str, Any], str] | None:
        """A tensor that tells where a module is: one of the base, because an adapter's leaves with it."""
        for registry in (module._parameters, module._buffers):
            for name, tensor in registry.items():
                if tensor is not None and (tensor.is_floating_point() or tensor.is_complex()) and id(tensor) not in self._added:
                    return registry, name
        return None


def _added_by(tuning: Tuning, root: nn.Module) -> set[int]:
    added = set(tuning.adapter)
    tensors = (item for buffers in (False, True) for item in named_tensors(root, buffers=buffers))
    return {id(tensor) for key, _, _, tensor in tensors if key in added}


def _copy(tensor: Tensor) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():  # a copy made in inference mode could never train
        if not isinstance(tensor, nn.Parameter):
            return tensor.detach().clone()
        copied = copy.deepcopy(tensor)  # of the same class, with what a user has noted on it
    copied.grad = None
    return copied


def _orders(changes: Iterable[Change]) -> Iterator[tuple[dict[Any, Any], list[Any], list[Any]]]:
    for change in changes:
        for attribute, before in change.order.items():
            registry = change.module.__dict__.get(attribute)
            # what is taken out and put back comes last: only then the order must be restored
            if isinstance(registry, dict) and [key for key in registry if key in before] != before:
                yield registry, before, list(registry)


class _SetView:
    """A set as slots: each member is a key that is there or not."""

    def __init__(self, container: set[Any]) -> None:
        self.container = container

    def get(self, key: Any, default: Any = None) -> Any:
        return True if key in self.container else default

    def pop(self, key: Any, default: Any = None) -> None:
        self.container.discard(key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.container.add(key)


class _ListView:
    """A list as one slot, whose value is all that is in it."""

    def __init__(self, container: list[Any]) -> None:
        self.container = container

    def get(self, key: Any, default: Any = None) -> Any:
        return list(self.container)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.container[:] = value


def _view(container: Any) -> Any:
    views: dict[type, Any] = {set: _SetView, list: _ListView}
    view = views.get(type(container))
    return view(container) if view else container


def _value(view: Any, value: Any) -> Any:
    return (True if value else ABSENT) if isinstance(view, _SetView) else value
