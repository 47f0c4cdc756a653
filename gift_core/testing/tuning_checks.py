"""Checks of enabling, training and disabling."""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from gift_core.caps import Cap, Caps, HasCaps
from gift_core.errors import GiftError, SiteError
from gift_core.factories import keep_trainable, parameter_name_contains, site_name
from gift_core.iterator import ParameterSite
from gift_core.plan import TuningPlan, plan_fine_tuning
from gift_core.strategy import FineTuningStrategy, merge_strategies
from gift_core.testing.results import CheckFailed, CheckSkipped, demand
from gift_core.testing.subject import Candidate, Facts, Subject, all_bits, distance, move, trainable
from gift_core.testing.table import check
from gift_core.tuning import disable_fine_tuning, enable_fine_tuning


@check("tuning", scope="strategy")
def matches_a_model(candidate: Candidate) -> None:
    """The strategy can be enabled on at least one of the models."""
    refusals = {subject.model.name: subject.refusal for subject in candidate.subjects}
    demand(not all(refusals.values()), f"nothing was checked, because no model suits it: {refusals}")


@check("tuning", scope="strategy")
def layers_as_declared(candidate: Candidate) -> None:
    """It adapts the layers that its capabilities name, and no others."""
    declared = set(candidate.capabilities.layers)
    if not declared:
        raise CheckSkipped("its capabilities name no layers")
    present, adapted = set[str](), set[str]()
    for subject in candidate.subjects:
        if subject.refusal:
            continue
        model = subject.plain()
        present |= {name for module in model.modules() for name in _ancestry(module)}
        for action in plan_fine_tuning(model, subject.strategy).actions:
            site = action.site.current_module
            demand(bool(_ancestry(site) & declared), f"it adapts {type(site).__name__} in {subject.model.name}, undeclared")
            adapted |= _ancestry(site)
    missed = sorted((declared & present) - adapted)
    demand(not missed, f"it declares {', '.join(missed)}, and adapts none of them in any model")


@check("tuning", scope="strategy")
def refuses_as_declared(candidate: Candidate) -> None:
    """It refuses the layers that its capabilities name, and no others: by name, when planning, and leaving the model as it was."""
    declared = set(candidate.capabilities.refuses)
    if not declared and not candidate.capabilities.layers:
        raise CheckSkipped("its capabilities name neither layers nor refusals")
    taken, refused = set[str](), set[str]()
    for subject in candidate.subjects:
        if isinstance(subject.objection, SiteError):
            refused |= _refused(subject, declared)
        elif not subject.refusal:
            taken |= {name for module in subject.plain().modules() for name in _ancestry(module)}
    missed = sorted((declared & taken) - refused)
    demand(not missed, f"it declares that it refuses {', '.join(missed)}, and refuses none of them in any model")


@check("tuning")
def planning_changes_nothing(subject: Subject) -> None:
    """Planning leaves the model and the random generator exactly as they were."""
    model = subject.plain()
    before, random = Facts.of(model), torch.get_rng_state()
    plan_fine_tuning(model, subject.strategy)
    changed = before.differences(Facts.of(model))
    demand(not changed, f"planning changed {changed}")
    demand(torch.equal(torch.get_rng_state(), random), "planning drew a random number")


@check("tuning")
def plan_equals_tuning(subject: Subject) -> None:
    """Enabling does what the plan says: the same matches, and no change outside the sites that it names."""
    model = subject.plain()
    plan = plan_fine_tuning(model, subject.strategy)
    names = [action.site.full_name for action in plan.actions]
    planned = {id(p) for action in plan.actions for p in _parameters_at(action.site)}
    classes = {name: (module, type(module)) for name, module in model.named_modules()}
    report = enable_fine_tuning(model, subject.strategy)
    demand((report.caps, report.frozen) == (plan.report.caps, plan.report.frozen), "the report names other sites than the plan")
    touched = [name for name, (module, cls) in classes.items() if type(module) is not cls]
    touched += [name for name, module in model.named_modules() if name not in classes or classes[name][0] is not module]
    touched += [name for name, parameter in trainable(model) if id(parameter) not in planned]
    # a parameter is adapted by its module, which takes another class and holds the new tensors beside the old one
    holders = {action.site.global_name for action in plan.actions if isinstance(action.site, ParameterSite)}
    outside = [
        name
        for name in touched
        if not any(_lies_in(name, site) for site in names) and holders.isdisjoint((name, name.rpartition(".")[0]))
    ]
    demand(not outside, f"enabling changed {', '.join(outside)}, which the plan ({', '.join(names)}) does not name")


