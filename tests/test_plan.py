from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from models import ALL, Builder, Delta, Nested, cnn, fingerprint, mlp, nested, refused, shared, single, tied
from torch import nn

from gift_core import FineTuningStrategy, ModuleSite, ParameterSite, enable_fine_tuning, plan_fine_tuning
from gift_core.errors import ActionError, CheckError, GiftError, ModelError, NoMatchError, SiteError
from gift_core.factories import (
    class_is,
    everything,
    freeze,
    is_instance,
    is_root,
    keep_trainable,
    lies_in,
    name_contains,
    name_is,
    parameter_name_is,
    reparameterize,
    selects,
)
from gift_core.iterator import join_name
from gift_lora_plugin import LoRAAllFineTuningStrategy


class Recorder:
    """A check that writes down what it is asked, and wants what ``wanted`` says."""

    def __init__(self, wanted: Any = lambda site: False) -> None:
        self.sites: list[tuple[Any, ...]] = []
        self.wanted = wanted

    def __call__(self, *site: Any) -> bool:
        self.sites.append(site)
        return bool(self.wanted(site))


def nothing(*site: Any, **params: Any) -> None:
    """Do nothing."""


def names(plan: Any) -> list[str]:
    """The full names of the sites that a plan acts on."""
    return [action.site.full_name for action in plan.actions]


def expected_walk(module: nn.Module, parent: nn.Module | None = None, current: str = "", name: str = "") -> Iterator[tuple[Any, ...]]:
    """The sites as the contract tells them: a module, its own parameters, then its children."""
    site = (parent, current, name, type(module).__name__, module)
    yield site
    yield from ((*site, own, parameter) for own, parameter in module._parameters.items() if parameter is not None)
    for own, child in module._modules.items():
        if child is not None:
            yield from expected_walk(child, module, own, join_name(name, own))


# --- the walk


@pytest.mark.parametrize("build", [b for b in ALL if b is not shared], ids=lambda build: build.__name__)
def test_every_site_is_offered_in_order(build: Builder) -> None:
    """The root first with no parent and empty names, then depth first; each parameter after its module."""
    asked: list[tuple[Any, ...]] = []
    model = build()

    def check(*site: Any) -> bool:
        asked.append(site)
        return len(site) == 7

    plan_fine_tuning(model, FineTuningStrategy([(check, nothing)], [(check, nothing)]))

    expected = list(expected_walk(model))
    assert [tuple(map(id, site[:1] + site[4:5] + site[6:])) for site in asked] == [
        tuple(map(id, site[:1] + site[4:5] + site[6:])) for site in expected
    ]
    assert [site[1:4] + site[5:6] for site in asked] == [site[1:4] + site[5:6] for site in expected]


def test_checks_are_called_with_positional_arguments() -> None:
    """A check may call its arguments as it likes, and knows modules from parameters by their number."""

    def for_modules(a: Any, b: str, c: str, d: str, e: nn.Module, /) -> bool:
        return False

    def for_parameters(a: Any, b: str, c: str, d: str, e: nn.Module, f: str, g: nn.Parameter, /) -> bool:
        return f == "bias"

    assert names(plan_fine_tuning(mlp(), FineTuningStrategy([(for_modules, nothing)], [(for_parameters, nothing)]))) == [
        "0.bias",
        "2.bias",
    ]


def test_a_matched_module_is_not_entered() -> None:
    """What a module cap matches belongs to its action: neither its parameters nor its children are offered."""
    modules, parameters = Recorder(lambda site: site[1] == "blocks"), Recorder()

    plan = plan_fine_tuning(nested(), FineTuningStrategy([(modules, nothing)], [(parameters, nothing)]))

    assert names(plan) == ["blocks"]
    assert not any(site[2].startswith("blocks") for site in parameters.sites)
    assert not any(site[2].startswith("blocks.") for site in modules.sites)


def test_a_matched_root_is_everything() -> None:
    """A cap that matches the root leaves nothing to visit."""
    check = Recorder(lambda site: True)

    plan = plan_fine_tuning(nested(), FineTuningStrategy([(check, nothing)]))

    assert names(plan) == [""]
    assert len(check.sites) == 1


def test_the_first_match_wins() -> None:
    """Later caps are not even asked about a site that an earlier one took."""
    later = Recorder(lambda site: True)

    plan = plan_fine_tuning(mlp(), FineTuningStrategy([(is_instance(nn.Linear), nothing), (is_root(), freeze())], [(later, nothing)]))

    assert names(plan) == [""]
    assert plan.actions[0].cap.action == freeze()
    assert later.sites == []


