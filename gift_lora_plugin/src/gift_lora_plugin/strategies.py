"""LoRA as strategies: which layers, and with which parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from gift_core import Caps, FineTuningStrategy
from gift_core.capabilities import Capabilities
from gift_core.factories import (
    Check,
    everything,
    is_instance,
    keep_trainable,
    parameter_name_contains,
    parameter_name_is,
    reparameterize,
    selects,
)
from gift_lora_plugin.layouts import ATTENTION_PARTS, is_transformers_conv1d
from gift_lora_plugin.lora import LoRA
from gift_lora_plugin.parameters import PatternRules, check_parameters, mentions, per_site

Patterns = str | Iterable[str] | None

_LINEAR = (nn.Linear,)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
#: Layers whose own forward reads the weight, where no dropout can be put into it.
_WITHOUT_DROPOUT = (
    *("ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d", "Bilinear"),
    *("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"),
)
_DTYPES = ("float32", "float64", "bfloat16", "float16")


class _LoRAStrategy(FineTuningStrategy):
    """What the strategies of this file share: the layers that have one weight, called ``weight``."""

    _types: tuple[type[nn.Module], ...] = ()
    _types_when_named: tuple[type[nn.Module], ...] = ()
    _adapts_conv1d = False

    def __init__(
        self,
        rank: int = 3,
        lora_alpha: float | None = None,
        lora_dropout: float = 0.0,
        train_bias: bool = False,
        targets: Patterns = None,
        exclude: Patterns = None,
        conv_layout: str = "balanced",
        use_rslora: bool = False,
        use_dora: bool = False,
        init: str = "kaiming",
        freeze_A: bool = False,
        adapter_dtype: str | None = None,
        rank_pattern: PatternRules | None = None,
        alpha_pattern: PatternRules | None = None,
        dropout_pattern: PatternRules | None = None,
    ) -> None:
        check_parameters(locals())
        kinds = is_instance(*self._types, *(() if targets is None else self._types_when_named))
        if self._adapts_conv1d:
            kinds |= _is_conv1d
        rules = {"rank": rank_pattern, "alpha": alpha_pattern, "dropout": dropout_pattern}
        self._mentioned = mentions(pattern for by in rules.values() for pattern in by or ())
        self._where = selects(targets, exclude) & self._mentioned
        action = per_site(reparameterize(LoRA, keep=("bias",) if train_bias else ()), **rules)
        params: dict[str, Any] = {"rank": rank, "alpha": lora_alpha, "dropout": lora_dropout, "conv_layout": conv_layout}
        variant: dict[str, Any] = {"rslora": use_rslora, "dora": use_dora, "init": init, "freeze_A": freeze_A, "dtype": adapter_dtype}
        params |= {key: value for key, value in variant.items() if value not in (False, None, "kaiming")}
        super().__init__(module_caps=[(kinds & self._where, action, params)])
        self.capabilities = dataclasses.replace(
            self.capabilities,
            adapter_dtype=adapter_dtype,
            random_in_training=any((lora_dropout, *(dropout_pattern or {}).values())),
            **_layers_with(self.capabilities.layers, lora_dropout),
        )
        if any(patterns is not None for patterns in (targets, exclude, dropout_pattern)):
            # what patterns leave of these kinds depends on the model
            self.capabilities = dataclasses.replace(self.capabilities, layers=(), refuses=())


class LoRAAllFineTuningStrategy(_LoRAStrategy):
    """LoRA on every layer that has a matrix in it, subclasses included.

    These are Linear layers, convolutions and transposed ones of one to three dimensions, Bilinear, the projections of
    MultiheadAttention, the gates of recurrent layers and cells, and transformers' Conv1D; and raw parameters that ``parameters`` names.

    Embedding and EmbeddingBag are adapted only where ``targets`` covers them: a table has a row of B for every token, which is
    often more than all other layers together, and language models tie it to their output layer. Both of a tied pair may be
    adapted, each with an adapter of its own; the report names the pair, and merging and unloading unties it.

    Args:
        rank: the rank of the update, at least 1.
        lora_alpha: numerator of the scaling alpha / rank; None means rank.
        lora_dropout: probability, in [0, 1), of dropping a number of the update's input in training. A layer whose own forward reads
            the weight has no place for it and is refused by name; of attention a warning tells that it has no effect there.
        train_bias: train the biases of the adapted layers too; they are frozen otherwise.
        targets: patterns of the layers to adapt (see `gift_core.selection`); None adapts all of the types but embeddings.
        exclude: patterns of layers to leave out.
        conv_layout: ``balanced`` or ``out_as_h``, see `gift_lora_plugin.matrix_shape`.
        use_rslora: scale by alpha / sqrt(rank).
        use_dora: learn the magnitude of each output apart from the direction.
        init: the start, ``kaiming``, ``orthogonal``, ``pissa`` or ``olora``; all keep the base as it is.
        freeze_A: train B alone (LoRA-FA).
        adapter_dtype: ``float32`` keeps the adapter of a half-precision model in single precision; None takes the weight's type.
        rank_pattern, alpha_pattern, dropout_pattern: other values of ``rank``, ``lora_alpha`` and ``lora_dropout`` for the layers that
            a pattern matches, and all inside it; the first match wins, and each pattern must match an adapted layer.
        attention: which projections of MultiheadAttention are adapted, of ``q``, ``k``, ``v`` and ``out``. With ``train_bias`` the one
            bias of q, k and v trains as a whole.
        parameters: patterns over the full names of raw parameters to adapt as well: matrices, or stacks of matrices such as the
            weights of experts.
        parameter_layout: how these map, ``out_in`` as in Linear or ``in_out`` as in ``input @ weight``.

    Raises:
        ParameterError: if a value is not allowed.

    Source: Hu et al. 2022, arXiv:2106.09685; of the variants see `gift_lora_plugin.LoRA`.
    """

    name = "lora"
    capabilities = Capabilities(
        layers=(
            "Linear",
            *("Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"),
            *("Bilinear", "MultiheadAttention", "LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell", "Conv1D"),
        ),
        dtypes=_DTYPES,
    )
    _types = (*_LINEAR, *_CONVOLUTIONS, nn.Bilinear)
    _types_when_named = _EMBEDDINGS
    _adapts_conv1d = True

    def __init__(
        self,
        rank: int = 3,
        lora_alpha: float | None = None,
        lora_dropout: float = 0.0,
        train_bias: bool = False,
        targets: Patterns = None,
        exclude: Patterns = None,
        conv_layout: str = "balanced",
        use_rslora: bool = False,
        use_dora: bool = False,
        init: str = "kaiming",
        freeze_A: bool = False,
        adapter_dtype: str | None = None,
        rank_pattern: PatternRules | None = None,
        alpha_pattern: PatternRules | None = None,
        dropout_pattern: PatternRules | None = None,
        attention: Sequence[str] = ATTENTION_PARTS,
        parameters: Patterns = None,
        parameter_layout: str = "out_in",
    ) -> None:
        check_parameters({"attention": attention, "parameters": parameters, "parameter_layout": parameter_layout})
        variants = (use_rslora, use_dora, init, freeze_A, adapter_dtype, rank_pattern, alpha_pattern, dropout_pattern)
        super().__init__(rank, lora_alpha, lora_dropout, train_bias, targets, exclude, conv_layout, *variants)
        self._parameters["attention"] = tuple(attention)  # as the default is, so that one read from JSON is equal
        check: Any
        check, action, shared = self.module_caps[0]
        params = dict(shared)
        if set(attention) == {"out"}:
            # which is a Linear layer inside of it
            layers = tuple(name for name in self.capabilities.layers if name != "MultiheadAttention")
            self.capabilities = dataclasses.replace(self.capabilities, layers=layers)
        if "out" not in attention:
            self.module_caps = Caps([(check & _is_no_output_projection, action, params)])
        weights: list[tuple[Any, ...]] = [
            (_is_attention_weight(attention) & self._where, action, params | {"attention": tuple(attention)}),
            (is_instance(*_RECURRENT) & parameter_name_contains("weight", optional=True) & self._where, action, params),
        ]
        if parameters is not None:
            # first, because what is named alone may be an attention's weight, to be read as one matrix
            raw = selects(parameters, exclude) & self._mentioned
            weights.insert(0, (raw, action, params | {"parameter_layout": parameter_layout}))
            refuses = (*self.capabilities.refuses, "Parameter") if self.capabilities.refuses else ()
            self.capabilities = dataclasses.replace(self.capabilities, layers=(), refuses=refuses)
        biases = [(_IsBiasOf(tuple(check for check, *_ in weights)), keep_trainable())] if train_bias else []
        self.para_caps = Caps([*weights, *biases])


class LoRALinearFineTuningStrategy(_LoRAStrategy):
    """LoRA on every Linear layer and transformers' Conv1D; takes what `LoRAAllFineTuningStrategy` takes, up to ``dropout_pattern``."""

    name = "lora-linear"
    capabilities = Capabilities(layers=("Linear", "Conv1D"), dtypes=_DTYPES)
    _types = _LINEAR
    _adapts_conv1d = True


