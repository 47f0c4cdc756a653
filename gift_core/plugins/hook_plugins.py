"""The plugins with hooks: loaded on first need, each by itself, and called one by one.

pluggy and the plugins are imported only if there is an entry point in the group ``gift.plugins``, or a plugin was registered by hand.
What was loaded is kept until something is installed, ``sys.path`` changes or a setting does.
"""

from __future__ import annotations

import contextvars
import dataclasses
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from gift_core.errors import GiftWarning, InvalidPluginError, PluginConflictError, PluginError, PluginLoadError
from gift_core.plugins.discovery import PLUGINS, STRATEGIES, Provider, discover, path_state
from gift_core.plugins.loading import check_generation, fields, load_object, subject, tell_authors
from gift_core.plugins.settings import current_settings, trace

if TYPE_CHECKING:
    import pluggy

#: What a plugin may register, and the hook that does it.
KINDS = {"strategy": "gift_register_strategies", "check": "gift_register_checks", "action": "gift_register_actions"}

#: The names that the core gives to checks and actions in strategy files.
CORE_NAMES = {
    "check": frozenset(
        {
            "everything",
            "is_root",
            "class_is",
            "is_instance",
            "name_is",
            "name_contains",
            "name_matches",
            "lies_in",
            "layer_index",
            "parameter_name_is",
            "parameter_name_contains",
        }
    ),
    "action": frozenset({"keep_trainable", "freeze"}),
}


@dataclasses.dataclass(frozen=True)
class HookPlugin:
    """One plugin with hooks, after it was tried.

    Attributes:
        provider: where it comes from.
        plugin: the module or object; None if it cannot be used.
        error: why it cannot be used, or None.
        things: what it registered: kind, then name, then the thing.
    """

    provider: Provider
    plugin: object | None
    error: PluginError | None
    things: dict[str, dict[str, Callable[..., Any]]]


@dataclasses.dataclass(frozen=True)
class _Loaded:
    plugins: tuple[HookPlugin, ...] = ()
    manager: pluggy.PluginManager | None = None


_by_hand: dict[str, tuple[Provider, object]] = {}
_NONE = _Loaded()
_state: tuple[object, _Loaded] = (None, _NONE)
_told = _NONE
_lock = threading.Lock()
_loading: contextvars.ContextVar[bool] = contextvars.ContextVar("gift_plugins_loading", default=False)


def hook_plugins(*, tell: bool = True) -> tuple[HookPlugin, ...]:
    """Every plugin with hooks that may be used, loaded; a broken one is there with its error.

    Args:
        tell: whether broken ones are also warned about, or raised if the settings are strict.

    Raises:
        PluginError: of a broken plugin, if the settings are strict.
    """
    return (_loaded() if tell else _load()).plugins


def registered_things(kind: str, *, tell: bool = True) -> Iterator[tuple[Provider, Callable[..., Any]]]:
    """What plugins registered of a kind: "strategy", "check" or "action"; each with its name; ``tell`` as in `hook_plugins`."""
    for one in hook_plugins(tell=tell):
        for name, thing in one.things.get(kind, {}).items():
            group = STRATEGIES if kind == "strategy" else f"{PLUGINS}.{kind}"
            yield dataclasses.replace(one.provider, name=name, group=group, hook_plugin=one.provider.name), thing


def call_hooks(hook: str, **arguments: Any) -> None:
    """Call a life-cycle hook of every plugin, in pluggy's order; one that raises is warned about and stops no other.

    Raises:
        PluginLoadError: if one raises and the settings are strict.
    """
    manager = _loaded().manager
    if manager is None:
        return
    providers = {id(one.plugin): one.provider for one in hook_plugins()}
    for impl in reversed(getattr(manager.hook, hook).get_hookimpls()):
        try:
            _call(impl.function, hook, providers[id(impl.plugin)], {name: arguments[name] for name in impl.argnames})
        except PluginError as error:
            _report(error)


def register_plugin(plugin: object, name: str | None = None) -> None:
    """Use a module or an object with hooks in this process, without a package: for notebooks and tests.

    Args:
        plugin: the module or object.
        name: what messages call it; by default its own name.

    Raises:
        PluginError: if it is invalid, of another generation, or one of its registration hooks raises; nothing of it is kept then.
    """
    called = name or str(getattr(plugin, "__name__", type(plugin).__name__))
    if called in _by_hand:
        raise PluginConflictError(f"a plugin named {called!r} is registered already.", name=called, hint="Give another name.")
    provider = Provider(called, called, PLUGINS, "", "", "registered in this process")
    check_generation(plugin, provider)
    tried = _try(provider, lambda: plugin)
    if tried.error is not None:
        raise tried.error
    _by_hand[called] = (provider, plugin)


def unregister_plugin(name: str) -> None:
    """Take back what `register_plugin` did.

    Raises:
        InvalidPluginError: if nothing is registered under the name.
    """
    if name not in _by_hand:
        raise InvalidPluginError(
            f"no plugin named {name!r} is registered in this process.",
            name=name,
            hint="Register it first: register_plugin(plugin, name).",
        )
    del _by_hand[name]


