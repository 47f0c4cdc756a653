"""A new plugin project, made from the template that travels with the package.

The template is a real project whose names are tokens. It is copied with these replaced, in contents and in paths, in one pass, so
that a user's name that looks like a token is safe. Nothing here imports torch or needs a network.
"""

from __future__ import annotations

import json
import keyword
import os
import re
import sys
import tempfile
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from gift_core.errors import GiftError, PluginConflictError
from gift_core.plugins import discover

#: What a generated method can be; the first is the template itself, the others are laid over it.
KINDS = ("caps", "reparameterization", "module")

_VARIANTS = "kinds"
#: What building and testing leave in the template when it is used from the repository.
_LEFTOVERS = {"__pycache__", "build", "dist", ".venv", ".pytest_cache", ".mypy_cache", ".ruff_cache", ".hypothesis"}
_DISTRIBUTION = re.compile(r"[A-Z0-9]|[A-Z0-9][A-Z0-9._-]*[A-Z0-9]", re.IGNORECASE | re.ASCII)
_PACKAGE = re.compile(r"[A-Z_][A-Z0-9_]*", re.IGNORECASE | re.ASCII)
#: Packages that a plugin, or its tests, import by these names.
_TAKEN = frozenset({"gift_core", "tests", "torch", "pytest", *sys.stdlib_module_names})
#: Beginnings of class names that would hide what the generated file itself imports.
_HIDING = ("FineTuning",)


class ScaffoldError(GiftError, ValueError):
    """A project cannot be made under the names given."""


class TargetExistsError(ScaffoldError, FileExistsError):
    """There is something at the place where the project should be made."""


class Names(NamedTuple):
    """What a plugin project is called.

    Attributes:
        distribution: what users install, as in ``gift-my-method-plugin``.
        package: what Python imports, as in ``gift_my_method_plugin``.
        strategy: what users write as the strategy's name, as in ``my-method``.
        prefix: what the names of its classes begin with, as in ``MyMethod``.
        author: who holds the copyright.
    """

    distribution: str
    package: str
    strategy: str
    prefix: str
    author: str


def derive_names(folder: Path, distribution: str | None = None, package: str | None = None, author: str | None = None) -> Names:
    """Name a project after its folder, except for what is given.

    Args:
        folder: where the project will be; ``my method`` and ``gift-my-method-plugin`` give the same names.
        distribution: the name to install it by; the strategy is called after it.
        package: the name to import it by.
        author: the author.

    Raises:
        ScaffoldError: if a name is not allowed, or none can be made of the folder's.
        PluginConflictError: if a strategy of that name is installed.
    """
    if distribution is None:
        distribution = _distribution_for(folder)
    if not _DISTRIBUTION.fullmatch(distribution):
        raise ScaffoldError(
            f"{distribution!r} is no valid distribution name: ASCII letters, digits, '.', '_' and '-', a letter or digit at both ends. "
            "Choose another with --name."
        )
    slug = _slug(distribution)
    package = slug.replace("-", "_") if package is None else package
    _check_package(package)
    author = f"The {distribution} authors" if author is None else author
    if not author.strip() or not author.isprintable():
        raise ScaffoldError(f"author is one line of text, got {author!r}.")
    strategy = _core_of(slug)
    _refuse_conflict(strategy)
    return Names(distribution, package, strategy, _prefix_for(strategy), author.strip())


def create_project(target: Path, names: Names, kind: str = KINDS[0]) -> list[Path]:
    """Make a plugin project; either all of it is there afterwards, or nothing.

    Args:
        target: the folder to make, and its parents if they lack.
        names: from `derive_names`.
        kind: one of `KINDS`.

    Returns:
        The files that were made, relative to the target, sorted.

    Raises:
        TargetExistsError: if there is anything at the target, an empty folder too.
        ScaffoldError: if the kind is unknown, or the folder cannot be written.
    """
    if kind not in KINDS:
        raise ScaffoldError(f"kind is one of {', '.join(KINDS)}, got {kind!r}.")
    target = Path(os.path.abspath(target))
    if os.path.lexists(target):
        raise TargetExistsError(f"{target} exists already: choose a folder that does not.")
    files = {_fill(path, names): _render(path, source, names) for path, source in _sources(kind)}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".gift-new-") as temporary:
            _write(Path(temporary) / "project", files)
            (Path(temporary) / "project").rename(target)
    except OSError as error:
        raise ScaffoldError(f"{target} cannot be made: {error}. Choose another folder.") from error
    return sorted(Path(path) for path in files)


