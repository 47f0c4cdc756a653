"""Random trees of modules x a random fault in a check or an action: all of it happens or nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fault_table import RecordFaults
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from low_rank import LowRank
from models import fingerprint
from torch import nn

from gift_core import FineTuningStrategy, adopt, disable_fine_tuning, enable_fine_tuning
from gift_core.errors import GiftError, SiteError

PROFILE = settings(
    max_examples=300, derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


class Interrupt(BaseException):
    """What is no Exception, as Ctrl-C is not."""


ERRORS: tuple[type[BaseException], ...] = (RuntimeError, AttributeError, MemoryError, KeyError, SiteError, StopIteration, Interrupt)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A module of a tree: its kind, and what a user had done to it."""

    kind: str
    frozen: bool
    training: bool
    hook: bool
    scratch: bool


class Branch(nn.Module):
    """Children under names, of which some may be None, and tensors of its own."""

    def __init__(self, children: list[nn.Module | None]) -> None:
        super().__init__()
        for number, child in enumerate(children):
            self.register_module(f"part{number}", child)
        self.scale = nn.Parameter(torch.ones(2))
        self.notes = ["a list", {"a": "dict"}]


LEAVES = st.builds(
    Leaf,
    kind=st.sampled_from(["linear", "linear", "conv", "batch", "layer", "dropout", "again", "tied", "nothing"]),
    frozen=st.booleans(),
    training=st.booleans(),
    hook=st.booleans(),
    scratch=st.booleans(),
)
TREES = st.recursive(LEAVES, lambda inner: st.lists(inner, min_size=1, max_size=3), max_leaves=8)

MAKERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(3, 3),
    "conv": lambda: nn.Conv2d(2, 2, 1),
    "batch": lambda: nn.BatchNorm1d(3),
    "layer": lambda: nn.LayerNorm(3),
    "dropout": lambda: nn.Dropout(0.1),
}


def grown(tree: Any, made: list[nn.Module]) -> nn.Module | None:
    """The module of a drawn tree; ``made`` collects all leaves, from which some are used again."""
    if isinstance(tree, list):
        return Branch([grown(part, made) for part in tree])
    if tree.kind == "nothing" or (tree.kind == "again" and not made):
        return None
    if tree.kind == "again":
        return made[0]
    leaf = MAKERS.get(tree.kind, MAKERS["linear"])()
    linear = [other for other in made if isinstance(other, nn.Linear)]
    if tree.kind == "tied" and linear:
        leaf.weight = linear[0].weight
    made.append(leaf)
    if tree.scratch:
        leaf.register_buffer("scratch", torch.ones(2), persistent=False)
    if tree.hook:
        leaf.register_forward_hook(_look)
        leaf.register_full_backward_pre_hook(_look)
    leaf.train(tree.training)
    for parameter in leaf.parameters():
        parameter.requires_grad_(not tree.frozen)
    return leaf


def _look(*_: Any) -> None:
    """A hook that does nothing."""


class OtherLinear(nn.Linear):
    """What a layer's class is changed to."""


def _write(parent: nn.Module | None, name: str, module: nn.Module) -> None:
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.mul_(3)


def _adopt(parent: nn.Module | None, name: str, module: nn.Module) -> None:
    adopt(module, LowRank, rank=1)


def _replace(parent: nn.Module | None, name: str, module: nn.Module) -> None:
    if parent is not None:
        setattr(parent, name, nn.Identity())


def _remove(parent: nn.Module | None, name: str, module: nn.Module) -> None:
    if parent is not None:
        delattr(parent, name)


def _reclass(parent: nn.Module | None, name: str, module: nn.Module) -> None:
    if type(module) is nn.Linear:
        module.__class__ = OtherLinear


