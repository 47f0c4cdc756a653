"""What tuning leaves on a model: how to undo it, and what belongs to the adapter.

The record is a plain attribute of the tuned root, made of names, tensors and modules, so that a deep copy or a pickle of the model
carries a record of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import threading
import weakref
from collections.abc import Callable, Container, Iterable, Iterator
from typing import Any, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor, nn

from gift_core.errors import StateError
from gift_core.info import Report
from gift_core.iterator import Inventory, NamedTensor, tensors_of, walk_modules
from gift_core.reparameterization import is_adopted
from gift_core.structure import Change

P = ParamSpec("P")
R = TypeVar("R")

#: Where a tuned root keeps its record.
RECORD_ATTRIBUTE = "_gift_tuning"


@dataclasses.dataclass
class Original:
    """A tensor that training moves, as it was before: where it lives, its value, and whether a parameter or buffer holds it."""

    module: nn.Module
    name: str
    full_name: str
    value: Tensor
    is_buffer: bool

    def current(self) -> Tensor | None:
        """The tensor that is there now."""
        return (self.module._buffers if self.is_buffer else self.module._parameters).get(self.name)

    def has_moved(self) -> bool:
        """Whether the tensor differs from what it was, bit for bit."""
        now = self.current()
        return now is not None and not same_bits(now.detach(), self.value.to(now.device, now.dtype))


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors of one dtype have the same shape and bits; a NaN equals itself."""
    if left.shape != right.shape:
        return False
    bits = [bits_of(tensor) for tensor in (left, right)]
    if bits[0].dtype is not bits[1].dtype:  # one of them lies at an odd place of its storage
        bits = [each.view(torch.uint8) for each in bits]
    return torch.equal(*bits)


def bits_of(tensor: Tensor) -> Tensor:
    """The numbers of a dense tensor, in order, as whole words or as bytes; a view where memory allows."""
    values = tensor.resolve_conj().resolve_neg().contiguous().flatten()
    words = values.nbytes % 8 == 0 and values.storage_offset() * values.element_size() % 8 == 0
    return values.view(torch.int64 if words else torch.uint8)  # whole words compare several times faster


@dataclasses.dataclass
class Tuning:
    """The record of one tuned model.

    Attributes:
        config: the strategy as data, None where it has no such form; ``strategy`` is its text.
        structure: digest of the base model's names and shapes.
        report: what enabling did.
        changes: the structural changes to undo.
        flags: every original parameter's ``requires_grad``, as (module, name, flag).
        originals: values before tuning of what moves: parameters that train or that torch rescales as it reads them, and buffers.
        adapter: keys of the tensors that tuning added, trainable or not. ``trained`` are all trainable keys; ``frozen`` the rest of
            the base's parameters; ``statistics`` the buffers of normalisation layers; ``buffers`` other persistent buffers.
        modules: what `walk_modules` gave of the model when it had been enabled.
        has_originals: False when ``keep_originals=False`` left the values of parameters that move out.
        merged: whether weights are merged. ``paused``: whether `tuning_disabled` is active. ``full``: whether state dicts hold all.
        provider: distribution and version of the strategy's plugin, once a save has looked them up; None before.
        governor: a weak reference to the set of adapters that this one belongs to. A copy or pickle of the model belongs to none,
            and is within no context.
    """

    config: dict[str, Any] | None
    strategy: str
    structure: str
    report: Report
    changes: list[Change]
    flags: list[tuple[nn.Module, str, bool]]
    originals: list[Original]
    adapter: list[str]
    trained: list[str]
    frozen: list[str]
    statistics: list[str]
    buffers: list[str]
    modules: list[nn.Module]
    has_originals: bool = True
    merged: bool = False
    paused: bool = False
    full: bool = False
    provider: dict[str, str | None] | None = None
    governor: Callable[[], Governor | None] | None = None

    def governed_by(self) -> Governor | None:
        """The set of adapters that switches the model, or None."""
        return self.governor and self.governor()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"governor": None, "paused": False, "full": False}  # a copy leaves these contexts behind


class Governor(Protocol):
    """What switches a model among several adapters."""

    def use(self, name: None, /) -> object:
        """Give the base model back."""


#: The locks of the models that are switched among several adapters. The record cannot hold them: the base model in use has none.
_turns: weakref.WeakKeyDictionary[nn.Module, contextlib.AbstractContextManager[Any]] = weakref.WeakKeyDictionary()
_turns_lock = threading.Lock()


