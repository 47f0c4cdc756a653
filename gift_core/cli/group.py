"""The command ``gift``: its verbs, and how an error ends it."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import click

from gift_core import __version__
from gift_core.cli.models import ModelNotFoundError
from gift_core.errors import (
    AdapterNotFoundError,
    GiftError,
    GiftWarning,
    PluginBlockedError,
    PluginConflictError,
    StrategyFileNotFoundError,
    UnknownDemoError,
    UnknownFormatError,
    UnknownPluginError,
    UnknownStrategyError,
)
from gift_core.plugins import plugin_settings

#: The verbs in the order of ``gift --help``; each is the file and the function of its name.
VERBS = ("list", "show", "inspect", "info", "merge", "convert", "demo", "doctor", "check", "new")

#: These end the command with code 3; every other error of ours with 1, and wrong usage with 2.
NOT_FOUND = (
    UnknownStrategyError,
    UnknownDemoError,
    UnknownFormatError,
    UnknownPluginError,
    PluginConflictError,
    PluginBlockedError,
    AdapterNotFoundError,
    StrategyFileNotFoundError,
    ModelNotFoundError,
)


class VerbGroup(click.Group):
    """A group that imports a verb's file when the verb, or the help that lists it, is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The verbs, in the order in which a user meets them."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of a verb, None if there is no such verb."""
        if cmd_name not in VERBS:
            return None
        command: click.Command = importlib.import_module(f"gift_core.cli.{cmd_name}_verb").command
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Run the verb; an error of GIFt's becomes one message and an exit code."""
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                return super().invoke(ctx)
        except GiftError as error:
            raise (_NotFound if isinstance(error, NOT_FOUND) else click.ClickException)(str(error)) from error


class _NotFound(click.ClickException):
    exit_code = 3


def _show_warning(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
    # where in the code a warning of ours was given tells the user of a command nothing
    click.echo(f"Warning: {message}" if issubclass(category, GiftWarning) else f"{category.__name__}: {message}", err=True)


def _version(ctx: click.Context, option: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        click.echo(f"gift {__version__}")
        ctx.exit()


@click.group(cls=VerbGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version and exit.")
@click.option("--no-autoload", is_flag=True, help="Use no installed plugin but those of --plugins.")
@click.option("--plugins", metavar="NAMES", help="Use these plugins and no others; commas separate several.")
@click.option("--block-plugins", metavar="NAMES", help="Never use these.")
@click.option("--strict-plugins", is_flag=True, help="A plugin that fails is an error, not a warning.")
@click.option("--trace-plugins", is_flag=True, help="Say what is imported and called.")
@click.pass_context
def main(
    ctx: click.Context, no_autoload: bool, plugins: str | None, block_plugins: str | None, strict_plugins: bool, trace_plugins: bool
) -> None:
    """Adapt any pre-trained PyTorch model by training a small part of it.

    Exit codes: 0 fine, 1 failed, 2 wrong usage, 3 not found or in conflict.
    """
    settings = plugin_settings(
        autoload=False if no_autoload else None,
        allow=_names(plugins),
        block=_names(block_plugins),
        strict=strict_plugins or None,
        trace=trace_plugins or None,
    )
    ctx.with_resource(settings)


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]
