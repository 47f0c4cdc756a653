"""``gift demo``: a program that a package brings under the group ``gift.demos``."""

from __future__ import annotations

import click

from gift_core.cli.output import json_option, print_json, print_table
from gift_core.plugins import DEMOS, Provider, dependency_error, find_provider, load, providers

#: The demo that runs when none is named.
DEFAULT = "digits"
#: The extra of a package that brings what its demos need.
EXTRA = "demo"


@click.command("demo", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("--list", "as_list", is_flag=True, help="List the demos instead; runs none.")
@json_option
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[NAME] [ARGUMENT]...")
@click.pass_context
def command(ctx: click.Context, as_list: bool, as_json: bool, arguments: tuple[str, ...]) -> None:
    """Run a demo, by default "digits".

    The arguments after NAME are the demo's own, as in "gift demo digits --help".
    """
    if as_list or as_json:
        if arguments:
            raise click.UsageError("--list takes no arguments.")
        _print_demos(as_json)
        return
    named = bool(arguments) and not arguments[0].startswith("-")
    provider = find_provider(arguments[0] if named else DEFAULT, DEMOS)
    ctx.exit(_run(provider, list(arguments[1:] if named else arguments)))


def _print_demos(as_json: bool) -> None:
    found = providers(DEMOS)
    if as_json:
        print_json([{"name": one.name, "distribution": one.distribution, "version": one.version} for one in found])
    else:
        print_table([(one.name, one.distribution, one.version) for one in found], ["name", "distribution", "version"])


def _run(provider: Provider, arguments: list[str]) -> int:
    program = load(provider, extra=EXTRA)
    try:
        return int(program(arguments) or 0)
    except ModuleNotFoundError as error:  # imported when it was needed
        raise dependency_error(provider, error, EXTRA) from error