def turn_of(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """The lock under which a governor switches a model: one for each model, whoever asks, to be entered again by who holds it."""
    with _turns_lock:
        return _turns.setdefault(model, threading.RLock())


@contextlib.contextmanager
def undisturbed(module: Any) -> Iterator[None]:
    """Within the context no other thread switches the adapters of a model or of one inside it: for what sees all of an adapter."""
    with contextlib.ExitStack() as turns:
        # in one order for all threads, so that none waits for another that waits for it
        for turn in sorted(_turns_in(module), key=id) if _turns else ():
            turns.enter_context(turn)
        yield


def in_turn(verb: Callable[P, R]) -> Callable[P, R]:
    """Let a verb on a model, its first argument, run `undisturbed`."""

    @functools.wraps(verb)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with undisturbed(args[0] if args else kwargs.get("module")):
            return verb(*args, **kwargs)

    return call


def _turns_in(module: Any) -> list[contextlib.AbstractContextManager[Any]]:
    found, pending, seen = [], [module] if isinstance(module, nn.Module) else [], set()
    while pending:
        if id(each := pending.pop()) in seen:
            continue
        seen.add(id(each))
        if (turn := _turns.get(each)) is not None:
            found.append(turn)  # and no deeper: what is inside may be exchanged just now
        else:
            pending += [child for child in list(each._modules.values()) if child is not None]
    return found


def find_tuning(module: nn.Module) -> Tuning | None:
    """The record of this very module, or None if it is no tuned root."""
    found: Tuning | None = module.__dict__.get(RECORD_ATTRIBUTE)
    return found


def tuning_of(module: nn.Module) -> Tuning:
    """The record of this very module.

    Raises:
        StateError: if it is no tuned root.
    """
    tuning = find_tuning(module)
    if tuning is None:
        raise StateError(f"this {type(module).__name__} is not tuned: call enable_fine_tuning(model, strategy) first.")
    return tuning


def set_tuning(module: nn.Module, tuning: Tuning | None) -> None:
    """Attach a record to a root, or take it away."""
    if tuning is None:
        module.__dict__.pop(RECORD_ATTRIBUTE, None)
    else:
        module.__dict__[RECORD_ATTRIBUTE] = tuning


def tuned_root(module: nn.Module) -> nn.Module:
    """The tuned model in ``module``: itself, or the only one inside it (a DDP or torch.compile wrapper, a larger model).

    Raises:
        StateError: if there is none, or more than one, or a `tuning_disabled` context is active on it.
    """
    if not isinstance(module, nn.Module):
        raise StateError(f"expected a tuned torch.nn.Module, got {type(module).__name__}.")
    root = module if find_tuning(module) is not None else _only_root_in(module)
    if tuning_of(root).paused:
        raise StateError("tuning is switched off by tuning_disabled(model) just now: leave that context first.")
    return root


def _only_root_in(module: nn.Module) -> nn.Module:
    roots = [(name, child) for name, child in _once(walk_modules(module)) if find_tuning(child) is not None]
    if not roots:
        tuning_of(module)  # raises
    if len(roots) > 1:
        names = ", ".join(repr(name) for name, _ in roots)
        raise StateError(f"{type(module).__name__} holds several tuned models ({names}): pass the one you mean.")
    return roots[0][1]


def adopted_modules(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every adopted module once, with its full name below ``root``."""
    return ((name, module) for name, module in _once(walk_modules(root)) if is_adopted(module))


def _once(modules: list[tuple[str, nn.Module]]) -> Iterator[tuple[str, nn.Module]]:
    seen: set[int] = set()
    for name, module in modules:
        if id(module) not in seen:
            seen.add(id(module))
            yield name, module


def named_tensors(root: nn.Module, *, buffers: bool) -> list[NamedTensor]:
    """Every parameter, or every buffer, as ``(key, module, name, tensor)`` under each key that a state dict gives it."""
    return tensors_of(walk_modules(root), "_buffers" if buffers else "_parameters")


def newcomers(tuning: Tuning, modules: list[tuple[str, nn.Module]]) -> set[str]:
    """Keys of the tensors that came with a module after tuning: added, or in the place of another.

    A module that took over the tensors of the one it replaces, as SyncBatchNorm does, brings none.
    """
    if _has_its_modules(tuning, modules):
        return set()
    known = set(map(id, tuning.modules))
    new = [(name, module) for name, module in modules if id(module) not in known]
    held = {id(tensor) for module in tuning.modules for tensor in (*module._parameters.values(), *module._buffers.values())}
    tensors = (*tensors_of(new, "_parameters"), *tensors_of(new, "_buffers"))
    return {key for key, _, _, tensor in tensors if id(tensor) not in held}


def refuse_incomplete(tuning: Tuning, modules: list[tuple[str, nn.Module]], keys: Container[str], failure: str) -> None:
    """Refuse a tuned model that lacks a part of its adapter.

    Args:
        tuning: the record of the model.
        modules: the modules in the model now.
        keys: what the model holds now. A layer that was wrapped since is still there, under another name.
        failure: what cannot be done, for the message.

    Raises:
        StateError: if a tuned layer was taken out or replaced.
    """
    if _has_its_modules(tuning, modules) or set(map(id, tuning.modules)).issubset(id(module) for _, module in modules):
        return
    if gone := [key for key in (*tuning.trained, *tuning.adapter) if key not in keys]:
        raise StateError(left_the_model(gone, failure))


def _has_its_modules(tuning: Tuning, modules: list[tuple[str, nn.Module]]) -> bool:
    """Whether a model consists of just the modules that it had when it was enabled, as nearly always."""
    return tuning.modules == [module for _, module in modules]


def left_the_model(gone: Iterable[str], failure: str) -> str:
    """Say that parts of the adapter are no longer in the model, and what to do."""
    return (
        f"{failure}: {', '.join(sorted(set(gone))[:5])} left the model, because a layer was taken out or replaced after tuning: put it "
        "back, or disable_fine_tuning(model), replace it and tune anew."
    )


def structure_digest(root: nn.Module) -> str:
    """A digest of the names and shapes of a plain model's parameters and persistent buffers."""
    return digest_of(Inventory.of(root))


def digest_of(inventory: Inventory) -> str:
    """The `structure_digest` of a model whose inventory is at hand."""
    shapes = {key: tensor.shape for tensors in (inventory.parameters, inventory.persistent_buffers) for key, _, _, tensor in tensors}
    return hashlib.sha256(json.dumps([(key, shapes[key]) for key in sorted(shapes)]).encode()).hexdigest()
