"""``gift demo``: a small network that knows the digits 0-4 learns 5-9 from 200 labels."""

from __future__ import annotations

import copy
from collections import OrderedDict

import torch
from torch import nn

from gift_lora_plugin import LoRAAllFineTuningStrategy
from gift_lora_plugin.demos.comparison import FULL, LORA, PROBE, Demo, Options, Task, run
from gift_lora_plugin.demos.data import Labelled, load_digits, split
from gift_lora_plugin.demos.output import say
from gift_lora_plugin.demos.training import Recipe, train

KNOWN, NEW = range(5), range(5, 10)


def network(seed: int) -> nn.Sequential:
    """A convolutional network for 8x8 images and five classes, initialised with ``seed``."""
    torch.manual_seed(seed)
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=nn.Conv2d(1, 32, 3, padding=1),
        relu1=nn.ReLU(),
        conv2=nn.Conv2d(32, 64, 3, padding=1),
        relu2=nn.ReLU(),
        pool1=nn.MaxPool2d(2),
        conv3=nn.Conv2d(64, 64, 3, padding=1),
        relu3=nn.ReLU(),
        pool2=nn.MaxPool2d(2),
        flatten=nn.Flatten(),
        fc=nn.Linear(256, 64),
        relu4=nn.ReLU(),
        head=nn.Linear(64, 5),
    )
    return nn.Sequential(layers)


def task(options: Options) -> Task:
    """Pre-train on the digits 0-4, and set the digits 5-9 as the new task."""
    pretrained = _pretrained(options)
    data = load_digits(NEW)
    parts = split(data.labels, options.seed, train=200, validation=150)
    inputs = data.inputs.unsqueeze(1)

    def build_base(seed: int) -> nn.Module:
        base = copy.deepcopy(pretrained)
        base.head = network(seed).head
        return base

    tuned = Recipe(1 if options.quick else options.epochs, 1e-2)
    return Task(
        name="digits",
        title="digits 0-4 to 5-9",
        build_base=build_base,
        head="head",
        # conv1 is left out: a 3x3 kernel on one channel is a matrix too small for this rank
        lora=LoRAAllFineTuningStrategy(rank=4, targets=["conv2", "conv3", "fc"]),
        train=Labelled(inputs[parts.train], data.labels[parts.train]),
        validation=Labelled(inputs[parts.validation], data.labels[parts.validation]),
        test=Labelled(inputs[parts.test], data.labels[parts.test]),
        images=data.inputs[parts.test],
        classes=[str(digit) for digit in NEW],
        recipes={
            PROBE: Recipe(2 if options.quick else 150, 0.1),
            LORA: tuned,
            FULL: tuned._replace(learning_rate=3e-3, weight_decay=0.01),
        },
        weight_decays=[0.0, 0.01, 0.1, 1.0],
    )


def _pretrained(options: Options) -> nn.Sequential:
    data = load_digits(KNOWN)
    parts = split(data.labels, options.seed, train=700, validation=100)
    inputs = data.inputs.unsqueeze(1)
    train_part, validation = (Labelled(inputs[part], data.labels[part]) for part in (parts.train, parts.validation))
    say("the base model: a small network, trained on the digits 0-4")
    base = network(options.seed)
    train(base, train_part, validation, Recipe(1 if options.quick else 12, 3e-3), options.seed, "pre-training")
    return base


DEMO = Demo("digits", "A small network that knows the digits 0-4 learns 5-9 from 200 labels.", 30, task)


def main(argv: list[str] | None = None) -> int:
    """Run the demo; ``argv`` as on the command line, the process's own if None. Returns the exit code."""
    return run(DEMO, argv)


if __name__ == "__main__":
    raise SystemExit(main())
