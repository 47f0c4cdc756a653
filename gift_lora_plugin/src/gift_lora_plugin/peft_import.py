"""From the files of PEFT to a tuned model, or to an adapter file.

The tensors say which layers are adapted and at which rank, and the configuration may not say otherwise; nothing in the files is run,
imported or compiled. Everything is checked before the model is touched, and every problem is reported at once.
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from gift_core import (
    FineTuningStrategy,
    FullFineTuningStrategy,
    Reparameterization,
    as_path,
    disable_fine_tuning,
    enable_fine_tuning,
    merge_strategies,
    plan_fine_tuning,
    save_adapter,
)
from gift_core.errors import AdapterMismatchError, AdapterWriteError, StateError
from gift_lora_plugin.parameters import literal_pattern
from gift_lora_plugin.peft_config import PeftConfig, alpha_for, alphas, config_from, keys_to_ignore, ranks
from gift_lora_plugin.peft_directory import PREFIX, TENSORS_FILE, Conversion, read_config_file, read_tensors_file
from gift_lora_plugin.peft_layers import (
    EMBEDDING_KEYS,
    MAGNITUDE_KEY,
    PLAIN_KEYS,
    Factors,
    from_peft,
    misfits,
    place_refusal,
    places_of,
    refusal,
    start_refusal,
    weight_shape,
)
from gift_lora_plugin.peft_problems import as_lines
from gift_lora_plugin.settings import scaling_of
from gift_lora_plugin.strategies import LoRAAllFineTuningStrategy

#: The name that PEFT gives an adapter unless told otherwise; its saved keys leave it out, those of a whole state dict have it.
_ADAPTER_NAME = "default"
_SAVED_COPY = "modules_to_save"
_FROZEN_COPY = "original_module"
#: Dtypes that torch computes in; in those of eight bits it does not even tell a NaN.
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclasses.dataclass
class _Content:
    """What the tensors of a file belong to.

    Attributes:
        sites: PEFT's tensors of each adapted layer, by its name.
        trained: values of the base model's own parameters and buffers, by key.
        copies: of the keys of ``trained`` those that PEFT trained in a copy of a module, with the module's name.
        base: values that the base model has to have, by key.
        problems: keys that belong nowhere, or where another key belongs.
    """

    sites: dict[str, dict[str, Tensor]] = dataclasses.field(default_factory=dict)
    trained: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    copies: dict[str, str] = dataclasses.field(default_factory=dict)
    base: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    problems: list[str] = dataclasses.field(default_factory=list)

    def put(self, shelf: dict[str, Tensor], name: str, tensor: Tensor, key: str) -> None:
        """Put a tensor of the file on one of the shelves above, where it may lie already, under another spelling of its key."""
        # with bias="all" PEFT itself writes the biases of modules_to_save under two keys, with the same values
        if name in shelf and not _agree(shelf[name], tensor):
            self.problems.append(f"{_named(key)}: the file holds this tensor under another key too, with other values")
        shelf[name] = tensor


@dataclasses.dataclass(frozen=True)
class _Group:
    """What the layers have in common that one strategy adapts."""

    rank: int
    alpha: float
    dropout: float
    wide: bool


def load_peft(model: nn.Module, directory: str | os.PathLike[str], *, ignore: str | Iterable[str] = ()) -> Conversion:
    """Tune a plain model with the adapter in a folder of PEFT's files; PEFT itself is not needed.

    Convolutions get the layout ``out_as_h``, which is PEFT's. PiSSA and OLoRA that PEFT saved without converting them count from what
    the weights of ``model`` give, as they do where PEFT loads them; in half precision PEFT rounds what it leaves of the base, and the
    base here is kept. Factors that the weight's dtype cannot hold are kept in float32, and the model computes with them as
    ``adapter_dtype="float32"`` does. Biases and modules trained in full take the dtype that they have in ``model``: float32
    is rounded to half precision, as by PEFT, and float64 is refused unless the model is in float64.

    Args:
        model: the base model, not tuned.
        directory: the folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        ignore: a key of the configuration, or several, to be passed over, though they may change what is computed.

    Raises:
        AdapterFileError: if a file is missing, damaged or malformed. `AdapterFormatError` if the adapter is of another kind than
            LoRA, or asks for what LoRA here does not do; `AdapterMismatchError` if it does not fit the model. The model is as it was.
        ParameterError: if ``ignore`` is no key and no list of keys.
        StateError: if the model is tuned already. `ModelError` if a part of it is scripted or lazy.
    """
    passed_over = keys_to_ignore(ignore)
    if any(isinstance(child, Reparameterization) for child in model.modules()):
        raise StateError(f"this {type(model).__name__} is tuned already: call disable_fine_tuning(model) first.")
    plan_fine_tuning(model, FullFineTuningStrategy())  # refuses what no strategy can tune
    folder = as_path(directory)
    config = config_from(read_config_file(folder), passed_over)
    tensors = read_tensors_file(folder)
    content = _sorted(_without_prefix(tensors), config, model)
    modules = dict(model.named_modules())
    if problems := [*content.problems, *_misfits(content, config, modules, model)]:
        raise AdapterMismatchError(
            f"{folder} does not fit this model; nothing was loaded.\n  "
            + as_lines(problems)
            + "\nLoad it into the base model that it was trained on."
        )
    factors = {name: from_peft(modules[name], site) for name, site in content.sites.items()}
    with _generators_kept():
        enable_fine_tuning(model, _strategy(config, factors, content, modules))
    try:
        _write(model, factors, content)
    except BaseException:
        disable_fine_tuning(model)
        raise
    full = sorted({key.rpartition(".")[0] for key in content.trained if not _is_bias_of(key, content.sites)})
    return Conversion(len(factors), tuple(full), config.bias, (folder / TENSORS_FILE).stat().st_size)


def import_peft(
    directory: str | os.PathLike[str],
    adapter_file: str | os.PathLike[str],
    model: nn.Module,
    *,
    ignore: str | Iterable[str] = (),
    force: bool = False,
) -> Conversion:
    """Turn PEFT's files into an adapter file.

    Args:
        directory: the folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        adapter_file: the file to write.
        model: the plain base model with its weights, of which the file holds digests; it is left as it was.
        ignore: see `load_peft`.
        force: overwrite a file that is there.

    Raises:
        GiftError: as `load_peft` does; `AdapterWriteError` if the file cannot be written, or is there.
    """
    if os.path.lexists(as_path(adapter_file)) and not force:
        raise AdapterWriteError(f"{adapter_file} exists already: choose another name, or overwrite with force.")
    done = load_peft(model, directory, ignore=ignore)
    try:
        return dataclasses.replace(done, file_bytes=save_adapter(model, adapter_file).file_bytes)
    finally:
        disable_fine_tuning(model)


# --- which tensor belongs where


def _without_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # transformers and diffusers may write the keys without
    if not all(key.startswith(PREFIX) for key in tensors):
        return dict(tensors)
    return {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}


def _sorted(tensors: Mapping[str, Tensor], config: PeftConfig, model: nn.Module) -> _Content:
    content = _Content()
    own = model.state_dict()
    for key, tensor in tensors.items():
        if (found := _site_key(key)) is not None:
            content.put(content.sites.setdefault(found[0], {}), found[1], tensor, key)
        elif not _sort_base_key(key, tensor, config, own.keys(), content):
            content.problems.append(f"unexpected: {_named(key)}")
    if not content.sites:
        content.problems.append("it holds no factors of LoRA")
    return content


def _site_key(key: str) -> tuple[str, str] | None:
    """The layer and PEFT's key below it, if a key is one of LoRA's."""
    for suffix in (*PLAIN_KEYS, *EMBEDDING_KEYS, MAGNITUDE_KEY, f"{MAGNITUDE_KEY}.weight"):
        named = f"{suffix.removesuffix('.weight')}.{_ADAPTER_NAME}{'.weight' if suffix.endswith('.weight') else ''}"
        for end in (suffix, named):
            if key.endswith(f".{end}"):
                return key.removesuffix(f".{end}"), suffix if suffix in PLAIN_KEYS else suffix.removesuffix(".weight")
    return None


def _sort_base_key(key: str, tensor: Tensor, config: PeftConfig, own: Iterable[str], content: _Content) -> bool:
    """Put aside a tensor of the base model's own; False if the configuration does not speak of it."""
    name = key
    for copy in (f".{_SAVED_COPY}.{_ADAPTER_NAME}.", f".{_SAVED_COPY}."):
        name = name.replace(copy, ".", 1)
    if f".{_FROZEN_COPY}." in key:
        content.put(content.base, name.replace(f".{_FROZEN_COPY}.", ".", 1), tensor, key)  # what the trained copy started from
        return True
    owner, _, last = name.rpartition(".")
    if owner.endswith(".base_layer"):
        plain = f"{owner.removesuffix('.base_layer')}.{last}"
        # a frozen weight is written along where a vocabulary may have grown
        content.put(content.trained if last == "bias" and config.bias != "none" else content.base, plain, tensor, key)
        return plain in own
    copied = _copied_module(owner, config.modules_to_save)
    if copied is not None:
        content.copies[name] = copied
    is_trained = copied is not None or (last == "bias" and config.bias == "all")
    content.put(content.trained if is_trained else content.base, name, tensor, key)
    return name in own


