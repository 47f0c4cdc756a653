"""Checks of what a strategy says of itself; no model is tuned."""

from __future__ import annotations

import copy
import functools
import json
import pickle
import subprocess
import sys
from typing import Any

from gift_core.capabilities import Capabilities
from gift_core.plugins import PLUGIN_API
from gift_core.strategy import FineTuningStrategy
from gift_core.testing.results import CheckSkipped, demand
from gift_core.testing.subject import Candidate
from gift_core.testing.table import check

# Run in a process of its own: what importing a module changed beyond what importing it must.
_IMPORT = """
import contextlib, importlib, io, json, os, random, sys
sys.path[:], name = json.load(sys.stdin)
import torch

def places():
    owners = {"torch": torch, "torch.nn.functional": torch.nn.functional, "torch.Tensor": torch.Tensor, "nn.Module": torch.nn.Module}
    return {f"{owner}.{key}": value for owner, thing in owners.items() for key, value in list(vars(thing).items())}

def state():
    return {
        "torch's random state": torch.get_rng_state().tolist(),
        "Python's random state": random.getstate(),
        "torch's default type": torch.get_default_dtype(),
        "torch's gradient mode": torch.is_grad_enabled(),
        "torch's number of threads": torch.get_num_threads(),
        "torch's deterministic mode": torch.are_deterministic_algorithms_enabled(),
        "the environment": dict(os.environ),
        "the working directory": os.getcwd(),
    }

before, functions, printed = state(), places(), io.StringIO()
try:
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        importlib.import_module(name)
except ModuleNotFoundError as error:
    print(json.dumps({"absent": error.name}))
else:
    now, after = state(), places()
    changed = [key for key in before if before[key] != now[key]]
    changed += [key for key, value in functions.items() if after.get(key, value) is not value and not key.endswith("__")]
    print(json.dumps({"changed": changed, "printed": printed.getvalue()}))
"""


@check("api", scope="strategy")
def import_is_quiet(candidate: Candidate) -> None:
    """Importing the strategy's module prints nothing, draws no random number, and changes no setting and no function of torch."""
    module = type(candidate.strategy).__module__
    said = _watch_import(module, tuple(sys.path))
    if "absent" in said:
        own = module == said["absent"] or module.startswith(f"{said['absent']}.")
        demand(own, f"importing {module} needs {said['absent']!r}, which is not installed")
        raise CheckSkipped(f"{module} cannot be imported by name in another process, so its import cannot be watched")
    demand(not said["changed"], f"importing {module} changed {', '.join(said['changed'])}")
    demand(not said["printed"], f"importing {module} printed {said['printed'][:80]!r}")


@functools.cache
def _watch_import(module: str, path: tuple[str, ...]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", _IMPORT],
        input=json.dumps([path, module]),
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )
    demand(done.returncode == 0, f"importing {module} ended the program: {done.stderr.strip().splitlines()[-1:]}")
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return said


@check("api", scope="strategy")
def declared_name(candidate: Candidate) -> None:
    """The class has a name that users can type: text without colons and spaces."""
    name = candidate.strategy.name
    demand(isinstance(name, str) and bool(name), f"{type(candidate.strategy).__name__}.name is {name!r}: set it to a text")
    demand(not any(c == ":" or c.isspace() for c in str(name)), f"the name {name!r} has a colon or a space in it")


@check("api", scope="strategy")
def declared_api(candidate: Candidate) -> None:
    """The class says for which generation of the plugin API it was written, and it is this core's."""
    declared = candidate.strategy.plugin_api
    demand(declared == PLUGIN_API, f"plugin_api is {declared!r}, and this core speaks {PLUGIN_API}")


@check("api", scope="strategy")
def declared_capabilities(candidate: Candidate) -> None:
    """What the class declares as ``capabilities`` is a `Capabilities`, of torch types that exist."""
    import torch

    declared = getattr(candidate.strategy, "capabilities", Capabilities())
    demand(isinstance(declared, Capabilities), f"capabilities is {declared!r}, not gift_core.capabilities.Capabilities(...)")
    named = [*declared.dtypes, *filter(None, [declared.adapter_dtype])]
    unknown = [name for name in named if not isinstance(getattr(torch, name, None), torch.dtype)]
    demand(not unknown, f"capabilities names dtypes that torch lacks: {', '.join(unknown)}")


@check("api", scope="strategy")
def config_round_trip(candidate: Candidate) -> None:
    """``to_config`` gives JSON data, from which the class makes an equal strategy again."""
    config = candidate.strategy.to_config()
    read = json.loads(json.dumps(config, allow_nan=False))
    again = type(candidate.strategy)(**read["parameters"])
    demand(again.to_config() == config, f"{config} became {again.to_config()} on the way through JSON")


@check("api", scope="strategy")
def strategy_is_data(candidate: Candidate) -> None:
    """The strategy can be copied and pickled, and says what it is."""
    strategy = candidate.strategy
    for what, made in (("deep copy", copy.deepcopy(strategy)), ("pickle", pickle.loads(pickle.dumps(strategy)))):
        demand(isinstance(made, FineTuningStrategy) and repr(made) == repr(strategy), f"a {what} of {strategy!r} is {made!r}")
