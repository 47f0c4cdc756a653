"""``gift new``: a plugin project of one's own."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from gift_core.scaffold import KINDS, ScaffoldError, create_project, derive_names


@click.command("new")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--name", metavar="NAME", help="The distribution, as in gift-my-method-plugin; the strategy is called after it.")
@click.option("--package", metavar="PACKAGE", help="The package to import, as in gift_my_method_plugin.")
@click.option("--author", metavar="AUTHOR", help="Who holds the copyright.")
@click.option("--kind", type=click.Choice(KINDS), default=KINDS[0], show_default=True, help="What the method does to a model.")
def command(folder: Path, name: str | None, package: str | None, author: str | None, kind: str) -> None:
    """Make a plugin project of your own.

    DIR is the folder to make. What the options do not name is called after it. The project is complete: it installs, and its tests
    pass.

    The kinds: caps chooses what trains and adds nothing; reparameterization is a function of the weight; module replaces layers by
    others.
    """
    try:
        names = derive_names(folder, name, package, author)
        files = create_project(folder, names, kind)
    except ScaffoldError as error:
        raise click.UsageError(str(error)) from error
    click.echo(f"{folder}: {len(files)} files")
    click.echo(f"  distribution  {names.distribution}")
    click.echo(f"  package       {names.package}")
    click.echo(f"  strategy      {names.strategy}")
    click.echo("\nNext:")
    for line in (
        f"cd {shlex.quote(str(folder))}",
        'pip install -e ".[test]"',
        "pytest",
        f"gift check {names.distribution}",
    ):
        click.echo(f"  {line}")
    click.echo(f"\nThen write your method in {'/'.join(('src', names.package, 'strategy.py'))}.")
