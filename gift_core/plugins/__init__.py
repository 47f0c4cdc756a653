"""Plugins: what is installed (metadata alone), and the loading of one of them by name.

Nothing here imports torch.
"""

from gift_core.plugins.discovery import DEMOS, STRATEGIES, BrokenEntry, Discovery, Provider, details, discover, providers
from gift_core.plugins.registry import (
    PLUGIN_API,
    UnknownDemoError,
    find_provider,
    load,
    load_strategy,
    provider_of,
    register_strategy,
    strategy_names,
    unregister_strategy,
)

__all__ = [
    "DEMOS",
    "PLUGIN_API",
    "STRATEGIES",
    "BrokenEntry",
    "Discovery",
    "Provider",
    "UnknownDemoError",
    "details",
    "discover",
    "find_provider",
    "load",
    "load_strategy",
    "provider_of",
    "providers",
    "register_strategy",
    "strategy_names",
    "unregister_strategy",
]
