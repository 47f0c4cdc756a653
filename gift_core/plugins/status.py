"""What can be said of each entry point: whether it can be used, and why not.

From metadata alone unless a function says that it loads.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from gift_core.errors import PluginConflictError, PluginError
from gift_core.plugins.discovery import NOUNS, PLUGINS, STRATEGIES, Discovery, Provider, discover
from gift_core.plugins.hook_plugins import HookPlugin, hook_plugins, registered_things
from gift_core.plugins.loading import PLUGIN_API
from gift_core.plugins.registry import load

OK = "ok"
CONFLICT = "conflict"
NEAR_MISS = "near-miss"
BROKEN = "broken"
BLOCKED = "blocked"
NOT_LOADED = "not loaded"


@dataclasses.dataclass(frozen=True)
class PluginStatus:
    """One line of a listing.

    Attributes:
        name: the entry point's name, None where it cannot be read.
        kind: strategy, plugin, demo or format.
        distribution: the package, or the place of its metadata.
        version: the package's version.
        api: the generation of the plugin API; None before loading.
        status: ok, conflict, near-miss, broken, blocked or not loaded.
        summary: the package's one line about itself.
        entry_point: ``module:attribute``.
        reason: why the status is not ok.
    """

    name: str | None
    kind: str
    distribution: str
    version: str | None
    api: int | None
    status: str
    summary: str | None
    entry_point: str | None
    reason: str | None

    def to_dict(self) -> dict[str, Any]:
        """The line as JSON data."""
        return dataclasses.asdict(self)


def statuses(group: str = STRATEGIES) -> list[PluginStatus]:
    """Every entry of a group, the broken and blocked ones too; runs no plugin code."""
    found = discover(group)
    return [_of_provider(one, found) for one in found.providers] + unusable(found)


def unusable(found: Discovery) -> list[PluginStatus]:
    """The entries of a group that cannot be used, or may not."""
    broken = [
        PluginStatus(
            one.name or None,
            NOUNS[one.group],
            one.distribution,
            one.version or None,
            None,
            BROKEN,
            None,
            one.value or None,
            one.reason,
        )
        for one in found.broken
    ]
    return broken + [_line(entry.provider, BLOCKED, entry.reason) for entry in found.blocked]


def after_loading(status: PluginStatus, found: Discovery) -> PluginStatus:
    """What is known of a strategy or demo once it was imported; runs its code."""
    provider = next((one for one in found.providers if (one.distribution, one.name) == (status.distribution, status.name)), None)
    if provider is None or status.status in (BROKEN, BLOCKED):
        return status
    try:
        load(provider)
    except PluginError as error:
        return dataclasses.replace(status, status=BROKEN, reason=str(error))
    return dataclasses.replace(status, api=PLUGIN_API)


def hook_statuses() -> list[PluginStatus]:
    """Every plugin with hooks and every strategy that one registers; runs their code."""
    return [of_hook_plugin(one) for one in hook_plugins(tell=False)] + _contributed()


def of_hook_plugin(one: HookPlugin) -> PluginStatus:
    """What is known of a plugin with hooks once it was tried."""
    if one.error is None:
        return dataclasses.replace(_line(one.provider, OK, None), api=PLUGIN_API)
    return _line(one.provider, CONFLICT if isinstance(one.error, PluginConflictError) else BROKEN, str(one.error))


def unloaded_hook_plugins() -> list[PluginStatus]:
    """Every plugin with hooks, as far as metadata tells."""
    found = discover(PLUGINS)
    return [_line(one, NOT_LOADED, "say --hooks to run it") for one in found.providers] + unusable(found)


def _contributed() -> list[PluginStatus]:
    strategies = [provider for provider, _ in registered_things("strategy", tell=False)]
    found = Discovery((*strategies, *discover(STRATEGIES).providers), ())
    return [dataclasses.replace(_of_provider(one, found), api=PLUGIN_API) for one in strategies]


def _of_provider(provider: Provider, found: Discovery) -> PluginStatus:
    same = [one.identity for one in found.conflicts.get(provider.name, ()) if one != provider]
    if same:
        return _line(provider, CONFLICT, f"the name is also provided by {', '.join(same)}")
    if (official := found.near_miss(provider)) is not None:
        return _line(provider, NEAR_MISS, f"its name is nearly {official.name!r}, which is {official.distribution}'s")
    return _line(provider, OK, None)


def _line(provider: Provider, status: str, reason: str | None) -> PluginStatus:
    kind = NOUNS[provider.group]
    summary = f"registered by plugin {provider.hook_plugin!r}" if provider.hook_plugin else provider.summary
    return PluginStatus(provider.name, kind, provider.distribution, provider.version, None, status, summary, provider.value, reason)
