"""``gift show``: what an installed strategy's metadata tells, and how to use it."""

from __future__ import annotations

import click

from gift_core.cli.output import json_option, print_facts, print_json
from gift_core.plugins import details, discover, find_provider


@click.command("show")
@click.argument("name")
@json_option
def command(name: str, as_json: bool) -> None:
    """Show one strategy, and how to use it.

    Says where the strategy NAME comes from; reads metadata alone and runs no plugin code. NAME is a name from "gift list", or
    distribution:name where two packages share one.
    """
    provider = find_provider(name)
    call = provider.identity if provider.name in discover().conflicts else provider.name
    facts = {
        "name": provider.name,
        "distribution": provider.distribution,
        "version": provider.version,
        "entry_point": provider.value,
        "summary": provider.summary,
        **details(provider),
    }
    usage = {
        "python": f'gift_core.enable_fine_tuning(model, "{call}")',
        "shell": f"gift inspect torchvision:resnet18 --strategy {call}",
    }
    if as_json:
        print_json(facts | {"usage": usage})
        return
    print_facts(facts)
    click.echo()
    print_facts(usage)
