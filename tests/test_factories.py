from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
from models import Delta, cnn, input_for, nested, refused
from torch import nn

from gift_core import FineTuningStrategy, disable_fine_tuning, enable_fine_tuning, plan_fine_tuning
from gift_core.caps import Cap
from gift_core.errors import GiftError, NoMatchError, PatternError, SiteError, StrategyError
from gift_core.factories import (
    Check,
    class_is,
    everything,
    freeze,
    is_instance,
    is_root,
    keep_trainable,
    layer_index,
    lies_in,
    name_contains,
    name_is,
    name_matches,
    parameter_name_contains,
    parameter_name_is,
    reparameterize,
    replace_module,
    selects,
    site_name,
)


class MyLinear(nn.Linear):
    """A subclass, which only some checks take."""


PARENT = nn.Module()
SITES: dict[str, tuple[Any, ...]] = {
    "root": (None, "", "", "Sequential", nn.Sequential()),
    "conv": (PARENT, "conv1", "layer4.0.conv1", "Conv2d", nn.Conv2d(1, 1, 1)),
    "mine": (PARENT, "fc", "layer4.1.fc", "MyLinear", MyLinear(1, 1)),
    "bias": (PARENT, "fc", "layer4.1.fc", "Linear", (_layer := nn.Linear(1, 1)), "bias", _layer.bias),
}


@pytest.mark.parametrize(
    ("check", "true_for"),
    [
        (everything(), "root conv mine bias"),
        (is_root(), "root"),
        (class_is("Conv2d"), "conv"),
        (class_is("Linear", "Conv2d"), "conv bias"),
        (is_instance(nn.Linear), "mine bias"),
        (is_instance("Linear", nn.Conv2d), "conv mine bias"),
        (name_is("conv1"), "conv"),
        (name_is("fc", "x"), "mine bias"),
        (name_contains("onv"), "conv"),
        (name_matches("layer4.?.fc"), "mine"),
        (name_matches("layer4.1.fc.bias"), "bias"),
        (name_matches("re:.*\\.(conv1|fc)"), "conv mine"),
        (lies_in("layer4"), "conv mine bias"),
        (lies_in("layer4.1"), "mine bias"),
        (lies_in("layer"), ""),
        (layer_index(0, 7), "conv"),
        (parameter_name_is("bias"), "bias"),
        (parameter_name_contains("ia"), "bias"),
        (class_is("Conv2d") | is_instance(nn.Linear), "conv mine bias"),
        (is_instance(nn.Linear) & parameter_name_is("bias"), "bias"),
        (~is_root() & ~class_is("MyLinear"), "conv bias"),
        (~(is_root() | class_is("Conv2d")), "mine bias"),
        (~~is_root(), "root"),
        (selects(), "root conv mine bias"),
        (selects("layer4.1"), "mine bias"),
        (selects(["layer4.0", "layer4.1"], "layer4.1.fc"), "conv"),
        (selects(None, ["type:Conv2d"]), "root mine bias"),
        (selects("layer:1"), "mine bias"),
    ],
    ids=repr,
)
def test_each_check_says_what_its_name_says(check: Check, true_for: str) -> None:
    """A check is true for the sites it describes and for no other, modules and parameters alike."""
    assert [name for name, site in SITES.items() if check(*site)] == true_for.split()


CHECKS = [
    everything(),
    is_root(),
    class_is("Conv2d", "Linear"),
    is_instance("Linear"),
    name_is("fc"),
    name_contains("fc", optional=True),
    name_matches("layer4.*", "re:x.*"),
    lies_in("layer4", optional=True),
    layer_index(1, 2),
    parameter_name_is("bias"),
    parameter_name_contains("bia"),
    ~name_is("fc") & (is_root() | class_is("A")),
    selects(["a", "b"], "c"),
]


@pytest.mark.parametrize("check", CHECKS, ids=repr)
def test_a_check_survives_json_and_pickle(check: Check) -> None:
    """Through its config and through pickle comes an equal check, ``optional`` included."""
    assert Check.from_config(json.loads(json.dumps(check.to_config()))) == check
    assert pickle.loads(pickle.dumps(check)) == check