def test_a_root_that_is_a_layer_is_adapted() -> None:
    """The root is a site like any other."""
    assert names(plan_fine_tuning(single(), FineTuningStrategy([(class_is("Linear"), reparameterize(Delta))]))) == [""]


def test_what_no_cap_wants_is_frozen() -> None:
    """The plan lists every other parameter, once."""
    plan = plan_fine_tuning(nested(), FineTuningStrategy([(is_instance(nn.Linear), nothing)]))

    assert [site.full_name for site in plan.frozen] == ["scale"] + [
        f"blocks.{index}.norm.{part}" for index in (0, 1) for part in ("weight", "bias")
    ]
    assert all(isinstance(site, ParameterSite) for site in plan.frozen)
    assert all(isinstance(action.site, ModuleSite) for action in plan.actions)


def test_parameter_caps_take_parameters() -> None:
    """A parameter cap takes the parameters of modules that no module cap took."""
    plan = plan_fine_tuning(
        nested(), FineTuningStrategy([(name_is("heads"), nothing)], [(parameter_name_is("bias") & class_is("Linear"), nothing)])
    )

    assert names(plan) == ["blocks.0.fc.bias", "blocks.1.fc.bias", "heads"]


def test_a_shared_module_is_visited_once() -> None:
    """A module under two names is one site, and the other name is reported."""
    plan = plan_fine_tuning(shared(), FineTuningStrategy([(is_instance(nn.Linear), nothing)]))

    assert names(plan) == ["first", "last"]
    assert plan.report.shared == ("second = first",)


def test_a_tied_parameter_is_taken_once() -> None:
    """A parameter under two names is acted on once and frozen never, if a cap wants it."""
    plan = plan_fine_tuning(tied(), FineTuningStrategy(para_caps=[(parameter_name_is("weight"), nothing)]))

    assert names(plan) == ["embedding.weight", "middle.weight"]
    assert [site.full_name for site in plan.frozen] == ["middle.bias"]


def test_a_tied_parameter_that_a_cap_takes_elsewhere_is_not_frozen() -> None:
    """Which name comes first makes no difference."""
    for wanted in ("embedding", "output"):
        plan = plan_fine_tuning(tied(), FineTuningStrategy([(name_is(wanted), nothing)]))

        assert "embedding.weight" not in [site.full_name for site in plan.frozen]
        assert "output.weight" not in [site.full_name for site in plan.frozen]


def test_missing_children_and_parameters_are_passed_over() -> None:
    """A child or parameter that is None is no site."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2, affine=False))
    model.register_module("gone", None)

    plan = plan_fine_tuning(model, FineTuningStrategy(para_caps=[(everything(), nothing)]))

    assert names(plan) == ["0.weight"]


@pytest.mark.parametrize("build", ALL, ids=lambda build: build.__name__)
def test_planning_changes_nothing(build: Builder) -> None:
    """A plan reads the model, draws no random number and leaves no trace."""
    model = build()
    before, random = fingerprint(model), torch.get_rng_state()

    plan = plan_fine_tuning(model, "lora")

    assert plan.module is model
    assert fingerprint(model) == before
    assert torch.equal(torch.get_rng_state(), random)


def test_a_plan_works_without_values() -> None:
    """A model on the meta device can be planned with actions that need no values."""
    with torch.device("meta"):
        model = Nested()

    assert names(plan_fine_tuning(model, FineTuningStrategy([(name_is("heads"), keep_trainable())]))) == ["heads"]


# --- strategies as actions


def test_a_nested_strategy_walks_on_from_its_site() -> None:
    """Names stay global, the site is the inner strategy's first, and only there do its caps apply."""
    asked = Recorder(lambda site: site[3] == "Linear")
    inner = FineTuningStrategy([(asked, nothing)], [(parameter_name_is("weight"), nothing)])

    plan = plan_fine_tuning(nested(), FineTuningStrategy([(name_is("blocks"), inner)]))

    assert names(plan) == ["blocks.0.fc", "blocks.0.norm.weight", "blocks.1.fc", "blocks.1.norm.weight"]
    assert [site[2] for site in asked.sites] == [
        "blocks",
        "blocks.0",
        "blocks.0.fc",
        "blocks.0.norm",
        "blocks.1",
        "blocks.1.fc",
        "blocks.1.norm",
    ]
    assert "blocks.0.norm.bias" in plan.report.frozen


def test_a_nested_strategy_may_take_its_own_site() -> None:
    """The inner strategy is offered the very module that the outer one matched."""
    inner = FineTuningStrategy([(is_instance(nn.Linear), nothing)])

    assert names(plan_fine_tuning(mlp(), FineTuningStrategy([(is_instance(nn.Linear), inner)]))) == ["0", "2"]