#: What an action may have done before it fails: each gets the parent, the name and the module.
DEEDS: dict[str, Callable[[nn.Module | None, str, nn.Module], Any]] = {
    "adopts": _adopt,
    "replaces": _replace,
    "removes": _remove,
    "changes the class": _reclass,
    "writes values": _write,
    "flips the flags": lambda parent, name, module: module.requires_grad_(True),
    "flips the mode": lambda parent, name, module: module.train(not module.training),
    "registers a parameter": lambda parent, name, module: module.register_parameter("more", nn.Parameter(torch.rand(2))),
    "registers a buffer": lambda parent, name, module: module.register_buffer("extra", torch.rand(2), persistent=False),
    "registers a module": lambda parent, name, module: module.register_module("child", nn.Linear(2, 2)),
    "hooks": lambda parent, name, module: module.register_forward_pre_hook(_look),
    "clears hooks": lambda parent, name, module: module._forward_hooks.clear(),
    "sets an attribute": lambda parent, name, module: setattr(module, "mark", object()),
    "puts another parameter": lambda parent, name, module: setattr(module, "weight", nn.Parameter(torch.rand(3, 3))),
    "draws": lambda parent, name, module: torch.rand(3),
}


class Faulty:
    """A check and an action of which one fails at a chosen call."""

    def __init__(self, check_fails_at: int, action_fails_at: int, deeds: list[str], error: type[BaseException], answer: bool) -> None:
        self.check_fails_at, self.action_fails_at = check_fails_at, action_fails_at
        self.deeds, self.error, self.answer = deeds, error, answer
        self.checked = self.acted = 0

    def check(self, parent: Any, name: str, full: str, kind: str, module: nn.Module) -> Any:
        self.checked += 1
        if self.checked == self.check_fails_at:
            if self.answer:
                return "neither true nor false"
            raise self.error("of the check")
        return isinstance(module, (nn.Linear, nn.BatchNorm1d))

    def action(self, parent: Any, name: str, full: str, kind: str, module: nn.Module) -> None:
        self.acted += 1
        for deed in self.deeds:
            DEEDS[deed](parent, name, module)
        if self.acted == self.action_fails_at:
            raise self.error("of the action")


FAULTS = st.builds(
    Faulty,
    check_fails_at=st.sampled_from([0, 0, 0, 1, 2, 3, 5, 8]),
    action_fails_at=st.sampled_from([0, 1, 1, 2, 3, 4]),
    deeds=st.lists(st.sampled_from(sorted(DEEDS)), max_size=4, unique=True),
    error=st.sampled_from(ERRORS),
    answer=st.booleans(),
)


@pytest.mark.filterwarnings("ignore::gift_core.errors.GiftWarning")
def test_all_or_nothing(record_faults: RecordFaults) -> None:
    """Whatever the tree and the fault, a failed enable, and a disable after one that worked, leave every object, flag and byte."""
    counts = {"cases": 0, "half": 0, "foreign": 0}
    outcomes: set[str] = set()

    @PROFILE
    @given(tree=st.lists(TREES, min_size=1, max_size=3), fault=FAULTS)
    def attempt(tree: list[Any], fault: Faulty) -> None:
        torch.manual_seed(0)
        model = grown(tree, [])
        assert model is not None
        before, random = fingerprint(model), torch.get_rng_state()
        counts["cases"] += 1
        outcome = _outcome(model, fault)
        outcomes.add(outcome)
        counts["foreign"] += outcome == "foreign"
        undone = fingerprint(model) == before
        counts["half"] += not (undone and (outcome == "tuned" or torch.equal(torch.get_rng_state(), random)))
        assert outcome != "foreign"
        assert undone

    attempt()

    assert outcomes == {"refused", "interrupted", "tuned"}
    record_faults("trees x failing checks and actions", **counts)


def _outcome(model: nn.Module, fault: Faulty) -> str:
    """Enable, and disable if that worked."""
    try:
        enable_fine_tuning(model, FineTuningStrategy([(fault.check, fault.action)]))
    except GiftError:
        return "refused"
    except Interrupt:
        return "interrupted"
    except Exception:
        return "foreign"
    disable_fine_tuning(model)
    return "tuned"
