"""``gift info``: what an adapter file says about itself."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gift_core.cli.output import file_size, json_option, print_facts, print_json, print_table

if TYPE_CHECKING:
    from gift_core.adapter_format import AdapterInfo


@click.command("info")
@click.argument("adapter", type=click.Path(path_type=Path))
@json_option
def command(adapter: Path, as_json: bool) -> None:
    """Show what an adapter file holds.

    Says what the file ADAPTER was made with, and which tensors it has; needs neither the model nor the plugin.
    """
    from gift_core.adapter_file import read_adapter_info

    info = read_adapter_info(adapter)
    if as_json:
        print_json(info.to_dict())
        return
    print_facts(_facts(info))
    click.echo()
    sites = [(name or "(root)", weight, method) for name, held in info.sites.items() for weight, method in held.items()]
    print_table(sites, ["site", "weight", "method"])
    click.echo()
    print_table([(key, one["shape"], one["dtype"]) for key, one in info.tensors.items()], ["tensor", "shape", "dtype"])


def _facts(info: AdapterInfo) -> dict[str, Any]:
    provider = info.provider or {}
    return {
        "strategy": info.strategy_text,
        "name": (info.strategy or {}).get("name") or "none: it has no form as data",
        "from": f"{provider['distribution']} {provider['version']}" if provider.get("distribution") else "no installed package",
        "core_version": info.core_version,
        "size": file_size(info.file_bytes),
        "numbers": f"{sum(math.prod(one['shape']) for one in info.tensors.values()):,} in {len(info.tensors)} tensors",
        "structure": info.structure,
        "digest": info.digest,
    }
