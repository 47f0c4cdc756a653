"""``gift inspect``: what a strategy would do to a model; a dry run that saves nothing."""

from __future__ import annotations

import click

from gift_core.cli.models import build_model, model_argument
from gift_core.cli.output import json_option, print_json
from gift_core.cli.strategies import build_strategy, strategy_options


@click.command("inspect")
@model_argument
@strategy_options
@json_option
def command(
    model: str, strategy: str, settings: tuple[str, ...], target: tuple[str, ...], exclude: tuple[str, ...], as_json: bool
) -> None:
    """Show what a strategy would do to a model.

    Shows what each rule matches, how much stays frozen, and the sizes before and after. Nothing is saved.

    MODEL is torchvision:resnet18, package.module:callable or file.py:callable; the callable takes no arguments and gives a
    module. Its code is run.
    """
    chosen = build_strategy(strategy, settings, target, exclude)
    module = build_model(model)
    from gift_core.tuning import enable_fine_tuning

    report = enable_fine_tuning(module, chosen)
    if as_json:
        print_json({"model": model} | report.to_dict())
    else:
        click.echo(str(report))
