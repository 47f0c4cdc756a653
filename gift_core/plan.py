"""The walk: which cap takes which site. It reads a model and changes nothing.

The root is visited first, then depth first. A module that a module cap matches belongs to its action: its parameters and children are
not visited further. Each other parameter is offered to the parameter caps, and frozen if none wants it.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from gift_core.caps import Cap, Caps, HasCaps, describe
from gift_core.errors import ActionError, CheckError, GiftError, ModelError, NoMatchError, SiteError
from gift_core.factories import Check, site_name
from gift_core.info import CapMatches, Count, Report
from gift_core.iterator import Inventory, ModuleIterator, ModuleSite, ParameterSite, join_name, named_parameters_below, too_deep
from gift_core.reparameterization import Reparameterization, is_adopted
from gift_core.strategy import FineTuningStrategy, as_strategy

Site = ModuleSite | ParameterSite

#: No model of so few levels is too deep to be walked.
_SHALLOW = 100

_UNUSABLE = (torch.jit.ScriptModule, Reparameterization)


class PlannedAction(NamedTuple):
    """One thing to do: call ``action(*site, **params)``. ``caution`` is what the action said of the site, or None."""

    cap: Cap
    site: Site
    caution: str | None

    def __call__(self) -> None:
        action = self.cap.action
        assert callable(action)  # nested strategies were walked into
        action(*self.site, **self.cap.params)


@dataclasses.dataclass(frozen=True)
class TuningPlan:
    """What applying a strategy to a model would do, in order. ``print(plan)`` shows it.

    Attributes:
        module: the root.
        strategy: what was planned.
        actions: the matched sites, in the order in which they are acted on.
        frozen: the sites of parameters that no cap wanted.
        report: the same as counts and names, without the counts after.
        inventory: what the model held.
    """

    module: nn.Module
    strategy: FineTuningStrategy
    actions: tuple[PlannedAction, ...]
    frozen: tuple[ParameterSite, ...]
    report: Report
    inventory: Inventory = dataclasses.field(repr=False)

    def __str__(self) -> str:
        return str(self.report)

    def _repr_html_(self) -> str:
        return self.report._repr_html_()


def plan_fine_tuning(module: nn.Module, fine_tuning_strategy: FineTuningStrategy | str) -> TuningPlan:
    """Find what a strategy would do to a model, without doing it.

    Args:
        module: the model; it is not changed.
        fine_tuning_strategy: a strategy, or the name of a registered one.

    Raises:
        ModelError: if ``module`` is no module, scripted, lazy, or not of the strategy's ``constraint_type``.
        NoMatchError: if nothing matches, or something that the strategy names matches nothing.
        CheckError: if a check raises or gives no truth value.
        SiteError: if a matched site cannot be adapted.
        ActionError: if an action cannot say whether it can, as with params that it does not take.
    """
    strategy = as_strategy(fine_tuning_strategy)
    inventory = Inventory.of(_as_module(module))
    refuse_unusable(inventory)
    try:
        return _Walk(inventory, strategy).plan()
    except RecursionError as error:
        deepest = max((name for name, _ in inventory.modules), key=lambda name: name.count("."))
        if deepest.count(".") < _SHALLOW:
            raise  # it is the strategy that is nested
        raise too_deep(module, deepest) from error


class _Walk:
    """One walk over one model: what has been seen, and what was found."""

    def __init__(self, inventory: Inventory, strategy: FineTuningStrategy) -> None:
        self.inventory = inventory
        self.root = inventory.modules[0][1]
        self.strategy = strategy
        self.actions: list[PlannedAction] = []
        self.frozen: list[ParameterSite] = []
        self.shared: list[str] = []
        self.matches: dict[int, tuple[str, Cap, list[str]]] = {}
        self.names: dict[Check, tuple[bool, bool]] = {}  # what a strategy names: (excludes, found)
        self.seen: dict[int, str] = {}
        self.nested: set[int] = set()  # ids of the caps whose action is a strategy
        self.wanted: set[int] = set()  # ids of the parameters that parameter caps took

    def plan(self) -> TuningPlan:
        self._register(self.strategy)
        self._enter(ModuleSite(None, "", "", type(self.root).__name__, self.root), self.strategy)
        self._tied_elsewhere()
        self._refuse_silence()
        return TuningPlan(self.root, self.strategy, tuple(self.actions), tuple(self.frozen), self._report(), self.inventory)

    def _register(self, strategy: HasCaps) -> None:
        for kind, caps in (("module", strategy.module_caps), ("parameter", strategy.para_caps)):
            for cap in caps:
                self.matches[id(cap)] = (kind, cap, [])
                for part, excludes in cap.check.naming_parts() if isinstance(cap.check, Check) else ():
                    self.names.setdefault(part, (excludes, False))
                if isinstance(cap.action, HasCaps):
                    self.nested.add(id(cap))
                    self._register(cap.action)

    def _enter(self, site: ModuleSite, strategy: HasCaps) -> None:
        """Start a strategy at its root: the model's, or the module that a nested strategy was the action for."""
        if strategy.constraint_type and not isinstance(site.current_module, strategy.constraint_type):
            allowed = " or ".join(item.__name__ for item in strategy.constraint_type)
            raise ModelError(f"{strategy!r} is for {allowed}, but {site_name(*site)} is none: choose another strategy or root.")
        self._offer(site, strategy)

    def _offer(self, site: ModuleSite, strategy: HasCaps) -> None:
        cap = _first_match(strategy.module_caps, site)
        if cap is not None:
            self._take(cap, site)
            return
        module = site.current_module
        for name, parameter in module._parameters.items():
            if parameter is not None:
                self._offer_parameter(ParameterSite(*site, name, parameter), strategy)
        for name, child in module._modules.items():
            if child is not None and not self._seen_before(child, full_name := join_name(site.global_name, name)):
                self._offer(ModuleSite(module, name, full_name, type(child).__name__, child), strategy)

    def _offer_parameter(self, site: ParameterSite, strategy: HasCaps) -> None:
        again = self._seen_before(site.parameter, site.full_name)
        cap = _first_match(strategy.para_caps, site)
        if cap is not None and id(site.parameter) not in self.wanted:
            self.wanted.add(id(site.parameter))
            self._take(cap, site)
        elif cap is None and not again:
            self.frozen.append(site)

    def _seen_before(self, thing: object, name: str) -> bool:
        first = self.seen.setdefault(id(thing), name)
        if first != name:
            self.shared.append(f"{name} = {first}")
        return first != name

    def _take(self, cap: Cap, site: Site) -> None:
        self.matches[id(cap)][2].append(site.full_name)
        for part, (excludes, found) in self.names.items():
            if not excludes and not found and _asks_for(cap, part) and part(*site):
                self.names[part] = (excludes, True)
        if id(cap) in self.nested:
            if not isinstance(site, ModuleSite):
                raise SiteError(f"at {site_name(*site)}: a strategy acts on modules, not on a parameter: use it in a module cap.")
            self._enter(site, cap.action)  # type: ignore[arg-type]
            return
        self.actions.append(PlannedAction(cap, site, _examine(cap, site)))

    def _tied_elsewhere(self) -> None:
        # a parameter that no cap wanted here may belong, tied, to a module that a cap took there
        taken = set()
        for action in self.actions:
            for name, parameter in _named_parameters_at(action.site):
                self._seen_before(parameter, name)
                taken.add(id(parameter))
        self.frozen = [site for site in self.frozen if id(site.parameter) not in taken]

    def _refuse_silence(self) -> None:
        every = None
        for part, (excludes, found) in self.names.items():
            if found:
                continue
            every = every or list(_every_site(self.root))
            if not (excludes and any(part(*site) for site in every)):
                raise NoMatchError(self._explain(part, every))
        if not self.actions:
            asked = "; ".join(repr(cap) for _, cap, _ in self.matches.values()) or "it has no caps"
            kinds = ", ".join(sorted({site.class_name for site in _every_site(self.root) if isinstance(site, ModuleSite)}))
            raise NoMatchError(
                f"{self.strategy!r} matches nothing in {type(self.root).__name__} ({asked}). The model has: {kinds}. "
                "Choose a strategy for these."
            )

    def _explain(self, part: Check, every: list[Site]) -> str:
        text = ", ".join(str(argument) for argument in part.arguments)
        named = [site for site in every if part(*site)]
        if not named:
            return f"{text!r} matches nothing in {type(self.root).__name__}. {_nearest(text, [site.full_name for site in every])}"
        modules = [site for site in named if isinstance(site, ModuleSite)] or named
        reasons = "; ".join(self._why_not(site) for site in modules[:3])
        more = f"; and {len(modules) - 3} more" if len(modules) > 3 else ""
        return f"{text!r} names sites of {type(self.root).__name__}, but the strategy adapts none of them: {reasons}{more}."

    def _why_not(self, site: Site) -> str:
        names = [action.site.full_name for action in self.actions]
        holder = next((n for n in names if site.full_name == n or not n or site.full_name.startswith(f"{n}.")), None)
        if holder is not None:
            return f"{site_name(*site)} belongs to {holder or 'the root'!r}, which an earlier cap took"
        alias = next((pair for pair in self.shared if pair.startswith(f"{site.full_name} = ")), None)
        return (
            f"{site_name(*site)} is another name ({alias}), so name that one"
            if alias
            else f"{site_name(*site)} is of no kind that it adapts, so leave it out"
        )

    def _report(self) -> Report:
        cautions: dict[str, list[str]] = {}
        for action in self.actions:
            if action.caution:
                cautions.setdefault(action.caution, []).append(action.site.full_name or "the root")
        parameters = self.inventory.own_parameters()
        return Report(
            strategy=repr(self.strategy),
            caps=tuple(CapMatches(kind, repr(cap), tuple(sites)) for kind, cap, sites in self.matches.values()),
            frozen=tuple(site.full_name for site in self.frozen),
            shared=tuple(self.shared),
            cautions=tuple(f"{text}: {', '.join(names)}" for text, names in cautions.items()),
            before=Count.of(parameters),
            trainable_before=Count.of(p for p in parameters if p.requires_grad),
        )


