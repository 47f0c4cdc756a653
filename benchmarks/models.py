"""The models: random weights, the shapes people fine-tune, from the libraries that people take them from.

A model says how it is built, what a batch of it is, how its loss is computed, and which layers an adapter goes on. Everything is drawn
from a seed, so that every system gets the same.
"""

from __future__ import annotations

import copy
import fnmatch
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Model:
    """One model of the benchmark.

    Attributes:
        name: as in the tables.
        about: what it is, in one line.
        rank: of the adapters; alpha is twice as much, so that a forgotten scaling shows.
        build: makes the model; the caller seeds.
        batch: draws a batch; the caller seeds.
        loss: from the model, or anything callable like it, and a batch.
        leave: patterns of the names of layers that get no adapter.
        embedding: the layer whose output stands for the input where the input is no floating-point tensor.
        is_quick: whether building it takes no longer than copying it.
        checked: a model of the same layers, and of fewer of them, on which equality is checked; None for the model itself.
    """

    name: str
    about: str
    rank: int
    build: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    loss: Callable[[Callable[..., Any], Batch], Tensor]
    leave: tuple[str, ...] = ()
    embedding: str | None = None
    is_quick: bool = False
    checked: Model | None = None

    def make(self) -> nn.Module:
        """The model, always with the same weights, in training mode."""
        return _built(self) if self.is_quick else copy.deepcopy(_kept(self))

    def draw(self, dtype: torch.dtype = torch.float32) -> Batch:
        """The batch, always the same; its floating-point tensors have ``dtype``."""
        torch.manual_seed(1)
        return {name: value.to(dtype) if value.is_floating_point() else value for name, value in self.batch().items()}


def _built(model: Model) -> nn.Module:
    torch.manual_seed(0)
    return model.build().train()


#: One at a time: drawing a hundred million weights takes seconds, and every system starts from the same ones.
_kept: Callable[[Model], nn.Module] = functools.lru_cache(maxsize=1)(_built)


def targets(model: Model, module: nn.Module) -> list[str]:
    """Names of the layers that get an adapter: every Linear layer and ungrouped convolution that the model does not leave out.

    The peers refuse grouped convolutions or compute another thing there, so nobody adapts them.
    """
    return [
        name
        for name, layer in module.named_modules()
        if _is_adaptable(layer) and not any(fnmatch.fnmatchcase(name, pattern) for pattern in model.leave)
    ]


def is_plain_linear(module: nn.Module, names: list[str]) -> bool:
    """Whether the named layers are all the layers with weights that the model has, each a plain `torch.nn.Linear`."""
    weighted = {name for name, layer in module.named_modules() if layer._parameters}
    return weighted == set(names) and all(type(module.get_submodule(name)) is nn.Linear for name in names)


def is_transposed(layer: nn.Module) -> bool:
    """Whether a layer keeps its weight as ``(in, out)``, as the Conv1D of transformers does."""
    return type(layer).__name__ == "Conv1D" and not isinstance(layer, nn.Conv1d)


def _is_adaptable(layer: nn.Module) -> bool:
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return layer.groups == 1
    return isinstance(layer, nn.Linear) or is_transposed(layer)


# --- a network of many small layers


class _Block(nn.Module):
    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class _Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width)
        # with tanh, neither the signal nor its gradient grows or dies over hundreds of layers
        nn.init.normal_(self.fc.weight, std=width**-0.5)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.fc(x))


def mlp(layers: int, width: int = 64, batch: int = 32, rank: int = 8) -> Model:
    """A network of equal Linear layers, twenty to a block: what is not arithmetic shows here."""
    per_block = min(20, layers)
    return Model(
        f"mlp{layers}",
        f"{layers} Linear layers of {width} x {width}, batch {batch}",
        rank,
        lambda: nn.Sequential(*(_Block(width, per_block) for _ in range(layers // per_block))),
        lambda: {"x": torch.randn(batch, width)},
        lambda model, batch: model(batch["x"]).square().mean(),
        is_quick=True,
    )


# --- what people fine-tune


def _classified(model: Callable[..., Any], batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"])


def _images(side: int, count: int, classes: int = 1000) -> Callable[[], Batch]:
    return lambda: {"x": torch.randn(count, 3, side, side), "y": torch.randint(classes, (count,))}


def _tokens(count: int, length: int, vocabulary: int) -> Callable[[], Batch]:
    return lambda: {"ids": torch.randint(vocabulary, (count, length))}


def _next_token(model: Callable[..., Any], batch: Batch) -> Tensor:
    loss: Tensor = model(input_ids=batch["ids"], labels=batch["ids"], use_cache=False).loss
    return loss


def _torchvision(name: str) -> nn.Module:
    import torchvision

    module: nn.Module = getattr(torchvision.models, name)()
    return module


def _timm(name: str, **options: Any) -> nn.Module:
    import timm

    module: nn.Module = timm.create_model(name, **options)
    return module


def _llama(width: int, layers: int, inner: int, vocabulary: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = width // 64
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            intermediate_size=inner,
            vocab_size=vocabulary,
            max_position_embeddings=512,
        )
    )


def _gpt2(layers: int) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_layer=layers, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0))


def _whisper() -> nn.Module:
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    # the widths of whisper-tiny, and two seconds of sound
    return WhisperEncoder(
        WhisperConfig(d_model=384, encoder_layers=4, encoder_attention_heads=6, encoder_ffn_dim=1536, max_source_positions=100)
    )


def _unet() -> nn.Module:
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=32,
        block_out_channels=(64, 128),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=16,
        layers_per_block=1,
    )


