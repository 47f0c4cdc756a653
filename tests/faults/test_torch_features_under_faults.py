"""What torch and a user do to a model around tuning, where it could go wrong in silence."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from low_rank import LowRankStrategy
from models import cnn, fingerprint, input_for, mlp, refused, train
from torch import Tensor, nn
from torch.func import functional_call, jacfwd, jacrev

from gift_core import (
    AdapterSet,
    FineTuningStrategy,
    FullFineTuningStrategy,
    Reparameterization,
    check_optimizer,
    disable_fine_tuning,
    enable_fine_tuning,
    full_state_dict,
    merge,
    merge_and_unload,
    merged,
)
from gift_core.errors import SiteError, StateError
from gift_core.factories import is_instance, reparameterize
from gift_lora_plugin import LoRAAllFineTuningStrategy

strategies = pytest.mark.parametrize("strategy", [LoRAAllFineTuningStrategy, LowRankStrategy], ids=["plugin", "plain"])


@pytest.fixture(autouse=True)
def _seeded() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        yield


def normed(how: str) -> nn.Module:
    """A network whose first layer's weight torch computes."""
    model = mlp()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that the old functions will go
        old: dict[str, Callable[[nn.Module], Any]] = {
            "old spectral_norm": nn.utils.spectral_norm,
            "old weight_norm": nn.utils.weight_norm,
            "spectral_norm": nn.utils.parametrizations.spectral_norm,
            "weight_norm": nn.utils.parametrizations.weight_norm,
            "orthogonal": nn.utils.parametrizations.orthogonal,
        }
        old[how](model[0])
    return model


norms = pytest.mark.parametrize("how", ["old spectral_norm", "old weight_norm", "spectral_norm", "weight_norm", "orthogonal"])


@norms
def test_a_weight_that_torch_computes_is_refused(how: str) -> None:
    """A normalised or parametrised layer is refused by name, with the way out; nothing changes, its buffers included."""
    model = normed(how)

    with refused(model, SiteError, "'0'", "exclude it"):
        enable_fine_tuning(model, LoRAAllFineTuningStrategy(rank=1))


@norms
@strategies
def test_a_layer_beside_it_is_tuned(how: str, strategy: Any) -> None:
    """With the layer left out the rest trains, merges and comes back bit for bit, the buffers that its norm moves included."""
    model, inputs = normed(how), input_for(mlp)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}

    enable_fine_tuning(model, strategy(rank=1, targets="2"))
    train(model, inputs)
    model.eval()
    expected = model(inputs)
    with merged(model):
        assert torch.allclose(model(inputs), expected, atol=1e-5)
    disable_fine_tuning(model)

    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # torch's own, where forward mode is set up
@strategies
@pytest.mark.parametrize("state", ["tuned", "merged"])
def test_jacobians(strategy: Any, state: str) -> None:
    """Jacobians of either mode, by the input and by the adapter, are those of the unloaded model and of autograd."""
    model, inputs = mlp(), input_for(mlp)[0]
    enable_fine_tuning(model, strategy(rank=2))
    train(model, input_for(mlp))
    model.eval()
    own = {key: p.detach() for key, p in model.named_parameters() if p.requires_grad}
    by_own = {key: torch.autograd.functional.jacobian(_as_function(model, key, inputs), tensor) for key, tensor in own.items()}
    found_own = jacrev(lambda values: functional_call(model, values, (inputs,)))(own)
    if state == "merged":
        merge(model)

    backward, forward = jacrev(model)(inputs), jacfwd(model)(inputs)
    plain = merge_and_unload(model)
    expected = torch.autograd.functional.jacobian(plain, inputs)

    assert torch.allclose(backward, expected, atol=1e-5)
    assert torch.allclose(forward, expected, atol=1e-5)
    assert all(torch.allclose(found_own[key], by_own[key], atol=1e-5) for key in own)


