"""Importing what one entry point names; a failure is told as the plugin's own.

Nothing here finds a name: it is given a provider, and imports that one and no other.
"""

from __future__ import annotations

import importlib
import time
import traceback
from collections.abc import Callable
from typing import Any

from gift_core.errors import IncompatiblePluginError, InvalidPluginError, PluginLoadError
from gift_core.plugins.discovery import NOUNS, Provider
from gift_core.plugins.names import nearest
from gift_core.plugins.settings import trace

#: The generation of the plugin API that this core speaks.
PLUGIN_API = 1


def load_object(provider: Provider, *, extra: str | None = None) -> object:
    """Import what a provider's entry point names, of whatever kind it is.

    Args:
        provider: from `find_provider`.
        extra: the extra of its distribution that brings what it needs, for the hint if something is missing.

    Raises:
        PluginLoadError: if its module, or something that its module needs, cannot be imported.
        InvalidPluginError: if its module lacks the attribute.
        IncompatiblePluginError: if it was written for another generation of the plugin API.
    """
    start = time.perf_counter()
    target = _attribute(_import(provider, extra), provider)
    check_generation(target, provider)
    trace(f"imported {subject(provider)} from {provider.value} in {time.perf_counter() - start:.3f} s")
    return target


def load_callable(provider: Provider, *, extra: str | None = None) -> Callable[..., Any]:
    """Import what a provider's entry point names, which must be a class or a function.

    Raises:
        PluginError: as `load_object` does; `InvalidPluginError` also if it cannot be called.
    """
    target = load_object(provider, extra=extra)
    if not callable(target):
        message = f"{subject(provider)} is {target!r}, neither a class nor a function."
        raise InvalidPluginError(message, **fields(provider), hint=tell_authors(provider))
    return target


def dependency_error(provider: Provider, error: ModuleNotFoundError, extra: str | None = None) -> PluginLoadError:
    """The error that tells which module a plugin misses, and the command that brings it."""
    missing = error.name or str(error)
    command = f"pip install '{provider.distribution}[{extra}]'" if extra else f"pip install --upgrade {provider.distribution}"
    hint = f"Try: {command}" if extra else f"Try: {command}, or install what provides {missing!r}."
    message = f"{subject(provider)} needs the module {missing!r}, a dependency that is not installed."
    return PluginLoadError(message, **fields(provider), hint=hint)


def _import(provider: Provider, extra: str | None) -> object:
    try:
        return importlib.import_module(provider.module)
    except ModuleNotFoundError as error:
        if _is_own(provider, error.name):
            raise PluginLoadError(
                f"{subject(provider)} names its own module {error.name!r}, which is not there.",
                **fields(provider),
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
                f"{subject(provider)} names {provider.attribute!r}, and {provider.module} has no such attribute"
                + (f"; the nearest is {similar[0]!r}." if similar else "."),
                **fields(provider),
                hint=tell_authors(provider),
            ) from error
        except (Exception, SystemExit) as error:  # a module may import on access
            raise _load_error(provider, error) from error
    return target


def _load_error(provider: Provider, error: BaseException) -> PluginLoadError:
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    what = "ended the program" if isinstance(error, SystemExit) else f"raised {type(error).__name__}: {error}"
    return PluginLoadError(
        f"{subject(provider)} could not be imported: {provider.module} {what}{place}.",
        **fields(provider),
        hint=f"The plugin is at fault, not your code: pip install --upgrade {provider.distribution}, or tell its authors.",
    )


def check_generation(target: object, provider: Provider) -> None:
    """Refuse what was written for another generation of the plugin API.

    Raises:
        IncompatiblePluginError: if it was; what declares none is taken to be of this one.
    """
    generation = getattr(target, "plugin_api", PLUGIN_API)
    if generation != PLUGIN_API:
        raise IncompatiblePluginError(
            f"{subject(provider)} was written for plugin API {generation!r}; this gift-core speaks {PLUGIN_API}.",
            **fields(provider),
            hint=f"Upgrade both: pip install --upgrade gift-core {provider.distribution}".rstrip(),
        )


def _is_own(provider: Provider, missing: str | None) -> bool:
    top = provider.module.partition(".")[0]
    return missing is not None and missing.partition(".")[0] == top


def subject(provider: Provider) -> str:
    """A provider as messages name it: kind, name, distribution and version."""
    noun = NOUNS.get(provider.group, "plugin")
    source = f" of {provider.distribution} {provider.version}".rstrip() if provider.distribution else ""
    return f"{noun} {provider.name!r}{source}"


def tell_authors(provider: Provider) -> str:
    """The hint where the plugin, and not its user, is at fault."""
    return f"Its entry point is {provider.value!r}; tell the authors of {provider.distribution}, or try a newer version."


def fields(provider: Provider) -> dict[str, str | None]:
    """What every `PluginError` says of the plugin it is about."""
    return {
        "name": provider.name,
        "distribution": provider.distribution or None,
        "version": provider.version or None,
        "entry_point": provider.value,
    }
