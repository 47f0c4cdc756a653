"""``gift merge``: base model and adapter into one plain file of weights."""

from __future__ import annotations

from pathlib import Path

import click

from gift_core.cli.models import build_model, model_argument
from gift_core.cli.output import file_size

_FILE = click.Path(path_type=Path)


@click.command("merge")
@model_argument
@click.argument("adapter", type=_FILE)
@click.option(
    "--weights",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="MODEL's weights (safetensors or a state dict).",
)
@click.option("-o", "--output", required=True, type=_FILE, help="Where to write the weights, as safetensors.")
@click.option("--force", is_flag=True, help="Overwrite the output.")
@click.option(
    "--trusted", is_flag=True, help="ADAPTER is your own: run its regular expressions, and let it allocate more than it holds."
)
def command(model: str, adapter: Path, weights: Path | None, output: Path, force: bool, trusted: bool) -> None:
    """Merge an adapter into its base model.

    Loads the file ADAPTER into MODEL and writes all weights, under the model's own names.

    MODEL is torchvision:resnet18, package.module:callable or file.py:callable; its code is run. Unless it loads the weights
    that the adapter was trained on by itself, name them with --weights.
    """
    from gift_core.adapter_file import load_adapter
    from gift_core.cli.weights import load_weights, refuse_overwriting, save_weights
    from gift_core.merging import merge_and_unload

    refuse_overwriting(output, force)  # before the work, not after it
    module = build_model(model)
    if weights is not None:
        load_weights(module, weights)
    load_adapter(module, adapter, trusted=trusted)
    merge_and_unload(module)
    size = save_weights(module, output, force=force)
    click.echo(f"{output}: {len(module.state_dict())} tensors, {file_size(size)}")
