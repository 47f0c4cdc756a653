"""Options that choose a strategy and its parameters: from text to a strategy."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from gift_core.cli.completion import complete_strategy
from gift_core.plugins import load_strategy, nearest

if TYPE_CHECKING:
    from gift_core.strategy import FineTuningStrategy


#: A strategy whose name ends so is a file; the reader of such files imports torch, and is imported when there is one.
SUFFIXES = (".toml", ".json")


def strategy_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of a verb that takes a strategy; it gets ``strategy``, ``settings``, ``target`` and ``exclude``."""
    options = (
        click.option(
            "--strategy",
            required=True,
            metavar="NAME",
            shell_complete=complete_strategy,
            help='A name from "gift list", or a strategy file (.toml or .json).',
        ),
        click.option(
            "--set",
            "settings",
            multiple=True,
            metavar="KEY=VALUE",
            help="A parameter, as in rank=8; the value is JSON or text.",
        ),
        click.option(
            "--target", multiple=True, metavar="PATTERN", help="Adapt only what matches: a glob, re:..., type:... or layer:..."
        ),
        click.option("--exclude", multiple=True, metavar="PATTERN", help="Leave out what matches."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def build_strategy(name: str, settings: Sequence[str], target: Sequence[str], exclude: Sequence[str]) -> FineTuningStrategy:
    """Make the strategy that the options describe.

    Raises:
        PluginError: if there is no such strategy, or it cannot be loaded.
        StrategyError: if a value is not allowed.
        click.UsageError: if a parameter is malformed, unknown or given twice; the message has the nearest names.
    """
    if name.endswith(SUFFIXES):
        return _from_file(name, [*settings, *target, *exclude])
    parameters = parse_settings(settings)
    for key, patterns in (("targets", target), ("exclude", exclude)):
        if patterns and key in parameters:
            raise click.UsageError(f"{key} is given twice, by --set {key}=... and by --{key.removesuffix('s')}.")
        if patterns:
            parameters[key] = list(patterns)
    _refuse_unknown(name, parameters)
    from gift_core.strategy import strategy_from_config

    return strategy_from_config({"name": name, "parameters": parameters})


def _from_file(name: str, options: Sequence[str]) -> FineTuningStrategy:
    if options:
        raise click.UsageError(f"{name} holds its parameters itself: change the file, or leave --set, --target and --exclude out.")
    from gift_core.strategy_file import strategy_from_file

    return strategy_from_file(name)


def parse_settings(settings: Sequence[str]) -> dict[str, Any]:
    """The values of ``--set KEY=VALUE`` by key, each read as JSON, or as text where it is none.

    Raises:
        click.BadParameter: if one has another form, or a key is given twice.
    """
    parameters: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key.strip():
            raise click.BadParameter(f"{setting!r} is not of the form KEY=VALUE, as in rank=8.", param_hint="--set")
        if key.strip() in parameters:
            raise click.BadParameter(f"{key.strip()!r} is given twice.", param_hint="--set")
        parameters[key.strip()] = _value(text)
    return parameters


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _refuse_unknown(name: str, parameters: Mapping[str, Any]) -> None:
    factory = load_strategy(name)
    if not callable(factory):
        return  # building it tells
    known = inspect.signature(factory).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        return
    for key in parameters:
        if key not in known:
            similar = nearest(key, known)
            question = f"; did you mean {similar[0]!r}?" if similar else "."
            allowed = f"Its parameters: {', '.join(known) or 'none'}."
            raise click.BadParameter(f"strategy {name!r} has no parameter {key!r}{question} {allowed}", param_hint=_option(key))


def _option(key: str) -> str:
    return {"targets": "--target", "exclude": "--exclude"}.get(key, "--set")