def _as_module(module: Any) -> nn.Module:
    if isinstance(module, nn.Module):
        return module
    given = "nothing" if module is None else f"{type(module).__name__}"
    raise ModelError(f"fine-tuning needs a torch.nn.Module, got {given}: pass the model itself as the first argument.")


def refuse_unusable(inventory: Inventory) -> None:
    """Refuse a model that no strategy can tune.

    Raises:
        ModelError: if a part of it is scripted, adapted already, or lazy; the message names it.
    """
    for name, module in inventory.modules:
        if isinstance(module, _UNUSABLE):
            scripted = "is scripted and cannot be adapted: adapt the model itself, then torch.jit.script merge_and_unload(model)."
            adapted = "is adapted already: disable_fine_tuning(model) first, or plan on a fresh copy."
            raise _is_no_use(name, module, adapted if is_adopted(module) else scripted)
    for key, module, _, parameter in inventory.parameters:
        if is_lazy(parameter):
            raise _is_no_use(key.rpartition(".")[0], module, "is lazy and has no shapes yet: run one forward pass first.")


def _is_no_use(name: str, module: nn.Module, reason: str) -> ModelError:
    return ModelError(f"{repr(name) if name else 'the model'} ({type(module).__name__}) {reason}")


def _first_match(caps: Caps, site: Site) -> Cap | None:
    for cap in caps:
        if _ask(cap, site):
            return cap
    return None


