"""``gift show``: what is known of an installed strategy, and how to use it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import click

from gift_core.cli.completion import complete_strategy
from gift_core.cli.output import json_option, print_facts, print_json, print_table
from gift_core.plugins import PLUGIN_API, Provider, details, discover, find_provider, load
from gift_core.plugins.origin import is_editable, source_file


@click.command("show")
@click.argument("name", shell_complete=complete_strategy)
@click.option("--load", "wants_code", is_flag=True, help="Import it too, for its parameters and its docstring.")
@json_option
def command(name: str, wants_code: bool, as_json: bool) -> None:
    """Show one strategy, and how to use it.

    Says where the strategy NAME comes from. Reads metadata alone and runs no plugin code unless --load is given. NAME is a name from
    "gift list", or distribution:name where two packages share one.
    """
    provider = find_provider(name, hooks=wants_code)
    call = provider.identity if provider.name in discover().conflicts else provider.name
    usage = {
        "python": f'gift_core.enable_fine_tuning(model, "{call}")',
        "shell": f"gift inspect torchvision:resnet18 --strategy {call}",
    }
    facts, code = _facts(provider), _code(load(provider)) if wants_code else {}
    if as_json:
        print_json(facts | code | {"usage": usage})
        return
    print_facts({key: value for key, value in facts.items() if value is not None})
    click.echo()
    print_facts(usage)
    if code:
        _print_code(code)


def _facts(provider: Provider) -> dict[str, Any]:
    return {
        "name": provider.name,
        "distribution": provider.distribution,
        "version": provider.version,
        "entry_point": provider.value,
        "summary": provider.summary,
        "file": source_file(provider),
        "editable": is_editable(provider),
        **details(provider),
    }


def _code(factory: Callable[..., Any]) -> dict[str, Any]:
    return {
        "api": getattr(factory, "plugin_api", PLUGIN_API),
        "parameters": [_parameter(one) for one in inspect.signature(factory).parameters.values()],
        "capabilities": _text(getattr(factory, "capabilities", None)),
        "docstring": inspect.getdoc(factory),
    }


def _parameter(parameter: inspect.Parameter) -> dict[str, Any]:
    empty = inspect.Parameter.empty
    annotation = parameter.annotation
    kind = None if annotation is empty else annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return {
        "name": str(parameter).partition(":")[0].partition("=")[0],  # with the stars of *args and **kwargs
        "type": kind,
        "default": None if parameter.default is empty else repr(parameter.default),
    }


def _text(thing: object) -> str | None:
    return None if thing is None else repr(thing)


def _print_code(code: dict[str, Any]) -> None:
    click.echo()
    print_table(
        [(one["name"], one["type"] or "", one["default"] or "required") for one in code["parameters"]], ["parameter", "type", "default"]
    )
    if code["capabilities"]:
        click.echo(f"\n{code['capabilities']}")
    if code["docstring"]:
        click.echo(f"\n{code['docstring']}")
