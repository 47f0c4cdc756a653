"""From a tuned model, or an adapter file, to the files of PEFT.

What is exported computes the same in PEFT, or nothing is written and every reason is named. One thing is exported with a warning: a
layer that shares its weight with another is right in PEFT's forward, and not once PEFT has merged it.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from gift_core import as_path
from gift_core.errors import AdapterFormatError, GiftWarning, ParameterError
from gift_lora_plugin.lora import LoRA
from gift_lora_plugin.peft_config import alpha_for, config_data
from gift_lora_plugin.peft_directory import PREFIX, Conversion, write_files
from gift_lora_plugin.peft_layers import is_fan_in_fan_out, to_peft
from gift_lora_plugin.peft_source import Adapter, Site, listed, opened
from gift_lora_plugin.peft_trained import InFull


def export_peft(
    source: nn.Module | str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
    base_model: str | os.PathLike[str] | None = None,
    task_type: str | None = None,
    force: bool = False,
) -> Conversion:
    """Write an adapter as PEFT's ``adapter_config.json`` and ``adapter_model.safetensors``; PEFT itself is not needed.

    A convolution in the ``balanced`` layout becomes one of ``k0`` times the rank, and PiSSA and OLoRA become plain factors of twice the
    rank for the unchanged base model; each is the same update, to the last bit of the scaling, which PEFT divides from a numerator.

    A layer that shares its weight with another, as an output layer may with the embedding, is exported with a warning: PEFT's forward
    is right, and its ``merge_and_unload`` changes the other layer, too, unless the base model is untied first.

    Args:
        source: a tuned model, or an adapter file.
        directory: the folder; it is made if need be.
        model: the plain base model, for a file. It tells what kind of layer each site is, and is left as it was. A file of
            ``lora-linear`` needs none: its layers are taken to be plain `torch.nn.Linear`.
        base_model: what PEFT finds the base model by, for the configuration.
        task_type: such as ``CAUSAL_LM``, likewise.
        force: overwrite the two files. Where an export was killed half-way, the pair that it was to replace is brought back first.

    Raises:
        AdapterFormatError: if PEFT would compute something else; every reason is listed.
        AdapterFileError: if the file is not sound; `AdapterMismatchError` if it is not for the model.
        AdapterWriteError: if the files cannot be written, or are there; what was there is intact.
        ParameterError: if ``base_model`` or ``task_type`` is no text.
        StateError: if the model is not tuned, or the one for a file is.
    """
    done, warned = export_with_warnings(source, directory, model=model, base_model=base_model, task_type=task_type, force=force)
    for text in warned:
        warnings.warn(text, GiftWarning, stacklevel=2)
    return done


def export_with_warnings(
    source: nn.Module | str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    model: nn.Module | None,
    base_model: str | os.PathLike[str] | None,
    task_type: str | None,
    force: bool,
) -> tuple[Conversion, list[str]]:
    """`export_peft`, with those of its notes that deserve a warning, for a caller that shows the notes itself."""
    folder = as_path(directory)
    base, task = _text("base_model", base_model), _text("task_type", task_type)
    with opened(source, model) as adapter:
        full = InFull.of(adapter)
        problems = [*adapter.problems, *_problems(adapter), *full.problems]
        if not adapter.sites and not problems:
            problems.append("it adapts no layer with LoRA")
        if problems:
            raise AdapterFormatError(
                "the adapter has no exact form as PEFT files; nothing was written.\n  "
                + "\n  ".join(problems)
                + "\nExclude these places when you tune, or merge the adapter and share the whole model."
            )
        layers = {name: to_peft(site.module, site.factors) for name, site in adapter.sites.items()}
        tensors = {f"{PREFIX}{name}.{key}": tensor for name, found in layers.items() for key, tensor in found.items()}
        tensors |= {f"{PREFIX}{key}": tensor for key, tensor in full.tensors.items()}
        # the rank that PEFT sees: that of A, the first tensor, as it gets it
        ranks = {name: next(iter(found.values())).shape[0] for name, found in layers.items()}
        config = _config(adapter, ranks, full, base, task)
        size = write_files(folder, config, tensors, force=force)
        warned = list(_ties(adapter))
        return Conversion(len(layers), tuple(full.modules), full.bias, size, (*_notes(adapter), *warned)), warned


def _config(adapter: Adapter, ranks: Mapping[str, int], full: InFull, base_model: str | None, task_type: str | None) -> dict[str, Any]:
    sites = adapter.sites
    rslora = _says(adapter.config, "use_rslora")
    return config_data(
        ranks=ranks,
        alphas={name: alpha_for(site.scaling, ranks[name], rslora) for name, site in sites.items()},
        dropout=max(site.dropout for site in sites.values()),
        rslora=rslora,
        dora=any(site.factors.magnitude is not None for site in sites.values()),
        bias=full.bias,
        modules_to_save=full.modules,
        fan_in_fan_out=any(is_fan_in_fan_out(site.module) for site in sites.values()),
        base_model=base_model,
        task_type=task_type,
    )


def _text(name: str, value: object) -> str | None:
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if text is not None and not isinstance(text, str):
        raise ParameterError(f"{name} must be text, as it stands in PEFT's configuration, or None, got {value!r}.")
    return text


def _notes(adapter: Adapter) -> Iterator[str]:
    dropouts = {site.dropout for site in adapter.sites.values()}
    if len(dropouts) > 1:
        yield f"layers have different dropout; PEFT has one, {max(dropouts):g}, which matters in training alone"
    if max(dropouts) and any(isinstance(site.module, nn.Embedding) for site in adapter.sites.values()):
        yield "PEFT has no dropout on an embedding, which matters in training alone"
    if adapter.root is None:
        yield "the layers were taken to be plain torch.nn.Linear with weights of their own, because no model was given"


def _ties(adapter: Adapter) -> Iterator[str]:
    if adapter.root is None:
        return
    holders = Counter(id(parameter) for module in adapter.root.modules() for parameter in module._parameters.values())
    weights = {name: site.module._parameters["weight"] for name, site in adapter.sites.items() if site.module is not None}
    if tied := [name for name, weight in weights.items() if holders[id(weight)] > 1]:
        yield (
            f"{listed(tied)}: the weight is tied to another layer, which PEFT's merge_and_unload changes as well, so that the merged "
            "model answers otherwise there; unmerged it answers the same. Untie the base model before PEFT merges (docs/guide.md), or "
            "exclude these layers when you tune"
        )


def _problems(adapter: Adapter) -> Iterator[str]:
    magnitudes = {name: site.factors.magnitude for name, site in adapter.sites.items()}
    if any(value is None for value in magnitudes.values()) and any(value is not None for value in magnitudes.values()):
        without = sorted(name for name, value in magnitudes.items() if value is None)
        yield f"{listed(without)}: no DoRA, and PEFT has it on every layer or on none"
    for name, site in adapter.sites.items():
        if site.factors.magnitude is not None and _has_no_direction(site):
            yield f"{name}: an output whose weights are all zero; PEFT's DoRA divides by their norm"


def _has_no_direction(site: Site) -> bool:
    if not isinstance(site.module, LoRA):
        return False  # without the layer nothing is known of its weight
    layout, weight = site.module.lora_layout, site.module._parameters["weight"]
    assert weight is not None  # it is adapted
    update = layout.as_weight(site.factors.B @ site.factors.A).mul(site.scaling)
    return bool((layout.output_norms(weight.detach() + update) == 0).any())


def _says(config: Mapping[str, Any] | None, key: str) -> bool:
    """Whether a strategy says yes to a parameter, as all do that a merged one is made of and that know it."""
    if config is None:
        return False
    parameters = config["parameters"]
    parts = [part for part in parameters.get("strategies", ()) if key in part["parameters"]]
    return all(_says(part, key) for part in parts) if parts else bool(parameters.get(key))
