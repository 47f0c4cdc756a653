"""Strategies that tune a model wrongly."""

from __future__ import annotations

import secrets
from typing import Any

import torch
from torch import Tensor, nn

from broken_strategies.healthy import Healthy, Shift
from gift_core import FineTuningStrategy, adopt
from gift_core.capabilities import Capabilities
from gift_core.errors import SiteError
from gift_core.factories import class_is, is_instance, keep_trainable, reparameterize
from gift_core.reparameterization import is_adopted


class MatchesNothing(FineTuningStrategy):
    """Is for a layer that no model has."""

    name = "nothing"

    def __init__(self) -> None:
        super().__init__(module_caps=[(class_is("NoSuchLayer"), keep_trainable())])


class DeclaresTooMuch(Healthy):
    """Claims convolutions, and adapts none."""

    capabilities = Capabilities(layers=("Linear", "Conv2d"))


class ClaimsToRefuse(Healthy):
    """Claims to refuse Linear layers, and adapts them all."""

    capabilities = Capabilities(layers=("Linear",), refuses=("Linear",))


class Picky(Healthy):
    """Refuses narrow layers, and does not say so."""

    capabilities = Capabilities(layers=("Linear",))

    class Method(Shift):
        """A shift of more than four outputs."""

        @classmethod
        def examine(cls, module: nn.Module, name: str, weight: Tensor, **params: Any) -> None:
            if len(weight) < 5:
                raise SiteError(f"it has {len(weight)} outputs, and 5 are needed: exclude it.")

    method = Method

    def __init__(self) -> None:
        FineTuningStrategy.__init__(self, module_caps=[(is_instance(nn.Linear), reparameterize(self.method))])


class RefusesLate(Healthy):
    """Refuses narrow layers, as it says, when half of the model is adapted."""

    capabilities = Capabilities(layers=("Linear",), refuses=("Linear",))

    @classmethod
    def more(cls, *site: Any) -> None:
        if len(site[4].bias if site[4].bias is not None else "a wide one") < 5:
            raise SiteError("it has too few outputs: exclude it.")


class RefusesSomething(Healthy):
    """Refuses narrow layers, as it says, without a word on which."""

    capabilities = Capabilities(layers=("Linear",), refuses=("Linear",))

    def __init__(self) -> None:
        FineTuningStrategy.__init__(self, module_caps=[(no_narrow_linear, reparameterize(Shift))])


def no_narrow_linear(*site: Any) -> bool:
    """Whether this is a Linear layer; an error that names nothing if it is a narrow one."""
    if isinstance(site[4], nn.Linear) and site[4].out_features < 5:
        raise SiteError("a layer has too few outputs.")
    return isinstance(site[4], nn.Linear)


def marks(*site: Any) -> bool:
    """Leave a mark on every module that is asked about."""
    site[4].visited = True
    return isinstance(site[4], nn.Linear)


class MarksWhilePlanning(FineTuningStrategy):
    """Has a check with a side effect."""

    name = "marks"

    def __init__(self) -> None:
        super().__init__(module_caps=[(marks, reparameterize(Shift))])


class AdaptsNeighbours(Healthy):
    """Adapts the embeddings and convolutions beside its site, too."""

    @classmethod
    def more(cls, *site: Any) -> None:
        for sibling in site[0].children() if site[0] is not None else ():
            if isinstance(sibling, (nn.Conv2d, nn.Embedding)) and not is_adopted(sibling):
                adopt(sibling, Shift)


class CountsInNeighbours(Healthy):
    """Counts in a buffer of the BatchNorm beside its site; nothing rolls that back."""

    @classmethod
    def more(cls, *site: Any) -> None:
        for sibling in site[0].children() if site[0] is not None else ():
            if isinstance(sibling, nn.BatchNorm2d) and sibling.num_batches_tracked is not None:
                sibling.num_batches_tracked += 1


class StartsAway(Healthy):
    """Starts away from the base model, and claims not to."""

    class Method(Shift):
        """A shift that is not zero."""

        def init_parameters(self, weight: Tensor) -> None:
            self.delta = nn.Parameter(torch.full_like(weight, 0.1))

    method = Method


