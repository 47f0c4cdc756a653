"""``gift info``: what an adapter file says about itself."""

from __future__ import annotations

from pathlib import Path

import click

from gift_core.cli.output import json_option, print_facts, print_json


@click.command("info")
@click.argument("adapter", type=click.Path(path_type=Path))
@json_option
def command(adapter: Path, as_json: bool) -> None:
    """Show what the file ADAPTER holds and where it came from; needs neither the model nor the plugin."""
    from gift_core.adapter_file import read_adapter_info

    facts = read_adapter_info(adapter).to_dict()
    if as_json:
        print_json(facts)
    else:
        print_facts(facts)
