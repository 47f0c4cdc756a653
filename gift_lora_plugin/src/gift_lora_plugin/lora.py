"""LoRA and its variants as one reparameterization, with forwards of their own where that beats building the weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gift_core import Reparameterization, adopted_weight
from gift_core.errors import SiteError
from gift_lora_plugin.convolution import low_rank_conv
from gift_lora_plugin.initialization import FROM_WEIGHT, factors_of, kaiming_uniform, orthogonal
from gift_lora_plugin.layouts import is_transformers_conv1d
from gift_lora_plugin.linear import low_rank_linear
from gift_lora_plugin.lowrank import drop, in_memory_as, own_precision
from gift_lora_plugin.settings import Settings, settings_of, shared_setting

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_OF_TENSORS = frozenset({"freeze_A", "dtype"})  # the params that are no matter of the settings
_ATTENTION = (nn.MultiheadAttention, nn.modules.linear.NonDynamicallyQuantizableLinear)


class LoRA(Reparameterization):
    r"""A frozen weight plus a trainable low-rank update.

    The effective weight is :math:`V = W + s B A`, with the product put into the shape of ``W`` by the layer's `Layout`, and one product
    per block where the weight is a stack of matrices. With ``dora`` it is :math:`m\, V / \lVert V \rVert`, one magnitude per output.
    Every variant starts as the layer was, bit for bit.

    Args of `init_parameters`:
        rank: :math:`r`, at least 1.
        alpha: numerator of the scaling; ``None`` means ``rank``.
        dropout: probability with which a number of the update's input is dropped in training; of an embedding, whose input is one
            number per token, the whole update of a token.
        conv_layout, attention, parameter_layout: how the weight is read, see `layouts.layout_of_kind`.
        rslora: scale by :math:`\alpha / \sqrt{r}` (rsLoRA) instead of :math:`\alpha / r`, so that the update's size does not depend on
            the rank.
        dora: learn the magnitude of each output apart from its direction (DoRA). The norm is a constant in the backward pass, as in
            section 4.3 of the paper. An output whose weights are all zero keeps them until the update moves them.
        init: where the factors start, one of `INITIALIZATIONS`. ``pissa`` and ``olora`` start from the weight's own content; the base
            is left as it is, and the update is counted from the start: :math:`s (B A - B_0 A_0)`.
        freeze_A: train ``B`` alone (LoRA-FA); ``A`` becomes a buffer, which is saved with the adapter.
        dtype: ``"float32"`` keeps the adapter, and forms the effective weight, in no less than single precision; ``None`` takes the
            weight's dtype.

    Attributes:
        lora_B: ``(rows, rank)``, or ``(blocks, rows, rank)``; zeros by default. ``(out, rank)`` for a Linear layer.
        lora_A: ``(rank, columns)``, or ``(blocks, rank, columns)``; Kaiming uniform with ``a = sqrt(5)`` by default.
        lora_magnitude: ``(outputs,)``, real, the norms of the weight; with ``dora`` alone.
        lora_B_init, lora_A_init: the factors at the start, persistent buffers; with ``pissa`` and ``olora`` alone.
        lora_settings: what is no tensor, one `Settings` for all layers that are adapted alike.
        lora_scaling, lora_dropout, lora_layout, lora_init, lora_dora: what these settings say of ``weight``; one that is set is this
            layer's own from then on, and no adapter file can hold it: saving refuses it.

    Source: Hu et al. 2022, arXiv:2106.09685, section 4.1; rsLoRA: Kalajdzievski 2023, arXiv:2312.03732, theorem 3.2; DoRA: Liu et al.
    2024, arXiv:2402.09353, equations 5 and 11; PiSSA: arXiv:2404.02948; OLoRA: arXiv:2406.01775; LoRA-FA: Zhang et al. 2023,
    arXiv:2308.03303, section 3.
    """

    lora_B: nn.Parameter
    lora_A: Tensor
    lora_magnitude: nn.Parameter
    lora_B_init: Tensor
    lora_A_init: Tensor
    lora_settings: Settings

    lora_scaling = shared_setting("scaling")
    lora_dropout = shared_setting("dropout")
    lora_layout = shared_setting("layout")
    lora_init = shared_setting("init")
    lora_dora = shared_setting("dora")

    @classmethod
    def specialize(cls, module: nn.Module) -> type[Reparameterization]:
        # a subclass with a forward of its own must keep it: it reads the effective weight; and so must a layer with several weights
        forward = type(module).forward
        if len([parameter for parameter in module._parameters.values() if parameter is not None and parameter.dim() > 1]) != 1:
            return cls
        if isinstance(module, nn.Linear):
            return LinearLoRA if forward is nn.Linear.forward else cls
        if isinstance(module, nn.Embedding):
            return EmbeddingLoRA if forward is nn.Embedding.forward else cls
        convolution: Any = next((kind for kind in _CONVOLUTIONS if isinstance(module, kind)), None)
        if convolution:
            inner = getattr(type(module), "_conv_forward", None)
            return ConvLoRA if forward is convolution.forward and inner is convolution._conv_forward else cls
        plain = is_transformers_conv1d(module) and forward.__module__ == "transformers.pytorch_utils"
        return TransposedLinearLoRA if plain else cls

    @classmethod
    def examine(cls, module: nn.Module, name: str, weight: Tensor, **params: Any) -> str | None:
        if (reason := dtype_refusal(name, weight.dtype)) is not None:
            raise SiteError(reason)
        settings = settings_of(module, name, weight.shape, **{key: params[key] for key in params if key not in _OF_TENSORS})
        reads_weight = cls is LoRA or (cls is EmbeddingLoRA and not _reads_rows(module))
        if reads_weight and isinstance(module, _EMBEDDINGS) and module.sparse:
            raise SiteError("its sparse gradients cannot pass through an effective weight: set its sparse=False, or exclude it.")
        if settings.dropout and isinstance(module, _ATTENTION):
            return "lora_dropout has no effect where attention reads the weight itself"
        if settings.dropout and reads_weight:
            raise SiteError("its forward reads the weight, and no dropout can be put into it: set lora_dropout=0, or exclude it.")
        if (rank := params["rank"]) > settings.layout.max_rank:
            return f"rank {rank} is more than these layers can use; it works, and wastes numbers"
        return None

    def init_parameters(
        self,
        weight: Tensor,
        *,
        rank: int,
        alpha: float | None = None,
        dropout: float = 0.0,
        rslora: bool = False,
        dora: bool = False,
        init: str = "kaiming",
        freeze_A: bool = False,
        dtype: str | None = None,
        **layout: Any,
    ) -> None:
        module, name = adopted_weight(self)
        settings = settings_of(
            module, name, weight.shape, rank=rank, alpha=alpha, dropout=dropout, rslora=rslora, dora=dora, init=init, **layout
        )
        self.lora_settings = settings
        lora_B, lora_A = _start(settings, weight, rank, weight.dtype if dtype is None else _at_least(dtype, weight.dtype))
        if init in FROM_WEIGHT:
            if isinstance(module, _EMBEDDINGS) and module.padding_idx is not None:
                lora_B[module.padding_idx] = 0  # torch promises that this row stays as it is
            self.register_buffer("lora_B_init", lora_B.clone())
            self.register_buffer("lora_A_init", lora_A.clone())
        self.register_parameter("lora_B", nn.Parameter(lora_B))
        if freeze_A:
            # no parameter, so that what passes over frozen parameters (distributed checkpoints) cannot lose it
            self.register_buffer("lora_A", lora_A)
        else:
            self.register_parameter("lora_A", nn.Parameter(lora_A))
        if dora:
            # the very computation of the forward pass, so that the quotient of the two is exactly 1
            self.register_parameter("lora_magnitude", nn.Parameter(settings.layout.output_norms(self._constant_direction(weight))))

    def unsaved(self) -> str | None:
        given = self.lora_settings.given
        if given is None or given == self.lora_settings:
            return None
        return (
            "its lora_scaling, lora_dropout or another setting was set on the layer itself, and a file holds what the strategy says: "
            "say it there, as by lora_alpha, alpha_pattern or dropout_pattern"
        )

    def factors(self) -> tuple[Tensor, Tensor]:
        r"""B and A whose product is the update, apart from the scaling, whatever they started from.

        For a start from the weight these are :math:`[B - B_0, B_0]` and :math:`[A; A - A_0]`, of twice the rank, whose product is
        :math:`B A - B_0 A_0`, exactly zero at the start.
        """
        lora_B, lora_A = self.lora_B, self.lora_A
        if self.lora_settings.init not in FROM_WEIGHT:
            return lora_B, lora_A
        lora_B_init, lora_A_init = self.lora_B_init, self.lora_A_init
        return torch.cat([lora_B - lora_B_init, lora_B_init], -1), torch.cat([lora_A, lora_A - lora_A_init], -2)

    def reparameterize(self, weight: Tensor) -> Tensor:
        direction, settings = self._direction(weight, *self.factors()), self.lora_settings
        if not settings.dora:
            return direction
        return direction * settings.layout.along_outputs(self._gain_of(direction.detach()))

    def _direction(self, weight: Tensor, lora_B: Tensor, lora_A: Tensor) -> Tensor:
        """``W + s B A``, in the adapter's dtype."""
        settings, layout = self.lora_settings, self.lora_settings.layout
        add = torch.addmm if layout.blocks is None else torch.baddbmm
        matrices = layout.matrices_of(weight.to(lora_B.dtype))
        return in_memory_as(weight, layout.weight_with(weight, add(matrices, lora_B, lora_A, alpha=settings.scaling)))

    def _constant_direction(self, weight: Tensor) -> Tensor:
        lora_B, lora_A = self.factors()
        with own_precision(weight.device.type):
            return self._direction(weight, lora_B.detach(), lora_A.detach())

    def _gain_of(self, direction: Tensor) -> Tensor:
        r""":math:`m / \lVert V \rVert`, ``(outputs,)``, and 1 for an output without a direction."""
        norms = self.lora_settings.layout.output_norms(direction)
        zero = norms == 0
        return torch.where(zero, torch.ones_like(norms), self.lora_magnitude / norms.masked_fill(zero, 1))


