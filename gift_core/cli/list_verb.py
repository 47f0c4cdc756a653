"""``gift list``: the installed strategies, from metadata alone unless ``--hooks`` is given."""

from __future__ import annotations

import click

from gift_core.cli.output import json_option, one_line, print_json, print_table
from gift_core.plugins import DEMOS, FORMATS, Discovery, discover
from gift_core.plugins.status import (
    BLOCKED,
    BROKEN,
    PluginStatus,
    after_loading,
    hook_statuses,
    statuses,
    unloaded_hook_plugins,
)

HEADER = ("name", "distribution", "version", "API", "status", "summary")


@click.command("list")
@click.option("--all", "everything", is_flag=True, help="Also list plugins, demos, formats, and what cannot be used, with the reason.")
@click.option("--hooks", is_flag=True, help="Run the plugins, and list what they register.")
@json_option
def command(everything: bool, hooks: bool, as_json: bool) -> None:
    """List the installed strategies.

    Reads metadata alone and runs no plugin code; with --hooks it runs that of the plugins with hooks, and with --all --hooks that of
    all plugins, to tell which work.
    """
    found = discover()
    lines = _lines(found, everything, hooks)
    if as_json:
        print_json([line.to_dict() for line in lines if everything or line.status != BLOCKED])
        return
    shown = [line for line in lines if everything or line.status not in (BROKEN, BLOCKED)]
    print_table([_cells(line) for line in shown], HEADER)
    for problem in _problems(found):
        click.echo(f"Warning: {one_line(problem)}", err=True)


def _lines(found: Discovery, everything: bool, hooks: bool) -> list[PluginStatus]:
    lines = statuses()
    if everything and hooks:
        lines = [after_loading(line, found) for line in lines]
    if hooks:
        lines += hook_statuses()
    elif everything:
        lines += unloaded_hook_plugins()
    return lines + ([*statuses(DEMOS), *statuses(FORMATS)] if everything else [])


def _cells(line: PluginStatus) -> tuple[str, ...]:
    api = "" if line.api is None else str(line.api)
    return line.name or "", line.distribution, line.version or "", api, line.status, line.reason or line.summary or ""


def _problems(found: Discovery) -> list[str]:
    conflicts = [
        f"the name {name!r} has several providers; say {' or '.join(one.identity for one in same)}."
        for name, same in found.conflicts.items()
    ]
    return conflicts + [f"{entry.distribution}: {entry.reason}." for entry in found.broken]
