"""Whether systems compute the same thing: every one against the formula, in float64, before any is timed.

The formula is the base model run with the weights ``W + alpha / r * B A``, written in plain tensors; autograd gives its gradients.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.models import Model, is_plain_linear, is_transposed, targets
from benchmarks.systems import Pairs, Setting, System, Unsupported

#: The largest difference allowed in float64, of a loss or of a gradient, over the largest number in it.
TOLERANCE = 1e-7

Factors = dict[str, tuple[Tensor, Tensor]]


class NotEqual(Exception):
    """A system does not compute what the formula says; it is not timed."""


@dataclass(frozen=True)
class Results:
    """A loss, and the gradient of A and of B by layer, each as a matrix."""

    loss: Tensor
    gradients: Factors


def check(model: Model, kinds: Iterable[type[System]], **changes: Any) -> tuple[list[type[System]], dict[str, str]]:
    """Compare systems with the formula on one batch of a model.

    Args:
        model: the model; it is built in float64.
        kinds: the systems.
        **changes: to the `Setting` that every system gets.

    Returns:
        The systems that agree, and for the others the reason by name: not installed, not able, or not equal.
    """
    expected: dict[tuple[Any, ...], Results] = {}
    agree: list[type[System]] = []
    refused: dict[str, str] = {}
    for kind in kinds:
        try:
            system = kind(base := model.make().double(), setting := setting_for(model, base, **changes))
            factors = fill(system.pairs())
            shapes = tuple((name, A.shape, B.shape) for name, (A, B) in factors.items())
            if shapes not in expected:
                expected[shapes] = by_formula(model, factors, setting)
            compare(run(model, system), expected[shapes])
        except (Unsupported, NotEqual) as error:
            refused[kind.name] = str(error)
        except Exception as error:
            refused[kind.name] = f"{type(error).__name__}: {error}".partition("\n")[0]
        else:
            agree.append(kind)
    return agree, refused


def setting_for(model: Model, base: nn.Module, **changes: Any) -> Setting:
    """What is asked of every system on a model, spelt as a user would: no targets, last names that say the same, or all names."""
    names = targets(model, base)
    last = sorted({name.rpartition(".")[2] for name in names})
    chosen = {name for name, _ in base.named_modules() if name.rpartition(".")[2] in last}
    endings = last if chosen == set(names) and all("." in name for name in names) else names
    patterns = [f"*.{name}" for name in last] if endings is last else names
    return Setting(names, model.rank, None if is_plain_linear(base, names) else patterns, endings, **changes)


def fill(pairs: Pairs) -> Factors:
    """Give A and B of every layer numbers drawn from the layer's name, so that equal shapes hold equal numbers in every system.

    Returns:
        Copies of them, as matrices.
    """
    with torch.no_grad():
        for name, (A, B) in pairs.items():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            for factor in (A, B):
                numbers = torch.randn(_matrix(factor).shape, generator=generator, dtype=torch.float64)
                factor.copy_(numbers.mul_(0.3 / factor[0].numel() ** 0.5).view_as(factor))
    return {name: (_matrix(A).detach().clone(), _matrix(B).detach().clone()) for name, (A, B) in pairs.items()}


def by_formula(model: Model, factors: Factors, setting: Setting) -> Results:
    """The loss and the gradients by the formula, in float64."""
    base = model.make().double().requires_grad_(False)
    leaves = {name: (A.requires_grad_(), B.requires_grad_()) for name, (A, B) in factors.items()}
    loss = model.loss(with_weights(base, effective_weights(base, leaves, setting)), model.draw(torch.float64))
    flat = [factor for pair in leaves.values() for factor in pair]
    gradients = iter(torch.autograd.grad(loss, flat))
    return Results(loss.detach(), {name: (next(gradients), next(gradients)) for name in leaves})


def effective_weights(base: nn.Module, factors: Factors, setting: Setting) -> dict[str, Tensor]:
    """``W + alpha / r * B A`` by the weight's name, the product's numbers in the memory order of ``W``."""
    scaling = setting.alpha / setting.rank
    return {f"{name}.weight": _effective_weight(base.get_submodule(name), A, B, scaling) for name, (A, B) in factors.items()}


def with_weights(base: nn.Module, weights: dict[str, Tensor]) -> Callable[..., Any]:
    """The base model as a function, with some weights replaced."""
    return lambda *args, **kwargs: functional_call(base, weights, args, kwargs)


def run(model: Model, system: System) -> Results:
    """The loss and the gradients that a system gives."""
    loss = model.loss(system.module, model.draw(torch.float64))
    loss.backward()
    return Results(loss.detach(), {name: (_gradient(name, A), _gradient(name, B)) for name, (A, B) in system.pairs().items()})


def compare(found: Results, expected: Results) -> None:
    """Refuse results that differ.

    Raises:
        NotEqual: naming the first thing that differs, and by how much.
    """
    _compare("the loss", found.loss, expected.loss)
    if set(found.gradients) != set(expected.gradients):
        raise NotEqual(f"other layers are adapted: {sorted(set(found.gradients) ^ set(expected.gradients))[:3]}")
    for name, pair in expected.gradients.items():
        for factor, mine, theirs in zip("AB", found.gradients[name], pair, strict=True):
            _compare(f"the gradient of {factor} at {name}", mine, theirs)


def differs_by(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest number expected; infinite where shapes differ or a number is not finite."""
    if found.shape != expected.shape or not found.isfinite().all():
        return float("inf")
    largest = expected.abs().max().item()
    return (found - expected).abs().max().item() / largest if largest else found.abs().max().item()


def _compare(what: str, found: Tensor, expected: Tensor) -> None:
    difference = differs_by(found, expected)
    if not difference <= TOLERANCE:
        raise NotEqual(f"{what} differs from the formula's by {difference:.1e} of its largest number")


def _effective_weight(layer: Any, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    update = scaling * (B @ A)
    return layer.weight + (update.T if is_transposed(layer) else update.view(layer.weight.shape))  # type: ignore[no-any-return]


def _gradient(name: str, factor: nn.Parameter) -> Tensor:
    if factor.grad is None:
        raise NotEqual(f"{name} gets no gradient")
    return _matrix(factor.grad)


def _matrix(factor: Tensor) -> Tensor:
    return factor.reshape(factor.shape[0], -1)
