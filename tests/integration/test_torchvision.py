"""The whole way, with the smallest model of every classification family of torchvision: tune, save, load, merge, undo."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from models import fingerprint
from torch import Tensor, nn

from gift_core import disable_fine_tuning, enable_fine_tuning, load_adapter, merge, save_adapter, unmerge
from gift_core.reparameterization import is_adopted
from gift_lora_plugin import LoRAAllFineTuningStrategy

torchvision = pytest.importorskip("torchvision")

#: Each model with the size of an image and options. At less than 64 pixels some networks end in single pixels, and the BatchNorm of a
#: few single pixels has gradients of 1e10 and more, in the plain model too. Inits that draw from truncated distributions are slow.
MODELS: dict[str, tuple[int, dict[str, Any]]] = {
    "alexnet": (64, {}),
    "convnext_tiny": (64, {}),
    "densenet121": (64, {}),
    "efficientnet_b0": (64, {}),
    "efficientnet_v2_s": (64, {}),
    "googlenet": (64, {"init_weights": False, "aux_logits": True}),
    # its auxiliary head needs images of 299
    "inception_v3": (75, {"init_weights": False, "aux_logits": False}),
    # its windows of 7 fit into four halvings of 224 and of no smaller image
    "maxvit_t": (224, {}),
    "mnasnet0_5": (64, {}),
    "mobilenet_v2": (64, {}),
    "mobilenet_v3_small": (64, {}),
    "regnet_x_400mf": (64, {}),
    "regnet_y_400mf": (64, {}),
    "resnet18": (64, {}),
    "resnext50_32x4d": (64, {}),
    "shufflenet_v2_x0_5": (64, {}),
    "squeezenet1_1": (64, {}),
    "swin_t": (64, {}),
    "swin_v2_t": (64, {}),
    "vgg11": (64, {"init_weights": False}),
    "vit_b_16": (64, {"image_size": 64}),
    "wide_resnet50_2": (64, {}),
}


def build(name: str) -> nn.Module:
    """A model with seeded random weights, in eval mode."""
    torch.manual_seed(0)
    return torchvision.models.get_model(name, weights=None, **MODELS[name][1]).eval()  # type: ignore[no-any-return]


def logits(output: Any) -> Tensor:
    """All the logits of an output, the auxiliary heads' too."""
    return output if isinstance(output, Tensor) else torch.cat([part for part in output if part is not None])


def step(model: nn.Module, images: Tensor) -> None:
    """One step of SGD in training mode."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    output = logits(model.train()(images))
    nn.functional.cross_entropy(output, torch.arange(len(output)) % 3).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # random weights make for large gradients
    optimizer.step()
    model.eval()


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Equal to single precision's rounding through a deep network, relative to the largest logit."""
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


@torch.no_grad()
def answer(model: nn.Module, images: Tensor) -> Tensor:
    """The logits in eval mode."""
    return logits(model(images))


@pytest.mark.parametrize("name", MODELS)
def test_every_family_goes_the_whole_way(name: str, tmp_path: Path) -> None:
    """Enable changes no answer; a step does; a fresh copy loads it; merging keeps it; disable gives back every byte and class."""
    model, images = build(name), torch.randn(2, 3, MODELS[name][0], MODELS[name][0])
    fresh, original = copy.deepcopy(model), fingerprint(model)
    base = answer(model, images)

    report = enable_fine_tuning(model, LoRAAllFineTuningStrategy(rank=2))
    assert torch.equal(answer(model, images), base)
    assert 0 < report.trainable.numbers < 0.2 * report.before.numbers

    step(model, images)
    tuned = answer(model, images)
    assert tuned.isfinite().all()
    assert not torch.equal(tuned, base)

    save_adapter(model, tmp_path / "adapter.safetensors")
    load_adapter(fresh, tmp_path / "adapter.safetensors")
    assert torch.equal(answer(fresh.eval(), images), tuned)

    merge(model)
    assert_close(answer(model, images), tuned)
    unmerge(model)
    assert torch.equal(answer(model, images), tuned)

    disable_fine_tuning(model)
    assert torch.equal(answer(model, images), base)
    assert fingerprint(model) == original
    assert not any(map(is_adopted, model.modules()))


def test_no_family_is_left_out() -> None:
    """Every file of torchvision's classification models has a model in the list."""

    def home(name: str) -> str:
        return torchvision.models.get_model_builder(name).__module__

    assert {home(name) for name in MODELS} == {home(name) for name in torchvision.models.list_models(module=torchvision.models)}
