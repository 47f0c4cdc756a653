"""Enable and disable: applying a plan to a model, all or nothing, and giving the original back."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import threading
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from gift_core.caps import describe
from gift_core.copies import copy_as_tuned, exchange_values
from gift_core.distributed import is_sharded, write_whole
from gift_core.errors import ActionError, GiftError, GiftWarning, ModelError, NoMatchError, SiteError, StateError
from gift_core.factories import site_name, writes_no_value
from gift_core.guard import GUARDED_BYTES, Guard, Room
from gift_core.info import Count, Report
from gift_core.iterator import Inventory, NamedTensor, walk_modules
from gift_core.plan import PlannedAction, TuningPlan, parameters_at, plan_fine_tuning
from gift_core.plugins import call_hooks
from gift_core.record import (
    RECORD_ATTRIBUTE,
    Original,
    Tuning,
    adopted_modules,
    digest_of,
    find_tuning,
    in_turn,
    set_tuning,
    tuned_root,
    tuning_of,
    undisturbed,
)
from gift_core.reparameterization import ENABLE_FIRST, adoptions_of, is_adopted, refresh_caches, set_merged
from gift_core.state_dict import classify_keys, install_hooks
from gift_core.strategy import FineTuningStrategy, as_strategy
from gift_core.structure import Snapshot, take_snapshot, undo

#: An action, and the parameters that it answers for, each with whether it leaves them trainable.
Wishes = tuple[PlannedAction, list[tuple[Tensor, bool]]]

#: What torch sets on every module that FSDP, of either version, holds. The parameters of the first version look like any others.
_FSDP_MARK = "_is_fsdp_managed_module"

#: The modules of all models that are being enabled, by ``id``.
_enabling: dict[int, nn.Module] = {}
_enabling_lock = threading.Lock()


def enable_fine_tuning(
    module: nn.Module,
    fine_tuning_strategy: FineTuningStrategy | str,
    replace_parameter_function: bool = True,
    trainable_state_dict: bool = True,
    *,
    keep_originals: bool = True,
) -> Report:
    """Adapt a model in place: plan, then apply, all or nothing.

    Args:
        module: the model, on its device and in its dtype, before any wrapper (DDP, FSDP, torch.compile). That DDP holds it already
            cannot be seen from a ``ddp.module`` given here.
        fine_tuning_strategy: a strategy, or the name of a registered one.
        replace_parameter_function: let ``module.parameters()`` give only the trained part, frozen just now or not.
            `torch.optim.swa_utils.AveragedModel` pairs the parameters of a model with those of its copy and needs it off.
        trainable_state_dict: let ``module.state_dict()`` hold only the trained part, and ``load_state_dict`` take it back.
        keep_originals: copy the values of parameters that stay trainable, and of embeddings with ``max_norm``, into which torch writes
            as it reads, so that `disable_fine_tuning` can restore them. False saves that memory when a large model is trained in full.

    Returns:
        What was done: counts before and after, and what each cap matched.

    Raises:
        GiftError: for any reason that `plan_fine_tuning` gives; `StateError` if the model is tuned already; `ActionError` if an
            action raises. The model is then exactly as it was.
    """
    with undisturbed(module), _enabled_alone(module):
        _refuse_state(module)
        strategy = as_strategy(fine_tuning_strategy)
        with _collector_paused():
            plan = plan_fine_tuning(module, strategy)
            _refuse_untrainable(plan.inventory)
        for text in plan.report.cautions:
            warnings.warn(text, GiftWarning, stacklevel=2)
        call_hooks("gift_before_enable", module=module, strategy=strategy, plan=plan)
        with _collector_paused():
            return _tune(plan, replace_parameter_function, trainable_state_dict, keep_originals)


def _tune(plan: TuningPlan, replace_parameter_function: bool, trainable_state_dict: bool, keep_originals: bool) -> Report:
    module, strategy = plan.module, plan.strategy
    before = take_snapshot(module)
    base = Inventory.of(module)
    structure = digest_of(base)
    with _all_or_nothing(module, before), _training_allowed():
        originals = _apply(plan, base, keep_originals)
        tuned = Inventory.of(module)
        _refuse_conflicts(tuned)
        if replace_parameter_function:
            module.parameters = TrainableParameters(module)  # type: ignore[method-assign]
        if trainable_state_dict:
            install_hooks(module)
        report = _completed(plan, tuned)
        tuning = Tuning(
            config=_config_of(strategy),
            strategy=repr(strategy),
            structure=structure,
            report=report,
            changes=before.changes_since(),
            flags=before.flags,
            originals=originals,
            has_originals=keep_originals or not any(map(_needs_original, base.parameters)),
            **classify_keys(tuned, base.ids()),
        )
        set_tuning(module, tuning)
        call_hooks("gift_after_enable", module=module, strategy=strategy, report=report)
    return report


@in_turn
def disable_fine_tuning(module: nn.Module) -> nn.Module:
    """Give the original model back, in place and bit for bit: objects, classes, values, flags, keys.

    Args:
        module: a tuned model, or a wrapper around one.

    Returns:
        The model, for convenience.

    Raises:
        StateError: if it is not tuned, or was enabled with ``keep_originals=False`` while its own parameters moved.
    """
    root = tuned_root(module)
    tuning = tuning_of(root)
    if not tuning.has_originals:
        raise StateError("the original values were not kept (keep_originals=False): load the base model's checkpoint instead.")
    if tuning.merged:
        for _, adopted in adopted_modules(root):
            set_merged(adopted, False)
        tuning.merged = False
    if (governor := tuning.governed_by()) is not None:
        governor.use(None)  # the other adapters stay where they are
        return module
    undo(tuning.changes)
    refresh_caches(root)
    Snapshot([], tuning.flags).restore_flags()
    restore_values(tuning)
    set_tuning(root, None)
    return module


@contextlib.contextmanager
def tuning_disabled(module: nn.Module) -> Iterator[nn.Module]:
    """Within the context, the model computes what the base model computes.

    The trained values come back when the context ends, also after an error. A copy or a pickle made within is of the tuned model.

    Raises:
        StateError: if the model is not tuned, or its original values were not kept.
    """
    with undisturbed(module):
        tuning, tuned = _pause(module)
    try:
        yield module
    finally:
        with undisturbed(module):
            tuning.paused = False
            exchange_values(tuning)
            tuned.restore()


def _pause(module: nn.Module) -> tuple[Tuning, Snapshot]:
    """Let the base model compute; gives the record, and what the model was like."""
    root = tuned_root(module)
    tuning = tuning_of(root)
    if not tuning.has_originals:
        raise StateError(
            "the original values were not kept (keep_originals=False), so the base model cannot be computed: load it again."
        )
    if any(is_sharded(tensor) for original in tuning.originals if (tensor := original.current()) is not None):
        raise StateError("parameters of the base move and are sharded, so they cannot be exchanged: compute the base model on a copy.")
    tuned = take_snapshot(root)
    if tuning.merged:
        for _, adopted in adopted_modules(root):
            set_merged(adopted, False)
    undo(tuning.changes)
    refresh_caches(root)
    exchange_values(tuning)
    copy_as_tuned(root, tuned)
    tuning.paused = True
    return tuning, tuned


def restore_values(tuning: Tuning) -> None:
    """Write the original values back into the tensors that training moved, in place."""
    with torch.no_grad():
        for original in tuning.originals:
            if (tensor := original.current()) is not None:
                write_whole(tensor, original.value)


class TrainableParameters:
    """Stands in for ``module.parameters``: gives what tuning lets train, frozen just now or not, and what else trains now.

    ``requires_grad_(False)`` can therefore be taken back by ``requires_grad_()``, which reaches the same parameters and none of the
    frozen base. It holds its owner, so that a deep copy or a pickle of the model gives its own copy's parameters.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        tuning = find_tuning(self.module)
        trained = frozenset(tuning.trained if tuning is not None else ())
        return (p for name, p in self.module.named_parameters(recurse=recurse) if p.requires_grad or name in trained)