def _copied_module(owner: str, endings: Sequence[str]) -> str | None:
    """The outermost of a module and those that hold it whose name ends so; PEFT trains a copy of it."""
    ends = [*(at for at, character in enumerate(owner) if character == "."), len(owner)]
    return next((owner[:end] for end in ends if any(owner[:end].endswith(ending) for ending in endings)), None)


def _named(name: str) -> str:
    """A name from a file as text that cannot move the cursor."""
    return name if name.isprintable() else repr(name)


def _is_bias_of(key: str, sites: Mapping[str, Any]) -> bool:
    owner, _, last = key.rpartition(".")
    return last == "bias" and owner in sites


# --- does it fit


def _misfits(content: _Content, config: PeftConfig, modules: Mapping[str, nn.Module], model: nn.Module) -> Iterator[str]:
    holders = Counter(id(parameter) for module in modules.values() for parameter in module._parameters.values())
    places = places_of(modules.values())
    said = ranks(config, [name for name in content.sites if name in modules])
    for name, tensors in content.sites.items():
        if name not in modules:
            yield f"{_named(name)}: the model has no such layer"
        elif reason := (
            place_refusal(name, modules, places) or refusal(modules[name]) or _start_refusal(modules[name], config, holders)
        ):
            yield f"{name}: {reason}"
        else:
            # a factor may be kept in single precision, whatever the weight is in
            limit = torch.promote_types(_weight(modules[name]).dtype, torch.float32).to_real()
            wrong = (
                misfits(modules[name], tensors, config.dora)
                or list(_wrong_numbers(tensors, dict.fromkeys(tensors, limit)))
                or _wrong_rank(modules[name], tensors, said.get(name), config.start)
            )
            yield from (f"{name}: {problem}" for problem in wrong)
    own = model.state_dict()
    for key, tensor in {**content.trained, **content.base}.items():
        if key in own and tensor.shape != own[key].shape:
            yield f"{key} is {tuple(tensor.shape)} in the file, {tuple(own[key].shape)} in the model"
    limits = _limits(content, own)
    yield from _wrong_numbers({key: content.trained[key] for key in limits}, limits)
    yield from _torn_ties(content, model)
    for key, tensor in content.base.items():
        if key in own and tensor.shape == own[key].shape and not _is_held(tensor, own[key]):
            yield f"{key} is frozen, and the file holds other values: load these into the base model first"