class Unseeded(Healthy):
    """Draws its start from a generator that no seed governs."""

    class Method(Shift):
        """A shift with a random factor."""

        def init_parameters(self, weight: Tensor) -> None:
            super().init_parameters(weight)
            generator = torch.Generator().manual_seed(secrets.randbits(32))
            self.mix = nn.Parameter(torch.rand(weight.shape, generator=generator).to(weight))

        def reparameterize(self, weight: Tensor) -> Tensor:
            return weight + self.delta * self.mix

    method = Method


def write_in_training(module: nn.Module, inputs: Any) -> None:
    """Change the last row of the module's weight, when it trains."""
    if module.training:
        module.weight.data[-1] += 1  # type: ignore[operator, union-attr, index]


class TrainsTheBase(Healthy):
    """Writes into the embedding beside its site, in training."""

    @classmethod
    def more(cls, *site: Any) -> None:
        # in a Sequential, because elsewhere the embedding's weight is another layer's too
        for sibling in site[0].children() if isinstance(site[0], nn.Sequential) else ():
            if isinstance(sibling, nn.Embedding):
                sibling.register_forward_pre_hook(write_in_training)


class TrainsASpare(Healthy):
    """Trains a tensor that nothing reads."""

    class Method(Shift):
        """A shift and a spare one."""

        def init_parameters(self, weight: Tensor) -> None:
            super().init_parameters(weight)
            self.spare = nn.Parameter(torch.zeros_like(weight))

    method = Method


def write_in_use(module: nn.Module, inputs: Any) -> None:
    """Set the last row of the module's weight, when it is used."""
    if not module.training and not torch.compiler.is_compiling():
        module.weight.data[-1] = 7  # type: ignore[operator, union-attr, index]


class WritesInUse(Healthy):
    """Writes into the embedding beside its site when the model answers."""

    @classmethod
    def more(cls, *site: Any) -> None:
        # in a Sequential, because elsewhere the embedding's weight is another layer's too
        for sibling in site[0].children() if isinstance(site[0], nn.Sequential) else ():
            if isinstance(sibling, nn.Embedding):
                sibling.register_forward_pre_hook(write_in_use)


class Unties(Healthy):
    """Gives each layer a weight of its own, also where two shared one."""

    capabilities = Capabilities(mergeable=False)

    @classmethod
    def act(cls, *site: Any) -> None:
        site[4].weight = nn.Parameter(site[4].weight.detach().clone())
        super().act(*site)


class FreezesNeighbours(Healthy):
    """Freezes the biases beside its site, whoever trains them."""

    @classmethod
    def more(cls, *site: Any) -> None:
        for name, parameter in site[0].named_parameters() if site[0] is not None else ():
            if name.endswith("bias"):
                parameter.requires_grad_(False)


BROKEN: dict[str, tuple[type[FineTuningStrategy], str]] = {
    "matches_a_model": (MatchesNothing, "nothing was checked"),
    "layers_as_declared": (DeclaresTooMuch, "it declares Conv2d, and adapts none"),
    "refuses_as_declared": (ClaimsToRefuse, "it declares that it refuses Linear, and refuses none"),
    "planning_changes_nothing": (MarksWhilePlanning, "planning changed the root: visited"),
    "plan_equals_tuning": (AdaptsNeighbours, "which the plan"),
    "atomic_on_failure": (CountsInNeighbours, "num_batches_tracked"),
    "unchanged_at_start": (StartsAway, "the answer differs"),
    "seed_governs_initialisation": (Unseeded, "torch.manual_seed does not govern"),
    "base_frozen": (TrainsTheBase, "training moved the frozen 0.weight"),
    "all_trainable_get_gradients": (TrainsASpare, "spare"),
    "disable_restores": (WritesInUse, "after disable_fine_tuning the model differs in 0.weight: its values"),
    "shared_stays_shared": (Unties, "no longer shared"),
    "merges_with_another": (FreezesNeighbours, "bias"),
}
#: Further ones, by the name of the check that they fail: they refuse layers in a wrong way.
LIARS: tuple[tuple[str, type[FineTuningStrategy], str], ...] = (
    ("refuses_as_declared", Picky, "in cnn it refuses, undeclared, at 'head' (Linear): it has 4 outputs"),
    ("refuses_as_declared", RefusesLate, "planning is not: raise SiteError in `examine`"),
    ("refuses_as_declared", RefusesSomething, "does not say which layer is meant"),
)
