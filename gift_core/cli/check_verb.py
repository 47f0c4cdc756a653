"""``gift check``: the conformance kit, for what is installed or lies in a folder."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
import sys
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from gift_core.cli.completion import complete_strategy
from gift_core.cli.output import json_option, print_json, print_table
from gift_core.errors import InvalidPluginError, UnknownPluginError, UnknownStrategyError
from gift_core.plugins import STRATEGIES, Provider, discover, find_provider
from gift_core.plugins.names import nearest

if TYPE_CHECKING:
    from gift_core.testing import CheckResult

#: Mirrors `gift_core.testing.LEVELS`, which needs torch to be imported; a test holds the two together.
LEVELS = ("api", "tuning", "files", "numerics", "torch")

Say = Callable[[str], None]


class Plan(NamedTuple):
    """What is to be checked: a distribution, None for a strategy alone, and the strategies' names."""

    distribution: str | None
    strategies: tuple[str, ...]


@click.command("check")
@click.argument("subject", metavar="NAME|DISTRIBUTION|PATH", shell_complete=complete_strategy)
@click.option(
    "--level", type=click.Choice(LEVELS), default=LEVELS[-1], show_default=True, help="The last level; those before it run too."
)
@json_option
@click.pass_context
def command(ctx: click.Context, subject: str, level: str, as_json: bool) -> None:
    """Check that a plugin keeps its promises.

    Runs the conformance kit on a strategy by its NAME, or on an installed DISTRIBUTION: its packaging and all its strategies. PATH
    is the folder of a project that is installed. The plugin's code is run.
    """
    plan = _plan(subject)
    with _progress() as say:
        results = {what: _run(what, check, say) for what, check in _checks(plan, level)}
    rows = [(what, result) for what, found in results.items() for result in found]
    if as_json:
        print_json([{"subject": what, **result.to_dict()} for what, result in rows])
    else:
        _print(rows)
    ctx.exit(0 if all(result.ok for _, result in rows) else 1)


# --- what is meant


def _plan(subject: str) -> Plan:
    if _is_path(subject):
        return _plan_of(_distribution_at(Path(subject)), subject)
    try:
        return Plan(None, (_call(find_provider(subject)),))
    except UnknownStrategyError as error:
        if _is_installed(subject):
            return _plan_of(subject, subject)
        raise _unknown(subject) from error


def _plan_of(distribution: str, subject: str) -> Plan:
    if not _is_installed(distribution):
        raise _unknown(distribution, f"Install it first: pip install {'-e ' if distribution != subject else ''}{subject}")
    own = [one for one in discover().providers if _normal(one.distribution) == _normal(distribution)]
    return Plan(distribution, tuple(_call(one) for one in own))


def _call(provider: Provider) -> str:
    return provider.identity if provider.distribution and provider.name in discover().conflicts else provider.name


def _is_path(subject: str) -> bool:
    separators = [os.sep, os.altsep or os.sep]
    return any(separator in subject for separator in separators) or subject in (".", "..") or _is_project(subject)


def _is_project(subject: str) -> bool:
    return (Path(subject) / "pyproject.toml").is_file() and not _is_installed(subject)


def _distribution_at(folder: Path) -> str:
    file = folder / "pyproject.toml"
    try:
        return str(tomllib.loads(file.read_text(encoding="utf-8"))["project"]["name"])
    except FileNotFoundError as error:
        raise UnknownPluginError(
            f"there is no project at {folder}: it has no pyproject.toml.", name=str(folder), hint="Name a folder with one."
        ) from error
    except (OSError, KeyError, TypeError, ValueError) as error:
        message = f"{file} states no project name ({type(error).__name__}: {error})."
        raise InvalidPluginError(message, name=str(folder), hint='Write name = "..." under [project].') from error


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.distribution(distribution)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return False
    return True


def _unknown(name: str, hint: str | None = None) -> UnknownPluginError:
    providers = discover(STRATEGIES).providers
    similar = nearest(name, [known for one in providers for known in (one.name, one.distribution)])
    question = f"; did you mean {' or '.join(map(repr, similar))}?" if similar else "."
    return UnknownPluginError(f"no strategy and no installed distribution is called {name!r}{question}", name=name, hint=hint)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


# --- running and showing


def _checks(plan: Plan, level: Any) -> Iterator[tuple[str, Callable[[], Iterator[CheckResult]]]]:
    from gift_core.testing import check_distribution, iter_checks

    distribution = plan.distribution
    if distribution is not None:
        yield distribution, lambda: iter(check_distribution(distribution))
    for name in plan.strategies:
        yield name, lambda name=name: iter_checks(name, level=level)  # type: ignore[misc]


def _run(what: str, check: Callable[[], Iterator[CheckResult]], say: Say) -> list[CheckResult]:
    results = []
    say(f"{what}: starting")
    for result in check():
        results.append(result)
        say(f"{what}: {result.check}{f' on {result.model}' if result.model else ''}")
    return results


@contextlib.contextmanager
def _progress() -> Iterator[Say]:
    # on a terminal only: a pipe, and whoever reads it, gets the result alone
    if not sys.stderr.isatty():
        yield lambda text: None
        return
    from rich.console import Console

    console = Console(stderr=True)
    with console.status("importing torch") as status:
        yield lambda text: status.update(text)


def _print(rows: Sequence[tuple[str, CheckResult]]) -> None:
    checks: dict[tuple[str, str], list[CheckResult]] = {}
    for what, result in rows:
        checks.setdefault((what, result.check), []).append(result)
    print_table([(what, name, _summary(results)) for (what, name), results in checks.items()], ["subject", "check", "result"])
    counts = Counter(str(result.status).replace("_", " ") for _, result in rows)
    click.echo(f"\n{', '.join(f'{number} {status}' for status, number in counts.items())}")
    for what, result in rows:
        if not result.ok or result.status in ("warning", "expected_failure"):
            click.echo(f"{what}: {result}", err=not result.ok)


def _summary(results: Sequence[CheckResult]) -> str:
    if len(results) == 1:
        return str(results[0].status).replace("_", " ")
    counts = Counter(str(result.status).replace("_", " ") for result in results)
    return ", ".join(f"{number} {status}" for status, number in counts.items())