def _torn_ties(content: _Content, model: nn.Module) -> Iterator[str]:
    """What the model holds in one tensor, and PEFT trained apart."""
    tensors = _named_tensors(model)
    ties: dict[int, list[str]] = {}
    for key, tensor in tensors.items():
        ties.setdefault(id(tensor), []).append(key)
    for key, value in content.trained.items():
        for other in ties.get(id(tensors.get(key)), ()):
            if key in content.copies and not other.startswith(f"{content.copies[key]}."):
                yield f"{key} is tied to {other}, and PEFT trained a copy of it alone: untie the base model first (docs/guide.md)"
            elif other < key and other in content.trained and not _agree(value, content.trained[other]):
                yield f"{key} is tied to {other}, and the file holds other values for it: untie the base model first (docs/guide.md)"


def _agree(value: Tensor, other: Tensor) -> bool:
    return value.dtype == other.dtype and torch.equal(value, other)


def _named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers under each of their names."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def _start_refusal(module: nn.Module, config: PeftConfig, holders: Mapping[int, int]) -> str | None:
    return None if config.start is None else start_refusal(module, config.start, is_tied=holders[id(_weight(module))] > 1)


def _wrong_rank(module: nn.Module, tensors: Mapping[str, Tensor], said: int | None, start: str | None) -> list[str]:
    rank = from_peft(module, tensors).rank
    # a start made anew has as many directions as the weight, however many more the configuration asks for
    allowed = said if said is None or start is None else min(said, *weight_shape(module))
    if allowed in (rank, None):
        return []
    most = "" if allowed == said else f", of which a weight of shape {weight_shape(module)} has {allowed}"
    return [f"lora_A has rank {rank}, and the configuration says {said}{most}"]