class LoRAConvFineTuningStrategy(_LoRAStrategy):
    """LoRA on every convolution, transposed or not; takes what `LoRAAllFineTuningStrategy` takes, up to ``dropout_pattern``."""

    name = "lora-conv"
    capabilities = Capabilities(layers=tuple(kind.__name__ for kind in _CONVOLUTIONS), dtypes=_DTYPES)
    _types = _CONVOLUTIONS


def _layers_with(layers: tuple[str, ...], dropout: float) -> dict[str, Any]:
    refused = tuple(name for name in layers if dropout and name in _WITHOUT_DROPOUT)
    return {"layers": tuple(name for name in layers if name not in refused), "refuses": refused}


def _is_attention_weight(attention: Sequence[str]) -> Check:
    chosen = [part for part in ATTENTION_PARTS if part in attention and part != "out"]
    names = ["in_proj_weight", *(f"{part}_proj_weight" for part in chosen)] if chosen else []
    return is_instance(nn.MultiheadAttention) & (parameter_name_is(*names, optional=True) if names else ~everything())


def _is_conv1d(*site: Any) -> bool:
    return is_transformers_conv1d(site[4])


def _is_no_output_projection(*site: Any) -> bool:
    return not (isinstance(site[0], nn.MultiheadAttention) and site[1] == "out_proj")


@dataclasses.dataclass(frozen=True)
class _IsBiasOf:
    """True for the biases of attention and recurrent layers that belong to a weight which one of ``weights`` chooses."""

    weights: tuple[Callable[..., bool], ...]

    def __call__(self, *site: Any) -> bool:
        module = site[4]
        found = [(name, module._parameters.get(name)) for name in _weights_of(module, site[5])]
        return any(check(*site[:5], name, weight) for name, weight in found if weight is not None for check in self.weights)


def _weights_of(module: nn.Module, bias: str) -> Iterable[str]:
    if isinstance(module, nn.MultiheadAttention) and bias == "in_proj_bias":
        return ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
    return (bias.replace("bias", "weight"),) if isinstance(module, _RECURRENT) and bias.startswith("bias") else ()