class _LinearMap(LoRA):
    """What layers share whose output is linear in the weight, with each output of the weight a channel of the output."""

    bias: Tensor | None
    _holds_transposed = False

    def forward(self, input: Tensor) -> Tensor:
        """Map as the layer does, by the function that chooses the cheapest way for its shape."""
        _refuse_tracing(input)
        settings, layout = self.lora_settings, self.lora_settings.layout
        if layout.blocks is not None or layout.transposed is not self._holds_transposed:
            return super().forward(input)  # type: ignore[no-any-return]
        dropout = settings.dropout if self.training else 0.0
        if not settings.dora:
            return self._tuned(input, self.bias, dropout)
        weight: Any = self._parameters["weight"]
        gain = self._gain_of(self._constant_direction(weight))
        if dropout:
            dropped = drop(input, dropout)
            update = self._spread(gain) * self._tuned(dropped, None, 0.0) - self._frozen(dropped, None)
            base = self._frozen(input, self.bias)
            return (base + update).to(base.dtype)
        tuned = self._tuned(input, self.bias, 0.0)
        # the bias has no magnitude; written so that a gain of 1 changes no bit
        rest = None if self.bias is None else self._spread((1 - gain) * self.bias)
        rescaled = tuned * self._spread(gain) if rest is None else torch.addcmul(rest, tuned, self._spread(gain))
        return rescaled.to(tuned.dtype)

    def _spread(self, outputs: Tensor) -> Tensor:
        """One number for each output, shaped to multiply what the layer gives."""
        return outputs

    def _tuned(self, input: Tensor, bias: Tensor | None, dropout: float) -> Tensor:
        """The map by ``W + s B A``."""
        raise NotImplementedError  # a base: each kind of layer below has its own

    def _frozen(self, input: Tensor, bias: Tensor | None) -> Tensor:
        """The map by ``W``."""
        raise NotImplementedError  # a base: each kind of layer below has its own