def _ask(cap: Cap, site: Site) -> bool:
    try:
        answer = cap.check(*site)
    except GiftError:
        raise
    except Exception as error:
        raise CheckError(f"check {describe(cap.check)} raised at {site_name(*site)}: {type(error).__name__}: {error}") from error
    # numpy's bool is meant, and its name is all that need be known of it
    if not (isinstance(answer, bool) or type(answer).__name__ in ("bool", "bool_")):
        raise CheckError(f"check {describe(cap.check)} gave {answer!r} at {site_name(*site)}: return True or False, as in bool(...).")
    return bool(answer)


def _examine(cap: Cap, site: Site) -> str | None:
    examine: Callable[..., str | None] | None = getattr(cap.action, "examine", None)
    if examine is None:
        return None
    try:
        return examine(*site, **cap.params)
    except SiteError as error:
        raise SiteError(f"at {site_name(*site)}: {error}") from error
    except GiftError:
        raise
    except Exception as error:
        what = f"action {describe(cap.action)} with {dict(cap.params)!r}"
        raise ActionError(f"{what} cannot be planned at {site_name(*site)}: {type(error).__name__}: {error}") from error


def _asks_for(cap: Cap, part: Check) -> bool:
    return isinstance(cap.check, Check) and any(part == other for other, _ in cap.check.naming_parts())


def _named_parameters_at(site: Site) -> list[tuple[str, nn.Parameter]]:
    if isinstance(site, ParameterSite):
        return [(site.full_name, site.parameter)]
    return [(join_name(site.global_name, name), parameter) for name, parameter in named_parameters_below(site.current_module)]


def parameters_at(site: Site) -> list[nn.Parameter]:
    """The parameters that an action on the site answers for: a module's, children included, or the one."""
    if isinstance(site, ParameterSite):
        return [site.parameter]
    return [parameter for _, parameter in named_parameters_below(site.current_module)]


def _every_site(root: nn.Module) -> Iterator[Site]:
    pending = [ModuleSite(None, "", "", type(root).__name__, root)]
    while pending:
        site = pending.pop()
        yield site
        yield from (ParameterSite(*site, name, p) for name, p in site.current_module._parameters.items() if p is not None)
        for child in ModuleIterator(site.current_module, site.global_name):
            pending.append(ModuleSite(site.current_module, *child[:4]))


def _nearest(text: str, names: list[str]) -> str:
    plain = re.sub(r"^(re|type|layer):|[*?\[\]]", "", text).strip(".")
    endings = [name for name in names if name.endswith(f".{plain}")]
    if endings:
        return f"A full name is meant: write '*.{plain}' (as in {endings[0]})."
    close = difflib.get_close_matches(plain, names, n=3, cutoff=0.5)
    if not close:
        last = {name.rpartition(".")[2]: name for name in names}
        close = [last[found] for found in difflib.get_close_matches(plain.rpartition(".")[2], list(last), n=3, cutoff=0.5)]
    return f"Did you mean {', '.join(close)}?" if close else f"Choose from names such as {', '.join(name for name in names[1:4])}."