def _wrong_numbers(tensors: Mapping[str, Tensor], limits: Mapping[str, torch.dtype]) -> Iterator[str]:
    """What of some tensors has no place where these dtypes are the widest."""
    for key, tensor in tensors.items():
        dtype, limit = tensor.dtype, limits[key]
        is_whole = not (limit.is_floating_point or limit.is_complex)
        if (dtype.is_floating_point or dtype.is_complex) if is_whole else dtype not in _FLOATS:
            needed = "an integer or bool" if is_whole else "float16, bfloat16, float32 or float64"
            yield f"{_named(key)} is of {dtype}; {needed} is needed"
        elif not torch.isfinite(tensor).all():
            yield f"{_named(key)} holds NaN or infinity"
        elif limit in _FLOATS and torch.promote_types(dtype, limit) != limit:
            yield f"{_named(key)} is of {dtype}, and would lose digits: call model.to({dtype}) first"


def _limits(content: _Content, own: Mapping[str, Tensor]) -> dict[str, torch.dtype]:
    """The widest dtype for each value of the base model's own; half precision is rounded to, as it is where PEFT loads."""
    dtypes = {key: own[key].dtype for key in content.trained if key in own}
    return {key: torch.promote_types(dtype, torch.float32) if dtype in _FLOATS else dtype for key, dtype in dtypes.items()}


def _is_held(tensor: Tensor, own: Tensor) -> bool:
    is_cut = tensor.is_complex() and not own.is_complex()
    return not is_cut and torch.equal(tensor.to(own.dtype), own.cpu())


def _weight(module: nn.Module) -> Tensor:
    weight = module._parameters["weight"]
    assert weight is not None  # `refusal` lets no layer without one pass
    return weight


# --- tuning


