"""One file per question; each gives its tasks."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.plan import Settings, Task
from benchmarks.suites import enabling, evaluating, growth, importing, memory, states, training

#: The suites by name, in the order in which they run: importing comes last, when the others have read the files of all libraries.
SUITES: dict[str, Callable[[Settings], list[Task]]] = {
    "enable": enabling.tasks,
    "state": states.tasks,
    "growth": growth.tasks,
    "memory": memory.tasks,
    "eval": evaluating.tasks,
    "train": training.tasks,
    "import": importing.tasks,
}
