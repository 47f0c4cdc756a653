"""``gift doctor``: every plugin loaded in a process of its own, and what that showed."""

from __future__ import annotations

import sys
from typing import Any

import click

from gift_core import __version__
from gift_core.cli.output import json_option, print_facts, print_json, print_table
from gift_core.errors import UnknownPluginError
from gift_core.plugins import PLUGINS, STRATEGIES, Provider, current_settings, discover
from gift_core.plugins.names import is_called, normalise
from gift_core.plugins.probe import Probe, probe_all
from gift_core.plugins.settings import as_variables
from gift_core.plugins.status import BROKEN, OK, unusable

_GROUPS = (STRATEGIES, PLUGINS)


@click.command("doctor")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@json_option
@click.pass_context
def command(ctx: click.Context, names: tuple[str, ...], as_json: bool) -> None:
    """Load each plugin by itself, and say what is wrong.

    Each strategy and each plugin with hooks is imported in a process of its own. NAME is a name, a distribution or
    distribution:name; without one all are checked.

    Exit codes: 1 if a plugin failed, 3 if there is no such plugin or two share a name.
    """
    asked = [one for group in _GROUPS for one in discover(group).providers if _is_asked(one, names)]
    unknown = [name for name in names if not any(_is_asked(one, (name,)) for one in asked) and not _unusable((name,))]
    if unknown:
        raise UnknownPluginError(
            f"no installed plugin or package is called {', '.join(map(repr, unknown))}.", hint="See gift list --all."
        )
    found = {"plugins": [_row(probe) for probe in probe_all(asked)], "unusable": _unusable(names), "conflicts": _conflicts(names)}
    facts: dict[str, Any] = {"gift_core": __version__, "python": sys.version.split()[0], "interpreter": sys.executable}
    facts |= {name: value for name, value in as_variables(current_settings()).items() if value not in ("", "0")}
    print_json(facts | found) if as_json else _print(facts, found)
    ctx.exit(_exit_code(found))


def _is_asked(provider: Provider, names: tuple[str, ...]) -> bool:
    return not names or any(
        normalise(name) == normalise(provider.distribution) or is_called(name, provider.distribution, provider.name) for name in names
    )


def _row(probe: Probe) -> dict[str, Any]:
    provider = probe.provider
    return {
        "name": provider.name,
        "kind": "strategy" if provider.group == STRATEGIES else "plugin",
        "distribution": provider.distribution,
        "version": provider.version,
        "status": BROKEN if probe.reason else OK,
        "seconds": None if probe.seconds is None else round(probe.seconds, 3),
        "patched": list(probe.patched),
        "reason": probe.reason,
    }


def _unusable(names: tuple[str, ...]) -> list[dict[str, Any]]:
    lines = [line for group in _GROUPS for line in unusable(discover(group))]
    wanted = [line for line in lines if not names or {line.name, line.distribution, f"{line.distribution}:{line.name}"} & set(names)]
    return [line.to_dict() for line in wanted]


def _conflicts(names: tuple[str, ...]) -> dict[str, list[str]]:
    conflicts = discover(STRATEGIES).conflicts
    return {name: [one.identity for one in same] for name, same in conflicts.items() if any(_is_asked(one, names) for one in same)}


def _print(facts: dict[str, Any], found: dict[str, Any]) -> None:
    print_facts(facts)
    click.echo()
    lines = [*found["plugins"], *found["unusable"]]
    rows = [(one["name"] or "", one["distribution"], one["version"] or "", one["status"], _seconds(one), _note(one)) for one in lines]
    print_table(rows, ["name", "distribution", "version", "status", "seconds", "note"])
    for name, same in found["conflicts"].items():
        click.echo(f"\nThe name {name!r} is provided by {' and '.join(same)}: say which one is meant, or uninstall the other.")


def _seconds(row: dict[str, Any]) -> str:
    seconds = row.get("seconds")
    return "" if seconds is None else f"{seconds:.2f}"


def _note(row: dict[str, Any]) -> str:
    patched = row.get("patched")
    return row["reason"] or (f"replaces {', '.join(patched)}" if patched else "")


def _exit_code(found: dict[str, Any]) -> int:
    if any(one["status"] == BROKEN for one in (*found["plugins"], *found["unusable"])):
        return 1
    return 3 if found["conflicts"] else 0
