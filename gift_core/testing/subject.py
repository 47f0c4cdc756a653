"""A strategy under test, and a strategy on one model: what the checks are handed.

The functions here move a model's trained part without a forward pass, so that a check of saving or undoing does not depend on training.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor, nn

from gift_core.capabilities import Capabilities
from gift_core.errors import GiftError, ModelError, NoMatchError, SiteError
from gift_core.plan import plan_fine_tuning
from gift_core.strategy import FineTuningStrategy, strategy_from_config
from gift_core.testing.models import ReferenceModel
from gift_core.tuning import enable_fine_tuning

#: How far two ways to the same answer may differ, relative to the largest number of the answer (or to 1, if that is larger).
TOLERANCES = {"float64": 1e-10, "float32": 2e-5, "float16": 1e-2, "bfloat16": 5e-2}


@dataclasses.dataclass(frozen=True, eq=False)
class Candidate:
    """A strategy under test, and the models to try it on."""

    strategy: FineTuningStrategy
    models: tuple[ReferenceModel, ...]

    @property
    def capabilities(self) -> Capabilities:
        """What the strategy declares; the defaults where it declares nothing that can be read."""
        declared = getattr(self.strategy, "capabilities", None)
        return declared if isinstance(declared, Capabilities) else Capabilities()

    @functools.cached_property
    def subjects(self) -> tuple[Subject, ...]:
        """The strategy on each of the models."""
        return tuple(Subject(self, model) for model in self.models)

    @functools.cached_property
    def is_registered(self) -> bool:
        """Whether the strategy's name leads back to it, so that an adapter file alone brings it back."""
        try:
            return type(strategy_from_config(self.strategy.to_config())) is type(self.strategy)
        except GiftError:
            return False


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """A strategy on one reference model."""

    candidate: Candidate
    model: ReferenceModel

    @property
    def strategy(self) -> FineTuningStrategy:
        """The strategy under test."""
        return self.candidate.strategy

    @property
    def dtypes(self) -> list[torch.dtype]:
        """The declared types in which the plain model itself works on this machine."""
        named = [getattr(torch, name) for name in self.candidate.capabilities.dtypes]
        return [dtype for dtype in named if self._plain_works(dtype)]

    @functools.cached_property
    def dtype(self) -> torch.dtype:
        """The type in which checks work that need only one: one in which what is added has another type, if there is such."""
        other = [dtype for dtype in self.dtypes if self.added_dtype(dtype) != dtype]
        return other[0] if other else torch.float32

    def added_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The type that what the strategy adds to a model of ``dtype`` has, as declared."""
        declared = self.candidate.capabilities.adapter_dtype
        return dtype if declared is None else torch.promote_types(getattr(torch, declared), dtype)

    @functools.cached_property
    def objection(self) -> GiftError | None:
        """What the strategy has against this model, as planning or enabling raised it."""
        try:
            plan_fine_tuning(self.plain(), self.strategy)
            self.tuned()
        except (NoMatchError, SiteError, ModelError) as error:
            return error
        except Exception:
            return None  # an error, which the checks report
        return None

    @property
    def refusal(self) -> str:
        """Why nothing can be checked on this model; empty if it can."""
        if not self.model.is_available:
            return f"it needs {self.model.package}, which is not installed"
        if isinstance(self.objection, NoMatchError):
            return "it matches nothing in this model"
        return f"it refuses this model: {self.objection}" if self.objection else ""

    def plain(self) -> nn.Module:
        """A new base model."""
        return self.model.fresh(self.dtype)

    def tuned(self, dtype: torch.dtype | None = None, *, seed: int = 2) -> nn.Module:
        """A new tuned model in eval mode, initialised under ``seed``."""
        model = self.model.fresh(dtype or self.dtype)
        torch.manual_seed(seed)
        enable_fine_tuning(model, self.strategy)
        return model.eval()

    def moved(self, dtype: torch.dtype | None = None) -> nn.Module:
        """A new tuned model whose trained part has moved."""
        model = self.tuned(dtype)
        move(model)
        return model

    def answer(self, model: nn.Module) -> Tensor:
        """What the model computes from the reference input, in the mode that it is in, without gradients."""
        with torch.no_grad():
            output: Tensor = model(self.model.example(_base_dtype(model)))
        return output

    def loss(self, model: nn.Module) -> Tensor:
        """Something to minimise, on the reference input."""
        output: Tensor = model(self.model.example(_base_dtype(model)))
        return output.float().square().mean()

    def _plain_works(self, dtype: torch.dtype) -> bool:
        try:
            with torch.no_grad():
                self.model.fresh(dtype)(self.model.example(dtype))
        except (RuntimeError, NotImplementedError, TypeError):  # how torch says that a kernel lacks this dtype on this device
            return False
        return True


def move(model: nn.Module, by: float = 0.1) -> None:
    """Add noise to everything that trains, and to the statistics of normalisation layers, as training would move them."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in trainable(model):
            kind = torch.complex64 if parameter.is_complex() else torch.float32
            noise = torch.randn(parameter.shape, generator=generator, dtype=kind) * by
            parameter.add_(noise.to(parameter.device, parameter.dtype))
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
                module.running_mean.add_(by)


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """What trains, each parameter once, by its full name."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def bits(tensor: Tensor) -> bytes:
    """Every bit of a tensor."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def all_bits(model: nn.Module) -> dict[str, bytes]:
    """The bits of every parameter and buffer, by full name, whatever its state dict gives."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: bits(tensor) for name, tensor in tensors}


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a model is: objects, classes, flags, attributes, keys and values. ``alive`` keeps ids from being used again."""

    said: dict[str, Any]
    alive: list[Any] = dataclasses.field(compare=False, repr=False)

    @classmethod
    def of(cls, model: nn.Module) -> Facts:
        """Take down what the model is now."""
        said: dict[str, Any] = {"keys of the state dict": list(model.state_dict())}
        alive: list[Any] = []
        for name, module in model.named_modules(remove_duplicate=False):
            said[f"{name or 'the root'}: its class"] = (id(module), type(module))
            for key, value in vars(module).items():
                said[f"{name or 'the root'}: {key}"] = _identity(value, alive)
            alive.append(module)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            said[f"{name}: requires_grad"] = parameter.requires_grad
        said |= {f"{name}: its values": value for name, value in all_bits(model).items()}
        return cls(said, alive)

    def differences(self, other: Facts) -> str:
        """What is not the same, as text; empty if all is."""
        names = [name for name in {**self.said, **other.said} if self.said.get(name, ...) != other.said.get(name, ...)]
        return "; ".join(names[:5])


def tolerance(dtype: torch.dtype) -> float:
    """How far two answers in ``dtype`` may differ; none is 0."""
    return TOLERANCES.get(str(dtype).removeprefix("torch."), 0.0)


def distance(left: Tensor, right: Tensor) -> float:
    """The largest difference, relative to the largest number of ``left`` or to 1, if that is larger."""
    scale = max(1.0, left.abs().max().item())
    return (left.double() - right.double()).abs().max().item() / scale


def _identity(value: Any, alive: list[Any]) -> Any:
    alive.append(value)
    if isinstance(value, dict):
        alive.extend(value.values())
        return [(key, id(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        alive.extend(value)
        return [id(item) for item in value]
    return sorted(map(repr, value)) if isinstance(value, set) else value if isinstance(value, (bool, int, float, str)) else id(value)


def _base_dtype(model: nn.Module) -> torch.dtype:
    # the base's own parameters come first in each module, so that an adapter of another type does not mislead
    return next((p.dtype.to_real() for _, p in model.named_parameters() if p.is_floating_point() or p.is_complex()), torch.float32)
