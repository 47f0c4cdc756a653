"""Learning rates for the two factors, as an optimizer's parameter groups."""

from __future__ import annotations

from typing import Any

from torch import nn

from gift_core.errors import ModelError, ParameterError, StateError
from gift_lora_plugin.lora import LoRA
from gift_lora_plugin.parameters import LARGEST, is_number

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


def lora_plus_param_groups(
    model: nn.Module, lr: float, ratio: float = 16.0, *, embedding_lr: float | None = None
) -> list[dict[str, Any]]:
    r"""Let B learn faster than A: :math:`\eta_B = \lambda \eta_A`.

    Every trainable parameter is in exactly one group: ``lora_B`` of the adapted layers at ``lr * ratio``, everything else (``lora_A``,
    magnitudes, biases, parts that a cap keeps training) at ``lr``. Hand the groups to any optimizer:
    ``torch.optim.AdamW(lora_plus_param_groups(model, 1e-4))``.

    Args:
        model: a tuned model, or what wraps one.
        lr: :math:`\eta_A`, above zero.
        ratio: :math:`\lambda`, above zero; the paper's rule of thumb is 16 for Adam, and more for harder tasks.
        embedding_lr: a rate of their own for both factors of embeddings, whose input has no width to scale with; None treats them
            as other layers.

    Returns:
        Groups without the empty ones: ``params``, ``lr``, ``name`` (``base``, ``lora_B`` or ``embedding``), and ``param_names``, which
        torch's optimizers keep in their state.

    Raises:
        ParameterError: if a rate or the ratio is no finite number above zero.
        ModelError: if ``model`` is no `torch.nn.Module`.
        StateError: if the model has no LoRA that trains.

    Source: Hayou et al. 2024, arXiv:2402.12354, section 4.
    """
    for name, value in (("lr", lr), ("ratio", ratio), ("embedding_lr", 1.0 if embedding_lr is None else embedding_lr)):
        if not is_number(value) or value <= 0:
            raise ParameterError(f"{name} must be a finite number above zero, got {value!r}; the largest allowed is {LARGEST:.2g}.")
    if not isinstance(model, nn.Module):
        raise ModelError(f"lora_plus_param_groups needs a tuned torch.nn.Module, got {type(model).__name__}: pass the model itself.")
    kinds = _kinds(model, split_embeddings=embedding_lr is not None)
    if not any(kind != "base" for kind in kinds.values()):
        raise StateError(f"this {type(model).__name__} has no LoRA that trains: call enable_fine_tuning(model, 'lora') first.")
    rates = {"base": lr, "lora_B": lr * ratio, "embedding": embedding_lr}
    groups: dict[str, dict[str, Any]] = {
        kind: {"params": [], "lr": rate, "name": kind, "param_names": []} for kind, rate in rates.items()
    }
    for name, parameter in nn.Module.named_parameters(model):
        if parameter.requires_grad:
            group = groups[kinds.get(id(parameter), "base")]
            group["params"].append(parameter)
            group["param_names"].append(name)
    return [group for group in groups.values() if group["params"]]


def _kinds(model: nn.Module, split_embeddings: bool) -> dict[int, str]:
    """The group of each trainable tensor of LoRA, by the tensor's id."""
    return {
        id(parameter): _kind(module, name, split_embeddings)
        for module in model.modules()
        if isinstance(module, LoRA)
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.requires_grad
    }


def _kind(module: nn.Module, name: str, split_embeddings: bool) -> str:
    is_factor = name.endswith(("lora_A", "lora_B"))
    if is_factor and split_embeddings and isinstance(module, _EMBEDDINGS):
        return "embedding"
    return "lora_B" if name.endswith("lora_B") else "base"
