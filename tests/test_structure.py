from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import ALL, Builder, Delta, cnn, fingerprint, lstm, mlp, nested, refused
from torch import nn

from gift_core import FineTuningStrategy, adopt, disable_fine_tuning, enable_fine_tuning
from gift_core.errors import ActionError
from gift_core.structure import ABSENT, take_snapshot, undo


class Relative(nn.Linear):
    """Another class for a Linear layer."""


def hook(module: nn.Module, *rest: Any) -> None:
    """Do nothing."""


def reorder(module: nn.Module) -> None:
    """Give a module's first parameter the last place."""
    name, parameter = next(iter(module._parameters.items()))
    del module._parameters[name]
    module._parameters[name] = parameter


#: What code may do to the structure around a Linear layer: the model, and the layer's name in it.
CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "class": lambda m: setattr(m[0], "__class__", Relative),
    "new attribute": lambda m: setattr(m[0], "extra", [1]),
    "other value": lambda m: setattr(m[0], "in_features", 99),
    "no attribute": lambda m: delattr(m[0], "in_features"),
    "renamed attribute": lambda m: setattr(m[0], "width", m[0].__dict__.popitem()[1]),
    "new parameter": lambda m: m[0].register_parameter("extra", nn.Parameter(torch.ones(1))),
    "other parameter": lambda m: setattr(m[0], "weight", nn.Parameter(torch.ones(8, 4))),
    "no parameter": lambda m: m[0].register_parameter("bias", None),
    "deleted parameter": lambda m: delattr(m[0], "bias"),
    "order of parameters": lambda m: reorder(m[0]),
    "new buffer": lambda m: m[0].register_buffer("extra", torch.ones(1), persistent=False),
    "other child": lambda m: m.__setitem__(0, nn.ReLU()),
    "no child": lambda m: m.__delitem__(1),
    "new child": lambda m: m.append(nn.ReLU()),
    "order of children": lambda m: m.insert(0, nn.ReLU()),
    "hook": lambda m: m[0].register_forward_hook(hook, with_kwargs=True),
    "pre-hook": lambda m: m[0].register_forward_pre_hook(hook, prepend=True),
    "state dict hook": lambda m: m.register_state_dict_post_hook(hook),
    "load hook": lambda m: m[0].register_load_state_dict_pre_hook(hook),
    "forward": lambda m: setattr(m[0], "forward", hook),
    "mode": lambda m: m.eval(),
    "flag": lambda m: m.requires_grad_(False),
    "parametrization": lambda m: nn.utils.parametrizations.weight_norm(m[0]),
    "adoption": lambda m: adopt(m[0], Delta),
    "everything at once": lambda m: [change(m) for name, change in CHANGES.items() if name in TOGETHER],
}
TOGETHER = ("class", "new buffer", "hook", "flag", "mode", "no parameter", "new child")


@pytest.mark.parametrize("change", CHANGES)
def test_a_snapshot_can_be_restored(change: str) -> None:
    """Whatever happened to the structure, restoring brings back objects, classes, hooks, flags and orders."""
    model = mlp()
    before, snapshot = fingerprint(model), take_snapshot(model)

    CHANGES[change](model)
    changed = fingerprint(model) != before
    snapshot.restore()

    assert changed
    assert fingerprint(model) == before


@pytest.mark.parametrize("build", ALL, ids=lambda build: build.__name__)
def test_nothing_changed_is_no_change(build: Builder) -> None:
    """Between two moments without a change there is nothing to undo."""
    model = build()

    assert take_snapshot(model).changes_since() == []


def test_hooks_that_were_there_stay() -> None:
    """Containers that held something before hold exactly that again."""
    model = mlp()
    model[0].register_forward_hook(hook)
    model[0].notes = {"a": 1}
    model[0].tags = {"x", "y"}
    model[0].steps = [1, 2]
    before, snapshot = fingerprint(model), take_snapshot(model)

    model[0]._forward_hooks.clear()
    model[0].notes.update(a=2, b=3)
    model[0].tags ^= {"y", "z"}
    model[0].steps.reverse()
    snapshot.restore()

    assert fingerprint(model) == before


def test_a_container_emptied_and_another_filled_are_told_apart() -> None:
    """As many containers hold something as before, and still both changes are undone."""
    model = mlp()
    model[0].notes, model[0].steps, model[0].tags = {"a": 1}, [], set()
    before, snapshot = fingerprint(model), take_snapshot(model)

    model[0].notes.clear()
    model[0].steps.append(3)
    model[0].tags.add("x")
    snapshot.restore()

    assert fingerprint(model) == before


def test_undo_leaves_what_came_later() -> None:
    """Only what changed between the two moments is reversed; a later hook, mode, attribute, child or class stays."""
    model = nested()
    snapshot = take_snapshot(model)
    adopt(model.heads["a"], Delta)
    model.heads["a"].register_forward_hook(hook)
    changes = snapshot.changes_since()

    kept = model.heads["a"].register_forward_hook(hook)
    model.eval()
    model.note = "mine"
    model.heads["c"] = nn.ReLU()
    model.blocks[0].fc.__class__ = Relative
    undo(changes)

    assert type(model.heads["a"]) is nn.Linear
    assert list(model.heads["a"]._forward_hooks) == [kept.id]
    assert not model.training
    assert model.note == "mine"
    assert list(model.heads) == ["a", "b", "c"]
    assert type(model.blocks[0].fc) is Relative


def test_undo_follows_a_copy() -> None:
    """Changes are data: copied with their model they undo the copy, and the original is left alone."""
    model = cnn()
    snapshot = take_snapshot(model)
    adopt(model.head, Delta)

    copied, changes = copy.deepcopy((model, snapshot.changes_since()))
    pickled, more = pickle.loads(pickle.dumps((model, snapshot.changes_since())))
    undo(changes)
    undo(more)

    assert isinstance(model.head, Delta)
    assert type(copied.head) is type(pickled.head) is nn.Linear
    assert "delta" not in copied.state_dict()


