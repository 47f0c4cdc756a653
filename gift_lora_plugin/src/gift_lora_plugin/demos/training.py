"""One training loop for every method of the demos."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gift_lora_plugin.demos.data import Labelled
from gift_lora_plugin.demos.output import Progress


class Recipe(NamedTuple):
    """How to train: AdamW, one cycle of the learning rate up to its peak and down to zero."""

    epochs: int
    learning_rate: float
    weight_decay: float = 0.0
    batch_size: int = 32


class Run(NamedTuple):
    """What a training gave: accuracy on the validation part after each epoch, and seconds, validation included."""

    curve: tuple[float, ...]
    seconds: float


@torch.no_grad()
def predict(model: nn.Module, inputs: Tensor, batch_size: int = 64) -> Tensor:
    """The model's logits in eval mode, ``(n, classes)``."""
    model.eval()
    return torch.cat([model(batch) for batch in inputs.split(batch_size)])


def accuracy(model: nn.Module, data: Labelled) -> float:
    """The share of examples that the model gets right."""
    return (predict(model, data.inputs).argmax(1) == data.labels).double().mean().item()


def train(model: nn.Module, data: Labelled, validation: Labelled, recipe: Recipe, seed: int, label: str) -> Run:
    """Train what is trainable in ``model``; BatchNorm keeps the base's statistics."""
    start = time.perf_counter()
    shuffle = torch.Generator().manual_seed(seed)
    batches = -(-len(data.labels) // recipe.batch_size)
    # fused: one pass over each tensor, which shows on a CPU where all of a network trains
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True)
    steps = recipe.epochs * batches
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, total_steps=steps, pct_start=0.2)
    curve = []
    with Progress(label, recipe.epochs, batches) as progress:
        for _ in range(recipe.epochs):
            _training_mode(model)
            for batch in torch.randperm(len(data.labels), generator=shuffle).split(recipe.batch_size):
                optimizer.zero_grad()
                F.cross_entropy(model(data.inputs[batch]), data.labels[batch]).backward()
                optimizer.step()
                schedule.step()
                progress.batch()
            curve.append(accuracy(model, validation))
            progress.epoch(curve[-1])
    return Run(tuple(curve), time.perf_counter() - start)


def train_head(
    model: nn.Module,
    head: str,
    data: Labelled,
    validation: Labelled,
    recipe: Recipe,
    weight_decays: Sequence[float],
    seed: int,
) -> Run:
    """Train the head alone, with the weight decay that does best on the validation part.

    Everything before the head is frozen, so what the head gets is computed once.
    """
    start = time.perf_counter()
    layer = model.get_submodule(head)
    features, checks = (Labelled(_inputs_of(layer, model, part.inputs), part.labels) for part in (data, validation))
    fresh = copy.deepcopy(layer.state_dict())
    found = []
    for decay in weight_decays:
        layer.load_state_dict(fresh)
        run = train(layer, features, checks, recipe._replace(weight_decay=decay), seed, f"probe, weight decay {decay:g}")
        found.append((run.curve[-1], run.curve, copy.deepcopy(layer.state_dict())))
    _, curve, state = max(found, key=lambda candidate: candidate[0])
    layer.load_state_dict(state)
    return Run(curve, time.perf_counter() - start)


def _inputs_of(layer: nn.Module, model: nn.Module, inputs: Tensor) -> Tensor:
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].detach()))
    try:
        predict(model, inputs)
    finally:
        handle.remove()
    return torch.cat(seen)


def _training_mode(model: nn.Module) -> None:
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
