"""Where a plugin's code lies, found without running any of it."""

from __future__ import annotations

import importlib.util
import json
from importlib.machinery import ModuleSpec, PathFinder

from gift_core.plugins.discovery import Provider, distribution_of


def source_file(provider: Provider) -> str | None:
    """The file of the module that an entry point names; None if there is none.

    Only the top-level package goes through the import system: to find a module inside of a package, that would import the package.
    """
    top, *inner = provider.module.split(".")
    spec = _find(top)
    for part in inner:
        if spec is None or spec.submodule_search_locations is None:
            return None
        spec = PathFinder.find_spec(part, list(spec.submodule_search_locations))
    return spec.origin if spec else None


def is_editable(provider: Provider) -> bool | None:
    """Whether the package is installed editable; None for what no installed package provides."""
    distribution = distribution_of(provider)
    if distribution is None:
        return None
    try:
        said = json.loads(distribution.read_text("direct_url.json") or "{}")
        return bool(said.get("dir_info", {}).get("editable", False))
    except (ValueError, AttributeError, OSError):
        return False


def _find(top: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
