"""From a name to the object behind it: exactly one plugin is imported, and its failure is told as its own.

A name is ``name``, or ``distribution:name`` where two packages use the same one.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

from gift_core.errors import (
    GiftWarning,
    InvalidPluginError,
    PluginBlockedError,
    PluginConflictError,
    PluginError,
    StrategyError,
    UnknownDemoError,
    UnknownFormatError,
    UnknownPluginError,
    UnknownStrategyError,
)
from gift_core.plugins.discovery import DEMOS, FORMATS, NOUNS, PLUGINS, STRATEGIES, BlockedEntry, Discovery, Provider, discover
from gift_core.plugins.hook_plugins import CORE_NAMES, plugins_by_hand, registered_things
from gift_core.plugins.loading import check_generation, fields, load_callable
from gift_core.plugins.names import CORE, did_you_mean, is_called, normalise
from gift_core.plugins.settings import PluginSettings, isolation

_registered: dict[str, Callable[..., Any]] = {}


def register_strategy(name: str, factory: Callable[..., Any], *, replace: bool = False) -> None:
    """Make a strategy known by name in this process, without a package: for notebooks and tests.

    Args:
        name: how it is called from now on.
        factory: the strategy's class, or a function that returns a strategy.
        replace: allow to replace what was registered under the name before, as a notebook cell does that is run again. An
            installed package's name is never replaced.

    Raises:
        StrategyError: if the name is no name, or the factory cannot be called.
        PluginConflictError: if the name is taken.
    """
    if not isinstance(name, str) or not name.strip() or ":" in name:
        raise StrategyError(f"a strategy's name is text without a colon, got {name!r}.")
    if not callable(factory):
        raise StrategyError(f"strategy {name!r} is {factory!r}: register its class, or a function that returns a strategy.")
    if _registered.get(name, factory) is not factory and not replace:
        raise PluginConflictError(
            f"a strategy named {name!r} is registered already: {_describe(_registered[name])}.",
            name=name,
            hint="Take another name, or pass replace=True.",
        )
    for provider in discover(STRATEGIES).providers:
        if provider.name == name:
            message = f"a strategy named {name!r} is installed already, from {provider.distribution} {provider.version}."
            raise PluginConflictError(message, **fields(provider), hint="Take another name.")
    check_generation(factory, _provider_of_registered(name, factory))
    _registered[name] = factory


def unregister_strategy(name: str) -> None:
    """Take back what `register_strategy` did.

    Raises:
        UnknownStrategyError: if nothing is registered under the name.
    """
    if name not in _registered:
        _unknown(name, STRATEGIES, _registered)
    del _registered[name]


def strategy_names(*, hooks: bool = False) -> list[str]:
    """The names that can be used, sorted: those of installed packages and those registered in this process.

    Args:
        hooks: also those that plugins register by hook, which imports and runs the plugins.
    """
    names = {provider.name for provider in discover(STRATEGIES).providers} | _registered.keys()
    return sorted(names | ({provider.name for provider, _ in registered_things("strategy")} if hooks else set()))


@contextlib.contextmanager
def isolated_plugins() -> Iterator[PluginSettings]:
    """A context in which nothing that is installed is seen, only the core's own names and what is registered inside.

    What was registered before is hidden, and what is registered inside is forgotten when the context ends.
    """
    registered, by_hand = dict(_registered), plugins_by_hand()
    plugins = dict(by_hand)
    _registered.clear()
    by_hand.clear()
    try:
        with isolation() as settings:
            yield settings
    finally:
        _registered.clear()
        _registered.update(registered)
        by_hand.clear()
        by_hand.update(plugins)


def find_provider(name: str, group: str = STRATEGIES, *, hooks: bool = True) -> Provider:
    """Find who provides a name; reads metadata, and imports plugins with hooks only if no entry point provides the name.

    Args:
        name: ``name`` or ``distribution:name``.
        group: the entry-point group to search.
        hooks: whether plugins may be imported, to ask them for strategies that no entry point provides.

    Raises:
        UnknownStrategyError: if there is no such strategy; the message has the nearest names and all installed ones.
        UnknownDemoError: likewise for a demo; `UnknownFormatError` for a file format; `UnknownPluginError` for a plugin with hooks.
        PluginConflictError: if two distributions provide the bare name.
        PluginBlockedError: if a setting keeps it from being used.
        InvalidPluginError: if there is such an entry and it cannot be read.
    """
    if group == STRATEGIES and name in _registered:
        return _provider_of_registered(name, _registered[name])
    found = discover(group)
    matches = [one for one in found.providers if is_called(name, one.distribution, one.name)]
    by_hook: list[Provider] = []
    if hooks and not matches and group == STRATEGIES and not any(_is_blocked(name, entry) for entry in found.blocked):
        by_hook = [one for one, _ in registered_things("strategy")]
        matches = [one for one in by_hook if is_called(name, one.distribution, one.name)]
    own = [provider for provider in matches if normalise(provider.distribution) == CORE]
    if len(matches) > 1 and not own:
        _conflict(name, matches)
    if not matches:
        _refuse_blocked(name, found)
        _refuse_broken(name, found)
        _unknown(name, group, [one.name for one in (*found.providers, *by_hook)] + (list(_registered) if group == STRATEGIES else []))
    return (own or matches)[0]


def find_thing(kind: str, name: str) -> Callable[..., Any]:
    """Find a check or an action that a plugin registered by hook; the core's own are in `gift_core.factories`.

    Args:
        kind: "check" or "action".
        name: ``name`` or ``distribution:name``.

    Raises:
        UnknownPluginError: if no plugin registered it; the message has the nearest names.
        PluginConflictError: if two did.
    """
    things = list(registered_things(kind))
    matches = [(one, thing) for one, thing in things if is_called(name, one.distribution, one.name)]
    if len(matches) > 1:
        _conflict(name, [provider for provider, _ in matches], kind)
    if not matches:
        known = sorted({one.name for one, _ in things} | CORE_NAMES[kind])
        hint = "Others come with packages, which register them by hook."
        message = f"no {kind} named {name!r}{did_you_mean(name, known)}\nKnown: {', '.join(known)}."
        raise UnknownPluginError(message, name=name, hint=hint)
    return matches[0][1]


def load_strategy(name: str) -> object:
    """Import the strategy of that name, and no other plugin.

    Args:
        name: ``name`` or ``distribution:name``.

    Returns:
        Its class, or the function that makes it.

    Raises:
        PluginError: if it is unknown, blocked, in conflict, cannot be imported, is not what its entry point promises, or was written
            for another generation of the plugin API; each has its own class.
    """
    if name in _registered:
        return _registered[name]
    provider = find_provider(name)
    if (official := discover(STRATEGIES).near_miss(provider)) is not None:
        text = f"strategy {name!r} is {provider.distribution}'s; {official.name!r}, nearly the same name, is {official.distribution}'s."
        warnings.warn(f"{text} If you meant that one, write {official.name!r}.", GiftWarning, stacklevel=2)
    return load(provider)


def load(provider: Provider, *, extra: str | None = None) -> Callable[..., Any]:
    """Import what a provider's entry point names.

    Args:
        provider: from `find_provider`.
        extra: the extra of its distribution that brings what it needs, for the hint if something is missing.

    Raises:
        PluginLoadError: if its module, or something that its module needs, cannot be imported.
        InvalidPluginError: if its module lacks the attribute, or that cannot be called.
        IncompatiblePluginError: if it was written for another generation of the plugin API.
    """
    if provider.hook_plugin:
        thing = next(thing for one, thing in registered_things("strategy") if one == provider)
        check_generation(thing, provider)
        return thing
    if not provider.distribution and provider.name in _registered:
        return _registered[provider.name]
    return load_callable(provider, extra=extra)


def provider_of(strategy: object) -> Provider | None:
    """Find who provides a strategy, for the record: by its name, its class, its factory or an instance of its class.

    Returns:
        The provider; None for a strategy that is neither installed nor registered.

    Raises:
        PluginError: if a name was given and it is unknown or in conflict.
    """
    if isinstance(strategy, str):
        return find_provider(strategy)
    candidates = [strategy, type(strategy)]
    for name, factory in _registered.items():
        if any(factory is candidate for candidate in candidates) or getattr(strategy, "name", None) == name:
            return _provider_of_registered(name, factory)
    found = discover(STRATEGIES).providers
    tests = (_imports_as, _names, _gives)
    return next((provider for test in tests for provider in found if test(provider, candidates)), None)


# --- finding


def _provider_of_registered(name: str, factory: Callable[..., Any]) -> Provider:
    return Provider(name, _describe(factory), STRATEGIES, "", "", "registered in this process")


def _describe(factory: Callable[..., Any]) -> str:
    return f"{getattr(factory, '__module__', '')}:{getattr(factory, '__qualname__', repr(factory))}"


def _conflict(name: str, matches: list[Provider], kind: str | None = None) -> NoReturn:
    noun = kind or NOUNS.get(matches[0].group, "plugin")
    sources = " and ".join(f"{provider.distribution} {provider.version}" for provider in matches)
    ways = " or ".join(repr(provider.identity) for provider in matches)
    raise PluginConflictError(
        f"the {noun} name {name!r} is provided by {sources}.",
        name=name,
        distribution=", ".join(provider.distribution for provider in matches),
        version=", ".join(provider.version for provider in matches),
        entry_point=", ".join(provider.value for provider in matches),
        hint=f"Say which one is meant, {ways}, or uninstall the other.",
    )


def _is_blocked(name: str, entry: BlockedEntry) -> bool:
    return is_called(name, entry.provider.distribution, entry.provider.name)


def _refuse_blocked(name: str, found: Discovery) -> None:
    for entry in found.blocked:
        if _is_blocked(name, entry):
            one = entry.provider
            message = f"{NOUNS.get(one.group, 'plugin')} {name!r} of {one.distribution} {one.version} is blocked: {entry.reason}."
            raise PluginBlockedError(message, **fields(one), hint="Change that variable, or the setting of the same meaning.")


def _refuse_broken(name: str, found: Discovery) -> None:
    distribution, _, bare = name.rpartition(":")
    for entry in found.broken:
        if entry.name == bare and (not distribution or normalise(entry.distribution) == normalise(distribution)):
            raise InvalidPluginError(
                f"{NOUNS.get(entry.group, 'plugin')} {name!r} of {entry.distribution} cannot be used: {entry.reason}.",
                name=entry.name,
                distribution=entry.distribution,
                version=entry.version or None,
                entry_point=entry.value,
                hint=f"Reinstall it (pip install --force-reinstall {entry.distribution}), or tell its authors.",
            )


def _unknown(name: str, group: str, names: Iterable[str]) -> NoReturn:
    installed, bare = sorted(set(names)), name.rpartition(":")[2].strip()
    noun = NOUNS.get(group, "plugin")
    message = f"no {noun} named {name!r}{did_you_mean(bare, installed)}\nInstalled: {', '.join(installed) or 'none'}."
    errors: dict[str, tuple[type[PluginError], str]] = {
        STRATEGIES: (UnknownStrategyError, f"Others come with packages: pip install gift-{normalise(ascii(bare)[1:-1])}-plugin."),
        PLUGINS: (UnknownPluginError, "See gift list --all."),
        DEMOS: (UnknownDemoError, "Demos come with strategy packages; see gift demo --list."),
        FORMATS: (UnknownFormatError, "Formats come with strategy packages; see gift list --all."),
    }
    error, hint = errors[group]
    raise error(message, name=name, hint=hint)


# --- provenance


def _imports_as(provider: Provider, candidates: list[object]) -> bool:
    """Whether what is imported already under the entry point's module and attribute is the strategy; imports nothing."""
    target: object = sys.modules.get(provider.module)
    for part in filter(None, provider.attribute.split(".")):
        target = vars(target).get(part) if hasattr(target, "__dict__") else None
    return any(target is candidate for candidate in candidates)


def _names(provider: Provider, candidates: list[object]) -> bool:
    """Whether the strategy has the entry point's name and is defined in its package, as what a function returns is."""
    return _shares_package(provider, candidates) and getattr(candidates[0], "name", None) == provider.name


def _gives(provider: Provider, candidates: list[object]) -> bool:
    """Whether loading gives the strategy; only the package that defines it is loaded, which an import of it has run before."""
    if not _shares_package(provider, candidates):
        return False
    try:
        target = load(provider)
    except PluginError:
        return False
    return any(target is candidate for candidate in candidates)


def _shares_package(provider: Provider, candidates: list[object]) -> bool:
    tops = {str(getattr(candidate, "__module__", "")).partition(".")[0] for candidate in candidates}
    return provider.module.partition(".")[0] in tops