@check("tuning")
def atomic_on_failure(subject: Subject) -> None:
    """When the last action raises, the model and the random generator are exactly what they were."""
    model = subject.plain()
    last = len(plan_fine_tuning(model, subject.strategy).actions)
    failing = _failing(subject.strategy, _Countdown(last))
    before, random = Facts.of(model), torch.get_rng_state()
    try:
        enable_fine_tuning(model, failing)
    except GiftError:
        changed = before.differences(Facts.of(model))
        demand(not changed, f"after a failure the model differs in {changed}")
        demand(torch.equal(torch.get_rng_state(), random), "after a failure the random generator is not where it was")
    else:
        raise CheckFailed("an action raised, and enable_fine_tuning did not")


@check("tuning", needs="identity_at_start")
def unchanged_at_start(subject: Subject) -> None:
    """A freshly enabled model gives the base model's answer, bit for bit."""
    tuned, plain = subject.tuned(), subject.plain()
    flags = {name: parameter.requires_grad for name, parameter in tuned.named_parameters()}
    for name, parameter in plain.named_parameters():
        # torch chooses the kernel of a product by requires_grad, so freezing alone may move the last bit
        parameter.requires_grad_(flags.get(name, False))
    wanted, given = subject.answer(plain), subject.answer(tuned)
    off = f"by up to {distance(wanted, given):.2g}" if wanted.shape == given.shape else f"in shape, {tuple(given.shape)}"
    demand(torch.equal(wanted, given), f"the answer differs {off}; if that is meant, declare identity_at_start=False")


@check("tuning")
def seed_governs_initialisation(subject: Subject) -> None:
    """Two models that are enabled under one seed are equal, bit for bit."""
    first, second = all_bits(subject.tuned(seed=5)), all_bits(subject.tuned(seed=5))
    differing = [name for name in first if first[name] != second.get(name)]
    demand(not differing, f"torch.manual_seed does not govern {', '.join(differing)}: draw from torch's own generator")


@check("tuning")
def base_frozen(subject: Subject) -> None:
    """A training step, with weight decay, leaves every frozen tensor as it was, bit for bit."""
    model = subject.tuned().train()
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    before = all_bits(model)
    optimizer = torch.optim.SGD([parameter for _, parameter in model.named_parameters()], lr=0.1, weight_decay=0.1)
    subject.loss(model).backward()
    optimizer.step()
    after = all_bits(model)
    moved = [name for name in frozen if before[name] != after[name]]
    demand(not moved, f"training moved the frozen {', '.join(moved)}")


@check("tuning")
def all_trainable_get_gradients(subject: Subject) -> None:
    """Everything that trains, and nothing else, is in ``parameters()``, and a backward pass gives it a finite gradient."""
    model = subject.moved().train()
    given, meant = {id(p) for p in model.parameters()}, {id(p) for _, p in trainable(model)}
    demand(given == meant, "parameters() gives other parameters than those that train")
    subject.loss(model).backward()
    none = [name for name, parameter in trainable(model) if parameter.grad is None]
    demand(not none, f"no gradient reaches {', '.join(none)}: use it in forward, or do not train it")
    wild = [name for name, p in trainable(model) if p.grad is not None and not bool(p.grad.isfinite().all())]
    demand(not wild, f"the gradient of {', '.join(wild)} is not finite")


@check("tuning")
def disable_restores(subject: Subject) -> None:
    """Disabling gives the original back after use: objects, classes, flags, keys and values, bit for bit."""
    model = subject.plain()
    plan_fine_tuning(model, subject.strategy)  # what planning changes is another check's business
    before = Facts.of(model)
    enable_fine_tuning(model, subject.strategy)
    subject.answer(model.eval())
    move(model)
    disable_fine_tuning(model)
    changed = before.differences(Facts.of(model))
    demand(not changed, f"after disable_fine_tuning the model differs in {changed}")


@check("tuning")
def shared_stays_shared(subject: Subject) -> None:
    """A module or a parameter that the model holds under several names is still one object under all of them."""
    model = subject.plain()
    before = _names_by_object(model)
    if not any(len(names) > 1 for names in before):
        raise CheckSkipped("this model shares nothing")
    enable_fine_tuning(model, subject.strategy)
    now = {name: at for at, names in enumerate(_names_by_object(model)) for name in names}
    split = [names for names in before if len({now[name] for name in names if name in now}) > 1]
    demand(not split, f"no longer shared: {'; '.join(' = '.join(names) for names in split)}")