@pytest.mark.parametrize("check", CHECKS[:-2], ids=repr)
def test_a_check_prints_as_it_was_written(check: Check) -> None:
    """The repr names the factory and its arguments."""
    assert repr(check).startswith(f"{check.kind}(")
    assert all(str(argument) in repr(check) or argument is nn.Linear for argument in check.arguments)


def test_composed_checks_print_with_their_operators() -> None:
    """Composition reads as Python, with brackets and without ``everything``."""
    assert repr(is_instance(nn.Linear) & ~name_is("fc")) == "(is_instance(Linear) & ~name_is('fc'))"
    assert repr(class_is("A") | class_is("B") & is_root()) == "(class_is('A') | (class_is('B') & is_root()))"
    assert repr(is_root() & selects()) == "is_root()"


def test_a_function_of_the_users_own_composes() -> None:
    """A plain function may stand on the right of an operator, and is named in the repr."""

    def wide(*site: Any) -> bool:
        return site[4].out_features > 2

    both = is_instance(nn.Linear) & wide

    assert [both(None, "", "", "Linear", nn.Linear(1, width)) for width in (2, 3)] == [False, True]
    assert "wide" in repr(both)
    assert repr(selects() & wide & is_root()).endswith("wide) & is_root())")
    with pytest.raises(StrategyError, match="wide"):
        both.to_config()


@pytest.mark.parametrize("other", [3, "conv", None])
def test_only_callables_compose(other: Any) -> None:
    """What is no check is Python's own TypeError."""
    with pytest.raises(TypeError):
        is_root() & other
    with pytest.raises(TypeError):
        is_root() | other


@pytest.mark.parametrize(
    "make",
    [
        lambda: class_is(),
        lambda: class_is(nn.Linear),  # type: ignore[arg-type]
        lambda: class_is(""),
        lambda: is_instance("Linnear"),
        lambda: is_instance(3),  # type: ignore[arg-type]
        lambda: is_instance(),
        lambda: name_is(3),  # type: ignore[arg-type]
        lambda: name_contains(),
        lambda: name_matches("re:["),
        lambda: name_matches(),
        lambda: lies_in(""),
        lambda: layer_index(),
        lambda: layer_index(-1),
        lambda: layer_index(True),
        lambda: layer_index(1.0),  # type: ignore[arg-type]
        lambda: parameter_name_is(),
        lambda: parameter_name_contains(None),  # type: ignore[arg-type]
        lambda: selects([]),
        lambda: selects(exclude=[]),
        lambda: selects(3),  # type: ignore[arg-type]
        lambda: reparameterize(nn.Linear),  # type: ignore[arg-type]
        lambda: reparameterize("lora"),  # type: ignore[arg-type]
        lambda: replace_module(None),  # type: ignore[arg-type]
    ],
)
def test_a_factory_refuses_what_it_cannot_mean(make: Callable[[], object]) -> None:
    """A wrong argument is an error when the check is written, not a check that is never true."""
    with pytest.raises(StrategyError):
        make()


@pytest.mark.parametrize(
    "config",
    [
        None,
        {},
        {"check": "os.system", "arguments": ["ls"]},
        {"check": "name_is"},
        {"check": "name_is", "arguments": "fc"},
        {"check": "name_is", "arguments": [3]},
        {"check": "name_is", "arguments": []},
        {"check": "and", "arguments": ["x"]},
        {"check": "and", "arguments": []},
        {"check": "not", "arguments": []},
        {"check": "is_root", "arguments": ["x"]},
        {"check": "is_root", "arguments": [], "optional": True},
        {"check": "name_matches", "arguments": ["re:["]},
        {"check": "name_is", "arguments": ["fc"], "import": "os"},
        {"check": "is_instance", "arguments": ["functional"]},
        {"check": ["and"], "arguments": []},
    ],
    ids=repr,
)
def test_data_that_describes_no_check_is_refused(config: Any) -> None:
    """A config comes from a file: whatever it holds, the answer is a check or a GiftError."""
    with pytest.raises(StrategyError):
        Check.from_config(config)


