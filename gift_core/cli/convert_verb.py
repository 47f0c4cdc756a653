"""``gift convert``: an adapter file to and from the format of another library, which a package brings under ``gift.formats``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gift_core.cli.completion import complete_format
from gift_core.cli.models import build_model, well_formed
from gift_core.cli.output import file_size, json_option, print_facts, print_json, print_table
from gift_core.cli.strategies import parse_settings
from gift_core.errors import InvalidPluginError
from gift_core.plugins import FORMATS, find_provider, load_object, nearest, providers

if TYPE_CHECKING:
    from torch import nn

_PATH = click.Path(path_type=Path)
#: What the command itself gives a converter; its other keywords are for ``--set``.
_OWN_KEYWORDS = ("model", "force")
_WHOSE_WEIGHTS = (
    "without --weights the adapter file belongs to the weights that MODEL's function gave; into a model with others it does not load "
    "unless with check_base=False"
)


@click.command("convert")
@click.argument("source", type=_PATH, required=False)
@click.argument("target", type=_PATH, required=False)
@click.option(
    "--to", "to_format", metavar="FORMAT", shell_complete=complete_format, help="SOURCE is an adapter file, TARGET of FORMAT."
)
@click.option(
    "--from", "from_format", metavar="FORMAT", shell_complete=complete_format, help="SOURCE is of FORMAT, TARGET an adapter file."
)
@click.option("--model", metavar="MODEL", callback=well_formed, help="The base model, where the files alone do not suffice.")
@click.option(
    "--weights",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="MODEL's weights (safetensors or a state dict).",
)
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="What the format asks for; the value is JSON or text.")
@click.option("--force", is_flag=True, help="Overwrite TARGET.")
@click.option("--list", "as_list", is_flag=True, help="List the formats instead.")
@json_option
def command(
    source: Path | None,
    target: Path | None,
    to_format: str | None,
    from_format: str | None,
    model: str | None,
    weights: Path | None,
    settings: tuple[str, ...],
    force: bool,
    as_list: bool,
    as_json: bool,
) -> None:
    """Convert an adapter to or from another format.

    Say one of --to and --from. The formats come with packages: "gift convert --list" names them.

    MODEL is torchvision:resnet18, package.module:callable or file.py:callable; its code is run.
    """
    if as_list:
        _print_formats(as_json)
        return
    name = to_format or from_format
    if name is None or (to_format and from_format):
        raise click.UsageError("say either --to FORMAT or --from FORMAT; gift convert --list names the formats.")
    if source is None or target is None:
        raise click.UsageError("name SOURCE and TARGET, what is converted and what is written.")
    if weights is not None and model is None:
        raise click.UsageError("--weights are those of --model: name it too.")
    convert = _converter(name, "export" if to_format else "import_")
    options = _options(convert, name, settings)
    result = convert(source, target, model=_model(model, weights), force=force, **options)
    if from_format and model is not None and weights is None:
        result = {**result, "notes": [*result.get("notes", ()), _WHOSE_WEIGHTS]}
    _print(target, result, as_json)


def _print_formats(as_json: bool) -> None:
    found = providers(FORMATS)
    if as_json:
        print_json([{"name": one.name, "distribution": one.distribution, "version": one.version} for one in found])
    else:
        print_table([(one.name, one.distribution, one.version) for one in found], ["name", "distribution", "version"])


def _converter(name: str, method: str) -> Callable[..., Mapping[str, Any]]:
    provider = find_provider(name, FORMATS)
    convert: Any = getattr(load_object(provider), method, None)
    if not callable(convert):
        raise InvalidPluginError(
            f"format {name!r} of {provider.distribution} has no function {method!r}.",
            name=provider.name,
            distribution=provider.distribution,
            version=provider.version,
            entry_point=provider.value,
            hint=f"A format is an object with export and import_; tell the authors of {provider.distribution}.",
        )
    return convert  # type: ignore[no-any-return]


def _options(convert: Callable[..., Any], name: str, settings: tuple[str, ...]) -> dict[str, Any]:
    options = parse_settings(settings)
    parameters = inspect.signature(convert).parameters.values()
    known = [one.name for one in parameters if one.kind is one.KEYWORD_ONLY and one.name not in _OWN_KEYWORDS]
    for key in options:
        if key not in known:
            similar = nearest(key, known)
            question = f"; did you mean {similar[0]!r}?" if similar else "."
            message = f"format {name!r} takes no {key!r} here{question} It takes: {', '.join(known) or 'nothing'}."
            raise click.BadParameter(message, param_hint="--set")
    return options


def _model(text: str | None, weights: Path | None) -> nn.Module | None:
    if text is None:
        return None
    from gift_core.cli.weights import load_weights

    module = build_model(text)
    if weights is not None:
        load_weights(module, weights)
    return module


def _print(target: Path, result: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print_json({"target": str(target), **result})
        return
    shown = {key: value for key, value in result.items() if key not in ("notes", "file_bytes")}
    size = {"size": file_size(result["file_bytes"])} if "file_bytes" in result else {}
    print_facts({"written": str(target), **shown, **size})
    for note in result.get("notes", ()):
        click.echo(f"Note: {note}.", err=True)
