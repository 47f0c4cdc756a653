"""What importing a library takes once torch is there; a new interpreter each time."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from functools import partial

from benchmarks.plan import Record, Settings, Task

#: The code behind each name; what GIFt loads on first use is used.
STATEMENTS = {
    "GIFt": "import gift_core as g, gift_lora_plugin as p; (g.enable_fine_tuning, g.save_adapter, g.merge, p.LoRA)",
    "loralib": "import loralib",
    "LyCORIS": "import lycoris",
    "PEFT": "import peft",
}
MODULES = {"GIFt": "gift_lora_plugin", "loralib": "loralib", "LyCORIS": "lycoris", "PEFT": "peft"}

PROGRAM = "import time, torch; start = time.perf_counter(); {}; print((time.perf_counter() - start) * 1e3)"


def tasks(settings: Settings) -> list[Task]:
    """One task for all of them."""
    return [Task("import", 30, partial(measure, 2 if settings.quick else 4))]


def measure(rounds: int, record: Record) -> None:
    """Import each library in an interpreter of its own; those of which no bar speaks once, because some take seconds."""
    installed = [name for name in STATEMENTS if importlib.util.find_spec(MODULES[name]) is not None]
    record.leave_out("import", {name: f"{MODULES[name]} is not installed" for name in STATEMENTS if name not in installed})
    milliseconds(STATEMENTS["GIFt"])  # the file cache is warm from here on; for the peers it is if other suites ran before
    samples = {
        name: [milliseconds(STATEMENTS[name]) if name == "GIFt" or done == 0 else None for done in range(rounds)] for name in installed
    }
    record.add("import/after torch", "ms", samples)


def milliseconds(statement: str) -> float:
    """How long a statement takes in a new interpreter that has torch."""
    program = [sys.executable, "-W", "ignore", "-c", PROGRAM.format(statement)]
    # pip compiles what it installs, and an editable project is compiled by its first import, if that is allowed to
    surroundings = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(program, capture_output=True, text=True, encoding="utf-8", check=True, env=surroundings)
    return float(done.stdout.split()[-1])
