"""A plugin with hooks, held against the specification before anything of it is used.

pluggy tells a misspelt hook and an unknown argument. What it passes over, and what would then never be called or be called with
nothing, is refused here: a hook without its mark, an argument with a default, a wrapper, a generator, a class instead of an object.
"""

from __future__ import annotations

import inspect

import pluggy
from pluggy import HookImpl

from gift_core.errors import InvalidPluginError
from gift_core.plugins import hooks
from gift_core.plugins.discovery import Provider
from gift_core.plugins.loading import fields, subject
from gift_core.plugins.names import did_you_mean
from gift_core.plugins.settings import PROJECT

_PREFIX = "gift_"


def hook_names() -> list[str]:
    """The hooks there are, in the order of their specification."""
    return [name for name in vars(hooks) if name.startswith(_PREFIX)]


def new_manager() -> pluggy.PluginManager:
    """A plugin manager that knows the hooks and no plugin."""
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(hooks)
    return manager


def validate(plugin: object, provider: Provider) -> None:
    """Refuse a plugin that could not be called as it means to be.

    Raises:
        InvalidPluginError: if it has no hook, an unknown one, or one with a wrong signature; the message names the hook and the nearest
            real one.
    """
    if isinstance(plugin, type):
        raise _invalid(provider, f"names the class {plugin.__name__}", "Name a module, or an instance of the class.")
    try:
        _refuse_unmarked(plugin, provider)
        impls = _implementations(plugin)
        for name, impl in impls:
            _check(name, impl, provider)
        manager = new_manager()
        manager.register(plugin, provider.identity)
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise _invalid(provider, f"does not follow the specification: {' '.join(str(error).split())}", _SEE) from error
    except InvalidPluginError:
        raise
    except Exception as error:  # an object may raise when its attributes are read
        raise _invalid(provider, f"cannot be read: {type(error).__name__}: {error}", _SEE) from error
    if not impls:
        raise _invalid(provider, "implements no hook", f"Mark its functions with @hookimpl; the hooks are {', '.join(hook_names())}.")


_SEE = "See the documentation of gift_core.plugins.hooks, and tell its authors."


def _implementations(plugin: object) -> list[tuple[str, HookImpl]]:
    manager = pluggy.PluginManager(PROJECT)  # without the specification, so that ours is what tells of a mistake first
    manager.register(plugin)
    callers = [caller for caller in vars(manager.hook).values() if isinstance(caller, pluggy.HookCaller)]
    return [(caller.name, impl) for caller in callers for impl in caller.get_hookimpls()]


def _refuse_unmarked(plugin: object, provider: Provider) -> None:
    for name in dir(plugin):
        function = inspect.getattr_static(plugin, name, None)
        if name.startswith(_PREFIX) and inspect.isfunction(function) and not hasattr(function, f"{PROJECT}_impl"):
            known = did_you_mean(name, hook_names()) if name not in hook_names() else "."
            raise _invalid(provider, f"has {name}, which is not marked{known}", "Mark it with @hookimpl, or give it another name.")


def _check(name: str, impl: HookImpl, provider: Provider) -> None:
    if name not in hook_names():
        known = did_you_mean(name, hook_names())
        raise _invalid(provider, f"has the hook {name!r}, which does not exist{known}", f"The hooks are {', '.join(hook_names())}.")
    if impl.wrapper or impl.hookwrapper:
        raise _invalid(provider, f"has {name} as a wrapper, around other plugins' hooks", "Write a plain function.")
    if inspect.isgeneratorfunction(impl.function) or inspect.iscoroutinefunction(impl.function):
        raise _invalid(provider, f"has {name} as a generator or coroutine, whose body would not run", "Write a plain function.")
    _check_signature(impl, name, provider)


def _check_signature(impl: HookImpl, name: str, provider: Provider) -> None:
    allowed = list(inspect.signature(getattr(hooks, name)).parameters)
    for parameter in inspect.signature(impl.function).parameters.values():
        if parameter.name not in allowed and parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            known = did_you_mean(parameter.name, allowed)
            what = f"has {name} with the argument {parameter.name!r}, which the hook does not get{known}"
        elif parameter.kind is not parameter.POSITIONAL_OR_KEYWORD:
            what = f"has {name} with {parameter}, and a hook's arguments are named one by one."
        elif parameter.default is not parameter.empty:
            what = f"has {name} with a default for {parameter.name!r}, which would keep it from being passed."
        else:
            continue
        raise _invalid(provider, what, f"Write def {name}({', '.join(allowed)}), or fewer of these.")


def _invalid(provider: Provider, what: str, hint: str) -> InvalidPluginError:
    stop = "" if what.endswith((".", "?")) else "."
    return InvalidPluginError(f"{subject(provider)} {what}{stop}", **fields(provider), hint=hint)
