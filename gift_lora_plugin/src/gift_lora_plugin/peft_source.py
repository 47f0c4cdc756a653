"""An adapter as it comes to be exported: from a tuned model, from a file and its base model, or from a file alone."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from gift_core import AdapterInfo, Reparameterization, as_path, disable_fine_tuning, load_adapter, read_adapter_info, save_adapter
from gift_core.errors import AdapterFileError, AdapterFormatError, AdapterMismatchError, StateError
from gift_lora_plugin.lora import LoRA
from gift_lora_plugin.peft_layers import UNCALLED, Factors, is_fan_in_fan_out, place_refusal, places_of, refusal
from gift_lora_plugin.settings import scaling_of

#: What LoRA registers on a layer.
_OWN = ("lora_A", "lora_B", "lora_magnitude", "lora_A_init", "lora_B_init")
#: The strategy whose layers need not be looked at: they are Linear.
_LINEAR = "lora-linear"


@dataclasses.dataclass(frozen=True)
class Site:
    """A layer with LoRA: itself where it is at hand, its update, the scaling and the dropout."""

    module: nn.Module | None
    factors: Factors
    scaling: float
    dropout: float


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter to be exported.

    Attributes:
        root: the tuned model, None where the file is all there is.
        config: the strategy's config.
        sites: the layers with LoRA, by full name.
        rest: the other tensors of the adapter, by key.
        problems: what can be no site of PEFT.
        knows_base: whether the frozen values in ``root`` are those that the adapter belongs to.
    """

    root: nn.Module | None
    config: Mapping[str, Any] | None
    sites: dict[str, Site]
    rest: dict[str, Tensor]
    problems: list[str]
    knows_base: bool


@contextlib.contextmanager
def opened(source: nn.Module | str | os.PathLike[str], model: nn.Module | None) -> Iterator[Adapter]:
    """The adapter of a tuned model or of a file; a plain model given for a file is tuned as long as the context lasts.

    Raises:
        AdapterFileError: if the file is not sound; `AdapterMismatchError` if it is not for the model; `AdapterFormatError` if it needs
            a model and none is given.
        StateError: if a model that has to be tuned is not, or the other way about.
    """
    if isinstance(source, nn.Module):
        if model is not None:
            raise StateError("a tuned model needs no second one: leave model out.")
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "adapter.safetensors"
            info = save_adapter(source, file)
            yield _of_model(source, info, load_file(file), knows_base=True)
    elif model is None:
        yield _of_file(as_path(source))
    else:
        if any(isinstance(child, Reparameterization) for child in model.modules()):
            raise StateError("the model given for an adapter file is tuned already: pass the plain base model, or the tuned one alone.")
        knows_base = _load(model, source)
        try:
            yield _of_model(model, read_adapter_info(source), _tensors(source), knows_base=knows_base)
        finally:
            disable_fine_tuning(model)


def _load(model: nn.Module, path: str | os.PathLike[str]) -> bool:
    """Load a file into a plain model, and say whether the model holds the base weights that it was trained on."""
    try:
        load_adapter(model, path)
        return True
    except AdapterMismatchError:
        # the kinds of layers are all that is needed of the model, as long as everything that is exported is in the file
        load_adapter(model, path, check_base=False)
        return False


def _tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise AdapterFileError(f"{path} cannot be read: {error}. Get a fresh copy.") from error


def _of_model(root: nn.Module, info: AdapterInfo, tensors: dict[str, Tensor], *, knows_base: bool) -> Adapter:
    modules = dict(root.named_modules())
    if not info.sites.keys() <= modules.keys():
        raise StateError(f"{type(root).__name__} holds the tuned model inside: pass the tuned model itself.")
    places = places_of(modules.values())
    sites, problems = {}, []
    for name, weights in info.sites.items():
        module = modules[name]
        reason = _site_problem(name, modules, weights, places)
        if reason is None and isinstance(module, LoRA):
            sites[name] = Site(module, _factors(module), module.lora_scaling, module.lora_dropout)
        else:
            problems.append(f"{name or 'the root'}: {reason}")
    return Adapter(root, info.strategy, sites, _rest(tensors, info), problems, knows_base)


def _rest(tensors: Mapping[str, Tensor], info: AdapterInfo) -> dict[str, Tensor]:
    """What is no tensor of LoRA's; those of a weight with another name than ``weight`` have it in front."""
    return {key: value for key, value in tensors.items() if not (key.rpartition(".")[0] in info.sites and key.endswith(_OWN))}


def _site_problem(name: str, modules: Mapping[str, nn.Module], weights: Mapping[str, str], places: Mapping[int, int]) -> str | None:
    module = modules[name]
    others = sorted(set(weights) - {"weight"})
    if other := sorted(set(weights.values()) - {LoRA.__name__}):
        return f"it is adapted with {', '.join(other)}"
    if not isinstance(module, LoRA):
        return f"it is adapted with the LoRA of {type(module).__module__}, and this package knows its own alone"
    if others:
        return f"its {listed(others)}: PEFT files have no form for it"
    if not name:
        return "PEFT replaces layers, and cannot replace the model itself"
    if (reason := place_refusal(name, modules, places)) is not None:
        return reason
    if module.lora_layout.blocks is not None or module.lora_layout.transposed is not is_fan_in_fan_out(module):
        return "its weight is read as PEFT does not read it (parameter_layout)"
    weight = module._parameters["weight"]
    return "complex numbers: PEFT has no LoRA for them" if weight is not None and weight.is_complex() else refusal(module)


def _factors(module: LoRA) -> Factors:
    with torch.no_grad():
        B, A = module.factors()
    return Factors(A.detach(), B.detach(), module.lora_magnitude.detach() if module.lora_dora else None)


def _of_file(path: Path) -> Adapter:
    info = read_adapter_info(path)
    tensors = _tensors(path)
    parameters = (info.strategy or {}).get("parameters", {})
    # they may be attention's or an encoder layer's, see `refusal` and `place_refusal`
    unsure = [name for name in info.sites if name.rpartition(".")[2] in ("out_proj", *UNCALLED)]
    biases = {f"{name}.bias" for name in info.sites}
    rest = _rest(tensors, info)
    if (info.strategy or {}).get("name") != _LINEAR or parameters.get("alpha_pattern") or unsure or not rest.keys() <= biases:
        raise AdapterFormatError(
            f"{path} alone does not tell what kind of layer each of its {len(info.sites)} sites is: name the base model too "
            "(model=..., or --model on the command line)."
        )
    sites = {name: _of_tensors(name, tensors, parameters) for name in info.sites}
    return Adapter(None, info.strategy, sites, rest, [], knows_base=False)


def _of_tensors(name: str, tensors: Mapping[str, Tensor], parameters: Mapping[str, Any]) -> Site:
    A, B, magnitude, A_init, B_init = (tensors.get(f"{name}.{key}") for key in _OWN)
    if A is None or B is None:
        raise AdapterFileError(f"the file lists the site {name!r} and has no lora_A or lora_B for it: get a fresh copy.")
    rank = A.shape[0]
    if A_init is not None and B_init is not None:
        # as LoRA.factors does
        A, B = torch.cat([A, A - A_init]), torch.cat([B - B_init, B_init], 1)
    scaling = scaling_of(rank, parameters.get("lora_alpha"), bool(parameters.get("use_rslora")))
    return Site(None, Factors(A, B, magnitude), scaling, parameters.get("lora_dropout", 0.0))


def listed(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
