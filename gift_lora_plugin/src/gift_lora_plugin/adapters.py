"""Several LoRA adapters on one model: combined into a new one, or each for its own samples of a batch."""

from __future__ import annotations

import contextlib
import dataclasses
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gift_core import AdapterSet, Report
from gift_core.errors import ParameterError, StateError
from gift_lora_plugin.combined_strategy import combined_strategy, difference_of
from gift_lora_plugin.combining import METHODS, REAL_ONLY, SAME_RANK, Factors, Update, combine_parameters
from gift_lora_plugin.lora import LoRA
from gift_lora_plugin.mixture import Mixture, Survey
from gift_lora_plugin.parameters import LARGEST, is_number


@dataclasses.dataclass(frozen=True)
class _Site:
    """One adapted weight under one adapter: the full name of its factor B, the name of the site, its update, whether it has DoRA."""

    key: str
    place: str
    update: Update
    dora: bool

    @property
    def rank(self) -> int:
        return int(self.update.lora_A.shape[-2])

    @property
    def own_keys(self) -> set[str]:
        start = self.key.removesuffix("lora_B")
        return {start + name for name in ("lora_B", "lora_A", "lora_B_init", "lora_A_init", "lora_magnitude")}


@dataclasses.dataclass(frozen=True)
class _Content:
    """What an adapter has: its adapted weights by key, and its values of the base's parameters that it trains, too."""

    sites: dict[str, _Site]
    kept: Mapping[str, Tensor]


