"""From a name to the object behind it: exactly one plugin is imported, and its failure is told as its own.

A name is ``name``, or ``distribution:name`` where two packages use the same one.
"""

from __future__ import annotations

import difflib
import importlib
import sys
import traceback
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from gift_core.errors import (
    IncompatiblePluginError,
    InvalidPluginError,
    PluginConflictError,
    PluginError,
    PluginLoadError,
    StrategyError,
    UnknownStrategyError,
)
from gift_core.plugins.discovery import DEMOS, STRATEGIES, Discovery, Provider, discover, normalise

#: The generation of the plugin API that this core speaks.
PLUGIN_API = 1

#: The distribution whose names no other can take.
CORE = "gift-core"

_NOUNS = {STRATEGIES: "strategy", DEMOS: "demo"}
_registered: dict[str, Callable[..., Any]] = {}


class UnknownDemoError(PluginError, LookupError):
    """No installed package provides a demo of that name."""


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
            raise PluginConflictError(message, **_fields(provider), hint="Take another name.")
    _check_generation(factory, _provider_of_registered(name, factory))
    _registered[name] = factory


def unregister_strategy(name: str) -> None:
    """Take back what `register_strategy` did.

    Raises:
        UnknownStrategyError: if nothing is registered under the name.
    """
    if name not in _registered:
        _unknown(name, STRATEGIES, _registered)
    del _registered[name]


def strategy_names() -> list[str]:
    """The names that can be used, sorted: those of installed packages and those registered in this process."""
    return sorted({provider.name for provider in discover(STRATEGIES).providers} | _registered.keys())


def find_provider(name: str, group: str = STRATEGIES) -> Provider:
    """Find who provides a name; reads metadata and imports nothing of it.

    Args:
        name: ``name`` or ``distribution:name``.
        group: the entry-point group to search.

    Raises:
        UnknownStrategyError: if there is no such strategy; the message has the nearest names and all installed ones.
        UnknownDemoError: likewise for a demo.
        PluginConflictError: if two distributions provide the bare name.
        InvalidPluginError: if there is such an entry and it cannot be read.
    """
    if group == STRATEGIES and name in _registered:
        return _provider_of_registered(name, _registered[name])
    found = discover(group)
    matches = [provider for provider in found.providers if _is_called(provider, name)]
    own = [provider for provider in matches if normalise(provider.distribution) == CORE]
    if len(matches) > 1 and not own:
        _conflict(name, matches)
    if not matches:
        _refuse_broken(name, found)
        _unknown(name, group, [one.name for one in found.providers] + (list(_registered) if group == STRATEGIES else []))
    return (own or matches)[0]


def load_strategy(name: str) -> object:
    """Import the strategy of that name, and no other plugin.

    Args:
        name: ``name`` or ``distribution:name``.

    Returns:
        Its class, or the function that makes it.

    Raises:
        PluginError: if it is unknown, in conflict, cannot be imported, is not what its entry point promises, or was written for
            another generation of the plugin API; each has its own class.
    """
    if name in _registered:
        return _registered[name]
    return load(find_provider(name))


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
    if not provider.distribution and provider.name in _registered:
        return _registered[provider.name]
    target = _attribute(_import(provider, extra), provider)
    if not callable(target):
        message = f"{_subject(provider)} is {target!r}, neither a class nor a function."
        raise InvalidPluginError(message, **_fields(provider), hint=_tell_authors(provider))
    _check_generation(target, provider)
    return target


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


def dependency_error(provider: Provider, error: ModuleNotFoundError, extra: str | None = None) -> PluginLoadError:
    """The error that tells which module a plugin misses, and the command that brings it."""
    missing = error.name or str(error)
    command = f"pip install '{provider.distribution}[{extra}]'" if extra else f"pip install --upgrade {provider.distribution}"
    hint = f"Try: {command}" if extra else f"Try: {command}, or install what provides {missing!r}."
    message = f"{_subject(provider)} needs the module {missing!r}, a dependency that is not installed."
    return PluginLoadError(message, **_fields(provider), hint=hint)


def nearest(name: str, names: Iterable[str]) -> list[str]:
    """Up to three of the names, the most similar first."""
    return difflib.get_close_matches(name, sorted(set(names)), n=3, cutoff=0.5)


# --- finding


def _is_called(provider: Provider, name: str) -> bool:
    distribution, colon, bare = name.rpartition(":")
    return provider.name == bare and (not colon or normalise(provider.distribution) == normalise(distribution))


def _provider_of_registered(name: str, factory: Callable[..., Any]) -> Provider:
    return Provider(name, _describe(factory), STRATEGIES, "", "", "registered in this process")