def test_the_constraint_of_a_nested_strategy_is_for_its_site() -> None:
    """It is checked at the module that was matched, not at the root, and the error names that module."""
    inner = FineTuningStrategy([(is_instance(nn.Linear), nothing)], constraint_type=nn.ModuleList)

    assert names(plan_fine_tuning(nested(), FineTuningStrategy([(name_is("blocks"), inner)]))) == ["blocks.0.fc", "blocks.1.fc"]
    with refused(model := nested(), ModelError, "ModuleList", "'heads' (ModuleDict)"):
        plan_fine_tuning(model, FineTuningStrategy([(name_is("heads"), inner)]))


def test_a_strategy_is_no_action_on_a_parameter() -> None:
    """In a parameter cap a strategy is an error that names the parameter."""
    inner = FineTuningStrategy([(is_instance(nn.Linear), nothing)])

    with refused(model := mlp(), SiteError, "'0.weight'", "module cap"):
        plan_fine_tuning(model, FineTuningStrategy(para_caps=[(everything(), inner)]))


# --- bad input


@pytest.mark.parametrize("thing", [None, 3, "resnet18", nn.Linear, [nn.ReLU()]])
def test_something_that_is_no_module_is_refused(thing: Any) -> None:
    """No model, or no module, is a ModelError and a TypeError that says what was given."""
    with pytest.raises(ModelError, match="nothing" if thing is None else type(thing).__name__) as caught:
        plan_fine_tuning(thing, "lora")

    assert isinstance(caught.value, (GiftError, TypeError))


@pytest.mark.parametrize("error", [ValueError("odd"), KeyError("odd"), AssertionError("odd")])
def test_a_check_that_raises_is_named(error: Exception) -> None:
    """The error names the check, the site and the cause, and is chained."""

    def wants_odd(*site: Any) -> bool:
        if site[1] == "fc":
            raise error
        return False

    with refused(model := nested(), CheckError, "wants_odd", "'blocks.0.fc' (Linear)", type(error).__name__, "odd"):
        plan_fine_tuning(model, FineTuningStrategy([(wants_odd, nothing)]))
    with pytest.raises(CheckError) as caught:
        plan_fine_tuning(model, FineTuningStrategy([(wants_odd, nothing)]))

    assert caught.value.__cause__ is error


def test_a_check_with_another_signature_is_named() -> None:
    """A check that takes other arguments is a CheckError, not a bare TypeError."""
    with refused(model := mlp(), CheckError, "<lambda>", "the root"):
        plan_fine_tuning(model, FineTuningStrategy([(lambda module: True, nothing)]))


@pytest.mark.parametrize("answer", [None, 1, 0, "", "yes", [], torch.tensor(True), NotImplemented, np.array([True, False])], ids=repr)
def test_a_check_must_answer_true_or_false(answer: Any) -> None:
    """Another answer is an error that shows it, because a forgotten return would match nothing in silence."""

    def careless(*site: Any) -> Any:
        return answer

    with refused(model := mlp(), CheckError, "careless", repr(answer), "the root (Sequential)"):
        plan_fine_tuning(model, FineTuningStrategy([(careless, nothing)]))


@pytest.mark.parametrize("kind", [bool, np.bool_])
def test_numpys_booleans_are_booleans(kind: Any) -> None:
    """What a comparison of numpy gives is taken."""
    assert names(plan_fine_tuning(mlp(), FineTuningStrategy([(lambda *site: kind(site[3] == "Linear"), nothing)]))) == ["0", "2"]


def test_interrupts_are_not_wrapped() -> None:
    """Ctrl-C in a check stays what it is."""

    def interrupted(*site: Any) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        plan_fine_tuning(mlp(), FineTuningStrategy([(interrupted, nothing)]))


