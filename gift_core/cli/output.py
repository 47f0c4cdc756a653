"""How listings are printed: drawn on a terminal, plain aligned text elsewhere, and JSON for programs.

Rich is imported when a table goes to a terminal, and only then.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click

Cells = Sequence[Any]


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """The option ``--json`` that every listing has; the verb gets it as ``as_json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")(command)


def print_json(data: Any) -> None:
    """Print data as JSON."""
    click.echo(json.dumps(data, indent=2, default=str))


def print_table(rows: Sequence[Cells], header: Cells) -> None:
    """Print rows under a header."""
    cells = [[one_line(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        _draw(cells, [str(cell) for cell in header])
    else:
        click.echo(plain_table(cells, [str(cell) for cell in header]))


def print_facts(facts: Mapping[str, Any]) -> None:
    """Print names and their values, a line for each; words stand where the names have underscores."""
    names = [name.replace("_", " ") for name in facts]
    width = max(map(len, names), default=0)
    for name, value in zip(names, facts.values(), strict=True):
        title = name.ljust(width)
        click.echo(f"{click.style(title, bold=True) if _has_colour() else title}  {one_line(value)}")


def plain_table(rows: Sequence[Sequence[str]], header: Sequence[str]) -> str:
    """Columns aligned by two spaces, the header first, no rules: text that ``grep``, ``cut`` and ``awk`` can work on."""
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def one_line(value: Any) -> str:
    """A value as text that cannot move the cursor: metadata is written by others, and may hold any character."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return "".join(character if character.isprintable() else " " for character in text).strip()


def file_size(size: int) -> str:
    """A size in bytes as text: megabytes of a million, below one kilobytes of a thousand."""
    return f"{size / 1e6:,.2f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"


def _has_colour() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def _draw(rows: list[list[str]], header: list[str]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for index, title in enumerate(header):
        table.add_column(title, overflow="fold", style="cyan" if index == 0 else None)
    for row in rows:
        table.add_row(*map(Text, row))  # Text, because brackets in a cell are no markup
    # an empty NO_COLOR counts as unset, as its convention has it; without colour bold goes too, so that it is plain text
    Console(no_color=not _has_colour(), color_system="auto" if _has_colour() else None).print(table)