class LoRAAdapterSet(AdapterSet):
    """An `AdapterSet` that can combine LoRA adapters, and compute a batch with a different adapter for each sample."""

    _is_mixing = False

    def combine(
        self,
        weights: Mapping[str, float],
        name: str | None = None,
        method: str = "linear",
        *,
        rank: int | None = None,
        density: float = 0.5,
        generator: torch.Generator | None = None,
    ) -> Report:
        """Add an adapter that combines others, all or nothing; it is an ordinary adapter, which trains and saves.

        What the adapters train of the base, biases or a head, is combined as its differences from the base, see `combine_parameters`.

        Args:
            weights: the adapters, each with its weight.
            name: of the new one; None joins the method and the adapters, as in ``linear-a-b``, which is then the last of `names`.
            method: ``cat`` (the exact weighted sum of the updates, at the sum of the ranks), ``svd`` (its best approximation of a given
                rank), or one of ``linear``, ``ties``, ``dare``, which work on the factors and need one rank for all; ``ties`` takes
                real numbers only. See `gift_lora_plugin.combining` for the formulas.
            rank: of the new adapter, with ``svd``; None takes each layer's largest.
            density: the share that ``ties`` and ``dare`` keep, in (0, 1].
            generator: draws what ``dare`` drops.

        Raises:
            AdapterNameError: if an adapter is unknown or the name is taken.
            ParameterError: if a weight, the method, the rank or the density is not allowed, ranks differ where they must not, or the
                method does not take complex numbers.
            StateError: if the adapters are not of the same strategy but for rank, scaling and start, one has DoRA, has moved a buffer
                (statistics of a normalisation), or trains what is neither its factors nor the base's; the message names it and the
                reason.
        """
        _check(weights, method, rank, density, generator)
        name = "-".join([method, *weights]) if name is None else name
        self._refuse_name(name)
        config = self._common_config(list(weights))
        contents, shares = [self._content(other) for other in weights], list(weights.values())
        _refuse_complex(method, contents[0])
        options: dict[str, Any] = {"density": density, "generator": generator}
        with self.using(None) as model, torch.no_grad():
            sites = {key: [content.sites[key] for content in contents] for key in contents[0].sites}
            factors = {key: _combine(found, shares, method, options | {"rank": rank}) for key, found in sites.items()}
            base = dict(model.named_parameters())
            tuned = {key: [content.kept[key] for content in contents] for key in contents[0].kept}
            kept = {key: combine_parameters(base[key], values, shares, method, **options) for key, values in tuned.items()}
            ranks = {found[0].place: int(factors[key][1].shape[-2]) for key, found in sites.items()}
            strategy = combined_strategy(model, config, ranks)
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        with self._lock, torch.random.fork_rng(devices=devices):  # what enabling draws is replaced, before anyone sees it
            report = self.add(name, strategy)
            try:
                self._write(name, factors, kept)
            except BaseException:
                self.remove(name)
                raise
        return report

    @contextlib.contextmanager
    def per_sample(self, names: Sequence[str | None]) -> Iterator[nn.Module]:
        """Within the context sample i of a batch is computed with adapter ``names[i]``, or as by the base model where that is None.

        The result is that of running the samples one by one, but for the order of sums; dropout draws anew. A linear layer computes the
        base's product once for all samples, and each adapter's update for its own; any other layer that an adapter changes, also a
        trained bias or head, runs once for each adapter on its own samples. Gradients flow to the adapters' parameters. What was
        compiled runs eagerly here.

        Args:
            names: a list with one for each sample. Samples lie along the first axis of what every changed layer is called with; in
                recurrent layers and attention where ``batch_first`` says, or in packed sequences, and around these perhaps along the
                second axis, too.

        Raises:
            AdapterNameError: if an adapter is unknown.
            ParameterError: if ``names`` is one text, or no list of names and None.
            SiteError: if the samples of a layer cannot be told apart, or a layer mixes them (BatchNorm in training); the message names
                it.
            StateError: if a layer is called with another number of samples, something else reads its weight, an adapter has modules of
                its own, or an adapter is put to use within the context.
        """
        _check_names(names)
        rows = {name: [at for at, other in enumerate(names) if other == name] for name in dict.fromkeys(names) if name is not None}
        with self._lock, self.using(None) as model:
            if self._is_mixing:
                raise StateError("per_sample is active already: leave that context first.")
            survey = Survey(model)
            mixture = Mixture(model, [(own, self._replicas(name, survey)) for name, own in rows.items()], len(names))
            trains = [parameter for parameter in nn.Module.parameters(model) if parameter.requires_grad]
            try:
                self._is_mixing = True
                for parameter in trains:
                    parameter.requires_grad_(False)
                with mixture.active(lambda: self.active is None):
                    yield model
            finally:
                self._is_mixing = False
                try:
                    self.use(None)
                finally:
                    for parameter in trains:
                        parameter.requires_grad_(True)

    def _replicas(self, name: str, survey: Survey) -> dict[nn.Module, nn.Module]:
        with self.using(name):
            return survey.replicas(name)

    # --- what is combined

    def _common_config(self, names: list[str]) -> dict[str, Any]:
        """The strategy of the first, after a look at whether the others' differ from it only in what is folded into the factors."""
        configs = [self._config(name) for name in names]
        for name, config in zip(names, configs, strict=True):
            if (difference := difference_of(configs[0], config)) is not None:
                raise StateError(f"{names[0]!r} and {name!r} {difference}: combine adapters of the same layers.")
        return configs[0]

    def _config(self, name: str) -> dict[str, Any]:
        strategy = self.strategy(name)
        if strategy is None:
            raise StateError(f"the strategy of {name!r} has no form as data, by which another adapter could have it: leave it out.")
        return strategy.to_config()

    def _content(self, name: str) -> _Content:
        with self.using(None) as model:
            parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
        with self.using(name) as model:
            sites = {site.key: site for site in _sites_of(model)}
            own = {key for site in sites.values() for key in site.own_keys}
            # not by requires_grad, which a user may have taken away for a while
            kept = {key: value for key, value in model.named_parameters() if key not in own and value is not parameters.get(key)}
            moved = [
                key
                for key, value in model.named_buffers()
                if key not in own and not (key in buffers and torch.equal(value, buffers[key]))
            ]
        alone = f"use it alone, with use({name!r})"
        if moved:
            raise StateError(
                f"adapter {name!r} has moved {', '.join(moved[:3])}, statistics of its own training, of which no weighted sum is "
                f"right: {alone}, or train with these layers in eval()."
            )
        if foreign := [key for key in kept if key not in parameters]:
            raise StateError(f"adapter {name!r} has {', '.join(foreign[:3])} of its own, which are no low-rank factors: {alone}.")
        if not sites:
            raise StateError(f"adapter {name!r} adapts no weight by low-rank factors: {alone}.")
        if dora := [site.place for site in sites.values() if site.dora]:
            raise StateError(
                f"adapter {name!r} uses DoRA at {dora[0]!r}, which rescales the weight, so that no factors and magnitudes have the "
                f"weighted sum of its updates: {alone}."
            )
        return _Content(sites, kept)

    def _write(self, name: str, factors: Mapping[str, Factors], kept: Mapping[str, Tensor]) -> None:
        with self.using(name) as model, torch.no_grad():
            for site in _sites_of(model):
                for target, value in zip((site.update.lora_B, site.update.lora_A), factors[site.key], strict=True):
                    target.copy_(value)
            parameters = dict(model.named_parameters())
            for key, value in kept.items():
                parameters[key].copy_(value)


