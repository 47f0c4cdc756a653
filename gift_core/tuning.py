"""Enable and disable: applying a plan to a model, all or nothing, and giving the original back."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from gift_core.caps import describe
from gift_core.errors import ActionError, GiftError, GiftWarning, ModelError, NoMatchError, SiteError, StateError
from gift_core.factories import site_name
from gift_core.info import Count, Report
from gift_core.plan import PlannedAction, TuningPlan, parameters_at, plan_fine_tuning
from gift_core.plugins import call_hooks
from gift_core.record import (
    Original,
    Tuning,
    adopted_modules,
    find_tuning,
    named_tensors,
    same_bits,
    set_tuning,
    structure_digest,
    tuned_root,
    tuning_of,
)
from gift_core.reparameterization import adoptions_of, refresh_caches, set_merged
from gift_core.state_dict import classify_keys, install_hooks
from gift_core.strategy import FineTuningStrategy, as_strategy
from gift_core.structure import Snapshot, take_snapshot, undo


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
        module: the model, on its device and in its dtype, before any wrapper (DDP, FSDP, torch.compile).
        fine_tuning_strategy: a strategy, or the name of a registered one.
        replace_parameter_function: let ``module.parameters()`` give only what trains. `torch.optim.swa_utils.AveragedModel` pairs
            the parameters of a model with those of its copy and needs it off.
        trainable_state_dict: let ``module.state_dict()`` hold only the trained part, and ``load_state_dict`` take it back.
        keep_originals: copy the values of parameters that stay trainable, so that `disable_fine_tuning` can restore them. False saves
            that memory when a large model is trained in full.

    Returns:
        What was done: counts before and after, and what each cap matched.

    Raises:
        GiftError: for any reason that `plan_fine_tuning` gives; `StateError` if the model is tuned already; `ActionError` if an
            action raises. The model is then exactly as it was.
    """
    _refuse_state(module)
    strategy = as_strategy(fine_tuning_strategy)
    plan = plan_fine_tuning(module, strategy)
    _refuse_untrainable(module)
    for text in plan.report.cautions:
        warnings.warn(text, GiftWarning, stacklevel=2)
    call_hooks("gift_before_enable", module=module, strategy=strategy, plan=plan)
    before = take_snapshot(module)
    structure = structure_digest(module)
    base = {id(tensor) for buffers in (False, True) for _, _, _, tensor in named_tensors(module, buffers=buffers)}
    own = list(module.parameters())
    with _all_or_nothing(module, before):
        originals = _apply(plan, keep_originals)
        _refuse_conflicts(module)
        if replace_parameter_function:
            module.parameters = TrainableParameters(module)  # type: ignore[method-assign]
        if trainable_state_dict:
            install_hooks(module)
        report = _completed(plan, module)
        tuning = Tuning(
            config=_config_of(strategy),
            strategy=repr(strategy),
            structure=structure,
            report=report,
            changes=before.changes_since(),
            flags=before.flags,
            originals=originals,
            has_originals=keep_originals or not any(parameter.requires_grad for parameter in own),
            **classify_keys(module, base),
        )
        set_tuning(module, tuning)
        call_hooks("gift_after_enable", module=module, strategy=strategy, report=report)
    return report


def disable_fine_tuning(module: nn.Module) -> nn.Module:
    """Give the original model back, in place and bit for bit: objects, classes, values, flags, keys.

    Args:
        module: a tuned model, or a wrapper around one.

    Returns:
        The model, for convenience.

    Raises:
        StateError: if it is not tuned, or was enabled with ``keep_originals=False`` while its own parameters trained.
    """
    root = tuned_root(module)
    tuning = tuning_of(root)
    if not tuning.has_originals:
        raise StateError("the original values were not kept (keep_originals=False): load the base model's checkpoint instead.")
    if tuning.merged:
        for _, adopted in adopted_modules(root):
            set_merged(adopted, False)
    undo(tuning.changes)
    refresh_caches(root)
    Snapshot([], tuning.flags).restore_flags()
    restore_values(tuning)
    set_tuning(root, None)
    return module


@contextlib.contextmanager
def tuning_disabled(module: nn.Module) -> Iterator[nn.Module]:
    """Within the context, the model computes what the base model computes.

    The trained values come back when the context ends, also after an error.

    Raises:
        StateError: if the model is not tuned, or its original values were not kept.
    """
    root = tuned_root(module)
    tuning = tuning_of(root)
    if not tuning.has_originals:
        raise StateError("the original values were not kept (keep_originals=False), so the base model cannot be computed.")
    tuned = take_snapshot(root)
    if tuning.merged:
        for _, adopted in adopted_modules(root):
            set_merged(adopted, False)
    undo(tuning.changes)
    refresh_caches(root)
    exchange_values(tuning)
    tuning.paused = True
    try:
        yield module
    finally:
        tuning.paused = False
        exchange_values(tuning)
        tuned.restore()


def restore_values(tuning: Tuning) -> None:
    """Write the original values back into the tensors that training moved, in place."""
    with torch.no_grad():
        for original in tuning.originals:
            if (tensor := original.current()) is not None:
                tensor.copy_(original.value)


def exchange_values(tuning: Tuning) -> None:
    """Swap the current values with the originals: pointers move, data does not."""
    for original in tuning.originals:
        if (tensor := original.current()) is not None:
            value = tensor.data
            tensor.data = original.value.to(tensor.device, tensor.dtype)
            original.value = value