@pytest.mark.parametrize("strategy", [FineTuningStrategy(), FineTuningStrategy([(class_is("Conv3d"), nothing)])])
def test_nothing_matched_is_an_error(strategy: FineTuningStrategy) -> None:
    """A strategy that does nothing to a model is an error that names it and the kinds that the model has."""
    with refused(model := mlp(), NoMatchError, repr(strategy), "Linear, ReLU"):
        plan_fine_tuning(model, strategy)


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("conv9", ["'conv9'", "conv"]),
        ("hed", ["'hed'", "head"]),
        ("head.wieght", ["'head.wieght'", "head.weight"]),
        ("re:con", ["'re:con'", "conv"]),
        ("type:Conv3d", ["'type:Conv3d'"]),
        ("layer:7", ["'layer:7'"]),
        ("xyz", ["'xyz'"]),
    ],
)
@pytest.mark.parametrize("argument", ["targets", "exclude"])
def test_a_name_that_matches_nothing_is_an_error(argument: str, target: str, says: list[str]) -> None:
    """A target or exclude that matches nothing is named, with the nearest names, also when others match."""
    patterns = {"targets": ["head"], "exclude": ["head.bias"]}
    patterns[argument] = [*patterns[argument], target]

    with refused(model := cnn(), NoMatchError, *says):
        plan_fine_tuning(model, FineTuningStrategy(para_caps=[(selects(**patterns), nothing)]))


def test_the_last_part_of_a_name_is_completed() -> None:
    """Who writes the last part of a full name is told how to write it."""
    with refused(model := nested(), NoMatchError, "'fc'", "'*.fc'", "blocks."):
        plan_fine_tuning(model, FineTuningStrategy([(selects("fc"), nothing)]))


def test_a_name_of_the_wrong_kind_is_explained() -> None:
    """A target that exists and that no cap can take is an error that says why."""
    with refused(model := cnn(), NoMatchError, "'bn'", "'bn' (BatchNorm2d)"):
        plan_fine_tuning(model, FineTuningStrategy([(is_instance(nn.Linear) & selects(["head", "bn"]), nothing)]))


def test_a_name_inside_what_another_cap_took_is_explained() -> None:
    """A target that an earlier cap took away is an error that names the one who has it."""
    caps = [(name_is("blocks"), nothing), (selects("blocks.0.fc"), nothing)]

    with refused(model := nested(), NoMatchError, "'blocks.0.fc'", "belongs to 'blocks'"):
        plan_fine_tuning(model, FineTuningStrategy(caps))


def test_an_alias_is_explained() -> None:
    """A target that is a module's second name is an error that gives the first."""
    with refused(model := shared(), NoMatchError, "'second'", "second = first"):
        plan_fine_tuning(model, FineTuningStrategy([(is_instance(nn.Linear) & selects("second"), nothing)]))


def test_a_name_in_a_nested_strategy_must_match_too() -> None:
    """Silence inside a nested strategy is as bad as outside."""
    inner = FineTuningStrategy([(selects("heads.a"), nothing), (selects("heads.z"), nothing)])

    with refused(model := nested(), NoMatchError, "'heads.z'"):
        plan_fine_tuning(model, FineTuningStrategy([(name_is("heads"), inner)]))


def test_lazy_modules_are_refused() -> None:
    """A layer without shapes is named, and what to do is said."""
    with refused(model := nn.Sequential(nn.ReLU(), nn.LazyLinear(2)), ModelError, "'1' (LazyLinear)", "forward pass"):
        plan_fine_tuning(model, "lora")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_scripted_modules_are_refused() -> None:
    """A scripted root or part is named, and told to be scripted afterwards."""
    scripted = torch.jit.script(nn.Linear(2, 2))
    model = nn.Sequential(nn.Linear(2, 2), scripted)

    with pytest.raises(ModelError, match=r"the model.*scripted"):
        plan_fine_tuning(scripted, "lora")
    with pytest.raises(ModelError, match=r"'1'.*scripted.*then torch.jit.script merge_and_unload\(model\)"):
        plan_fine_tuning(model, "lora")


