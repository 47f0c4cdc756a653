"""How the weight of a layer is read as one matrix or as a stack of matrices, and where its outputs lie.

Pure shapes and tensors: nothing here has a rank, a scaling or a parameter. A low-rank update is a product per matrix; the layout puts
it into the weight's shape, and says over what a norm per output is taken.

==========================================  ======================  ================================  ===========
layer and parameter                         weight                  matrices (rows, columns)          outputs
==========================================  ======================  ================================  ===========
Linear, q/k/v_proj_weight, weight_hr        (out, in)               (out, in)                         out
Conv1-3d                                    (out, in / g, *k)       see `lowrank.matrix_shape`        out
ConvTranspose1-3d                           (in, out / g, *k)       the same, in memory order         g * out / g
Embedding, EmbeddingBag                     (num, dim)              (num, dim)                        dim
Bilinear                                    (out, in1, in2)         (out, in1 * in2)                  out
MultiheadAttention.in_proj_weight           (3 * dim, dim)          stack of 3, or of the chosen      stack * dim
LSTM, GRU: weight_ih, weight_hh             (gates * hidden, in)    stack of 4, of 3                  gates * hidden
transformers' Conv1D                        (in, out)               (out, in), transposed             out
a raw parameter, ``out_in``                 (out, in)               (out, in)                         out
a raw parameter, ``in_out``                 (in, out)               (out, in), transposed             out
stacked raw ones (experts)                  (n, out, in)            stack of n                        n * out
==========================================  ======================  ================================  ===========
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gift_core.errors import SiteError
from gift_lora_plugin.lowrank import matrix_shape

#: How a raw parameter maps: ``out_in`` as in `torch.nn.Linear`, ``in_out`` as in ``input @ weight``.
PARAMETER_LAYOUTS = ("out_in", "in_out")

#: What of an attention layer may be adapted: the projections of query, key and value, and the one of the output.
ATTENTION_PARTS = ("q", "k", "v", "out")

_TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_GATES: tuple[tuple[tuple[type[nn.Module], ...], int], ...] = (((nn.LSTM, nn.LSTMCell), 4), ((nn.GRU, nn.GRUCell), 3))

#: All of a layer that its layouts depend on: its class, and the groups of a transposed convolution, 1 for any other.
Kind = tuple[type[nn.Module], int]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one weight is read as ``(rows, columns)`` or ``(blocks, rows, columns)``.

    Attributes:
        shape: of the weight.
        rows: of each matrix; the rows of B.
        columns: of each matrix; the columns of A.
        blocks: how many matrices are stacked; None for a single one.
        transposed: whether the weight holds each matrix transposed, as ``(in, out)``.
        view: a shape of the same numbers in memory order in which the outputs fill whole axes.
        output_axes: these axes of ``view``.
        parts: which entries of ``view``'s first axis are adapted, the rest keep the weight; None for all.
    """

    shape: tuple[int, ...]
    rows: int
    columns: int
    blocks: int | None = None
    transposed: bool = False
    view: tuple[int, ...] = ()
    output_axes: tuple[int, ...] = (0,)
    parts: tuple[int, ...] | None = None

    @property
    def max_rank(self) -> int:
        """The largest rank that a matrix of this layout can have."""
        return min(self.rows, self.columns)

    @property
    def outputs(self) -> int:
        """How many outputs the adapted part has: the size of a magnitude."""
        return math.prod(self._output_sizes())

    def shape_of_A(self, rank: int) -> tuple[int, ...]:
        """``(rank, columns)``, or ``(blocks, rank, columns)``."""
        return (rank, self.columns) if self.blocks is None else (self.blocks, rank, self.columns)

    def shape_of_B(self, rank: int) -> tuple[int, ...]:
        """``(rows, rank)``, or ``(blocks, rows, rank)``."""
        return (self.rows, rank) if self.blocks is None else (self.blocks, self.rows, rank)

    def matrices_of(self, weight: Tensor) -> Tensor:
        """The adapted part of a weight as ``(rows, columns)`` or ``(blocks, rows, columns)``; a view where memory allows."""
        stack = () if self.blocks is None else (-1,)
        sides = (self.columns, self.rows) if self.transposed else (self.rows, self.columns)
        matrices: Tensor = self._adapted(weight.reshape(*stack, *sides))
        return matrices.mT if self.transposed else matrices

    def weight_with(self, weight: Tensor, matrices: Tensor) -> Tensor:
        """The weight whose adapted part is ``matrices``; the inverse of `matrices_of`."""
        if self.transposed:
            # in memory as the weight is, so that a merged layer runs the kernels of the original
            matrices = matrices.mT.contiguous()
        if self.parts is None:
            return matrices.reshape(self.shape)
        rest = weight.reshape(self.view).unbind()
        return torch.stack(self._filled(matrices, rest)).view(self.shape)

    def as_weight(self, update: Tensor) -> Tensor:
        """An update ``(rows, columns)`` or ``(blocks, rows, columns)`` in the weight's shape, zero where nothing is adapted."""
        if self.parts is None:
            return self.weight_with(update, update)
        return self.weight_with(update.new_zeros(self.shape), update)

    def output_norms(self, weight: Tensor) -> Tensor:
        """The norm of a weight for each output, ``(outputs,)``: over everything but the output axes, in the weight's dtype."""
        spread = self._adapted(weight.reshape(self.view))
        others = [axis for axis in range(len(self.view)) if axis not in self.output_axes]
        norms: Tensor = torch.linalg.vector_norm(spread, dim=others)
        return norms.flatten()

    def along_outputs(self, values: Tensor) -> Tensor:
        """One number for each output, ``(outputs,)``, in a shape that multiplies the weight; one where nothing is adapted."""
        kept = iter(self._output_sizes())
        spread = values.view([next(kept) if axis in self.output_axes else 1 for axis in range(len(self.view))])
        if self.parts is not None:
            spread = torch.stack(self._filled(spread, [torch.ones_like(spread[0])] * self.view[0]))
        if len(self.view) == len(self.shape):
            return spread
        # the first axis of the weight is two of the view: they take their full size, the others stay broadcast
        return spread.expand(*self.view[:2], *spread.shape[2:]).reshape(self.shape[0], *spread.shape[2:])

    def _output_sizes(self) -> list[int]:
        sizes = [self.view[axis] for axis in self.output_axes]
        return sizes if self.parts is None else [len(self.parts), *sizes[1:]]

    def _adapted(self, stack: Tensor) -> Tensor:
        # views that are stacked, not an index tensor, which would wait for its device
        return stack if self.parts is None else torch.stack([stack[part] for part in self.parts])

    def _filled(self, adapted: Tensor, rest: Sequence[Tensor]) -> list[Tensor]:
        assert self.parts is not None  # it is called where there are some
        given = dict(zip(self.parts, adapted.unbind(), strict=True))
        return [given.get(part, rest[part]) for part in range(self.view[0])]


