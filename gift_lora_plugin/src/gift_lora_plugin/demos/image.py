"""``gift demo image``: a network that knows ImageNet learns handwritten digits from 1,000 labels."""

from __future__ import annotations

import torch
from torch import nn

from gift_lora_plugin import LoRAConvFineTuningStrategy
from gift_lora_plugin.demos.comparison import FULL, LORA, PROBE, Demo, Options, Task, run
from gift_lora_plugin.demos.data import Labelled, load_digits, split
from gift_lora_plugin.demos.efficientnet import as_images, load_efficientnet_lite0
from gift_lora_plugin.demos.training import Recipe

#: The 1x1 convolutions: they hold nearly all of the weights, and as matrices suit a low rank.
POINTWISE = ("_blocks.*._expand_conv", "_blocks.*._project_conv", "_conv_head")


def build_base(seed: int) -> nn.Module:
    """EfficientNet-Lite0 with a new head for ten classes, drawn with ``seed``."""
    torch.manual_seed(seed)
    return load_efficientnet_lite0(classes=10)


def task(options: Options) -> Task:
    """Set all ten digits, at 64 pixels, as the new task of an ImageNet network."""
    digits = load_digits()
    sizes = {"train": 100, "validation": 50, "test": 100} if options.quick else {"train": 1000, "validation": 200}
    parts = split(digits.labels, options.seed, **sizes)
    train, validation, test = (Labelled(as_images(digits.inputs[part]), digits.labels[part]) for part in parts)
    tuned = Recipe(1 if options.quick else options.epochs, 4e-3)
    return Task(
        name="image",
        title="EfficientNet-Lite0 to handwritten digits",
        build_base=build_base,
        head="_fc",
        lora=LoRAConvFineTuningStrategy(rank=8, targets=POINTWISE),
        train=train,
        validation=validation,
        test=test,
        images=digits.inputs[parts.test],
        classes=[str(digit) for digit in range(10)],
        recipes={
            PROBE: Recipe(2 if options.quick else 50, 1e-2),
            LORA: tuned,
            FULL: tuned._replace(learning_rate=1e-3, weight_decay=0.01),
        },
        weight_decays=[0.0, 0.1, 1.0],
    )


DEMO = Demo("image", "A network that knows ImageNet learns handwritten digits from 1,000 labels.", 5, task)


def main(argv: list[str] | None = None) -> int:
    """Run the demo; ``argv`` as on the command line, the process's own if None. Returns the exit code."""
    return run(DEMO, argv)


if __name__ == "__main__":
    raise SystemExit(main())
