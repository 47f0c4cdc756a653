"""Loading one plugin in a process of its own, to see what it does: ``python -m gift_core.plugins.probe GROUP DISTRIBUTION:NAME``."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from typing import Any

from gift_core.errors import PluginError
from gift_core.plugins.discovery import PLUGINS, Provider
from gift_core.plugins.hook_plugins import try_plugin
from gift_core.plugins.registry import find_provider, load
from gift_core.plugins.settings import as_variables, current_settings

#: A plugin that takes longer than this to load has failed.
TIMEOUT_SECONDS = 120

_MARK = "gift-probe:"
_PATCHABLE = ("torch", "torch.nn", "torch.nn.functional", "torch.optim", "torch:Tensor", "torch.nn:Module", "torch.nn:Linear")


@dataclasses.dataclass(frozen=True)
class Probe:
    """What loading a plugin showed.

    Attributes:
        provider: the plugin.
        reason: why it cannot be used; None if it can.
        seconds: how long loading took, torch itself not counted; None if it did not end.
        patched: functions and classes of torch that were replaced by loading it.
    """

    provider: Provider
    reason: str | None
    seconds: float | None
    patched: tuple[str, ...]


def probe_all(found: Iterable[Provider]) -> list[Probe]:
    """Load each plugin in its own process, a few at a time."""
    with concurrent.futures.ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        return list(pool.map(probe, found))


def probe(provider: Provider) -> Probe:
    """Load a plugin in a new process, whose crash is the plugin's alone."""
    command = [sys.executable, "-P", "-m", __name__, provider.group, provider.identity]
    environment = (
        os.environ | as_variables(current_settings()) | {"PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)}
    )
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=TIMEOUT_SECONDS, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return Probe(provider, f"loading it did not end within {TIMEOUT_SECONDS} seconds", None, ())
    lines = [line.removeprefix(_MARK) for line in done.stdout.splitlines() if line.startswith(_MARK)]
    if not lines:
        last = done.stderr.strip().splitlines()[-1:] or ["it printed nothing"]
        return Probe(provider, f"loading it ended the process with code {done.returncode}: {last[0]}", None, ())
    told = json.loads(lines[-1])
    return Probe(provider, told["reason"], told["seconds"], tuple(told["patched"]))


def main(arguments: list[str]) -> None:
    """Load one plugin in this process and print what happened."""
    group, name = arguments
    before = _torch_functions()
    start = time.perf_counter()
    reason = _reason(group, name)
    seconds = time.perf_counter() - start
    after = _torch_functions() if before else {}
    patched = sorted(key for key, thing in before.items() if after.get(key) is not thing)
    print(_MARK + json.dumps({"reason": reason, "seconds": seconds, "patched": patched}))


def _reason(group: str, name: str) -> str | None:
    try:
        provider = find_provider(name, group)
        if group == PLUGINS:
            error = try_plugin(provider).error
            return str(error) if error else None
        load(provider)
    except PluginError as error:
        return str(error)
    return None


def _torch_functions() -> dict[str, Any]:
    try:
        owners = {place: _owner(place) for place in _PATCHABLE}
    except ImportError:
        return {}
    return {
        f"{place.replace(':', '.')}.{key}": thing
        for place, owner in owners.items()
        for key, thing in vars(owner).items()
        if callable(thing)
    }


def _owner(place: str) -> Any:
    module, _, name = place.partition(":")
    owner = importlib.import_module(module)
    return getattr(owner, name) if name else owner


if __name__ == "__main__":
    main(sys.argv[1:])