@contextlib.contextmanager
def _enabled_alone(module: Any) -> Iterator[None]:
    """Refuse what shares a module with a model that is being enabled just now, on any thread."""
    modules = walk_modules(module) if isinstance(module, nn.Module) else []
    own = {id(child): child for _, child in modules}
    with _enabling_lock:
        if not own.keys().isdisjoint(_enabling):
            name, child = next((name, child) for name, child in modules if id(child) in _enabling)
            where = f"{name!r} in this {type(module).__name__}" if name else f"this {type(child).__name__}"
            raise StateError(f"{where} is being enabled just now: wait until that enable_fine_tuning is done.")
        _enabling.update(own)
    try:
        yield
    finally:
        with _enabling_lock:
            for key in own:
                del _enabling[key]


def _refuse_state(module: Any) -> None:
    if not isinstance(module, nn.Module):
        return  # planning says it better
    modules = walk_modules(module)
    inside = [child for _, child in modules if isinstance(child, nn.parallel.DistributedDataParallel)]
    if inside or isinstance(module, nn.DataParallel) or hasattr(module, "_orig_mod"):
        wrapper = type(inside[0] if inside else module).__name__
        raise ModelError(f"{wrapper} wraps the model: call enable_fine_tuning on the model first, wrap it afterwards.")
    for name, child in [(name, child) for name, child in modules if _FSDP_MARK in child.__dict__]:
        raise ModelError(f"{repr(name) if name else 'the model'} ({type(child).__name__}) is sharded by FSDP already: {ENABLE_FIRST}")
    for name, child in [(name, child) for name, child in modules if RECORD_ATTRIBUTE in child.__dict__]:
        where = f"its {name!r}" if name else "the model"
        raise StateError(
            f"{where} is tuned already, by {tuning_of(child).strategy}: call disable_fine_tuning first, or enable "
            "merge_strategies([...]) of both at once."
        )


