"""What is exchanged in a model when its adapter changes, and what catches up when it comes back."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from models import Delta, WideDelta, fingerprint, mlp
from torch import Tensor, nn

from gift_core import AdapterSet, FineTuningStrategy
from gift_core.factories import is_instance, name_is, reparameterize, replace_module


def delta() -> FineTuningStrategy:
    """A full update beside each weight."""
    return FineTuningStrategy([(is_instance(nn.Linear), reparameterize(Delta))])


def put_last(*site: Any) -> None:
    """Take a module out of its parent and put it back, which makes it the last, and give it something that trains."""
    parent, name, module = site[0], site[1], site[4]
    del parent._modules[name]
    parent._modules[name] = module
    module.register_parameter("added", nn.Parameter(torch.zeros(2)))


def test_each_arrangement_has_its_own_order() -> None:
    """The order of a registry's keys is the base's without an adapter, and with one the order in which its strategy left them."""
    adapters = AdapterSet(model := mlp())
    before = fingerprint(model)
    adapters.add("moved", FineTuningStrategy([(name_is("0"), put_last)]))
    adapters.add("delta", delta())

    for name, order in ((None, "012"), ("moved", "120"), ("delta", "012"), ("moved", "120"), (None, "012")):
        adapters.use(name)

        assert "".join(model._modules) == order
    assert fingerprint(model) == before


class Quiet(nn.Module):
    """A layer with a part that never trains, whatever the mode of the model."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = nn.Linear(inner.in_features, inner.out_features, dtype=inner.weight.dtype)
        self.still = nn.Dropout().eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.still(self.inner(x))


def test_a_move_leaves_the_modes_of_a_replaced_modules_parts() -> None:
    """A module that was out of the model while that changed its dtype comes back in that dtype, and its parts in their own modes."""
    adapters = AdapterSet(model := mlp())
    adapters.add("quiet", FineTuningStrategy([(name_is("2"), replace_module(Quiet))]))

    model.double()
    adapters.use("quiet")

    assert model[2].inner.weight.dtype is torch.float64
    assert model[2].training and not model[2].still.training


@pytest.mark.parametrize("at", ["0", "2"])
def test_a_replaced_module_follows_a_move_wherever_it_stands(at: str) -> None:
    """The first module of a model, too, follows a move that came while it was replaced, and so does what replaces it."""
    adapters = AdapterSet(model := mlp())
    adapters.add("quiet", FineTuningStrategy([(name_is(at), replace_module(Quiet))]))
    for name, dtype in (("quiet", torch.float64), (None, torch.float32), ("quiet", torch.float64)):
        adapters.use(None if name else "quiet")
        model.to(dtype)
        adapters.use(name)

        assert {tensor.dtype for tensor in model.state_dict().values()} == {dtype}


class Sized(Delta):
    """An update of a complex layer that is scaled by a real number for each output, which comes first."""

    def init_parameters(self, weight: Tensor) -> None:
        self.size = nn.Parameter(torch.ones(weight.shape[0], 1, dtype=weight.dtype.to_real()))
        super().init_parameters(weight)

    def reparameterize(self, weight: Tensor) -> Tensor:
        return self.size * super().reparameterize(weight)


class Waves(nn.Module):
    """A complex layer in place of another, with real numbers besides."""

    def __init__(self, *site: Any) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 2, dtype=torch.complex64)
        self.window = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.window


ADAPTED_WAVES = [
    FineTuningStrategy([(is_instance(nn.Linear), reparameterize(Sized))]),
    FineTuningStrategy([(name_is("1"), replace_module(Waves)), (name_is("0"), reparameterize(Sized))]),
]


def precise(tensor: Tensor) -> Tensor:
    """In double precision, complex numbers as such."""
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


@pytest.mark.parametrize("strategy", ADAPTED_WAVES, ids=["adapted", "replaced"])
@pytest.mark.parametrize("in_use", [None, "waves", "sized"])
def test_complex_numbers_that_were_out_follow_a_move(strategy: FineTuningStrategy, in_use: str | None) -> None:
    """After a complex model went to another precision, what was out of it does too, with imaginary parts, and real numbers real."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3, dtype=torch.complex64), nn.Linear(3, 2, dtype=torch.complex64))
    adapters, x = AdapterSet(model), torch.randn(2, 4, dtype=torch.complex64)
    adapters.add("sized", ADAPTED_WAVES[0])
    adapters.add("waves", strategy)
    parameters, expected = {name: adapters.parameters(name) for name in adapters}, {}
    kinds = {name: [parameter.is_complex() for parameter in parameters[name]] for name in adapters}
    for name in ("sized", "waves", None):
        adapters.use(name)
        with torch.no_grad():
            for parameter in parameters.get(name or "", []):
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
        expected[name] = model(x).detach()
    parameters["sized"][0].grad = gradient = torch.randn_like(parameters["sized"][0])

    adapters.use(in_use)
    model._apply(precise)
    for name in ("sized", None, "waves", None, "sized"):
        adapters.use(name)

        assert {tensor.dtype for tensor in model.state_dict().values()} <= {torch.float64, torch.complex128}
        torch.testing.assert_close(model(precise(x)), precise(expected[name]), rtol=1e-5, atol=1e-6)
    for name in adapters:
        assert [id(parameter) for parameter in adapters.parameters(name)] == [id(parameter) for parameter in parameters[name]]
        assert [parameter.is_complex() for parameter in parameters[name]] == kinds[name]
    assert torch.equal(parameters["sized"][0].grad, precise(gradient))


def test_a_move_between_real_and_complex_is_followed() -> None:
    """Where a model itself becomes complex, or real, what was out of it does, as ``to`` does it to what is in use."""
    adapters = AdapterSet(model := nn.Sequential(nn.Linear(4, 3)))
    adapters.add("delta", delta())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of both
        for dtype in (torch.complex64, torch.float32):
            model.to(dtype)
            adapters.use("delta")

            assert model[0].delta.dtype is dtype

            adapters.use(None)


def test_a_mode_leaves_an_adapters_own_dtype() -> None:
    """An adapter in float32 on a base in bfloat16 stays in float32 when only the mode of the model changed meanwhile."""
    adapters = AdapterSet(model := mlp().bfloat16())
    adapters.add("wide", FineTuningStrategy([(is_instance(nn.Linear), reparameterize(WideDelta))]))
    for train in (False, True):
        model.train(train)
        adapters.use("wide")
        assert (model[0].delta.dtype, model[0]._parameters["weight"].dtype) == (torch.float32, torch.bfloat16)
        adapters.use(None)


def test_a_move_is_seen_beside_integers_and_absent_tensors() -> None:
    """Where a module has no parameter of some name, or integers before its numbers, a move of the model is followed all the same."""
    model = nn.Sequential(nn.BatchNorm1d(4, affine=False), nn.Linear(4, 3, bias=False))
    model[1].register_buffer("steps", torch.zeros((), dtype=torch.int64))
    model[1]._parameters = {"absent": None, **model[1]._parameters}
    model[0]._buffers = dict(reversed(model[0]._buffers.items()))  # the counter first
    adapters = AdapterSet(model)
    adapters.add("delta", delta())

    model.double()
    adapters.use("delta")

    assert model[1].delta.dtype is torch.float64
    assert model(torch.ones(2, 4).double()).dtype is torch.float64