def _strategy(
    config: PeftConfig, factors: Mapping[str, Factors], content: _Content, modules: Mapping[str, nn.Module]
) -> FineTuningStrategy:
    alpha = _alphas(config, factors)
    groups: dict[_Group, list[str]] = {}
    for name, update in factors.items():
        module = modules[name]
        dropout = 0.0 if isinstance(module, nn.Embedding) else config.dropout  # PEFT has none there
        dtype = _weight(module).dtype
        group = _Group(update.rank, alpha[name], dropout, _needs_more(update, dtype, config))
        groups.setdefault(group, []).append(name)
    biases = any(_is_bias_of(key, factors) for key in content.trained)
    others = [name for name, module in modules.items() if name not in factors and module._parameters]
    strategies: list[FineTuningStrategy] = [
        LoRAAllFineTuningStrategy(
            rank=group.rank,
            lora_alpha=group.alpha,
            lora_dropout=group.dropout,
            train_bias=biases,
            targets=_patterns(names, [*others, *(other for other in factors if other not in set(names))]),
            conv_layout="out_as_h",
            **_variant(config, group),
        )
        for group, names in groups.items()
    ]
    model = next(iter(modules.values()))
    first = {id(parameter): name for name, parameter in model.named_parameters()}  # the name by which a cap finds a tied one
    parameters = {name: first[id(parameter)] for name, parameter in model.named_parameters(remove_duplicate=False)}
    full = sorted({parameters[key] for key in content.trained if key in parameters and not _is_bias_of(key, factors)})
    if full:
        strategies.append(FullFineTuningStrategy(targets=[literal_pattern(key) for key in full]))
    return strategies[0] if len(strategies) == 1 else merge_strategies(strategies)


def _alphas(config: PeftConfig, factors: Mapping[str, Factors]) -> dict[str, float]:
    """The numerators that give PEFT's scaling at the ranks of the factors.

    PEFT scales by the rank in the configuration, also where a start made anew has fewer directions than that.
    """
    found, said = alphas(config, list(factors)), ranks(config, list(factors))
    fewer = {name: rank for name, rank in said.items() if rank != factors[name].rank}
    scalings = {name: scaling_of(rank, found[name], config.rslora) for name, rank in fewer.items()}
    return found | {name: alpha_for(scaling, factors[name].rank, config.rslora) for name, scaling in scalings.items()}


def _variant(config: PeftConfig, group: _Group) -> dict[str, Any]:
    said = {"use_rslora": config.rslora, "use_dora": config.dora, "init": config.start}
    return {key: value for key, value in (said | {"adapter_dtype": "float32" if group.wide else None}).items() if value}


def _needs_more(update: Factors, dtype: torch.dtype, config: PeftConfig) -> bool:
    """Whether a weight's dtype cannot hold every number of an update, or what the update counts from."""
    tensors = [update.A, update.B] if update.magnitude is None else [update.A, update.B, update.magnitude]
    dtypes = [torch.float32] if config.start else [tensor.dtype for tensor in tensors]
    return any(torch.promote_types(other, dtype) != dtype for other in dtypes)


def _patterns(names: list[str], others: list[str]) -> list[str]:
    """Patterns that choose these names and none of the others: one for all layers of a stack where that is so."""
    stacks: dict[str, list[str]] = {}
    for name in names:
        stacks.setdefault(".".join("*" if part.isdigit() else literal_pattern(part) for part in name.split(".")), []).append(name)
    patterns: list[str] = []
    for pattern, members in stacks.items():
        # a pattern also chooses what lies inside of what it matches
        is_exact = len(members) > 1 and not any(fnmatchcase(other, pattern) or fnmatchcase(other, f"{pattern}.*") for other in others)
        patterns += [pattern] if is_exact else map(literal_pattern, members)
    return patterns


def _generators_kept() -> AbstractContextManager[None]:
    # enabling draws the start of an adapter, and the file is about to replace it
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    return torch.random.fork_rng(devices=devices)


def _write(model: nn.Module, factors: Mapping[str, Factors], content: _Content) -> None:
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name, update in factors.items():
            layer: Any = modules[name]
            layer.lora_A.copy_(update.A)
            layer.lora_B.copy_(update.B)
            if update.magnitude is not None:
                layer.lora_magnitude.copy_(update.magnitude)
        tensors = _named_tensors(model)
        for key, value in content.trained.items():
            tensors[key].copy_(value)
