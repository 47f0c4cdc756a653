"""``gift list``: the installed strategies, from metadata alone."""

from __future__ import annotations

import click

from gift_core.cli.output import json_option, one_line, print_json, print_table
from gift_core.plugins import Discovery, Provider, discover


@click.command("list")
@json_option
def command(as_json: bool) -> None:
    """List the installed strategies.

    Reads metadata alone; runs no plugin code.
    """
    found = discover()
    if as_json:
        print_json([_row(provider, found) for provider in found.providers] + _broken_rows(found))
        return
    rows = [(one.name, one.distribution, one.version, one.summary) for one in found.providers]
    print_table(rows, ["name", "distribution", "version", "summary"])
    for problem in _problems(found):
        click.echo(f"Warning: {one_line(problem)}", err=True)


def _row(provider: Provider, found: Discovery) -> dict[str, str | None]:
    same = [one.identity for one in found.conflicts.get(provider.name, ()) if one != provider]
    return {
        "name": provider.name,
        "distribution": provider.distribution,
        "version": provider.version,
        "summary": provider.summary,
        "entry_point": provider.value,
        "status": "conflict" if same else "ok",
        "reason": f"the name is also provided by {', '.join(same)}" if same else None,
    }


def _broken_rows(found: Discovery) -> list[dict[str, str | None]]:
    return [
        {
            "name": entry.name or None,
            "distribution": entry.distribution,
            "version": entry.version or None,
            "summary": None,
            "entry_point": entry.value or None,
            "status": "broken",
            "reason": entry.reason,
        }
        for entry in found.broken
    ]


def _problems(found: Discovery) -> list[str]:
    conflicts = [
        f"the name {name!r} has several providers; say {' or '.join(one.identity for one in same)}."
        for name, same in found.conflicts.items()
    ]
    return conflicts + [f"{entry.distribution}: {entry.reason}." for entry in found.broken]
