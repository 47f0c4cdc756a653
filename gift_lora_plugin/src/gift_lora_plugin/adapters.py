"""Several LoRA adapters on one model: combined into a new one, or each for its own samples of a batch."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import types
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gift_core import AdapterSet, FineTuningStrategy, Report, strategy_from_config
from gift_core.errors import ParameterError, SiteError, StateError
from gift_lora_plugin.combining import METHODS, SAME_RANK, Factors, Update
from gift_lora_plugin.layouts import Layout, is_transformers_conv1d
from gift_lora_plugin.lora import LoRA
from gift_lora_plugin.strategies import LoRAAllFineTuningStrategy, LoRAConvFineTuningStrategy, LoRALinearFineTuningStrategy

_STRATEGIES = (LoRAAllFineTuningStrategy, LoRAConvFineTuningStrategy, LoRALinearFineTuningStrategy)

#: What adapters may differ in and still be combined: all of it is in the factors.
_FOLDED: dict[str, Any] = {"rank": 1, "lora_alpha": None, "use_rslora": False, "init": "kaiming", "freeze_A": False}
_FOLDED |= {"rank_pattern": None, "alpha_pattern": None, "lora_dropout": 0.0, "dropout_pattern": None}

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED: dict[Any, Any] = {
    nn.ConvTranspose1d: F.conv_transpose1d,
    nn.ConvTranspose2d: F.conv_transpose2d,
    nn.ConvTranspose3d: F.conv_transpose3d,
}


@dataclasses.dataclass(frozen=True)
class _Site:
    """One adapted weight under one adapter; ``key`` is its full name, ``module`` the layer, ``prefix`` what its tensors start with."""

    key: str
    module: nn.Module
    prefix: str
    update: Update
    layout: Layout
    dropout: float
    dora: bool

    @property
    def rank(self) -> int:
        return int(self.update.lora_A.shape[-2])

    @property
    def place(self) -> str:
        return self.key.removesuffix(f"{self.prefix}lora_B").rstrip(".")


class LoRAAdapterSet(AdapterSet):
    """An `AdapterSet` that can combine LoRA adapters, and compute a batch with a different adapter for each sample."""

    def combine(
        self,
        weights: Mapping[str, float],
        name: str,
        method: str = "linear",
        *,
        rank: int | None = None,
        density: float = 0.5,
        generator: torch.Generator | None = None,
    ) -> Report:
        """Add an adapter that combines others, all or nothing; it is an ordinary adapter, which trains and saves.

        Args:
            weights: the adapters, each with its weight.
            name: of the new one.
            method: ``cat`` (the exact weighted sum of the updates, at the sum of the ranks), ``svd`` (its best approximation of a given
                rank), or one of ``linear``, ``ties``, ``dare``, which work on the factors and need one rank for all; see
                `gift_lora_plugin.combining` for the formulas.
            rank: of the new adapter, with ``svd``; None takes each layer's largest.
            density: the share that ``ties`` and ``dare`` keep, in (0, 1].
            generator: draws what ``dare`` drops.

        Raises:
            AdapterNameError: if an adapter is unknown or the name is taken.
            ParameterError: if a weight, the method, the rank or the density is not allowed, or ranks differ where they must not.
            StateError: if an adapter is none of this plugin's strategies alone, uses DoRA, or trains or moves something besides its
                factors; the message names it and the reason. Such parts have no weighted sum that would be right for all.
        """
        _check(weights, method, rank, density)
        sites = {other: self._combinable(other) for other in weights}
        strategies = self._comparable(list(weights))
        options = _options(method, density, generator)
        with torch.no_grad():
            combined = {
                key: _combine([sites[other][key] for other in weights], list(weights.values()), method, rank, options)
                for key in next(iter(sites.values()))
            }
        ranks = {next(iter(sites.values()))[key].place: int(lora_A.shape[-2]) for key, (_, lora_A) in combined.items()}
        with torch.random.fork_rng(devices=[]):  # what enabling draws is replaced
            report = self.add(name, _strategy_with(strategies[0], ranks))
        try:
            self._write(name, combined)
        except BaseException:
            self.remove(name)
            raise
        return report

    @contextlib.contextmanager
    def per_sample(self, names: Sequence[str | None]) -> Iterator[nn.Module]:
        """Within the context sample i of a batch is computed with adapter ``names[i]``, or as by the base model where that is None.

        Each layer's base product is computed once for the whole batch; each adapter's update for its own samples. Gradients flow to
        the adapters' parameters. The result is that of running the samples one by one, but for the order of sums; dropout draws anew.

        Args:
            names: one for each sample, along the first axis of every adapted layer's input.

        Raises:
            AdapterNameError: if an adapter is unknown.
            StateError: if an adapter trains or moves something besides its factors, or a layer is called with another number of
                samples or not called at all (its weight was read by others, and would have been the base's).
            SiteError: if a layer cannot be computed so, or mixes samples (BatchNorm in training); the message names it.
        """
        rows = {name: [at for at, other in enumerate(names) if other == name] for name in dict.fromkeys(names) if name is not None}
        sites = [(site, torch.tensor(rows[name])) for name in rows for site in self._sites(name).values()]
        with self.using(None) as model:
            for site, _ in sites:
                _refuse_unsplittable(site)
            _refuse_mixing(model)
            trains = [parameter for parameter in nn.Module.parameters(model) if parameter.requires_grad]
            batch = _Batch(len(names), sites)
            try:
                for parameter in trains:
                    parameter.requires_grad_(False)
                batch.attach(model)
                yield model
            finally:
                batch.detach()
                for parameter in trains:
                    parameter.requires_grad_(True)

    # --- reading adapters

    def _sites(self, name: str) -> dict[str, _Site]:
        """The adapted weights of an adapter, after a look at whether they are all there is to it."""
        base = self._base_tensors()
        with self.using(name) as model:
            found = {site.key: site for site in _sites_of(model)}
            own = {key for site in found.values() for key in _own_keys(site)}
            others = [key for key, parameter in model.named_parameters() if parameter.requires_grad and key not in own]
            buffers = ((key, buffer) for key, buffer in model.named_buffers() if key not in own)
            others += [key for key, buffer in buffers if key not in base or not torch.equal(buffer, base[key])]
        if others or not found:
            what = f"has {', '.join(others[:3])} of its own" if others else "adapts no weight in this way"
            raise StateError(f"adapter {name!r} {what}, besides low-rank factors: use it alone, with use({name!r}).")
        return found

    def _base_tensors(self) -> dict[str, Tensor]:
        with self.using(None) as model:
            return dict(model.named_buffers())

    def _combinable(self, name: str) -> dict[str, _Site]:
        strategy = self.strategy(name)
        if not isinstance(strategy, _STRATEGIES):
            raise StateError(f"adapter {name!r} is of {strategy!r}, and only those of one LoRA strategy are combined.")
        sites = self._sites(name)
        for site in sites.values():
            if site.dora:
                raise StateError(f"adapter {name!r} uses DoRA at {site.place!r}, whose magnitudes have no weighted sum: leave it out.")
        return sites

    def _comparable(self, names: list[str]) -> list[FineTuningStrategy]:
        strategies = [strategy for name in names if (strategy := self.strategy(name)) is not None]
        configs = [strategy.to_config() for strategy in strategies]
        for name, config in zip(names, configs, strict=True):
            for key, value in config["parameters"].items():
                if key not in _FOLDED and value != (other := configs[0]["parameters"].get(key)):
                    raise StateError(
                        f"{key} is {other!r} in {names[0]!r} and {value!r} in {name!r}: combine adapters of the same layers."
                    )
            if config["name"] != configs[0]["name"]:
                raise StateError(
                    f"{names[0]!r} is of {configs[0]['name']!r}, {name!r} of {config['name']!r}: combine those of one strategy."
                )
        return strategies

    def _write(self, name: str, combined: Mapping[str, Factors]) -> None:
        with self.using(name) as model, torch.no_grad():
            for site in _sites_of(model):
                for target, value in zip((site.update.lora_B, site.update.lora_A), combined[site.key], strict=True):
                    target.copy_(value)


def _sites_of(model: nn.Module) -> Iterator[_Site]:
    for name, module in model.named_modules():
        if isinstance(module, LoRA):
            for key in [key for key in module._parameters if key.endswith("lora_B")]:
                yield _site(f"{name}.{key}" if name else key, module, key.removesuffix("lora_B"))


def _site(key: str, module: nn.Module, prefix: str) -> _Site:
    names = ("lora_B", "lora_A", "lora_B_init", "lora_A_init", "lora_scaling", "lora_init", "lora_layout", "lora_dropout", "lora_dora")
    own: Any = types.SimpleNamespace(**{name: getattr(module, prefix + name, None) for name in names})
    lora_B, lora_A = LoRA.factors(own)
    return _Site(key, module, prefix, Update(lora_B, lora_A, own.lora_scaling), own.lora_layout, own.lora_dropout, own.lora_dora)


def _own_keys(site: _Site) -> list[str]:
    start = site.key.removesuffix("lora_B")
    return [start + name for name in ("lora_B", "lora_A", "lora_B_init", "lora_A_init", "lora_magnitude")]


# --- combining


def _check(weights: Mapping[str, float], method: str, rank: int | None, density: float) -> None:
    if method not in METHODS:
        raise ParameterError(f"method must be one of {', '.join(METHODS)}, got {method!r}.")
    if not weights:
        raise ParameterError('weights must name at least one adapter, as in {"a": 0.7, "b": 0.3}.')
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise ParameterError(f"the weight of {name!r} must be a finite number, got {weight!r}.")
    if rank is not None and (method != "svd" or isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ParameterError(f"rank is a whole number from 1 up, for method 'svd' alone, got {rank!r} for {method!r}.")
    if not 0 < density <= 1:
        raise ParameterError(f"density must be in (0, 1], got {density!r}.")


def _options(method: str, density: float, generator: torch.Generator | None) -> dict[str, Any]:
    options: dict[str, dict[str, Any]] = {"ties": {"density": density}, "dare": {"density": density, "generator": generator}}
    return options.get(method, {})


def _combine(sites: list[_Site], weights: list[float], method: str, rank: int | None, options: dict[str, Any]) -> Factors:
    ranks = {site.rank for site in sites}
    if method in SAME_RANK and len(ranks) > 1:
        raise ParameterError(f"{method!r} needs one rank, and at {sites[0].place!r} they are {sorted(ranks)}: choose 'cat' or 'svd'.")
    if method == "svd":
        options = {"rank": rank or max(ranks)}
    return METHODS[method]([site.update for site in sites], weights, **options)


def _strategy_with(strategy: FineTuningStrategy, ranks: Mapping[str, int]) -> FineTuningStrategy:
    """The strategy of a combination: the same layers, the new ranks, and a scaling of 1."""
    config = strategy.to_config()
    usual = Counter(ranks.values()).most_common(1)[0][0]
    # a pattern covers what is inside it, and the first match wins: inner layers come first
    inner_first = sorted(ranks, key=lambda place: -place.count("."))
    patterns = {place: ranks[place] for place in inner_first} if len(set(ranks.values())) > 1 else None
    new = {**_FOLDED, "rank": usual, "rank_pattern": patterns}
    new |= {key: config["parameters"][key] for key in ("lora_dropout", "dropout_pattern")}
    return strategy_from_config({"name": config["name"], "parameters": {**config["parameters"], **new}})


# --- a different adapter for each sample


class _Batch:
    """The hooks that add each sample's own update to what the base layers give."""

    def __init__(self, size: int, sites: Sequence[tuple[_Site, Tensor]]) -> None:
        self.size = size
        self.by_layer: dict[nn.Module, list[tuple[_Site, Tensor]]] = {}
        for site, rows in sites:
            self.by_layer.setdefault(site.module, []).append((site, rows))
        self.called: set[nn.Module] = set()
        self.handles: list[Any] = []

    def attach(self, model: nn.Module) -> None:
        self.handles += [module.register_forward_hook(self._add, prepend=True) for module in self.by_layer]
        self.handles.append(model.register_forward_hook(self._finish))

    def detach(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _add(self, module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        sites = self.by_layer[module]
        place = sites[0][0].place
        if len(arguments) != 1:
            raise SiteError(f"{place!r} is called with {len(arguments)} positional arguments; per_sample follows layers of one input.")
        (value,) = arguments
        needs = len(module.kernel_size) + 2 if hasattr(module, "kernel_size") else 1 if isinstance(module, nn.Embedding) else 2  # type: ignore[arg-type]
        if value.dim() < needs or value.shape[0] != self.size:
            raise StateError(
                f"{place!r} is called with an input of {tuple(value.shape)}, and per_sample names {self.size} samples, which lie along "
                "the first axis: pass as many names as samples, or compute them one by one."
            )
        self.called.add(module)
        for site, rows in sites:
            rows = rows.to(output.device)
            output = output.index_add(0, rows, _update(site, module, value.index_select(0, rows)).to(output.dtype))
        return output

    def _finish(self, model: nn.Module, arguments: Any, output: Any) -> None:
        silent = [sites[0][0].place for module, sites in self.by_layer.items() if module not in self.called]
        self.called.clear()
        if silent:
            raise StateError(
                f"{', '.join(silent[:3])} took no part as a layer in this pass: something else reads its weight, which is the base's "
                "here, or it was skipped. Compute the samples one by one."
            )


def _update(site: _Site, module: Any, value: Tensor) -> Tensor:
    lora_B, lora_A, scaling = site.update
    if isinstance(module, nn.Embedding):
        return F.embedding(value, lora_B, module.padding_idx) @ lora_A * scaling
    value = value.to(lora_A.dtype)
    dropped = F.dropout(value, site.dropout, module.training) if site.dropout else value
    if isinstance(module, (*_CONVOLUTIONS, *_TRANSPOSED)):
        weight = site.layout.as_weight(lora_B @ lora_A) * scaling
        if isinstance(module, _CONVOLUTIONS):
            convolved: Tensor = module._conv_forward(dropped, weight, None)
            return convolved
        transposed = next(function for kind, function in _TRANSPOSED.items() if isinstance(module, kind))
        layer: Any = module
        moves = (layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation)
        return transposed(dropped, weight, None, *moves)  # type: ignore[no-any-return]
    return F.linear(F.linear(dropped, lora_A), lora_B) * scaling


def _refuse_unsplittable(site: _Site) -> None:
    module, original = site.module, type(site.module)
    plain: Any = next((kind for kind in (nn.Linear, nn.Embedding, *_CONVOLUTIONS, *_TRANSPOSED) if isinstance(module, kind)), None)
    inner = "_conv_forward" if plain in _CONVOLUTIONS else "forward"
    own_forward = plain is not None and any(getattr(original, name) is not getattr(plain, name) for name in ("forward", inner))
    inside_attention = isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
    if (plain is None and not is_transformers_conv1d(module)) or own_forward or inside_attention or site.prefix or site.dora:
        raise SiteError(
            f"{site.place!r} ({original.__name__}{', DoRA' if site.dora else ''}) does not add its update to an output of its own, so "
            "that samples cannot differ in it: compute them one by one, or exclude it."
        )
    if plain is nn.Embedding and (module.max_norm is not None or module.scale_grad_by_freq):
        raise SiteError(f"{site.place!r} looks at the batch or the table as a whole (max_norm, scale_grad_by_freq): one by one.")


def _refuse_mixing(model: nn.Module) -> None:
    for name, module in model.named_modules():
        mixes = isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None)
        if mixes:
            raise SiteError(f"{name!r} ({type(module).__name__}) mixes the samples of a batch: call eval() on it first.")
