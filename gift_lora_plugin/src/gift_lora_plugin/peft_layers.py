r"""One adapted layer in PEFT's terms: its tensors, and what PEFT would compute differently.

Pure tensors and layers: nothing here reads a file. Both libraries write the update as ``scaling * B A``; they differ in the shapes.

======================  ==========================================  ===========================================
layer                   PEFT                                        ours
======================  ==========================================  ===========================================
Linear, Conv1D          A ``(r, in)``, B ``(out, r)``               the same
Conv1-3d, ``out_as_h``  A ``(r, in, *k)``, B ``(out, r, 1, ...)``   A ``(r, in * k)``, B ``(out, r)``
Conv2-3d, ``balanced``  rank k0 r, see `conv_factors`               A ``(r, in * k1..)``, B ``(out * k0, r)``
Embedding               A ``(r, num)``, B ``(dim, r)``              B ``(num, r)``, A ``(r, dim)``
======================  ==========================================  ===========================================

The facts about PEFT are those of its version 0.21, found by running it.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from gift_core import Reparameterization
from gift_lora_plugin.layouts import is_transformers_conv1d
from gift_lora_plugin.lora import dtype_refusal

_CONVOLUTIONS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

#: Keys of a layer's tensors in a PEFT file, below the layer's name; the first is A and the second B.
PLAIN_KEYS = ("lora_A.weight", "lora_B.weight")
EMBEDDING_KEYS = ("lora_embedding_A", "lora_embedding_B")
MAGNITUDE_KEY = "lora_magnitude_vector"
#: PEFT reads a magnitude with or without this, and writes it without; transformers' load_adapter finds it with this alone.
MAGNITUDE_ENDING = ".weight"
#: Layers of `torch.nn.TransformerEncoderLayer` whose weights its fast path reads.
UNCALLED = ("linear1", "linear2")


@dataclasses.dataclass(frozen=True)
class Factors:
    """The update of one layer in our shapes.

    Attributes:
        A: ``(rank, columns)``.
        B: ``(rows, rank)``.
        magnitude: ``(outputs,)`` with DoRA, else None.
    """

    A: Tensor
    B: Tensor
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """The rank."""
        return self.A.shape[0]


def refusal(module: nn.Module) -> str | None:
    """Why the weight of a layer, adapted or not, cannot be adapted alike by PEFT; None where it can."""
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "MultiheadAttention reads its weight without calling it, and PEFT's adapter would have no effect"
    plain = _plain_class(module)
    if plain is None:
        return f"PEFT files have no form for a {_original_class(module).__name__}"
    if not _behaves_as(module, plain):
        return f"{_original_class(module).__name__} is a {plain.__name__} with code of its own, which PEFT's adapter goes around"
    weight = module._parameters["weight"]
    if weight is not None and (reason := dtype_refusal("weight", weight.dtype)) is not None:
        return reason.removesuffix(".")
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "max_norm rescales the weight at each use, and PEFT rescales its factor A as well"
    return _conv_refusal(module) if isinstance(module, _CONVOLUTIONS) else None


def places_of(modules: Iterable[nn.Module]) -> Counter[int]:
    """In how many places each module stands, by its id.

    Args:
        modules: those of a model, each once.
    """
    return Counter(id(child) for module in modules for child in module._modules.values() if child is not None)


def place_refusal(name: str, modules: Mapping[str, nn.Module], places: Mapping[int, int]) -> str | None:
    """Why PEFT's adapter on a layer would not be at work wherever the layer is; None where nothing tells that.

    Args:
        name: of the layer, in full.
        modules: those of the model, by name.
        places: what `places_of` says of them.
    """
    if places[id(modules[name])] > 1:
        return "the layer stands in several places, and PEFT replaces it in one of them"
    owner, _, child = name.rpartition(".")
    # torch leaves this path for a weight that trains, and takes it in eval mode without gradients
    if child in UNCALLED and isinstance(modules[owner], nn.TransformerEncoderLayer):
        return "TransformerEncoderLayer reads its weight without calling it in eval mode, and PEFT's adapter would have no effect there"
    return None


def start_refusal(module: nn.Module, start: str, is_tied: bool) -> str | None:
    """Why a layer cannot have a start that takes something from the base weight; None where PEFT has it, and it is ours, too."""
    if not isinstance(module, nn.Linear) and not (start == "pissa" and is_transformers_conv1d(module)):
        return f"PEFT has no start {start!r} for a {_original_class(module).__name__}"
    if is_tied:
        return f"its weight is another layer's too, which PEFT's start {start!r} would change: save the adapter as a plain one"
    return None


def to_peft(module: nn.Module | None, factors: Factors) -> dict[str, Tensor]:
    """PEFT's tensors of a layer by key.

    Args:
        module: a layer that `refusal` lets pass; None for a Linear that is not at hand.
        factors: its update.
    """
    A, B, keys = factors.A, factors.B, PLAIN_KEYS
    magnitude_shape: tuple[int, ...] = (-1,)
    if isinstance(module, nn.Embedding):
        A, B, keys = B.T, A.T, EMBEDDING_KEYS
    elif isinstance(module, _CONVOLUTIONS):
        shape = weight_shape(module)
        A, B = conv_factors(A, B, shape)
        magnitude_shape = (1, -1, *(1,) * (len(shape) - 2))
    tensors = dict(zip(keys, (A, B), strict=True))
    if factors.magnitude is not None:
        tensors[MAGNITUDE_KEY + MAGNITUDE_ENDING] = factors.magnitude.reshape(magnitude_shape)
    return tensors


def conv_factors(A: Tensor, B: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    r"""The factors of a convolution of either layout as PEFT's two convolutions.

    In the ``balanced`` layout row :math:`(o, i)` of :math:`B A` is the slice of output o at the first kernel place i. With
    :math:`A' = \mathrm{diag}(A, \ldots, A)`, k0 copies, and :math:`B'` the same numbers as B with k0 rows joined to one, row o of
    :math:`B' A'` is these slices one after another. The rank becomes :math:`k_0 r`, the update stays.

    Args:
        A: ``(r, columns)``.
        B: ``(rows, r)``, where rows is out, or out * k0 in the balanced layout.
        shape: of the weight, ``(out, in, *k)``.

    Returns:
        A' ``(r', in, *k)`` and B' ``(out, r', 1, ...)``.
    """
    slices = B.shape[0] // shape[0]
    wide = A if slices == 1 else torch.block_diag(*[A] * slices)
    rank = wide.shape[0]
    # the columns of a slice are (in, k1, ...) of one first kernel place, in memory order of the whole weight
    return wide.reshape(rank, *shape[1:]), B.reshape(shape[0], rank, *(1,) * (len(shape) - 2))


def from_peft(module: nn.Module, tensors: Mapping[str, Tensor]) -> Factors:
    """The update of a layer from PEFT's tensors, which `misfits` lets pass; a convolution's in the layout ``out_as_h``."""
    magnitude = tensors.get(MAGNITUDE_KEY)
    flat = None if magnitude is None else magnitude.flatten()
    if isinstance(module, nn.Embedding):
        A, B = (tensors[key] for key in EMBEDDING_KEYS)
        return Factors(B.T, A.T, flat)
    A, B = (tensors[key] for key in PLAIN_KEYS)
    return Factors(A.flatten(1), B.flatten(1), flat)


def misfits(module: nn.Module, tensors: Mapping[str, Tensor], dora: bool) -> list[str]:
    """What is wrong with a layer's tensors: missing, unexpected, of another shape than the layer's, or holding NaN."""
    wanted = (*(EMBEDDING_KEYS if isinstance(module, nn.Embedding) else PLAIN_KEYS), *((MAGNITUDE_KEY,) if dora else ()))
    problems = [f"{key} is missing" for key in wanted if key not in tensors]
    problems += [f"{key} is unexpected" for key in tensors if key not in wanted]
    if problems:
        return problems
    A = tensors[wanted[0]]
    rank = A.shape[0] if A.dim() else 0
    for key, shape in zip(wanted, _peft_shapes(module, rank), strict=False):
        found = tuple(tensors[key].shape)
        if found != shape or not rank:
            problems.append(f"{key} has shape {found}, and the layer takes {_described(shape, rank)}")
    return problems


def weight_shape(module: nn.Module) -> tuple[int, ...]:
    """The shape of a layer's own weight, adapted or not."""
    weight = module._parameters["weight"]
    assert weight is not None  # these layers always have one
    return tuple(weight.shape)