def kind_of(module: nn.Module) -> Kind:
    """What of a layer decides how its parameters are read."""
    return type(module), module.groups if isinstance(module, _TRANSPOSED_CONVOLUTIONS) else 1


def layout_of(module: nn.Module, name: str, shape: Sequence[int], **choices: Any) -> Layout:
    """`layout_of_kind` for a layer at hand."""
    return layout_of_kind(kind_of(module), name, shape, **choices)


def layout_of_kind(
    kind: Kind,
    name: str,
    shape: Sequence[int],
    *,
    conv_layout: str = "balanced",
    attention: Iterable[str] = ATTENTION_PARTS,
    parameter_layout: str | None = None,
) -> Layout:
    """Choose how a parameter of a layer is read.

    Args:
        kind: the layer's class, and its groups.
        name: of the parameter in it.
        shape: of the parameter.
        conv_layout: how a convolution is read, see `lowrank.matrix_shape`.
        attention: which of ``q``, ``k``, ``v`` are adapted in a packed ``in_proj_weight``.
        parameter_layout: one of `PARAMETER_LAYOUTS` for a raw parameter, whatever its layer: a matrix, or a stack of matrices. None
            reads it as the layer's class says, and in memory order where the class is unknown.

    Raises:
        SiteError: if the shape holds no matrix; the message names the parameter and the shape.
    """
    (cls, groups), size = kind, tuple(shape)
    if len(size) < 2 or not math.prod(size):
        raise SiteError(f"its {name!r} has shape {size}, and a low-rank update needs a matrix: exclude it.")
    if parameter_layout is not None:
        return _raw(name, size, parameter_layout == "in_out")
    if _is_conv1d(cls):
        return _raw(name, size, transposed=True)
    if issubclass(cls, nn.MultiheadAttention) and name == "in_proj_weight":
        return _packed(size, 3, tuple(sorted(ATTENTION_PARTS.index(part) for part in set(attention) - {"out"})))
    if gates := _gates(cls, name):
        return _packed(size, gates)
    rows, columns = matrix_shape(size, conv_layout)
    if issubclass(cls, _TRANSPOSED_CONVOLUTIONS):
        view = (groups, size[0] // groups, *size[1:])
        return Layout(size, rows, columns, view=view, output_axes=(0, 2))
    output = 1 if issubclass(cls, (nn.Embedding, nn.EmbeddingBag)) else 0
    return Layout(size, rows, columns, view=size, output_axes=(output,))


def is_transformers_conv1d(module: nn.Module) -> bool:
    """Whether a layer is transformers' Conv1D, a linear layer whose weight is ``(in, out)``; by name, without importing it."""
    return _is_conv1d(type(module))


def _is_conv1d_class(cls: type) -> bool:
    return any(base.__name__ == "Conv1D" and base.__module__ == "transformers.pytorch_utils" for base in cls.__mro__)


_is_conv1d: Callable[[type], bool] = functools.lru_cache(maxsize=1024)(_is_conv1d_class)


def _raw(name: str, shape: tuple[int, ...], transposed: bool) -> Layout:
    if len(shape) > 3:
        raise SiteError(f"its {name!r} has shape {shape}, and a parameter is read as one matrix or a stack of them: leave it out.")
    columns, rows = shape[-2:] if transposed else shape[:-3:-1]
    stacked = len(shape) == 3
    axes: Any = (0, 2 if transposed else 1) if stacked else (1 if transposed else 0,)
    return Layout(shape, rows, columns, shape[0] if stacked else None, transposed, shape, axes)


def _packed(shape: tuple[int, ...], total: int, parts: tuple[int, ...] | None = None) -> Layout:
    rows, columns = shape[0] // total, shape[1]
    parts = None if parts is None or len(parts) == total else parts
    blocks = total if parts is None else len(parts)
    return Layout(shape, rows, columns, blocks, view=(total, rows, columns), output_axes=(0, 1), parts=parts)


def _gates(cls: type[nn.Module], name: str) -> int:
    if not name.startswith(("weight_ih", "weight_hh")):
        return 0
    return next((gates for types, gates in _GATES if issubclass(cls, types)), 0)