def _refuse_untrainable(inventory: Inventory) -> None:
    for key, _, _, tensor in (*inventory.parameters, *inventory.buffers):
        if is_sharded(tensor):
            raise ModelError(f"{key!r} is sharded: {ENABLE_FIRST}")
        if tensor.is_meta:
            raise ModelError(f"{key!r} is on the meta device and has no values: load the base weights first (plans work without).")
        if tensor.is_inference():
            raise ModelError(f"{key!r} was made in torch.inference_mode() and cannot train: build or load the model outside of it.")


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """No cyclic garbage is made within, and what is made stays: looking for garbage meanwhile would take longer than the work."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _training_allowed() -> contextlib.AbstractContextManager[object]:
    """Tensors made within can train, also where the caller is in inference mode."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext()


@contextlib.contextmanager
def _all_or_nothing(module: nn.Module, before: Snapshot) -> Iterator[None]:
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    except BaseException:
        before.restore()
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
        raise


def _apply(plan: TuningPlan, base: Inventory, keep_originals: bool) -> list[Original]:
    originals = [Original(module, name, key, _copy(buffer), True) for key, module, name, buffer in _once(base.buffers)]
    flags = {id(parameter): parameter.requires_grad for _, _, _, parameter in base.parameters}
    for site in plan.frozen:
        site.parameter.requires_grad_(False)
    room = Room()
    done = [item for portion in _in_portions(plan.actions) for item in _act_guarded(portion, flags, room)]
    for action, wishes in done:
        for parameter, trains in wishes:
            if parameter.requires_grad != trains:
                _refuse_disagreement(action, trains)
    if keep_originals:
        trained = filter(_needs_original, base.parameters)
        originals += [Original(module, name, key, _copy(parameter), False) for key, module, name, parameter in _once(trained)]
    return originals