def is_fan_in_fan_out(module: nn.Module | None) -> bool:
    """Whether PEFT's name for the layer's weight layout, ``(in, out)``, is this."""
    return module is not None and is_transformers_conv1d(module)


def _peft_shapes(module: nn.Module, rank: int) -> list[tuple[int, ...]]:
    shape = weight_shape(module)
    ones = (1,) * (len(shape) - 2)
    if isinstance(module, nn.Embedding):
        return [(rank, shape[0]), (shape[1], rank), (shape[1],)]
    if is_transformers_conv1d(module):
        return [(rank, shape[0]), (shape[1], rank), (shape[1],)]
    return [(rank, *shape[1:]), (shape[0], rank, *ones), (1, shape[0], *ones) if ones or len(shape) > 2 else (shape[0],)]


def _described(shape: tuple[int, ...], rank: int) -> str:
    return str(shape) if rank else "at least rank 1"


def _original_class(module: nn.Module) -> type[nn.Module]:
    return next(cls for cls in type(module).__mro__ if issubclass(cls, nn.Module) and not issubclass(cls, Reparameterization))


def _plain_class(module: nn.Module) -> type[nn.Module] | None:
    plain = (nn.Linear, nn.Embedding, *_CONVOLUTIONS)
    if is_transformers_conv1d(module):
        return next(cls for cls in type(module).__mro__ if cls.__name__ == "Conv1D")
    return next((cls for cls in plain if isinstance(module, cls)), None)


def _behaves_as(module: nn.Module, plain: type[nn.Module]) -> bool:
    # PEFT calls the layer, and adds what it computes itself; the factor A of a convolution it makes as one more layer of its class
    code = ("forward", "_conv_forward", "__init__") if isinstance(module, _CONVOLUTIONS) else ("forward",)
    return all(getattr(_original_class(module), name) is getattr(plain, name) for name in code)


def _conv_refusal(module: nn.Module) -> str | None:
    assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    if module.groups > 1:
        return f"groups={module.groups}: PEFT's factor A reads every input channel, and its factor B is grouped instead"
    if any(step > 1 and size > 1 for step, size in zip(module.dilation, module.kernel_size, strict=True)):
        return f"dilation={module.dilation}: PEFT's factor A is a convolution without dilation"
    if module.padding_mode != "zeros" and any(module._reversed_padding_repeated_twice):
        return f"padding_mode={module.padding_mode!r}: PEFT's factor A is a convolution that pads with zeros"
    return None