def test_a_class_from_elsewhere_has_no_plain_form() -> None:
    """Only torch.nn's classes can be named in data."""
    with pytest.raises(StrategyError, match="MyLinear"):
        is_instance(MyLinear).to_config()


@pytest.mark.parametrize(
    ("factory", "argument"),
    [
        (name_is, "x"),
        (name_contains, "x"),
        (name_matches, "x"),
        (lies_in, "x"),
        (layer_index, 3),
        (parameter_name_is, "x"),
        (parameter_name_contains, "x"),
    ],
    ids=lambda thing: getattr(thing, "__name__", ""),
)
def test_what_names_something_is_not_optional_by_itself(factory: Callable[..., Check], argument: Any) -> None:
    """Each check that names something in the model must find it, unless it says ``optional=True``."""
    check, optional = factory(argument), factory(argument, optional=True)

    assert [*check.naming_parts()] == [(check, False)]
    assert [*(~check).naming_parts()] == [(check, True)]
    assert [*optional.naming_parts()] == []
    with pytest.raises(NoMatchError):
        plan_fine_tuning(cnn(), FineTuningStrategy([(everything(), keep_trainable()), (check, keep_trainable())]))


def test_a_name_must_be_found_unless_it_is_optional() -> None:
    """A check that names something missing is an error; with ``optional=True`` it is not."""
    cap = (name_is("head"), keep_trainable())

    plan = plan_fine_tuning(cnn(), FineTuningStrategy([cap, (name_is("classifier", optional=True), keep_trainable())]))

    assert [action.site.full_name for action in plan.actions] == ["head"]
    with refused(model := cnn(), NoMatchError, "classifier"):
        plan_fine_tuning(model, FineTuningStrategy([cap, (name_is("classifier"), keep_trainable())]))


def test_patterns_are_named_when_they_cannot_be_read() -> None:
    """A malformed pattern inside a factory is a PatternError."""
    with pytest.raises(PatternError, match=re.escape("re:(")):
        selects(["fc", "re:("])


# --- actions


def enable(model: nn.Module, *caps: tuple[Any, ...], parameters: tuple[Any, ...] = ()) -> set[str]:
    """Enable caps and give the names of what trains."""
    enable_fine_tuning(model, FineTuningStrategy(caps, parameters))
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_keep_trainable_trains_what_was_frozen_too() -> None:
    """A module or parameter kept trainable trains, whatever its flag was; the rest is frozen."""
    model = nested().requires_grad_(False)

    trained = enable(model, (name_is("a"), keep_trainable()), parameters=((parameter_name_is("scale"), keep_trainable()),))

    assert trained == {"heads.a.weight", "heads.a.bias", "scale"}


def test_freeze_keeps_later_caps_out() -> None:
    """The first cap that matches wins, so that freezing first is an exception to a later rule."""
    trained = enable(nested(), (name_is("norm"), freeze()), (is_instance(nn.Linear, nn.LayerNorm), keep_trainable()))

    assert trained == {f"{name}.{part}" for name in LINEARS for part in ("weight", "bias")}


LINEARS = ("blocks.0.fc", "blocks.1.fc", "heads.a", "heads.b.0", "heads.b.2")


def test_a_do_nothing_action_keeps_a_module_training() -> None:
    """What an action owns and leaves alone trains as before."""
    assert enable(nested(), (name_is("a"), lambda *site: None)) == {"heads.a.weight", "heads.a.bias"}


def test_reparameterize_trains_only_what_the_method_adds() -> None:
    """The adapted layer's own parameters are frozen, except those to keep."""
    check = is_instance(nn.Linear)

    assert enable(nested(), (check, reparameterize(Delta))) == {f"{name}.delta" for name in LINEARS}
    assert enable(nested(), (check, reparameterize(Delta, keep=["bias"]))) == {
        f"{name}.{part}" for name in LINEARS for part in ("delta", "bias")
    }


