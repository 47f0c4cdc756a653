"""Plugins: what is installed (metadata alone), and the loading of one of them by name.

Nothing here imports torch; pluggy is imported only where a plugin has hooks.
"""

from gift_core.plugins.discovery import (
    DEMOS,
    FORMATS,
    PLUGINS,
    STRATEGIES,
    BlockedEntry,
    BrokenEntry,
    Discovery,
    Provider,
    details,
    discover,
    providers,
)
from gift_core.plugins.hook_plugins import HookPlugin, call_hooks, hook_plugins, register_plugin, registered_things, unregister_plugin
from gift_core.plugins.loading import PLUGIN_API, dependency_error, load_object
from gift_core.plugins.names import did_you_mean, nearest
from gift_core.plugins.registry import (
    find_provider,
    find_thing,
    isolated_plugins,
    load,
    load_strategy,
    provider_of,
    register_strategy,
    strategy_names,
    unregister_strategy,
)
from gift_core.plugins.settings import PluginSettings, current_settings, plugin_settings

__all__ = [
    "DEMOS",
    "FORMATS",
    "PLUGINS",
    "PLUGIN_API",
    "STRATEGIES",
    "BlockedEntry",
    "BrokenEntry",
    "Discovery",
    "HookPlugin",
    "PluginSettings",
    "Provider",
    "call_hooks",
    "current_settings",
    "dependency_error",
    "details",
    "did_you_mean",
    "discover",
    "find_provider",
    "find_thing",
    "hook_plugins",
    "isolated_plugins",
    "load",
    "load_object",
    "load_strategy",
    "nearest",
    "plugin_settings",
    "provider_of",
    "providers",
    "register_plugin",
    "register_strategy",
    "registered_things",
    "strategy_names",
    "unregister_plugin",
    "unregister_strategy",
]
