from __future__ import annotations

import pytest
from models import ALL, Builder, mlp, nested, shared
from torch import nn

from gift_core import ModuleIterator, ModuleSite, ParameterSite
from gift_core.errors import GiftError, ModelError
from gift_core.iterator import Inventory, join_name, named_parameters_below, walk_modules


class TestNet(nn.Module):
    __test__ = False  # the name is the example's

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.fc1 = nn.Linear(16, 120)
        self.nn_seq = nn.Sequential(nn.Linear(4, 4), nn.ReLU())


def test_a_walk_prints_as_in_the_seed_example() -> None:
    """Each child comes with its own name, its full name, its class and whether it has children."""
    lines = [f"{child[0]} {child[1]} {child[2]} {child[4]}" for child in ModuleIterator(TestNet(), "TestNet")]

    assert lines == [
        "conv1 TestNet.conv1 Conv2d False",
        "pool TestNet.pool MaxPool2d False",
        "fc1 TestNet.fc1 Linear False",
        "nn_seq TestNet.nn_seq Sequential True",
    ]


def test_fields_have_names_and_positions() -> None:
    """A child can be unpacked in the documented order and read by name."""
    net = TestNet()

    first = next(iter(ModuleIterator(net, "net")))
    current_name, global_name, class_name, current_module, has_children = first

    assert (current_name, global_name, class_name, has_children) == ("conv1", "net.conv1", "Conv2d", False)
    assert current_module is first.current_module is net.conv1


def test_the_direct_children_are_torchs_own() -> None:
    """The iterator gives the names and the very objects that named_children gives, in its order."""
    net = nested()

    found = [(child.current_name, child.current_module) for child in ModuleIterator(net)]

    assert found == list(net.named_children())


@pytest.mark.parametrize(("parent", "name"), [("", "0"), ("a", "a.0"), ("a.b", "a.b.0")])
def test_an_empty_parent_adds_no_dot(parent: str, name: str) -> None:
    """Names join with a dot, without a leading one."""
    assert next(iter(ModuleIterator(mlp(), parent))).global_name == name
    assert join_name(parent, "0") == name


def test_it_can_be_walked_again_and_has_a_length() -> None:
    """Two passes give the same, also nested ones, and len counts what a pass gives."""
    walk = ModuleIterator(mlp())

    pairs = [(a.current_name, b.current_name) for a in walk for b in walk]

    assert list(walk) == list(walk)
    assert len(walk) == len(list(walk)) == 3
    assert len(pairs) == 9


def test_a_change_of_the_model_shows() -> None:
    """The iterator reads the model at each pass, so that a child added later is walked."""
    net = mlp()
    walk = ModuleIterator(net)

    net.append(nn.ReLU())

    assert len(walk) == 4


def test_missing_children_are_no_children() -> None:
    """A child that is None is neither walked nor counted, and makes nobody a parent."""
    net = nn.Sequential(nn.Linear(2, 2))
    net[0].register_module("nothing", None)
    net.register_module("gone", None)

    (child,) = ModuleIterator(net)

    assert len(ModuleIterator(net)) == 1
    assert child.has_children is False


def test_a_shared_child_is_walked_under_each_name() -> None:
    """One object under two names is two children: what to do about it is the plan's business."""
    assert [child.current_name for child in ModuleIterator(shared())] == ["first", "second", "last"]


@pytest.mark.parametrize("thing", [None, 3, nn.Linear, "model"])
def test_only_a_module_can_be_walked(thing: object) -> None:
    """What is no module is refused at construction, and the message says what was given."""
    with pytest.raises(ModelError, match=f"got {type(thing).__name__}") as caught:
        ModuleIterator(thing)  # type: ignore[arg-type]

    assert isinstance(caught.value, (GiftError, TypeError))


@pytest.mark.parametrize("build", [*ALL, lambda: nn.Linear(2, 3), lambda: nn.Linear(2, 3, bias=False)])
def test_what_is_below_a_module_is_what_torch_finds(build: Builder) -> None:
    """Modules and parameters below a module, or of one without children, come under all their names, as torch gives them."""
    model = build()

    assert walk_modules(model) == list(model.named_modules(remove_duplicate=False))
    found = [(name, id(parameter)) for name, parameter in named_parameters_below(model)]
    assert found == [(name, id(parameter)) for name, parameter in model.named_parameters(remove_duplicate=False)]


def test_sites_know_their_full_names() -> None:
    """A module's full name is its global name; a parameter's has its own name after a dot, and none at the root."""
    layer = nn.Linear(2, 2)
    at_root = ModuleSite(None, "", "", "Linear", layer)
    inside = ModuleSite(nn.Sequential(layer), "0", "a.0", "Linear", layer)

    assert inside.full_name == "a.0"
    assert ParameterSite(*inside, "weight", layer.weight).full_name == "a.0.weight"
    assert ParameterSite(*at_root, "weight", layer.weight).full_name == "weight"


def test_the_iterator_says_what_it_walks() -> None:
    """Its repr names the class and the parent name."""
    assert repr(ModuleIterator(TestNet(), "net")) == "ModuleIterator(TestNet, parent_name='net')"


@pytest.mark.parametrize("build", ALL, ids=lambda build: build.__name__)
def test_an_inventory_is_what_torch_lists(build: Builder) -> None:
    """Every module and tensor under each of its names, in torch's order; the persistent buffers as a state dict has them."""
    model = build()
    inventory = Inventory.of(model)

    assert inventory.modules == list(model.named_modules(remove_duplicate=False))
    assert [(key, id(p)) for key, _, _, p in inventory.parameters] == [
        (key, id(p)) for key, p in model.named_parameters(remove_duplicate=False)
    ]
    assert [(key, id(b)) for key, _, _, b in inventory.buffers] == [
        (key, id(b)) for key, b in model.named_buffers(remove_duplicate=False)
    ]
    assert {key for key, *_ in (*inventory.parameters, *inventory.persistent_buffers)} == set(model.state_dict())
    assert list(map(id, inventory.own_parameters())) == list(map(id, model.parameters()))
    assert inventory.ids() == {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    assert all(getattr(module, name) is tensor for _, module, name, tensor in (*inventory.parameters, *inventory.buffers))