def _language_model(
    name: str,
    about: str,
    build: Callable[[int], nn.Module],
    layers: int,
    batch: Callable[[], Batch],
    embedding: str,
    checked: int | None = None,
) -> Model:
    """A model of so many layers that says the next token; equality is ``checked`` on fewer of them, if that is given."""
    model = Model(name, about, 8, lambda: build(layers), batch, _next_token, leave=("lm_head",), embedding=embedding)
    return model if checked is None else replace(model, checked=replace(model, build=lambda: build(checked)))


TABLE = (
    Model("resnet18", "torchvision, 96 px, batch 8, every layer", 3, lambda: _torchvision("resnet18"), _images(96, 8), _classified),
    Model("resnet50", "torchvision, 96 px, batch 4, every layer", 3, lambda: _torchvision("resnet50"), _images(96, 4), _classified),
    Model(
        "ViT-S",
        "timm vit_small_patch16, 128 px, batch 4, Linear layers except the head",
        8,
        lambda: _timm("vit_small_patch16_224", img_size=128),
        _images(128, 4),
        _classified,
        leave=("head", "patch_embed.proj"),
    ),
    _language_model(
        "Llama 4x512",
        "transformers, 4 layers of 512, 256 tokens, Linear layers except the head",
        lambda layers: _llama(512, layers, 1376, 1000),
        4,
        _tokens(2, 128, 1000),
        "model.embed_tokens",
    ),
    mlp(600),
)

LARGE = (
    _language_model(
        "GPT-2 124M",
        "transformers, the smallest GPT-2, 64 tokens, its Conv1D layers; equality is checked on two of its twelve blocks",
        _gpt2,
        12,
        _tokens(1, 64, 50257),
        "transformer.wte",
        checked=2,
    ),
    _language_model(
        "Llama 110M",
        "transformers, 12 layers of 768, 64 tokens, Linear layers except the head; equality is checked on two of them",
        lambda layers: _llama(768, layers, 2048, 16000),
        12,
        _tokens(1, 64, 16000),
        "model.embed_tokens",
        checked=2,
    ),
)

#: Chosen before anyone saw how fast they are, and not tuned for since.
UNSEEN = (
    Model(
        "Whisper encoder",
        "transformers, the widths of whisper-tiny, 200 frames, batch 2, Linear layers (PEFT fails on its Conv1d)",
        6,
        _whisper,
        lambda: {"x": torch.randn(2, 80, 200)},
        lambda model, batch: model(batch["x"]).last_hidden_state.square().mean(),
        leave=("conv?",),
    ),
    Model(
        "DenseNet-121",
        "torchvision, 64 px, batch 4, every layer",
        4,
        lambda: _torchvision("densenet121"),
        _images(64, 4),
        _classified,
    ),
    Model(
        "MLP-Mixer",
        "timm mixer_s32, 128 px, batch 4, Linear layers except the head, half of them on transposed input",
        6,
        lambda: _timm("mixer_s32_224", img_size=128),
        _images(128, 4),
        _classified,
        leave=("head", "stem.proj"),
    ),
)

#: Unseen once; what was mended for the first of them was measured on both.
SEEN = (
    Model(
        "ConvNeXt",
        "timm convnext_femto, 96 px, batch 4, all but the depthwise convolutions and the head",
        4,
        lambda: _timm("convnext_femto"),
        _images(96, 4),
        _classified,
        leave=("head.fc",),
    ),
    Model(
        "U-Net",
        "diffusers UNet2DModel, GroupNorm, skip connections and attention, 32 px, batch 2, every layer",
        5,
        _unet,
        lambda: {"x": torch.randn(2, 3, 32, 32), "t": torch.randint(1000, (2,)), "y": torch.randn(2, 3, 32, 32)},
        lambda model, batch: F.mse_loss(model(batch["x"], batch["t"]).sample, batch["y"]),
    ),
)


#: All whose training steps are timed.
MODELS = (*TABLE, *UNSEEN, *SEEN, *LARGE)


def named(name: str) -> Model:
    """A model of the benchmark by its name."""
    return next(model for model in MODELS if model.name == name)