def test_reparameterize_works_for_a_parameter() -> None:
    """In a parameter cap the parameter itself is adapted, whatever its name, and its neighbours are frozen."""
    model = nested()

    trained = enable(model, parameters=((parameter_name_is("scale"), reparameterize(Delta), {"start": 1.0}),))

    assert trained == {"scale_delta"}
    assert (model.scale == 2).all()


def test_the_params_of_a_cap_reach_the_method() -> None:
    """What a cap holds besides check and action is what the action gets."""
    model = nested()

    enable(model, (name_is("a"), reparameterize(Delta), {"start": 0.5}))

    assert (model.heads["a"].delta == 0.5).all()


def test_an_adapted_name_that_is_not_there_is_refused() -> None:
    """The error names the layer, the parameter asked for and those it has."""
    model = cnn()

    with refused(model, SiteError, "'head'", "'kernel'", "weight, bias"):
        enable(model, (name_is("head"), reparameterize(Delta, names=["kernel"])))


def test_replace_module_can_be_undone() -> None:
    """The replacement stands in the module's place with the params it got, and disable brings the old object back."""
    model = cnn()
    old = model.head

    trained = enable(model, (name_is("head"), replace_module(lambda module, out: nn.Linear(module.in_features, out)), {"out": 9}))
    shape = model(input_for(cnn)).shape
    disable_fine_tuning(model)

    assert trained == {"head.weight", "head.bias"}
    assert shape == (3, 9)
    assert model.head is old


@pytest.mark.parametrize("result", [None, "model", nn.Linear])
def test_a_replacement_must_be_a_module(result: object) -> None:
    """What is put in a module's place must be one; the error names the function and what it gave."""

    def make(module: nn.Module) -> Any:
        return result

    with refused(model := cnn(), SiteError, "make", type(result).__name__, "'head'"):
        enable(model, (name_is("head"), replace_module(make)))


def test_the_root_cannot_be_replaced() -> None:
    """Nobody holds the root, so replacing it is an error that says what to do."""
    with refused(model := cnn(), SiteError, "root", "children"):
        enable(model, (is_root(), replace_module(lambda module: nn.ReLU())))


def test_a_parameter_is_no_module_to_replace() -> None:
    """replace_module in a parameter cap is an error that says so."""
    with refused(model := cnn(), SiteError, "module cap", "head.bias"):
        enable(model, parameters=((name_is("head") & parameter_name_is("bias"), replace_module(lambda module: nn.ReLU())),))


@pytest.mark.parametrize(
    ("action", "text"),
    [
        (keep_trainable(), "keep_trainable()"),
        (freeze(), "freeze()"),
        (reparameterize(Delta), "reparameterize(Delta)"),
        (replace_module(Delta), "replace_module(Delta)"),
    ],
)
def test_an_action_is_data(action: Any, text: str) -> None:
    """Actions print as they were written, compare by value and can be pickled."""
    assert repr(action) == text
    assert pickle.loads(pickle.dumps(action)) == action
    assert text in repr(Cap(everything(), action))


def test_sites_are_named_for_readers() -> None:
    """A site is its full name and class; the root is called so."""
    assert site_name(*SITES["conv"]) == "'layer4.0.conv1' (Conv2d)"
    assert site_name(*SITES["root"]) == "the root (Sequential)"
    assert site_name(*SITES["bias"]) == "'layer4.1.fc.bias' (Linear)"


def test_errors_are_of_one_family() -> None:
    """Whoever catches GiftError catches what a factory raises."""
    assert issubclass(PatternError, StrategyError)
    assert issubclass(StrategyError, GiftError)


def test_thousands_of_patterns() -> None:
    """As many targets and exclusions as a large model has layers make one check, which prints, compares and is tested as others."""
    names = [f"layer{number}" for number in range(3000)]
    site = (nn.Module(), "layer2999", "layer2999", "Linear", nn.Linear(1, 1))

    assert selects(names)(*site) and not selects(exclude=names)(*site)
    assert selects(names) == selects(names) and "'layer2999'" in repr(selects(names))
    assert [part.arguments[0] for part, _ in selects(names).naming_parts()] == names
