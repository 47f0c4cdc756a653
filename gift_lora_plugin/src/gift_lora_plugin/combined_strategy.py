"""Which strategies may be combined, and what strategy their combination has, as data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from gift_core import FineTuningStrategy, ParameterSite, merge_strategies, plan_fine_tuning, strategy_from_config
from gift_lora_plugin.parameters import literal_pattern
from gift_lora_plugin.strategies import LoRAAllFineTuningStrategy, LoRAConvFineTuningStrategy, LoRALinearFineTuningStrategy

_LORA = frozenset(strategy.name for strategy in (LoRAAllFineTuningStrategy, LoRAConvFineTuningStrategy, LoRALinearFineTuningStrategy))

#: What adapters may differ in and still be combined: all of it is in the factors.
_FOLDED: dict[str, Any] = {"rank": 1, "lora_alpha": None, "use_rslora": False, "init": "kaiming", "freeze_A": False}
_FOLDED |= {"rank_pattern": None, "alpha_pattern": None, "lora_dropout": 0.0, "dropout_pattern": None}


def difference_of(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """In what the configs of two strategies differ that is not folded into the factors; None where they may be combined."""
    parts, others = _parts(one), _parts(other)
    if len(parts) != len(others):
        return f"are of {len(parts)} and {len(others)} strategies"
    return next(filter(None, map(_part_difference, parts, others)), None)


def _part_difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    if one["name"] != other["name"]:
        return f"are of {one['name']!r} and {other['name']!r}"
    folded = _FOLDED if one["name"] in _LORA else {}
    for key in {**one["parameters"], **other["parameters"]}:
        if key not in folded and one["parameters"].get(key) != other["parameters"].get(key):
            return f"have {key} {one['parameters'].get(key)!r} and {other['parameters'].get(key)!r}"
    return None


def _parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What a merged strategy is made of, parts of parts too; a plain one is its only part."""
    parts = config["parameters"].get("strategies")
    return [config] if parts is None else [leaf for part in parts for leaf in _parts(part)]


def combined_strategy(model: nn.Module, config: Mapping[str, Any], ranks: Mapping[str, int]) -> FineTuningStrategy:
    """The strategy of a combination: the same sites, other ranks, and a scaling of 1.

    Args:
        model: the plain model, which tells what part of a merged strategy adapts a site.
        config: of a strategy that is combined.
        ranks: of the combination by site: the full name of a layer, or of its parameter if that is not called ``weight``.
    """
    parts = _parts(config)
    mine = _sites_by_part(model, parts) if sum(part["name"] in _LORA for part in parts) > 1 else {}
    made = [
        _part_with(part, {place: rank for place, rank in ranks.items() if mine.get(place, at) == at}) if part["name"] in _LORA else part
        for at, part in enumerate(parts)
    ]
    strategies = [strategy_from_config(part) for part in made]
    return strategies[0] if len(strategies) == 1 else merge_strategies(strategies)


def _sites_by_part(model: nn.Module, parts: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Which part adapts a site: the first that wants it."""
    strategies = [strategy_from_config(part) for part in parts]
    part_of = {id(cap): at for at, strategy in enumerate(strategies) for cap in (*strategy.module_caps, *strategy.para_caps)}
    actions = plan_fine_tuning(model, merge_strategies(strategies)).actions
    names = [(action.site.full_name if isinstance(action.site, ParameterSite) else action.site.global_name) for action in actions]
    return {name.removesuffix(".weight"): part_of.get(id(action.cap), -1) for name, action in zip(names, actions, strict=True)}


def _part_with(config: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, Any]:
    if not ranks:
        return dict(config)  # an earlier part took all that this one would adapt
    usual = Counter(ranks.values()).most_common(1)[0][0]
    # a pattern covers what is inside it, and the first match wins: inner layers come first
    inner_first = sorted(ranks, key=lambda place: -place.count("."))
    patterns = {literal_pattern(place): ranks[place] for place in inner_first} if len(set(ranks.values())) > 1 else None
    new = {**_FOLDED, "rank": usual, "rank_pattern": patterns}
    new |= {key: config["parameters"][key] for key in ("lora_dropout", "dropout_pattern")}
    return {"name": config["name"], "parameters": {**config["parameters"], **new}}