@check("tuning")
def merges_with_another(subject: Subject) -> None:
    """Merged with a strategy that trains biases, each site belongs to the one that planned it, trains, and is undone."""
    biases = FineTuningStrategy(para_caps=[(parameter_name_contains("bias", optional=True), keep_trainable())])
    both, model = merge_strategies([subject.strategy, biases]), subject.plain()
    alone, together = plan_fine_tuning(model, subject.strategy), plan_fine_tuning(model, both)
    before = Facts.of(model)
    lost = set(_sites(alone)) - set(_sites(together))
    demand(not lost, f"beside another strategy it no longer takes {', '.join(sorted(lost))}")
    theirs = [action.site for action in together.actions if action.site.full_name not in _sites(alone)]
    enable_fine_tuning(model, both)
    idle = [site.full_name for site in theirs if not all(p.requires_grad for p in _parameters_at(site))]
    demand(not idle, f"it froze {', '.join(idle)}, which belongs to the other strategy")
    move(model)
    disable_fine_tuning(model)
    changed = before.differences(Facts.of(model))
    demand(not changed, f"after disable_fine_tuning the model differs in {changed}")


# --- what the checks share


@dataclasses.dataclass
class _Countdown:
    """Raises when it is called the last time."""

    left: int

    def tick(self) -> None:
        self.left -= 1
        if self.left <= 0:
            raise RuntimeError("this failure is the check's own")


class _ThenFail:
    """An action that does what another does, and raises afterwards when its countdown is over."""

    def __init__(self, action: Any, countdown: _Countdown) -> None:
        self.action = action
        self.countdown = countdown

    def __call__(self, *site: Any, **params: Any) -> None:
        self.action(*site, **params)
        self.countdown.tick()


def _failing(strategy: HasCaps, countdown: _Countdown) -> FineTuningStrategy:
    def wrapped(caps: Caps) -> list[Cap]:
        return [
            Cap(
                cap.check,
                _failing(cap.action, countdown) if isinstance(cap.action, HasCaps) else _ThenFail(cap.action, countdown),
                cap.params,
            )
            for cap in caps
        ]

    return FineTuningStrategy(wrapped(strategy.module_caps), wrapped(strategy.para_caps), strategy.constraint_type)


def _refused(subject: Subject, declared: set[str]) -> set[str]:
    """What of the ``declared`` is refused in a model, if the refusal is the strategy's own, and is as it should be."""
    model = subject.plain()
    before, random = Facts.of(model), torch.get_rng_state()
    try:
        plan_fine_tuning(model, subject.strategy)
    except SiteError as error:
        refusal = error
    else:
        raise CheckFailed(f"enabling {subject.model.name} is refused, planning is not: raise SiteError in `examine`")
    changed = before.differences(Facts.of(model))
    demand(not changed and torch.equal(random, torch.get_rng_state()), f"refusing {subject.model.name} changed {changed or 'the seed'}")
    if _raised_by_core(refusal):
        return set()
    kinds = [kinds for name, kinds in _named_kinds(model) if f"at {name}: " in str(refusal)]
    demand(bool(kinds), f"the refusal of {subject.model.name} does not say which layer is meant: {refusal}")
    demand(bool(kinds[0] & declared), f"in {subject.model.name} it refuses, undeclared, {refusal}")
    return kinds[0] & declared


def _raised_by_core(error: BaseException) -> bool:
    frames = traceback.walk_tb((error.__cause__ or error).__traceback__)
    return str([frame.f_globals["__name__"] for frame, _ in frames][-1]).startswith("gift_core.")


def _named_kinds(model: nn.Module) -> Iterator[tuple[str, set[str]]]:
    """Every site as messages name it, and the names under which its refusal may be declared."""
    for name, module in model.named_modules():
        own = not type(module).__module__.startswith("torch.nn.")
        yield site_name(None, "", name, type(module).__name__, module), _ancestry(module)
        for key, parameter in module._parameters.items():
            kinds = _ancestry(module) | ({"Parameter"} if own else set())
            yield site_name(None, "", name, type(module).__name__, module, key, parameter), kinds


def _sites(plan: TuningPlan) -> list[str]:
    return [action.site.full_name for action in plan.actions]


def _parameters_at(site: Any) -> list[nn.Parameter]:
    return [site[6]] if len(site) == 7 else list(site[4].parameters())


def _lies_in(name: str, site: str) -> bool:
    return site in ("", name) or name.startswith(f"{site}.")


def _ancestry(module: nn.Module) -> set[str]:
    return {cls.__name__ for cls in type(module).__mro__}


def _names_by_object(model: nn.Module) -> list[list[str]]:
    names: dict[int, list[str]] = {}
    things: list[tuple[str, object]] = [*model.named_modules(remove_duplicate=False)]
    things += model.named_parameters(remove_duplicate=False)
    for name, thing in things:
        names.setdefault(id(thing), []).append(name)
    return list(names.values())