def _describe(factory: Callable[..., Any]) -> str:
    return f"{getattr(factory, '__module__', '')}:{getattr(factory, '__qualname__', repr(factory))}"


def _conflict(name: str, matches: list[Provider]) -> NoReturn:
    noun = _NOUNS.get(matches[0].group, "plugin")
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


def _refuse_broken(name: str, found: Discovery) -> None:
    distribution, _, bare = name.rpartition(":")
    for entry in found.broken:
        if entry.name == bare and (not distribution or normalise(entry.distribution) == normalise(distribution)):
            raise InvalidPluginError(
                f"{_NOUNS.get(entry.group, 'plugin')} {name!r} of {entry.distribution} cannot be used: {entry.reason}.",
                name=entry.name,
                distribution=entry.distribution,
                version=entry.version or None,
                entry_point=entry.value,
                hint=f"Reinstall it (pip install --force-reinstall {entry.distribution}), or tell its authors.",
            )


def _unknown(name: str, group: str, names: Iterable[str]) -> NoReturn:
    installed = sorted(set(names))
    similar = nearest(name.rpartition(":")[2], installed)
    noun = _NOUNS.get(group, "plugin")
    question = f"; did you mean {' or '.join(map(repr, similar))}?" if similar else "."
    message = f"no {noun} named {name!r}{question}\nInstalled: {', '.join(installed) or 'none'}."
    if group != STRATEGIES:
        raise UnknownDemoError(message, name=name, hint="Demos come with strategy packages; see gift demo --list.")
    package = normalise(name.rpartition(":")[2].strip())
    raise UnknownStrategyError(message, name=name, hint=f"Others come with packages: pip install gift-{package}-plugin.")


# --- loading


def _import(provider: Provider, extra: str | None) -> object:
    try:
        return importlib.import_module(provider.module)
    except ModuleNotFoundError as error:
        if _is_own(provider, error.name):
            raise PluginLoadError(
                f"{_subject(provider)} names its own module {error.name!r}, which is not there.",
                **_fields(provider),
                hint=f"The installation is incomplete: pip install --force-reinstall {provider.distribution}",
            ) from error
        raise dependency_error(provider, error, extra) from error
    except (Exception, SystemExit) as error:
        raise _load_error(provider, error) from error


def _attribute(module: object, provider: Provider) -> object:
    target = module
    for part in filter(None, provider.attribute.split(".")):
        try:
            target = getattr(target, part)
        except AttributeError as error:
            similar = nearest(part, [name for name in dir(target) if not name.startswith("_")])
            raise InvalidPluginError(
                f"{_subject(provider)} names {provider.attribute!r}, and {provider.module} has no such attribute"
                + (f"; the nearest is {similar[0]!r}." if similar else "."),
                **_fields(provider),
                hint=_tell_authors(provider),
            ) from error
        except (Exception, SystemExit) as error:  # a module may import on access
            raise _load_error(provider, error) from error
    return target


def _load_error(provider: Provider, error: BaseException) -> PluginLoadError:
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    what = "ended the program" if isinstance(error, SystemExit) else f"raised {type(error).__name__}: {error}"
    return PluginLoadError(
        f"{_subject(provider)} could not be imported: {provider.module} {what}{place}.",
        **_fields(provider),
        hint=f"The plugin is at fault, not your code: pip install --upgrade {provider.distribution}, or tell its authors.",
    )


def _check_generation(target: object, provider: Provider) -> None:
    generation = getattr(target, "plugin_api", PLUGIN_API)
    if generation != PLUGIN_API:
        raise IncompatiblePluginError(
            f"{_subject(provider)} was written for plugin API {generation!r}; this gift-core speaks {PLUGIN_API}.",
            **_fields(provider),
            hint=f"Upgrade both: pip install --upgrade gift-core {provider.distribution}".rstrip(),
        )


def _is_own(provider: Provider, missing: str | None) -> bool:
    top = provider.module.partition(".")[0]
    return missing is not None and missing.partition(".")[0] == top


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


def _subject(provider: Provider) -> str:
    noun = _NOUNS.get(provider.group, "plugin")
    source = f" of {provider.distribution} {provider.version}".rstrip() if provider.distribution else ""
    return f"{noun} {provider.name!r}{source}"


def _tell_authors(provider: Provider) -> str:
    return f"Its entry point is {provider.value!r}; tell the authors of {provider.distribution}, or try a newer version."


def _fields(provider: Provider) -> dict[str, str | None]:
    return {
        "name": provider.name,
        "distribution": provider.distribution or None,
        "version": provider.version or None,
        "entry_point": provider.value,
    }
