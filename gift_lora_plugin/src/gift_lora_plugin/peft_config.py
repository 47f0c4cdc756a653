r"""What stands in ``adapter_config.json``: reading it, and writing it for exactly our sites.

Patterns in that file are regular expressions, and a file may come from anybody. What we write is anchored and escaped; what we read is
never compiled: the layers are told by the keys of the tensors, the ranks by their shapes, and a key of ``alpha_pattern`` or
``rank_pattern`` is compared as text (see `alphas`).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from gift_core.errors import AdapterFileError, AdapterFormatError, ParameterError
from gift_lora_plugin.parameters import is_number
from gift_lora_plugin.peft_problems import as_lines

#: ``re.escape`` of our names plus ``^``; a longer key is refused.
MAX_PATTERN_LENGTH = 1000

_Value = TypeVar("_Value")

#: Keys that say where an adapter comes from, how it was initialised, or which layers it was made for: the tensors tell the same.
_DESCRIPTIVE = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode",
    "layers_pattern", "layers_to_transform", "loftq_config", "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size",
    "revision", "runtime_config", "target_modules", "task_type",
}  # fmt: skip
_READ = {
    "alpha_pattern", "bias", "init_lora_weights", "lora_alpha", "lora_dropout", "modules_to_save", "peft_type", "r",
    "rank_pattern", "use_dora", "use_rslora",
}  # fmt: skip
#: Keys that change what is computed, and have no form here.
_REFUSED = {
    "alora_invocation_tokens": "the adapter is active from a token on (aLoRA)",
    "arrow_config": "several adapters are mixed by a router (Arrow)",
    "ensure_weight_tying": "adapters of tied layers share their factors",
    "kasa_config": "the base weights are truncated (KaSA)",
    "layer_replication": "layers of the base model are repeated",
    "lora_bias": "the factor B has a bias",
    "megatron_config": "the layers are Megatron's parallel ones",
    "monteclora_config": "the factors are sampled (MonteCLoRA)",
    "target_parameters": "parameters are adapted that belong to no layer PEFT knows",
    "trainable_token_indices": "single rows of an embedding are trained",
    "use_bdlora": "the factors are block-diagonal (BD-LoRA)",
    "use_qalora": "the input is pooled by groups (QA-LoRA)",
    "velora_config": "the gradient of A is computed from compressed activations (VeLoRA)",
}
#: Starts that subtract from the base weight what the factors begin with: the tensors alone do not give the update.
_BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
#: Those of them that PEFT makes anew when it loads an adapter, from nothing but the base weight; so can we.
_MADE_ANEW = ("pissa", "olora")


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """What of a configuration decides the computation.

    Attributes:
        alpha: numerator of the scaling, of layers that ``alpha_pattern`` does not match.
        alpha_pattern: keys and numerators, the first match wins.
        dropout: probability with which a number of the update's input is dropped in training.
        rslora: whether the scaling is alpha / sqrt(rank).
        dora: whether there are magnitudes.
        bias: ``none``, ``all`` or ``lora_only``.
        modules_to_save: endings of the names of modules that are trained in full.
        rank: of layers that ``rank_pattern`` does not match; None where the configuration is silent.
        rank_pattern: keys and ranks, the first match wins.
        start: ``pissa`` or ``olora`` where the factors count from what the base weight gives, else None.
    """

    alpha: float
    alpha_pattern: Mapping[str, float]
    dropout: float
    rslora: bool
    dora: bool
    bias: str
    modules_to_save: tuple[str, ...]
    rank: int | None = None
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    start: str | None = None


def keys_to_ignore(ignore: object) -> frozenset[str]:
    """The keys that a caller wants passed over, from one key or several.

    Raises:
        ParameterError: if they are anything else.
    """
    keys: list[Any] = list(ignore) if isinstance(ignore, Iterable) and not isinstance(ignore, str) else [ignore]
    if not all(isinstance(key, str) for key in keys):
        raise ParameterError(f"ignore must be a key of PEFT's configuration, or a list of keys, got {_shown(ignore)}.")
    return frozenset(keys)


def config_from(data: Mapping[str, Any], ignore: Collection[str] = ()) -> PeftConfig:
    """Check a configuration, and take from it what decides the computation.

    Args:
        data: the JSON object.
        ignore: keys that the caller knows to be harmless.

    Raises:
        AdapterFileError: if it is malformed; `AdapterFormatError` if it asks for what has no form here. Each lists every reason.
    """
    kind = data.get("peft_type")
    if kind != "LORA":
        raise AdapterFormatError(
            f"peft_type is {kind!r}, and LORA alone can be read: there is no form for other methods. Load it with PEFT."
        )
    if wrong := _malformed(data):
        raise AdapterFileError("the configuration is malformed; get a fresh copy.\n  " + as_lines(wrong))
    if reasons := _no_form(data, ignore):
        raise AdapterFormatError("the configuration asks for what has no form here; load it with PEFT.\n  " + as_lines(reasons))
    return PeftConfig(
        alpha=data.get("lora_alpha", 8),
        alpha_pattern=data.get("alpha_pattern") or {},
        dropout=data.get("lora_dropout") or 0.0,
        rslora=bool(data.get("use_rslora")),
        dora=bool(data.get("use_dora")),
        bias=data.get("bias", "none"),
        modules_to_save=tuple(data.get("modules_to_save") or ()),
        rank=data.get("r"),
        rank_pattern=data.get("rank_pattern") or {},
        start=None if "init_lora_weights" in ignore else _made_anew(data),
    )


def _malformed(data: Mapping[str, Any]) -> list[str]:
    checks = {
        "r": (data.get("r") is None or _is_rank(data["r"]), "a whole number from 1 up"),
        "lora_alpha": (_is_number(data.get("lora_alpha", 8)), "a finite number"),
        "lora_dropout": (_is_number(p := data.get("lora_dropout") or 0.0) and 0 <= p < 1, "a number in [0, 1)"),
        "alpha_pattern": (_is_pattern(data.get("alpha_pattern"), _is_number), "names with finite numbers"),
        "rank_pattern": (_is_pattern(data.get("rank_pattern"), _is_rank), "names with whole numbers from 1 up"),
        "bias": (data.get("bias", "none") in ("none", "all", "lora_only"), "none, all or lora_only"),
        "modules_to_save": (_is_names(data.get("modules_to_save") or []), "a list of names"),
        "use_rslora": (isinstance(data.get("use_rslora", False), bool), "true or false"),
        "use_dora": (isinstance(data.get("use_dora", False), bool), "true or false"),
    }
    return [f"{key} is {_shown(data.get(key))}; it must be {allowed}" for key, (fine, allowed) in checks.items() if not fine]


def _no_form(data: Mapping[str, Any], ignore: Collection[str]) -> list[str]:
    reasons = [f"{key}: {why}" for key, why in _REFUSED.items() if data.get(key) and key not in ignore]
    start = data.get("init_lora_weights", True)
    changes_base = isinstance(start, str) and start.lower().startswith(_BASE_CHANGING) and _made_anew(data) is None
    if changes_base and "init_lora_weights" not in ignore:
        reasons.append(
            f"init_lora_weights is {_shown(start)}, which changes the base weights, by draws or data that the files do not hold: let "
            "PEFT save it as a plain adapter, with save_pretrained(directory, path_initial_model_for_weight_conversion=...)"
        )
    unknown = [key for key in data if key not in _DESCRIPTIVE | _READ | _REFUSED.keys() and data[key] and key not in ignore]
    # a switch of a later version that is off cannot change anything; one that is on may
    reasons += [
        f"{_shown(key)} is unknown, and set to {_shown(data[key])}: say ignore if you know it to be harmless" for key in unknown
    ]
    return reasons


def _made_anew(data: Mapping[str, Any]) -> str | None:
    start = data.get("init_lora_weights")
    return start.lower() if isinstance(start, str) and start.lower() in _MADE_ANEW else None


def alphas(config: PeftConfig, names: Sequence[str]) -> dict[str, float]:
    """The numerator of the scaling for each layer.

    PEFT matches a key of ``alpha_pattern`` as the end of a layer's name, at a dot, or with ``^`` the whole of it. That much is done
    here by comparing text, in which a dot that is not escaped stands for any character, as it does there.

    Raises:
        AdapterFormatError: if a key is another kind of regular expression, or there are many more keys than layers.
    """
    found = _by_pattern("alpha_pattern", config.alpha_pattern, names)
    return {name: found.get(name, config.alpha) for name in names}


def ranks(config: PeftConfig, names: Sequence[str]) -> dict[str, int]:
    """The rank that the configuration says of each layer; a layer of which it cannot be told is left out.

    Raises:
        AdapterFormatError: as `alphas` does, where a start is made anew, whose scaling is that of the rank in the configuration.
    """
    try:
        found = _by_pattern("rank_pattern", config.rank_pattern, names)
    except AdapterFormatError:
        if config.start is not None:
            raise
        return {}  # the tensors have the ranks, and this would only have checked them
    rest = {} if config.rank is None else dict.fromkeys(names, config.rank)
    return rest | found


def _by_pattern(pattern: str, values: Mapping[str, _Value], names: Sequence[str]) -> dict[str, _Value]:
    """The value of the first key that matches, for each name that one matches."""
    if len(values) > len(names) + MAX_PATTERN_LENGTH:
        raise AdapterFormatError(f"{pattern} has {len(values):,} keys for {len(names):,} layers: leave out those that match none.")
    keys = [_parsed(pattern, key) for key in values]
    by_text: dict[str, int] = {}
    by_length: dict[int, list[int]] = {}
    for index, key in enumerate(keys):
        if key.wild:
            by_length.setdefault(len(key.text), []).append(index)
        else:
            by_text.setdefault(f"^{key.text}" if key.anchored else key.text, index)
    in_order = list(values.values())
    result = {}
    for name in names:
        ends = [name, *(name[at + 1 :] for at, character in enumerate(name) if character == ".")]
        found = [by_text[end] for end in (f"^{name}", *ends) if end in by_text]
        found += [index for end in ends for index in by_length.get(len(end), ()) if keys[index].matches(end, end is name)]
        if found:
            result[name] = in_order[min(found)]
    return result


@dataclasses.dataclass(frozen=True)
class _Key:
    """A key of a pattern as text; ``wild`` are the places of it at which any character may stand."""

    text: str
    wild: frozenset[int]
    anchored: bool

    def matches(self, end: str, is_whole: bool) -> bool:
        return (is_whole or not self.anchored) and all(
            at in self.wild or mine == other for at, (mine, other) in enumerate(zip(self.text, end, strict=True))
        )


def _parsed(pattern: str, key: str) -> _Key:
    if len(key) > MAX_PATTERN_LENGTH:
        raise AdapterFormatError(
            f"a key of {pattern} has {len(key)} characters; {MAX_PATTERN_LENGTH} are allowed: write the names of layers."
        )
    rest, anchored = key.removeprefix("^"), key.startswith("^")
    text: list[str] = []
    wild: set[int] = set()
    escaped = False
    for character in rest.removesuffix("$") if not rest.endswith("\\$") else rest:
        if escaped and (character.isalnum() or character == "_"):
            raise _real_regex(pattern, key)
        if not escaped and character in "*+?[](){}|^$":
            raise _real_regex(pattern, key)
        if not escaped and character == "\\":
            escaped = True
            continue
        if not escaped and character == ".":
            wild.add(len(text))
        text.append(character)
        escaped = False
    if escaped or not text:
        raise _real_regex(pattern, key)
    return _Key("".join(text), frozenset(wild), anchored)


def _real_regex(pattern: str, key: str) -> AdapterFormatError:
    return AdapterFormatError(
        f"{pattern} has the key {_shown(key)}, a regular expression, and none from a file is ever run: replace it by the "
        "names, or the ends of the names, of the layers that it means."
    )


def config_data(
    *,
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    dropout: float,
    rslora: bool,
    dora: bool,
    bias: str,
    modules_to_save: Sequence[str],
    fan_in_fan_out: bool,
    base_model: str | None,
    task_type: str | None,
) -> dict[str, Any]:
    """A configuration for exactly these layers; what is left out has PEFT's default.

    Args:
        ranks: the rank of each layer by its full name.
        alphas: the numerator of each layer's scaling.
        dropout: see `PeftConfig`.
        rslora: likewise.
        dora: likewise.
        bias: likewise.
        modules_to_save: full names.
        fan_in_fan_out: whether there are layers whose weight is ``(in, out)``.
        base_model: a name or path that PEFT finds the base model by.
        task_type: such as ``CAUSAL_LM``, for PEFT's own classes of models.
    """
    rank, alpha = _most_common(ranks.values()), _most_common(alphas.values())
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "init_lora_weights": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "rank_pattern": {anchored(name): value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {anchored(name): value for name, value in alphas.items() if value != alpha},
        # text is matched as a whole, where a list would be matched as ends of names
        "target_modules": "|".join(re.escape(name) for name in ranks),
        "modules_to_save": list(modules_to_save) or None,
        "fan_in_fan_out": fan_in_fan_out,
        "bias": bias,
        "use_rslora": rslora,
        "use_dora": dora,
    }


def anchored(name: str) -> str:
    """A key of ``rank_pattern`` or ``alpha_pattern`` that matches this name and no other."""
    return f"^{re.escape(name)}"


def alpha_for(scaling: float, rank: int, rslora: bool) -> float:
    """The numerator that gives a scaling at a rank, or its neighbour where no quotient is that; a whole one where that is exact."""
    divisor = math.sqrt(rank) if rslora else rank
    alpha = scaling * divisor
    whole = round(alpha)
    return whole if whole / divisor == scaling else alpha


def _most_common(values: Iterable[Any]) -> Any:
    counts: dict[Any, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    return max(counts, key=lambda value: counts[value])


def _is_number(value: object) -> bool:
    return is_number(value) and abs(value) < 2**63  # type: ignore[arg-type]


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and _is_number(value) and value > 0


def _is_pattern(value: object, allowed: Callable[[object], bool]) -> bool:
    return not value or (isinstance(value, dict) and all(map(allowed, value.values())))


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) and item for item in value)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
