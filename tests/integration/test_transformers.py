"""Six families of transformers, tiny and with random weights, and what their library does with a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from whole_way import PROMISES, Subject, answer, assert_close, step, tune

from gift_core import enable_fine_tuning, merge_and_unload, merged
from gift_core.reparameterization import is_adopted
from gift_lora_plugin import LoRAAllFineTuningStrategy

transformers: Any = pytest.importorskip("transformers", reason="transformers is not installed")

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TOKENS = torch.arange(12).reshape(2, 6) + 4
CLASSES = torch.tensor([0, 1])
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
SOUNDS = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(0))


def bert() -> nn.Module:
    """A classifier of texts."""
    return transformers.BertForSequenceClassification(  # type: ignore[no-any-return]
        transformers.BertConfig(vocab_size=32, max_position_embeddings=16, **SMALL)
    )


def gpt2() -> nn.Module:
    """A language model of Conv1D layers, with the embedding tied to the output layer."""
    config = transformers.GPT2Config(
        vocab_size=32, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1, pad_token_id=1
    )
    return transformers.GPT2LMHeadModel(config)  # type: ignore[no-any-return]


def llama() -> nn.Module:
    """A language model with grouped queries."""
    config = transformers.LlamaConfig(vocab_size=32, max_position_embeddings=32, num_key_value_heads=1, pad_token_id=2, **SMALL)
    return transformers.LlamaForCausalLM(config)  # type: ignore[no-any-return]


def t5() -> nn.Module:
    """An encoder and a decoder that share the embedding."""
    config = transformers.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0)
    return transformers.T5ForConditionalGeneration(config)  # type: ignore[no-any-return]


def vit() -> nn.Module:
    """A classifier of images."""
    config = transformers.ViTConfig(image_size=16, patch_size=8, num_labels=3, **SMALL)
    return transformers.ViTForImageClassification(config)  # type: ignore[no-any-return]


def whisper() -> nn.Module:
    """Sound to text: convolutions, an encoder, and a decoder whose embedding is tied to the output layer."""
    shape = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    size = {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_mel_bins": 4, "max_source_positions": 8, "max_target_positions": 16}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
    config = transformers.WhisperConfig(vocab_size=32, suppress_tokens=None, begin_suppress_tokens=None, **shape, **size, **special)
    return transformers.WhisperForConditionalGeneration(config)  # type: ignore[no-any-return]


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor]]] = {
    "bert": (bert, {"input_ids": TOKENS, "labels": CLASSES}),
    "gpt2": (gpt2, {"input_ids": TOKENS, "labels": TOKENS}),
    "llama": (llama, {"input_ids": TOKENS, "labels": TOKENS}),
    "t5": (t5, {"input_ids": TOKENS, "labels": TOKENS}),
    "vit": (vit, {"pixel_values": IMAGES, "labels": CLASSES}),
    "whisper": (whisper, {"input_features": SOUNDS, "labels": TOKENS}),
}
GENERATORS = ("gpt2", "llama", "t5", "whisper")
TIED = ("gpt2", "t5", "whisper")


def subject(name: str, dtype: torch.dtype = torch.float32) -> Subject:
    """A model of the table with its inputs."""
    make, inputs = MODELS[name]
    inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}

    def build() -> nn.Module:
        torch.manual_seed(0)
        return make().to(dtype).eval()

    return Subject(build, lambda model: model(**inputs).logits, lambda model: model(**inputs).loss)


@pytest.mark.parametrize("promise", PROMISES)
@pytest.mark.parametrize("name", MODELS)
def test_every_family_keeps_every_promise(name: str, promise: str, tmp_path: Path) -> None:
    """Training, files, merging, unloading and undoing work on every family."""
    PROMISES[promise](subject(name), tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_half_precision_merges(name: str, dtype: torch.dtype) -> None:
    """Merged in half precision, a model answers within eight units of rounding of what it answered unmerged."""
    half = subject(name, dtype)
    model = tune(half, adapter_dtype="float32")
    tuned = answer(half, model)

    with merged(model):
        assert_close(answer(half, model).float(), tuned.float(), bound=8 * torch.finfo(dtype).eps)


def test_conv1d_of_gpt2_is_adapted_as_the_matrix_it_is() -> None:
    """All four Conv1D layers of a block are adapted, and compute x (W + (B A)^T) + b with plain tensors."""
    model = tune(subject("gpt2"), rank=2)
    block: Any = model.get_submodule("transformer.h.0")
    inputs = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))

    for layer in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
        assert is_adopted(layer)
        frozen = layer._parameters["weight"]
        x = inputs if frozen.shape[0] == 16 else inputs.repeat(1, 1, frozen.shape[0] // 16)
        torch.testing.assert_close(layer(x), x @ (frozen + (layer.lora_B @ layer.lora_A).t()) + layer.bias)


@pytest.mark.parametrize("name", GENERATORS)
def test_generated_tokens_stay_the_same(name: str) -> None:
    """A tuned model generates the same tokens unmerged, merged and unloaded: greedy, by beams, without the cache."""
    model, plain = tune(subject(name), lora_alpha=128), subject(name).build()
    inputs = {key: value for key, value in MODELS[name][1].items() if key != "labels"}

    def generate(model: Any) -> list[Tensor]:
        settings: list[dict[str, Any]] = [{}, {"num_beams": 2}, {"use_cache": False}]
        return [model.generate(**inputs, max_new_tokens=6, do_sample=False, **setting) for setting in settings]

    unmerged = generate(model)
    with merged(model):
        in_place = generate(model)
    unloaded = generate(merge_and_unload(model))

    for expected, *others in zip(unmerged, in_place, unloaded, strict=True):
        assert all(torch.equal(other, expected) for other in others)
    assert not any(map(torch.equal, unmerged, generate(plain)))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_gradient_checkpointing_gives_the_same_gradients(name: str, reentrant: bool) -> None:
    """With gradient checkpointing, and dropout, every adapter tensor gets the gradient that it gets without it, bit for bit.

    The reentrant kind adds up what flows back to the states of an encoder in another order, in a plain model too: up to rounding.
    """
    subjects = subject(name)
    model: Any = tune(subjects, lora_dropout=0.1)

    def gradients() -> dict[str, Tensor]:
        model.train().zero_grad()
        torch.manual_seed(1)
        subjects.loss(model).backward()
        return {key: parameter.grad for key, parameter in model.named_parameters() if parameter.requires_grad}

    expected = gradients()
    word = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # its older name
    getattr(model, f"{word}_checkpointing_enable")({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    actual = gradients()

    assert getattr(model, f"is_{word}_checkpointing")
    for key, gradient in expected.items():
        assert_close(actual[key], gradient, bound=1e-5 if reentrant else 0.0)


@pytest.mark.parametrize("name", TIED)
def test_tied_weights_stay_tied_while_tuned(name: str) -> None:
    """The adapted output layer and the embedding share the frozen tensor; tying again changes nothing; unloading unties them."""
    tied = subject(name)
    model: Any = tune(tied)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tuned = answer(tied, model)

    assert is_adopted(head)
    assert head._parameters["weight"] is embedding._parameters["weight"]
    model.tie_weights()
    assert torch.equal(answer(tied, model), tuned)

    merge_and_unload(model)
    assert head.weight is not embedding.weight
    assert torch.equal(embedding.weight, tied.build().get_input_embeddings().weight)


@pytest.mark.parametrize("name", MODELS)
def test_an_unloaded_model_is_an_ordinary_one(name: str, tmp_path: Path) -> None:
    """What is unloaded comes back by ``from_pretrained`` with the same bits, where the config of an untied pair says so."""
    model: Any = merge_and_unload(tune(subject(name)))
    if name in TIED:
        model.config.tie_word_embeddings = False

    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()

    assert torch.equal(answer(subject(name), again), answer(subject(name), model))


def test_adapted_embeddings_keep_checkpointing_and_tying() -> None:
    """A tied embedding and output layer that are both adapted train apart, and merge close to what they answered."""
    tied = subject("gpt2")
    model: Any = tied.build()
    enable_fine_tuning(model, LoRAAllFineTuningStrategy(rank=1, targets=["transformer.wte", "lm_head"]))
    model.enable_input_require_grads()
    step(tied, model, times=2)
    tuned = answer(tied, model)

    with merged(model):
        assert_close(answer(tied, model), tuned)
    assert not torch.equal(model.transformer.wte.weight, model.lm_head.weight)
    assert model.transformer.wte._parameters["weight"] is model.lm_head._parameters["weight"]