# --- names


def _distribution_for(folder: Path) -> str:
    name = os.path.basename(os.path.abspath(folder))
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    slug = _core_of(_slug(ascii_name))
    if not slug:
        raise ScaffoldError(f"no name can be made of the folder name {name!r}: give one with --name.")
    return f"gift-{slug}-plugin"


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _core_of(slug: str) -> str:
    """What is left of ``gift-my-method-plugin`` without what every plugin's name has; all of it if nothing would be."""
    return slug.removeprefix("gift-").removesuffix("-plugin") or slug


def _check_package(package: str) -> None:
    if not _PACKAGE.fullmatch(package) or keyword.iskeyword(package):
        raise ScaffoldError(
            f"{package!r} is no valid package name: ASCII letters, digits and '_', no digit first, no keyword of Python. "
            "Give one with --package."
        )
    if package.lower() in _TAKEN:
        raise ScaffoldError(f"the package name {package!r} is taken, and would hide what is imported by it: choose another.")


def _prefix_for(strategy: str) -> str:
    prefix = "".join(part[:1].upper() + part[1:] for part in strategy.split("-"))
    return f"Gift{prefix}" if prefix[:1].isdigit() or prefix in _HIDING else prefix


def _refuse_conflict(strategy: str) -> None:
    for provider in discover().providers:
        if provider.name == strategy:
            raise PluginConflictError(
                f"a strategy named {strategy!r} is installed already, from {provider.distribution} {provider.version}.",
                name=strategy,
                distribution=provider.distribution,
                version=provider.version,
                hint="Take another name; the strategy is called after the distribution (--name).",
            )


# --- files


def _template() -> Path:
    # beside the modules in what is built, beside the package in the repository: no copy of it can be out of date
    package = Path(__file__).resolve().parent
    for place in (package / "_template", package.parent / "plugins_template"):
        if (place / "pyproject.toml").is_file():
            return place
    raise ScaffoldError("the template is missing from this installation: reinstall gift-core.")


def _sources(kind: str) -> Iterator[tuple[str, Path]]:
    root = _template()
    found = dict(_walk(root))
    if kind != KINDS[0]:
        found |= dict(_walk(root / _VARIANTS / kind))
    yield from sorted(found.items())


def _walk(root: Path) -> Iterator[tuple[str, Path]]:
    for path in root.rglob("*"):
        parts = path.relative_to(root).parts
        if path.is_file() and parts[0] != _VARIANTS and not _LEFTOVERS.intersection(parts) and not path.name.endswith(".pyc"):
            yield "/".join(parts), path


def _render(path: str, source: Path, names: Names) -> str:
    # in TOML the author stands between quotes, where quotes and backslashes are written as JSON writes them
    author = json.dumps(names.author, ensure_ascii=False)[1:-1] if path.endswith(".toml") else names.author
    return _fill(source.read_text(encoding="utf-8"), names._replace(author=author))


def _fill(text: str, names: Names) -> str:
    values = {
        "gift-template-plugin": names.distribution,
        "gift_template_plugin": names.package,
        "The GIFt authors": names.author,
        "Template": names.prefix,
        "template": names.strategy,
    }
    return re.sub("|".join(map(re.escape, values)), lambda match: values[match[0]], text)


def _write(root: Path, files: dict[str, str]) -> None:
    for path, text in files.items():
        place = root / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text, encoding="utf-8", newline="\n")