class TrainableParameters:
    """Stands in for ``module.parameters``: gives only the parameters that train.

    It holds its owner, so that a deep copy or a pickle of the model gives its own copy's parameters.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        return (p for _, p in self.module.named_parameters(recurse=recurse) if p.requires_grad)


def _refuse_state(module: Any) -> None:
    if not isinstance(module, nn.Module):
        return  # planning says it better
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)) or hasattr(module, "_orig_mod"):
        raise ModelError(f"{type(module).__name__} wraps the model: call enable_fine_tuning on the model first, wrap it afterwards.")
    for name, child in module.named_modules():
        if (tuning := find_tuning(child)) is not None:
            where = f"its {name!r}" if name else "the model"
            raise StateError(
                f"{where} is tuned already, by {tuning.strategy}: call disable_fine_tuning first, or enable "
                "merge_strategies([...]) of both at once."
            )


def _refuse_untrainable(module: nn.Module) -> None:
    for buffers in (False, True):
        for key, _, _, tensor in named_tensors(module, buffers=buffers):
            if tensor.is_meta:
                raise ModelError(f"{key!r} is on the meta device and has no values: load the base weights first (plans work without).")
            if tensor.is_inference():
                raise ModelError(f"{key!r} was made in torch.inference_mode() and cannot train: build or load the model outside of it.")


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


def _apply(plan: TuningPlan, keep_originals: bool) -> list[Original]:
    originals = [
        Original(module, name, key, buffer.detach().clone(), True)
        for key, module, name, buffer in _once(named_tensors(plan.module, buffers=True))
    ]
    known = list(_once(named_tensors(plan.module, buffers=False)))
    flags = {id(parameter): parameter.requires_grad for _, _, _, parameter in known}
    for site in plan.frozen:
        site.parameter.requires_grad_(False)
    done = [(action, _act(action, flags)) for action in plan.actions]
    for action, wishes in done:
        for parameter, trains in wishes:
            if parameter.requires_grad != trains:
                _refuse_disagreement(action, trains)
    if keep_originals:
        originals += [
            Original(module, name, key, parameter.detach().clone(), False)
            for key, module, name, parameter in known
            if parameter.requires_grad
        ]
    return originals


def _once(tensors: Iterator[tuple[str, nn.Module, str, Tensor]]) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
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


def _act(action: PlannedAction, flags: dict[int, bool]) -> list[tuple[Tensor, bool]]:
    """Run one action and give the parameters it answers for, each with whether it leaves them trainable.

    What it wrote into the base's own tensors is put back before the error leaves.
    """
    answered_for = list(parameters_at(action.site))
    for parameter in answered_for:
        # each action finds the model's own flag, so that what it leaves is its own wish, also for a tensor that another had
        parameter.requires_grad_(flags.get(id(parameter), parameter.requires_grad))
    own = [_Held.of(tensor) for tensor in _own_tensors(action)]
    try:
        action()
        written = any(held.was_written() for held in own)
    except Exception as error:
        _write_back(own)
        where, what = site_name(*action.site), describe(action.cap.action)
        if isinstance(error, GiftError):
            raise type(error)(f"at {where}: {error}") from error
        raise ActionError(f"action {what} raised at {where}: {type(error).__name__}: {error}. The model is as before.") from error
    except BaseException:
        _write_back(own)
        raise
    if written:
        _write_back(own)
        raise ActionError(
            f"action {describe(action.cap.action)} wrote into the base model at {site_name(*action.site)}: an action registers "
            "tensors of its own and leaves the base's values alone. The model is as before."
        )
    return [(parameter, parameter.requires_grad) for parameter in answered_for]


def _own_tensors(action: PlannedAction) -> list[Tensor]:
    module: nn.Module = action.site[4]
    return [tensor for buffers in (False, True) for _, _, _, tensor in _once(named_tensors(module, buffers=buffers))]


@dataclasses.dataclass
class _Held:
    """A tensor of the base while an action runs: what shows a write, and what reverses it."""

    tensor: Tensor
    data: Tensor
    value: Tensor
    version: int

    @classmethod
    def of(cls, tensor: Tensor) -> _Held:
        return cls(tensor, tensor.data, tensor.detach().clone(), tensor._version)

    def was_written(self) -> bool:
        # a write through .data leaves the version as it was, so the bits are compared where a tensor has plain ones
        plain = type(self.tensor) in (Tensor, nn.Parameter) and self.tensor.layout is torch.strided and not self.tensor.is_meta
        return self.tensor._version != self.version or (plain and not self._is_as_before())

    def _is_as_before(self) -> bool:
        now = self.tensor.detach()
        return (now.dtype, now.device) == (self.value.dtype, self.value.device) and same_bits(now, self.value)

    def put_back(self) -> None:
        if self.was_written():
            self.tensor.data = self.data  # it may have been exchanged
            self.data.copy_(self.value)


def _write_back(own: list[_Held]) -> None:
    with torch.no_grad():
        for held in own:
            held.put_back()


def _refuse_conflicts(module: nn.Module) -> None:
    for name, adopted in adopted_modules(module):
        for weight, _ in adoptions_of(adopted):
            parameter = adopted._parameters[weight]
            if parameter is not None and parameter.requires_grad:
                raise SiteError(f"{name}.{weight} is adapted and trains itself as well: an action leaves what it adapts frozen.")
    if not any(p.requires_grad for p in module.parameters()):
        raise NoMatchError("nothing would train: the actions of the strategy left every parameter frozen.")


def _completed(plan: TuningPlan, module: nn.Module) -> Report:
    parameters = [parameter for _, parameter in module.named_parameters()]
    trainable = Count.of(p for p in parameters if p.requires_grad)
    return dataclasses.replace(plan.report, after=Count.of(parameters), trainable=trainable)


def _config_of(strategy: FineTuningStrategy) -> dict[str, Any] | None:
    try:
        return strategy.to_config()
    except GiftError:
        return None  # made of functions: an adapter of it loads only where the same strategy is enabled