def test_the_plan_names_the_site_that_cannot_be_adapted() -> None:
    """What a method finds wrong with a weight is an error at planning time, with the site."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2))

    with refused(model, SiteError, "'1' (Linear)", "pissa", "rank 3"):
        plan_fine_tuning(model, LoRAAllFineTuningStrategy(rank=3, init="pissa"))


def test_an_action_that_cannot_be_examined_is_named() -> None:
    """What an action raises while it is asked about a site is an error of ours, with the action, its params and the site."""

    class Picky:
        def __call__(self, *site: Any, **params: Any) -> None: ...

        def examine(self, *site: Any, rank: int) -> str | None:
            return None

        def __repr__(self) -> str:
            return "picky"

    with refused(model := mlp(), ActionError, "action picky with {'ranc': 2}", "at '0' (Linear)", "TypeError", "ranc"):
        plan_fine_tuning(model, FineTuningStrategy([(class_is("Linear"), Picky(), {"ranc": 2})]))


def test_what_matches_nothing_says_what_was_asked() -> None:
    """The error repeats the rules that were tried, or says that there were none, and names the kinds that the model has."""
    with pytest.raises(
        NoMatchError, match=r"matches nothing in Sequential \(class_is\('Conv2d'\) -> .*\)\. The model has: Linear, ReLU"
    ):
        plan_fine_tuning(mlp(), FineTuningStrategy([(class_is("Conv2d"), nothing)]))
    with pytest.raises(NoMatchError, match=r"\(it has no caps\)"):
        plan_fine_tuning(mlp(), FineTuningStrategy())


@pytest.mark.parametrize(
    ("layers", "says"), [(3, "so leave it out."), (4, "so leave it out; and 1 more."), (9, "so leave it out; and 6 more.")]
)
def test_of_many_sites_three_are_explained(layers: int, says: str) -> None:
    """Where a name is of many sites that the strategy does not adapt, three are explained and the others counted."""
    model = nn.Sequential(nn.Linear(2, 2), nn.ModuleDict({f"act{number}": nn.ReLU() for number in range(layers)}))

    with pytest.raises(NoMatchError) as caught:
        plan_fine_tuning(
            model, FineTuningStrategy([(is_instance(nn.Linear), nothing), (name_contains("act") & class_is("X"), nothing)])
        )

    assert str(caught.value).count("is of no kind") == 3
    assert str(caught.value).endswith(says)


def test_a_name_of_parameters_alone_is_explained() -> None:
    """A name that modules and parameters go by is explained at the modules; one that parameters alone go by, at these."""
    of_parameters = [(is_instance(nn.ReLU), nothing), (parameter_name_is("bias") & class_is("X"), nothing)]
    with pytest.raises(NoMatchError, match=r"adapts none of them: '2\.bias' \(Linear\) is of no kind") as caught:
        plan_fine_tuning(mlp(), FineTuningStrategy(of_parameters))
    assert "'0.bias' (Linear)" in str(caught.value)

    of_both = [(is_instance(nn.ReLU), nothing), (lies_in("0") & class_is("X"), nothing)]
    with pytest.raises(NoMatchError, match=r"adapts none of them: '0' \(Linear\) is of no kind that it adapts, so leave it out\.$"):
        plan_fine_tuning(mlp(), FineTuningStrategy(of_both))


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("projektion", "Did you mean encoder.layers.0.projection?"),
        ("decoder.projektion", "Did you mean encoder.layers.0.projection, "),
        ("of.a.wholly.different.and.far.longer.name.projektion", "Did you mean encoder.layers.0.projection?"),
        ("layers.0.projection", "write '*.layers.0.projection' (as in encoder.layers.0.projection)"),
        ("zzz", "Choose from names such as encoder, encoder.layers, encoder.layers.0."),
    ],
)
def test_the_nearest_name_is_told(target: str, says: str) -> None:
    """A name that matches nothing comes with the names nearest to it, by their last part too, or with how names look."""
    layer = nn.ModuleDict({"projection": nn.Linear(2, 2, bias=False)})
    model = nn.ModuleDict({"encoder": nn.ModuleDict({"layers": nn.ModuleList([layer])})})

    with pytest.raises(NoMatchError) as caught:
        plan_fine_tuning(model, LoRAAllFineTuningStrategy(targets=target))

    assert says in str(caught.value)


def test_a_model_that_goes_round_in_circles_is_refused() -> None:
    """A model that holds itself, somewhere below, is refused with the two names of what it holds twice."""
    for builder, says in ((lambda root, inner: root, "the model again"), (lambda root, inner: nn.Sequential(inner), "'inner' again")):
        root = nn.Sequential()
        root.add_module("inner", inner := nn.Sequential(nn.Linear(2, 2)))
        inner.add_module("up", builder(root, inner))

        with pytest.raises(ModelError, match=r"^'inner\.up.*is " + says):
            plan_fine_tuning(root, "full")
        with pytest.raises(ModelError, match=says):
            enable_fine_tuning(root, "full")


def test_a_model_deeper_than_python_follows_is_refused() -> None:
    """However deep a model is nested, enabling works or is refused and leaves no trace; a walk that ends says where and how deep."""
    for depth in (200, 700, *range(800, 1000, 10), 5000):
        layer = model = nn.Linear(2, 2)
        for _ in range(depth):
            model = nn.Sequential(model)  # type: ignore[assignment]
        try:
            enable_fine_tuning(model, "full")
        except GiftError as error:
            assert depth > 700 and (depth < 1000 or f"{'.'.join('00000')!r} are nested" in str(error))
            assert type(layer) is nn.Linear and type(model) is nn.Sequential and "parameters" not in vars(model)
        else:
            assert depth < 1000