def _sites_of(model: nn.Module) -> Iterator[_Site]:
    for name, module in model.named_modules():
        if isinstance(module, LoRA):
            for key in [key for key in module._parameters if key.endswith("lora_B")]:
                yield _site(name, key, module, key.removesuffix("lora_B"))


def _site(place: str, key: str, module: nn.Module, prefix: str) -> _Site:
    names = ("lora_B", "lora_A", "lora_B_init", "lora_A_init", "lora_settings")
    own: Any = types.SimpleNamespace(**{name: getattr(module, prefix + name, None) for name in names})
    lora_B, lora_A = LoRA.factors(own)
    start = f"{place}." if place else ""
    weight = f"{start}{prefix.removesuffix('_')}" if prefix else place
    return _Site(start + key, weight, Update(lora_B, lora_A, own.lora_settings.scaling), own.lora_settings.dora)


# --- combining

_OPTIONS: dict[str, tuple[str, ...]] = {"ties": ("density",), "dare": ("density", "generator"), "svd": ("rank",)}


def _check(weights: Mapping[str, float], method: str, rank: int | None, density: float, generator: torch.Generator | None) -> None:
    if not isinstance(method, str) or method not in METHODS:
        raise ParameterError(f"method must be one of {', '.join(METHODS)}, got {method!r}.")
    if not isinstance(weights, Mapping) or not weights or not all(isinstance(name, str) for name in weights):
        raise ParameterError(f'weights must name at least one adapter, as in {{"a": 0.7, "b": 0.3}}, got {weights!r}.')
    for name, weight in weights.items():
        if not is_number(weight):
            raise ParameterError(f"the weight of {name!r} must be a finite number of at most {LARGEST:.2g}, got {weight!r}.")
    if rank is not None and (method != "svd" or isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ParameterError(f"rank is a whole number from 1 up, for method 'svd' alone, got {rank!r} for {method!r}.")
    if not (is_number(density) and 0 < density <= 1):
        raise ParameterError(f"density must be a number in (0, 1], got {density!r}.")
    if not (generator is None or isinstance(generator, torch.Generator)):
        raise ParameterError(f"generator must be a torch.Generator, or None for torch's own, got {generator!r}.")


def _check_names(names: object) -> None:
    each = names if isinstance(names, Sequence) and not isinstance(names, str) else [names]
    wrong = [name for name in each if not (name is None or isinstance(name, str))]
    if each is not names or wrong:
        given = repr(wrong[0] if wrong else names)
        raise ParameterError(f'per_sample takes a list with one name, or None, for each sample, as in ["a", None, "a"], got {given}.')


def _refuse_complex(method: str, content: _Content) -> None:
    numbers = {site.place: site.update.lora_B for site in content.sites.values()} | dict(content.kept)
    if method in REAL_ONLY and (places := [place for place, value in numbers.items() if value.is_complex()]):
        others = ", ".join(repr(other) for other in METHODS if other not in REAL_ONLY)
        raise ParameterError(f"{method!r} elects signs, and the numbers at {places[0]!r} are complex: choose one of {others}.")


def _combine(sites: list[_Site], weights: list[float], method: str, options: dict[str, Any]) -> Factors:
    ranks = {site.rank for site in sites}
    if method in SAME_RANK and len(ranks) > 1:
        raise ParameterError(f"{method!r} needs one rank, and at {sites[0].place!r} they are {sorted(ranks)}: choose 'cat' or 'svd'.")
    given = options | {"rank": options["rank"] or max(ranks)}
    return METHODS[method]([site.update for site in sites], weights, **{key: given[key] for key in _OPTIONS.get(method, ())})