def test_absence_keeps_its_identity() -> None:
    """The mark for "there was nothing" is the same object in every copy."""
    assert copy.deepcopy(ABSENT) is copy.copy(ABSENT) is pickle.loads(pickle.dumps(ABSENT)) is ABSENT


def test_a_snapshot_copies_no_tensor() -> None:
    """Values are the business of whoever changes them: a snapshot does not bring them back."""
    model = mlp()
    snapshot = take_snapshot(model)

    with torch.no_grad():
        model[0].weight.zero_()
    snapshot.restore()

    assert not model[0].weight.any()


# --- the property: any tree, any half-done action


LEAVES: tuple[Callable[[], nn.Module], ...] = (
    lambda: nn.Linear(2, 3),
    lambda: nn.Linear(2, 2, bias=False),
    lambda: nn.Conv1d(2, 2, 1),
    lambda: nn.BatchNorm1d(2),
    lambda: nn.Embedding(3, 2),
    lambda: nn.LSTM(2, 2),
    lambda: nn.MultiheadAttention(2, 1),
    nn.ReLU,
)
leaves = st.sampled_from(LEAVES).map(lambda make: make())
trees = st.recursive(
    leaves,
    lambda children: st.one_of(
        st.lists(children, min_size=1, max_size=3).map(lambda parts: nn.Sequential(*parts)),
        st.lists(children, min_size=1, max_size=3).map(nn.ModuleList),
        st.dictionaries(st.sampled_from("abc"), children, min_size=1, max_size=3).map(nn.ModuleDict),
        children.map(lambda child: nn.Sequential(child, child)),
    ),
    max_leaves=6,
)


def write(site: tuple[Any, ...]) -> None:
    """Write into every tensor, as torch.nn.init does."""
    with torch.no_grad():
        for tensor in (*site[4].parameters(), *(b for b in site[4].buffers() if b.is_floating_point())):
            tensor.add_(1)


def write_data(site: tuple[Any, ...]) -> None:
    """Write past the version counter."""
    for parameter in site[4].parameters():
        parameter.data.mul_(2)


def exchange_data(site: tuple[Any, ...]) -> None:
    """Give each parameter another storage."""
    for parameter in site[4].parameters():
        parameter.data = torch.randn(5)


def replace(site: tuple[Any, ...]) -> None:
    """Wrap the module."""
    if site[0] is not None:
        site[0]._modules[site[1]] = nn.Sequential(site[4])


def adopt_all(site: tuple[Any, ...]) -> None:
    """Adopt every parameter of the module itself."""
    adopt(site[4], Delta, [name for name, value in site[4]._parameters.items() if value is not None])


DEEDS: tuple[Callable[[tuple[Any, ...]], object], ...] = (
    write,
    write_data,
    exchange_data,
    replace,
    adopt_all,
    lambda site: site[4].double(),
    lambda site: site[4].register_forward_hook(hook),
    lambda site: site[4].register_buffer("extra", torch.randn(2)),
    lambda site: site[4].train(not site[4].training),
    lambda site: site[4].requires_grad_(False),
    lambda site: site[4]._parameters.clear(),
    lambda site: setattr(site[4], "note", object()),
    lambda site: setattr(site[4], "__class__", type("Other", (type(site[4]),), {})),
    lambda site: site[0] is not None and site[0].register_forward_pre_hook(hook),
    lambda site: site[0] is not None and site[0]._modules.clear(),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(model=trees, deeds=st.lists(st.sampled_from(DEEDS), max_size=4, unique=True), calls=st.integers(1, 3), mode=st.booleans())
def test_a_failing_action_leaves_no_trace(
    model: nn.Module, deeds: list[Callable[[tuple[Any, ...]], object]], calls: int, mode: bool
) -> None:
    """In any tree, after any deeds, at any site: when an action raises, model and random generator are as before."""
    model.train(mode)
    done: list[str] = []

    def is_leaf(*site: Any) -> bool:
        return not site[4]._modules or isinstance(site[4], nn.MultiheadAttention)

    def act(*site: Any) -> None:
        done.append(site[2])
        if len(done) < min(calls, sites):
            adopt_all(site)
            return
        for deed in deeds:
            deed(site)
        raise RuntimeError("half way")

    sites = sum(is_leaf(None, "", "", "", module) for module in model.modules())
    sites -= sum(isinstance(module, nn.MultiheadAttention) for module in model.modules())

    with refused(model, ActionError, "half way", "act"):
        enable_fine_tuning(model, FineTuningStrategy([(is_leaf, act)]))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(model=trees, mode=st.booleans())
def test_any_tree_comes_back(model: nn.Module, mode: bool) -> None:
    """In any tree: after enabling, changing every trainable number and disabling, the model is as before."""
    model.train(mode)
    before = fingerprint(model)
    if not any(True for _ in model.parameters()):
        return

    enable_fine_tuning(model, FineTuningStrategy([(lambda *site: bool(site[4]._parameters), lambda *site: adopt_all(site))]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    disable_fine_tuning(model)

    assert fingerprint(model) == before


def test_a_recurrent_layer_comes_back() -> None:
    """The list of weights that a recurrent layer caches names the frozen ones again."""
    model = lstm()
    before = fingerprint(model)

    enable_fine_tuning(model, FineTuningStrategy([(lambda *site: site[3] == "LSTM", lambda *site: adopt_all(site))]))
    disable_fine_tuning(model)

    assert fingerprint(model) == before
    assert all(a is b for a, b in zip(model.lstm._flat_weights, model.lstm.parameters(), strict=True))