def _needs_original(item: NamedTensor) -> bool:
    """Whether a parameter of the base moves while the model is tuned: it trains, or torch rescales it wherever it is read."""
    _, module, _, parameter = item
    return parameter.requires_grad or (isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def _once(tensors: Iterable[NamedTensor]) -> Iterator[NamedTensor]:
    seen: set[int] = set()
    for item in tensors:
        if id(item[3]) not in seen:
            seen.add(id(item[3]))
            yield item


def _refuse_disagreement(action: PlannedAction, trains: bool) -> NoReturn:
    here, there = ("trains", "frozen or adapted") if trains else ("is frozen or adapted", "trained")
    raise SiteError(
        f"{site_name(*action.site)} {here}, but shares a tensor (tied weights) with a site that is {there}: exclude one of the two."
    )


def _in_portions(actions: Iterable[PlannedAction]) -> Iterator[list[tuple[PlannedAction, list[Tensor]]]]:
    """Actions, with the tensors around them, to run under one guard: as many as bound the memory of its copies, at least one."""
    portion: list[tuple[PlannedAction, list[Tensor]]] = []
    size = 0
    for action in actions:
        own = _own_tensors(action)
        size += sum(tensor.nbytes for tensor in own)
        if portion and size > GUARDED_BYTES:
            yield portion
            portion, size = [], sum(tensor.nbytes for tensor in own)
        portion.append((action, own))
    if portion:
        yield portion


def _act_guarded(portion: list[tuple[PlannedAction, list[Tensor]]], flags: dict[int, bool], room: Room) -> list[Wishes]:
    """Run actions, and give for each what `_act` gives. What they wrote into the base is put back before an error leaves."""
    guard = Guard((tensor for _, own in portion for tensor in own), room)
    try:
        done = [(action, _act(action, flags)) for action, _ in portion]
        if written := {id(tensor) for tensor in guard.written()}:
            _refuse_writing(next(action for action, own in portion if not written.isdisjoint(map(id, own))))
    except BaseException:
        guard.put_back()
        raise
    return done


def _own_tensors(action: PlannedAction) -> list[Tensor]:
    if writes_no_value(action.cap.action):
        return []
    return [
        tensor
        for _, module in walk_modules(action.site[4])
        for held in (module._parameters, module._buffers)
        for tensor in held.values()
        if tensor is not None
    ]


def _refuse_writing(action: PlannedAction) -> NoReturn:
    raise ActionError(
        f"action {describe(action.cap.action)} wrote into the base model at {site_name(*action.site)}: an action registers "
        "tensors of its own and leaves the base's values alone. The model is as before."
    )


def _act(action: PlannedAction, flags: dict[int, bool]) -> list[tuple[Tensor, bool]]:
    """Run one action and give the parameters it answers for, each with whether it leaves them trainable."""
    answered_for = parameters_at(action.site)
    for parameter in answered_for:
        # each action finds the model's own flag, so that what it leaves is its own wish, also for a tensor that another had
        if (flag := flags.get(id(parameter), trains := parameter.requires_grad)) is not trains:
            parameter.requires_grad_(flag)
    try:
        action()
    except Exception as error:
        where, what = site_name(*action.site), describe(action.cap.action)
        if isinstance(error, GiftError):
            _tell_where(error, f"at {where}: {error}")
            raise
        raise ActionError(f"action {what} raised at {where}: {type(error).__name__}: {error}. The model is as before.") from error
    return [(parameter, parameter.requires_grad) for parameter in answered_for]


def _tell_where(error: GiftError, text: str) -> None:
    """Add the place to an error of GIFt's or a plugin's, which keeps its type and all that it carries."""
    error.args = (text, *error.args[1:])
    if str(error) != text:  # it makes its text itself, or of several parts
        error.add_note(text)


def _refuse_conflicts(tuned: Inventory) -> None:
    for key, module, name, parameter in tuned.parameters:
        if parameter.requires_grad and is_adopted(module) and name in dict(adoptions_of(module)):
            raise SiteError(f"{key} is adapted and trains itself as well: let the action leave what it adapts frozen.")
    if not any(parameter.requires_grad for _, _, _, parameter in tuned.parameters):
        raise NoMatchError(
            "nothing would train: the actions of the strategy left every parameter frozen. Let one keep what is to train."
        )


def _completed(plan: TuningPlan, tuned: Inventory) -> Report:
    parameters = tuned.own_parameters()
    trainable = Count.of(p for p in parameters if p.requires_grad)
    return dataclasses.replace(plan.report, after=Count.of(parameters), trainable=trainable)


def _config_of(strategy: FineTuningStrategy) -> dict[str, Any] | None:
    try:
        return strategy.to_config()
    except GiftError:
        return None  # made of functions: an adapter of it loads only where the same strategy is enabled