class LinearLoRA(_LinearMap):
    """LoRA on `torch.nn.Linear`: thin products on the input, or for tiny layers the effective weight, see `low_rank_linear`."""

    def _tuned(self, input: Tensor, bias: Tensor | None, dropout: float) -> Tensor:
        lora_B, lora_A = self.factors()
        return low_rank_linear(input, self._matrix(), bias, lora_A, lora_B, self.lora_settings.scaling, dropout)

    def _frozen(self, input: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(input, self._matrix(), bias)

    def _matrix(self) -> Tensor:
        weight: Any = self._parameters["weight"]
        return weight  # type: ignore[no-any-return]


class TransposedLinearLoRA(LinearLoRA):
    """LoRA on transformers' Conv1D, a linear layer whose weight is ``(in, out)``."""

    _holds_transposed = True

    def forward(self, x: Tensor) -> Tensor:  # so Conv1D calls its input
        """Map ``(..., in)`` to ``(..., out)``."""
        return super().forward(x)

    def _matrix(self) -> Tensor:
        return super()._matrix().t()


class ConvLoRA(_LinearMap):
    """LoRA on a convolution, by the effective weight or by thin convolutions, whichever `low_rank_conv` finds cheaper."""

    def _tuned(self, input: Tensor, bias: Tensor | None, dropout: float) -> Tensor:
        lora_B, lora_A = self.factors()
        weight: Any = self._parameters["weight"]
        return low_rank_conv(
            input,
            weight,
            bias,
            lora_A,
            lora_B,
            self.lora_settings.scaling,
            dropout,
            stride=self.stride,  # type: ignore[arg-type]
            padding=self.padding,  # type: ignore[arg-type]
            dilation=self.dilation,  # type: ignore[arg-type]
            groups=self.groups,  # type: ignore[arg-type]
            padding_mode=self.padding_mode,  # type: ignore[arg-type]
        )

    def _frozen(self, input: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(input, self._parameters["weight"], bias)  # type: ignore[operator, no-any-return]

    def _spread(self, outputs: Tensor) -> Tensor:
        return outputs.view(-1, *[1] * len(self.kernel_size))  # type: ignore[arg-type]


class EmbeddingLoRA(LoRA):
    """LoRA on `torch.nn.Embedding`: the rows that the tokens choose, instead of a table of full size."""

    def forward(self, input: Tensor) -> Tensor:
        """Map tokens of any shape to ``(..., dim)``."""
        _refuse_tracing(input)
        settings = self.lora_settings
        if settings.layout.transposed or not _reads_rows(self):
            return super().forward(input)  # type: ignore[no-any-return]
        weight: Any = self._parameters["weight"]
        base = F.embedding(input, weight)
        tuned = self._rows(input, base) if not settings.dora else self._rescaled(input, base)
        if settings.dropout and self.training:
            keep = drop(base.new_ones(*input.shape, 1), settings.dropout)
            tuned = base + keep * (tuned - base)
        return tuned.to(base.dtype)

    def _rows(self, input: Tensor, base: Tensor) -> Tensor:
        lora_B, lora_A = self.factors()
        with own_precision(base.device.type):  # autocast leaves the frozen rows alone, too
            # never sparse, because A's gradient is dense and few optimizers take both
            update = F.embedding(input, lora_B, self.padding_idx) @ lora_A  # type: ignore[arg-type]
        return torch.add(base, update, alpha=self.lora_settings.scaling)

    def _rescaled(self, input: Tensor, base: Tensor) -> Tensor:
        weight: Any = self._parameters["weight"]
        tuned = self._rows(input, base) * self._gain_of(self._constant_direction(weight))
        if self.padding_idx is None:
            return tuned
        # what stands at padding gives no gradient, to the magnitude neither
        return torch.where(input.eq(self.padding_idx).unsqueeze(-1), tuned.detach(), tuned)  # type: ignore[arg-type]


def _start(settings: Settings, weight: Tensor, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    layout, init = settings.layout, settings.init
    if init in FROM_WEIGHT:
        lora_B, lora_A = factors_of(init, layout.matrices_of(weight), rank, settings.scaling)
        return lora_B.to(dtype).contiguous(), lora_A.to(dtype).contiguous()
    lora_A = weight.new_empty(layout.shape_of_A(rank), dtype=dtype)
    fill = orthogonal if init == "orthogonal" else kaiming_uniform
    return weight.new_zeros(layout.shape_of_B(rank), dtype=dtype), fill(lora_A)


def dtype_refusal(name: str, dtype: torch.dtype) -> str | None:
    """Why a weight of this dtype cannot be adapted: of numbers of eight bits or fewer torch adds none, with an adapter of any dtype."""
    if dtype.is_floating_point and dtype.itemsize == 1:
        return f"its {name!r} is in {dtype}, in which torch stores numbers and adds none: call to(torch.bfloat16) first, or exclude it."
    return None


def _at_least(dtype: str, weight_dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(getattr(torch, dtype), weight_dtype)


def _reads_rows(module: Any) -> bool:
    """Whether an embedding's rows may be looked up one by one; both settings look at the table or the batch as a whole."""
    return module.max_norm is None and not module.scale_grad_by_freq


def _refuse_tracing(input: object) -> None:
    if isinstance(input, torch.fx.Proxy):
        raise SiteError(
            "torch.fx traces into an adapted layer, where it would take the weight for a constant: make the layer a leaf of the "
            "tracer, as layers of torch.nn inside a model are, or merge_and_unload(model) first."
        )
