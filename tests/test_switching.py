"""What is exchanged in a model when its adapter changes, and what catches up when it comes back."""

from __future__ import annotations

from typing import Any

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