def _as_function(model: nn.Module, key: str, inputs: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda value: functional_call(model, {key: value}, (inputs,))


@strategies
def test_hooks_see_adapted_values(strategy: Any) -> None:
    """A forward hook on an adapted layer reads the effective weight, and the output that it gets is computed with it."""
    model, inputs = mlp(), input_for(mlp)
    enable_fine_tuning(model, strategy(rank=2))
    train(model, inputs)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    handle = model[0].register_forward_hook(lambda layer, given, out: seen.append((layer.weight.detach(), given[0], out.detach())))

    model.eval()(inputs)
    with merged(model):
        model(inputs)
    handle.remove()
    plain: Any = merge_and_unload(model)

    for weight, given, out in seen:
        assert torch.allclose(weight, plain[0].weight, atol=1e-6)
        assert torch.allclose(out, nn.functional.linear(given, weight, plain[0].bias), atol=1e-6)
    assert len(seen) == 2


# --- optimizers


@strategies
def test_an_optimizer_made_before(strategy: Any) -> None:
    """`check_optimizer` names every adapter tensor that no group holds, and every frozen one that a group holds."""
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    enable_fine_tuning(model, strategy(rank=2))

    report = check_optimizer(model, optimizer)

    assert report.missing == tuple(key for key, parameter in model.named_parameters() if parameter.requires_grad)
    assert report.frozen == ("0.weight", "0.bias", "2.weight", "2.bias")
    assert not report.ok
    assert all(key in str(report) for key in (*report.missing, *report.frozen, "after enable_fine_tuning"))


@strategies
def test_an_optimizer_made_after(strategy: Any) -> None:
    """An optimizer over ``parameters()`` of the tuned model, in one group or several, is right; also for a wrapper's other parts."""
    model = mlp()
    enable_fine_tuning(model, strategy(rank=2))
    larger = nn.Sequential(model, nn.Linear(3, 2))
    first, *rest = model.parameters()
    groups = torch.optim.SGD([{"params": [first], "lr": 1.0}, {"params": rest}], lr=0.1)

    assert check_optimizer(model, torch.optim.SGD(model.parameters(), lr=0.1)).ok
    assert check_optimizer(model, groups).ok
    assert check_optimizer(larger, torch.optim.SGD([*model.parameters(), *larger[1].parameters()], lr=0.1)).ok
    assert "just what trains" in str(check_optimizer(model, groups))


def test_an_optimizer_of_full_fine_tuning() -> None:
    """Where the base itself trains, its parameters are no frozen ones."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    enable_fine_tuning(model, FullFineTuningStrategy())

    assert check_optimizer(model, optimizer).ok


def test_an_optimizer_of_another_adapter() -> None:
    """An optimizer of an adapter that is not in use holds strangers, and lacks what is in use."""
    adapters = AdapterSet(mlp())
    for name in ("a", "b"):
        adapters.add(name, LowRankStrategy(rank=1))
    adapters.use("a")
    optimizer = torch.optim.SGD(adapters.parameters("b"), lr=0.1)

    report = check_optimizer(adapters.model, optimizer)
    assert (len(report.missing), report.strangers) == (4, 4)
    assert "4 of its tensors are none of the model's" in str(report)

    adapters.use("b")
    assert check_optimizer(adapters.model, optimizer).ok


def test_what_is_no_optimizer() -> None:
    """Something without parameter groups, and a plain model, are errors that say what to pass."""
    model = mlp()
    with pytest.raises(StateError, match="is not tuned"):
        check_optimizer(model, torch.optim.SGD(model.parameters(), lr=0.1))
    enable_fine_tuning(model, LowRankStrategy())
    with pytest.raises(StateError, match=r"expected a torch.optim.Optimizer, got list"):
        check_optimizer(model, list(model.parameters()))  # type: ignore[arg-type]


# --- what users call


@strategies
def test_letting_all_train_leaves_the_base_frozen(strategy: Any) -> None:
    """``model.requires_grad_()`` reaches what ``parameters()`` gives, so that the base stays frozen."""
    model = mlp()
    before = fingerprint(model)
    enable_fine_tuning(model, strategy(rank=2))

    model.requires_grad_()

    assert check_optimizer(model, torch.optim.SGD(model.parameters(), lr=0.1)).ok
    disable_fine_tuning(model)
    assert fingerprint(model) == before


def _by_the_model(model: nn.Module, flag: bool) -> None:
    model.requires_grad_(flag)


def _by_each_parameter(model: nn.Module, flag: bool) -> None:
    for parameter in model.parameters():
        parameter.requires_grad = flag


freezers = pytest.mark.parametrize("let", [_by_the_model, _by_each_parameter], ids=["model", "each"])


@strategies
@freezers
def test_freezing_for_a_while(strategy: Any, let: Callable[[nn.Module, bool], None]) -> None:
    """Freezing a tuned model and letting it train again gives the trainable set back, and never the frozen base."""
    model, inputs = mlp(), input_for(mlp)
    enable_fine_tuning(model, strategy(rank=2))
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    given, keys = list(map(id, model.parameters())), list(model.state_dict())

    let(model, False)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    meanwhile = list(map(id, model.parameters())), list(model.state_dict())
    copied = copy.deepcopy(model)
    let(model, True)
    let(copied, True)

    assert frozen == flags.keys()
    assert not model(inputs).isnan().any()
    assert meanwhile == (given, keys)
    for one in (model, copied):
        assert {name: parameter.requires_grad for name, parameter in one.named_parameters()} == flags


@freezers
def test_an_optimizer_made_while_frozen(let: Callable[[nn.Module, bool], None]) -> None:
    """An optimizer made while the model is frozen holds what trains afterwards; meanwhile its steps move nothing."""
    model, inputs = mlp(), input_for(mlp)
    enable_fine_tuning(model, LowRankStrategy(rank=2))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}

    let(model, False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    optimizer.step()

    assert check_optimizer(model, optimizer).ok
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())

    let(model, True)
    model(inputs).square().mean().backward()
    optimizer.step()

    assert check_optimizer(model, optimizer).ok
    assert not any(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items() if key.endswith("left"))


def test_freezing_a_part_of_the_adapter() -> None:
    """A tensor of the adapter that a user freezes stays where it is, may be in the optimizer or not, and trains when it is let."""
    model, inputs = mlp(), input_for(mlp)
    enable_fine_tuning(model, LoRAAllFineTuningStrategy(rank=2))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("lora_B"))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)

    model(inputs).square().mean().backward()
    optimizer.step()

    moved = [key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])]
    assert moved == [key for key in before if key.endswith("lora_B")]
    assert check_optimizer(model, optimizer).ok
    assert check_optimizer(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)).ok


class HalfFrozen(Reparameterization):
    """A method with a parameter that it does not train."""

    def init_parameters(self, weight: Tensor) -> None:
        self.fixed = nn.Parameter(torch.ones_like(weight[:, :1]), requires_grad=False)
        self.scale = nn.Parameter(torch.ones_like(weight[:, :1]))

    def reparameterize(self, weight: Tensor) -> Tensor:
        return weight * self.scale * self.fixed


def test_what_a_method_leaves_frozen_stays_so() -> None:
    """A tensor of the adapter that the method itself leaves frozen is not let train by ``requires_grad_()``."""
    model = mlp()
    enable_fine_tuning(model, FineTuningStrategy([(is_instance(nn.Linear), reparameterize(HalfFrozen))]))
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}

    model.requires_grad_(False).requires_grad_()

    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags


def test_freezing_one_of_several_adapters() -> None:
    """What is frozen under one adapter comes back with it, and is no other adapter's business."""
    adapters = AdapterSet(mlp())
    for name in ("a", "b"):
        adapters.add(name, LowRankStrategy(rank=1))
    first, second = adapters.parameters("a"), adapters.parameters("b")

    adapters.use("a").requires_grad_(False)
    adapters.use("b").requires_grad_()

    assert all(parameter.requires_grad for parameter in second)
    assert not any(parameter.requires_grad for parameter in first)
    assert list(map(id, adapters.parameters("a"))) == list(map(id, first))

    adapters.use("a").requires_grad_()

    assert all(parameter.requires_grad for parameter in first)
    assert all(parameter.requires_grad for parameter in adapters.use(None).parameters())


@strategies
def test_letting_a_layer_train_is_seen(strategy: Any) -> None:
    """After ``requires_grad_()`` on an adapted layer its frozen weight trains, and `check_optimizer` names it."""
    model = mlp()
    before = fingerprint(model)
    enable_fine_tuning(model, strategy(rank=2))
    model[0].requires_grad_()

    report = check_optimizer(model, torch.optim.SGD(model.parameters(), lr=0.1))

    assert report.frozen == ("0.weight", "0.bias")
    disable_fine_tuning(model)
    assert fingerprint(model) == before


@strategies
def test_a_new_layer_is_no_frozen_one(strategy: Any) -> None:
    """A layer that came in the place of a frozen one is to be held by an optimizer, and is not held in vain."""
    model = mlp()
    enable_fine_tuning(model, strategy(rank=2, targets="0"))
    before = torch.optim.SGD(model.parameters(), lr=0.1)
    model[2] = nn.Linear(8, 5)

    assert check_optimizer(model, before).missing == ("2.weight", "2.bias")
    assert check_optimizer(model, torch.optim.SGD(model.parameters(), lr=0.1)).ok


@strategies
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(strategy: Any, set_to_none: bool) -> None:
    """Both kinds of ``zero_grad`` reach every adapter tensor, and give the frozen base no gradient."""
    model, inputs = mlp(), input_for(mlp)
    enable_fine_tuning(model, strategy(rank=2))
    model(inputs).square().mean().backward()

    model.zero_grad(set_to_none=set_to_none)

    for parameter in nn.Module.parameters(model):
        if parameter.requires_grad and not set_to_none:
            assert parameter.grad is not None
            assert not parameter.grad.any()
        else:
            assert parameter.grad is None


@strategies
def test_to_empty(strategy: Any) -> None:
    """A tuned model that lost its values by ``to_empty`` is still tuned, and a full checkpoint brings everything back."""
    model, inputs = cnn(), input_for(cnn)
    enable_fine_tuning(model, strategy(rank=2))
    train(model, inputs)
    model.eval()
    expected = model(inputs)
    with full_state_dict(model):
        checkpoint = {key: tensor.clone() for key, tensor in model.state_dict().items()}

    model.to("meta")
    model.to_empty(device="cpu")
    model.load_state_dict(checkpoint)

    assert torch.equal(model(inputs), expected)
    train(model, inputs)
    assert not torch.equal(model(inputs), expected)
