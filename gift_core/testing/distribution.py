"""Checks of how an installed plugin is packaged, from its metadata."""

from __future__ import annotations

import difflib
import importlib.metadata as metadata
import json
import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urlparse

from gift_core.errors import PluginError
from gift_core.plugins import STRATEGIES, Provider
from gift_core.plugins.registry import load
from gift_core.testing.results import CheckFailed, CheckResult, CheckSkipped, Status, demand

#: Top-level names that a wheel puts beside everybody else's packages by mistake.
_STRAY = {"src", "tests", "test", "docs", "examples", "benchmarks", "build", "dist"}


def check_distribution(name: str) -> list[CheckResult]:
    """Check how a plugin is packaged: metadata, licence, requirement, entry points, types and layout.

    Args:
        name: the installed distribution, as in ``pip install``.

    Returns:
        One result for each check. Entry points are loaded, as using them would.

    Raises:
        PluginError: if no such distribution is installed; the message has the nearest names.
    """
    distribution = _find(name)
    return [_result(check, distribution) for check in _CHECKS]


def _find(name: str) -> metadata.Distribution:
    try:
        return metadata.distribution(name)
    except (metadata.PackageNotFoundError, ValueError) as error:
        installed = {str(found.metadata["Name"]) for found in metadata.distributions() if found.metadata["Name"]}
        near = difflib.get_close_matches(str(name), sorted(installed), n=3, cutoff=0.6)
        question = f"; did you mean {' or '.join(near)}?" if near else "."
        message = f"no distribution named {name!r} is installed{question}"
        raise PluginError(message, name=name, hint=f"Install it first: pip install {name or 'NAME'}") from error


def _result(check: Callable[[metadata.Distribution], None], distribution: metadata.Distribution) -> CheckResult:
    name = check.__name__
    try:
        check(distribution)
    except CheckSkipped as skipped:
        return CheckResult(name, None, Status.SKIPPED, str(skipped))
    except CheckFailed as failed:
        return CheckResult(name, None, Status.FAILED, str(failed))
    return CheckResult(name, None, Status.PASSED)


def states_metadata(distribution: metadata.Distribution) -> None:
    """It states a version, a summary, the Python it needs and a description."""
    stated = distribution.metadata.json
    wanted = {"version": "version", "summary": "description", "requires_python": "requires-python", "description": "readme"}
    missing = [key for field, key in wanted.items() if not str(stated.get(field, "")).strip()]
    demand(not missing, f"[project] in its pyproject.toml lacks {', '.join(missing)}")


def states_licence(distribution: metadata.Distribution) -> None:
    """It states its licence, and brings the text."""
    stated = distribution.metadata
    named = stated.get_all("License-Expression") or stated.get_all("License")
    named = named or [line for line in stated.get_all("Classifier") or [] if line.startswith("License ::")]
    demand(bool(named), 'it states no licence: write license = "MIT", or yours, under [project]')
    demand(bool(stated.get_all("License-File")), 'it brings no licence text: write license-files = ["LICENSE"] under [project]')


def requires_gift_core(distribution: metadata.Distribution) -> None:
    """It requires gift-core, with the oldest version that it works with, and does not pin it."""
    if _normal(distribution.metadata["Name"]) == "gift-core":
        raise CheckSkipped("this is gift-core itself")
    requirements = [line for line in distribution.requires or [] if _normal(re.split(r"[^\w.-]", line)[0]) == "gift-core"]
    plain = [line for line in requirements if "extra ==" not in line]
    demand(bool(plain), 'it does not require gift-core: write dependencies = ["gift-core>=0.1"]')
    demand(any(">" in line or "~=" in line for line in plain), f"{plain[0]!r} names no oldest version: write gift-core>=0.1")
    demand("==" not in plain[0], f"{plain[0]!r} pins gift-core, so no other plugin can ask for another version: write gift-core>=0.1")


def entry_points_agree(distribution: metadata.Distribution) -> None:
    """It registers strategies, each loads, and the class has the name of its entry point."""
    entries = [entry for entry in distribution.entry_points if entry.group == STRATEGIES]
    others = [entry for entry in distribution.entry_points if entry.group == "gift.plugins"]
    demand(bool(entries or others), f"it has no entry point in the group {STRATEGIES!r}, so nobody finds its strategies")
    for entry in entries:
        stated = distribution.metadata
        provider = Provider(entry.name, entry.value, STRATEGIES, stated["Name"], stated["Version"], "")
        try:
            target = load(provider)
        except PluginError as error:
            raise CheckFailed(str(error)) from error
        name = getattr(target, "name", entry.name)
        demand(name == entry.name, f"the entry point {entry.name!r} leads to {entry.value}, whose name is {name!r}: use one name")


def is_typed(distribution: metadata.Distribution) -> None:
    """Each package that its entry points name brings ``py.typed``, so that type checkers read its types."""
    for package, folder in _packages(distribution).items():
        demand((folder / "py.typed").is_file(), f"{package} has no py.typed: add that empty file beside its __init__.py")


def keeps_its_place(distribution: metadata.Distribution) -> None:
    """It installs nothing but its own packages; a project that is installed editable has them under ``src/``."""
    tops = {Path(str(file)).parts[0] for file in distribution.files or [] if ".." not in str(file)}
    stray = sorted(tops & _STRAY)
    demand(not stray, f"it installs the top-level {', '.join(stray)} beside everybody's packages: leave them out of the wheel")
    project = _editable_project(distribution)
    if project is None or _normal(distribution.metadata["Name"]) == "gift-core":
        return
    loose = [package for package in _packages(distribution) if (project / package).is_dir()]
    demand(not loose, f"{', '.join(loose)} lies in the project's own folder, where it is importable by accident: move it to src/")


_CHECKS = (states_metadata, states_licence, requires_gift_core, entry_points_agree, is_typed, keeps_its_place)


def _packages(distribution: metadata.Distribution) -> dict[str, Path]:
    """The top-level packages that the entry points name, with their folders, found without importing anything."""
    tops = {entry.value.partition(":")[0].split(".")[0].strip() for entry in distribution.entry_points if "gift." in entry.group}
    files = [Path(str(distribution.locate_file(file))) for file in distribution.files or []]
    project = _editable_project(distribution)
    if project is not None:
        files += [project / "src" / top / "__init__.py" for top in tops] + [project / top / "__init__.py" for top in tops]
    inits = [file for file in files if file.name == "__init__.py" and file.parent.name in tops and file.is_file()]
    return {file.parent.name: file.parent for file in inits}


def _editable_project(distribution: metadata.Distribution) -> Path | None:
    said = json.loads(distribution.read_text("direct_url.json") or "{}")
    if not said.get("dir_info", {}).get("editable"):
        return None
    return Path(unquote(urlparse(said["url"]).path))


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
