"""Shell completion: names of strategies and formats, from metadata alone."""

from __future__ import annotations

from typing import Any

import click
from click.shell_completion import CompletionItem

from gift_core.plugins import FORMATS, Discovery, discover


def complete_strategy(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[Any]:
    """The strategies whose name, or whose qualified name where two packages share one, starts with what was typed."""
    return _starting_with(incomplete, discover())


def complete_format(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[Any]:
    """Likewise for the formats of ``gift convert``."""
    return _starting_with(incomplete, discover(FORMATS))


def _starting_with(incomplete: str, found: Discovery) -> list[Any]:
    names = [(one.identity if one.name in found.conflicts else one.name, one.summary) for one in found.providers]
    return [CompletionItem(name, help=summary) for name, summary in names if name.startswith(incomplete)]