def plugins_by_hand() -> dict[str, tuple[Provider, object]]:
    """What `register_plugin` was given; the dictionary itself, for `isolated_plugins` to exchange."""
    return _by_hand


# --- loading


def _loaded() -> _Loaded:
    """What `_load` gives; broken plugins are told of once, or each time if the settings are strict."""
    global _told
    loaded = _load()
    if loaded is not _told or current_settings().strict:
        _told = loaded
        for one in loaded.plugins:
            if one.error is not None:
                _report(one.error)
    return loaded


def _load() -> _Loaded:
    global _state
    if _loading.get():  # a plugin that enables or asks for a strategy while it is imported sees no plugins
        return _NONE
    with _lock:  # another thread waits until everything is loaded
        key = (path_state(), current_settings(), tuple((name, id(plugin)) for name, (_, plugin) in _by_hand.items()))
        if _state[0] != key:
            tried = [try_plugin(one) for one in discover(PLUGINS).providers]
            tried += [_try(one, lambda plugin=plugin: plugin) for one, plugin in _by_hand.values()]  # type: ignore[misc]
            _state = (key, _Loaded(tuple(tried), _managed(tried)) if tried else _NONE)
        return _state[1]


def try_plugin(provider: Provider) -> HookPlugin:
    """Load, validate and register one plugin; its error is in the result, and nothing raises."""
    return _try(provider, lambda: load_object(provider))


def _report(error: PluginError) -> None:
    if current_settings().strict:
        raise error
    warnings.warn(str(error), GiftWarning, stacklevel=2)


def _try(provider: Provider, load: Callable[[], object]) -> HookPlugin:
    token = _loading.set(True)
    try:
        plugin = load()
        from gift_core.plugins.validation import validate

        validate(plugin, provider)
        return HookPlugin(provider, plugin, None, {kind: _registered(plugin, kind, provider) for kind in KINDS})
    except PluginError as error:
        return HookPlugin(provider, None, error, {})
    finally:
        _loading.reset(token)


def _managed(tried: list[HookPlugin]) -> pluggy.PluginManager:
    from gift_core.plugins.validation import new_manager

    manager = new_manager()
    for one in tried:
        # two entry points may name one module, which is called once
        if one.plugin is not None and not manager.is_registered(one.plugin):
            manager.register(one.plugin, one.provider.identity)
            manager.check_pending()
    return manager


def _registered(plugin: object, kind: str, provider: Provider) -> dict[str, Callable[..., Any]]:
    from gift_core.plugins.validation import new_manager

    manager, registry = new_manager(), _Registry(kind, provider)
    manager.register(plugin, provider.identity)
    for impl in getattr(manager.hook, KINDS[kind]).get_hookimpls():
        _call(impl.function, KINDS[kind], provider, {"registry": registry} if impl.argnames else {})
    return registry.things


def _call(function: Callable[..., Any], hook: str, provider: Provider, arguments: dict[str, Any]) -> None:
    start = time.perf_counter()
    try:
        function(**arguments)
    except PluginError:
        raise
    except (Exception, SystemExit) as error:
        message = f"{subject(provider)}: its hook {hook} raised {type(error).__name__}: {error}."
        raise PluginLoadError(message, **fields(provider), hint=tell_authors(provider)) from error
    finally:
        trace(f"called {hook} of {subject(provider)} in {time.perf_counter() - start:.3f} s")


class _Registry:
    """Takes what one plugin registers of one kind; `gift_core.plugins.hooks.Registry` promises what it does."""

    def __init__(self, kind: str, provider: Provider) -> None:
        self.kind = kind
        self.provider = provider
        self.things: dict[str, Callable[..., Any]] = {}

    def add(self, name: str, thing: Callable[..., Any]) -> None:
        where, known = subject(self.provider), fields(self.provider)
        rename = "Choose another name in the plugin."
        if not isinstance(name, str) or not name.strip() or ":" in name:
            raise InvalidPluginError(
                f"{where} registers a {self.kind} as {name!r}; a name is text without a colon.", **known, hint=rename
            )
        if not callable(thing):
            raise InvalidPluginError(
                f"{where} registers the {self.kind} {name!r} as {thing!r}, which cannot be called.",
                **known,
                hint="Register a function or a class.",
            )
        if self.things.get(name, thing) is not thing:
            raise PluginConflictError(f"{where} registers the {self.kind} {name!r} twice.", **known, hint=rename)
        if (owner := self._owner(name)) is not None:
            hint = f"The name keeps its meaning. {rename}"
            raise PluginConflictError(f"{where} registers a {self.kind} {name!r}, a name of {owner}.", **known, hint=hint)
        self.things[name] = thing

    def _owner(self, name: str) -> str | None:
        if self.kind != "strategy":
            return "gift-core" if name in CORE_NAMES[self.kind] else None
        return next((one.distribution for one in discover(STRATEGIES).providers if one.name == name), None)
