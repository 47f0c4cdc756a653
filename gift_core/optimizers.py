"""What an optimizer holds of a tuned model: all that trains, and nothing that does not."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from torch import nn
from torch.optim import Optimizer

from gift_core.errors import StateError
from gift_core.iterator import walk_modules
from gift_core.record import named_tensors, newcomers, tuned_root, tuning_of


@dataclasses.dataclass(frozen=True)
class OptimizerReport:
    """What `check_optimizer` found; prints as what is wrong and what to do.

    Attributes:
        missing: trainable parameters of the model that no group holds. They get gradients and never move.
        frozen: parameters that a group holds although tuning froze them. They stay as they are, unless someone lets them train.
        strangers: how many tensors the optimizer holds that are none of the model's, such as those of an adapter that is not in use.
    """

    missing: tuple[str, ...]
    frozen: tuple[str, ...]
    strangers: int

    @property
    def ok(self) -> bool:
        """Whether the optimizer holds just what trains."""
        return not (self.missing or self.frozen or self.strangers)

    def __str__(self) -> str:
        if self.ok:
            return "the optimizer holds just what trains."
        lines = [
            *(f"  no group holds {key}" for key in self.missing),
            *(f"  a group holds {key}, which is frozen" for key in self.frozen),
            *([f"  {self.strangers} of its tensors are none of the model's"] if self.strangers else []),
        ]
        return "\n".join(
            [
                "the optimizer does not fit the tuned model:",
                *lines,
                "Make the optimizer after enable_fine_tuning, from model.parameters().",
            ]
        )


def check_optimizer(model: nn.Module, optimizer: Optimizer) -> OptimizerReport:
    """Compare what an optimizer holds with what trains in a tuned model, say where it was made before the model was tuned.

    Args:
        model: a tuned model, or a wrapper around one.
        optimizer: any optimizer of torch's kind; its groups are read and left alone.

    Returns:
        What is missing and what is there in vain; ``.ok`` if neither.

    Raises:
        StateError: if the model is not tuned, or ``optimizer`` has no parameter groups of torch's kind.
    """
    groups = getattr(optimizer, "param_groups", None)
    if not isinstance(groups, list):
        raise StateError(f"expected a torch.optim.Optimizer, got {type(optimizer).__name__}: pass the optimizer itself.")
    for group in groups:
        if not isinstance(group, dict) or not isinstance(group.get("params"), Iterable):
            raise StateError(f"a group of the optimizer has no parameters under 'params': pass one of torch's kind, got {group!r}.")
    held = {id(parameter) for group in groups for parameter in group["params"]}
    root = tuned_root(model)
    tuning = tuning_of(root)
    base, trained = set(tuning.frozen) - newcomers(tuning, walk_modules(root)), set(tuning.trained)
    own = {id(parameter): (key, parameter.requires_grad) for key, _, _, parameter in named_tensors(root, buffers=False)}
    # what of a larger model lies outside the tuned part is its owner's business
    outside = {id(parameter) for parameter in nn.Module.parameters(model)} - own.keys()
    return OptimizerReport(
        missing=tuple(key for one, (key, trains) in own.items() if trains and key not in base and one not in held),
        frozen=tuple(key for one, (key, trains) in own.items() if (key in base or not (trains or key in trained)) and one in held),
        strangers=len(held - own.keys() - outside),
    )
