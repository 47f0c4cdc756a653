"""Running tests of a copy of the project in a fork of this process, which has imported what all of them need.

Importing torch takes longer than most tests. It is done once; each fork then imports the project afresh.
"""

from __future__ import annotations

import builtins
import contextlib
import dataclasses
import importlib
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

#: What the tests need and none of them changes.
_SHARED = (
    "pytest",
    "hypothesis.stateful",
    "pytest_timeout",
    "numpy",
    "safetensors.torch",
    "torch._dynamo",
    "torch.distributed.tensor",
    "torch.export",
)
#: A mutant may ask for any amount of memory.
_MEMORY = 24 * 2**30
_FOREIGN = 99


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How tests ended: whether all passed, the first that did not or what happened instead, and the seconds it took."""

    passed: bool
    reason: str
    seconds: float


class ForkedTests:
    """The tests of a copy of the project.

    Args:
        copy: a copy of the repository; its packages are found before those of the repository itself, by child processes too.
        original: the repository, which is no longer found.
    """

    def __init__(self, copy: Path, original: Path) -> None:
        self.copy = copy
        self.log = copy.parent / "log.txt"
        packages = [str(copy), str(copy / "gift_lora_plugin" / "src")]
        # an environment may lie within the repository, and stays
        own = {original, original / "tests", original / "tools", original / "gift_lora_plugin" / "src"}
        sys.path[:] = packages + [entry for entry in sys.path if Path(entry or ".").resolve() not in own]
        os.environ |= {
            "PYTHONPATH": os.pathsep.join(packages),
            "OMP_NUM_THREADS": "1",
            "HYPOTHESIS_STORAGE_DIRECTORY": str(copy.parent / "examples"),
        }
        for name in _SHARED:
            importlib.import_module(name)
        if loaded := [name for name in sys.modules if name.partition(".")[0] in ("gift_core", "gift_lora_plugin")]:
            raise RuntimeError(f"{loaded[0]} is imported already, so that no fork would import it afresh.")

    def run(self, files: Sequence[str], limit: float) -> Outcome:
        """Run test files up to the first failure, for at most ``limit`` seconds.

        Raises:
            RuntimeError: if the tests did not import the copy.
        """
        start, note = time.monotonic(), self.copy.parent / "note.txt"
        note.write_text("")
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = self._in_child(files, note)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        try:
            status = _waited_for(child, start + limit)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)  # what the tests started may be at work still
        seconds = time.monotonic() - start
        if status is None:
            os.waitpid(child, 0)
            return Outcome(False, f"no end within {limit:.0f} s", seconds)
        code = os.waitstatus_to_exitcode(status)
        if code == _FOREIGN:
            raise RuntimeError(f"the tests imported another gift_core than that in {self.copy}; see {self.log}.")
        return Outcome(code == 0, "" if code == 0 else note.read_text() or f"exit code {code}", seconds)

    def _in_child(self, files: Sequence[str], note: Path) -> int:
        import pytest

        os.setsid()
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
        output = os.open(self.log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(output, stream)
        os.chdir(self.copy)
        # cosmic-ray puts this name where an exception was caught: one that nobody raises
        builtins.CosmicRayTestingException = type("CosmicRayTestingException", (Exception,), {})  # type: ignore[attr-defined]
        shared = ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of plugins, whose own assertions need no rewriting
        options = [*shared, "-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0", f"--basetemp={self.copy.parent / 'tests'}"]
        code = int(pytest.main([*options, *files], plugins=[_FirstFailure(note)]))
        core = sys.modules.get("gift_core")
        here = core is not None and core.__file__ is not None and Path(core.__file__).is_relative_to(self.copy)
        return code if here or code else _FOREIGN


class _FirstFailure:
    """Notes the first test that fails, or the first file that cannot be read."""

    def __init__(self, note: Path) -> None:
        self.note = note

    def pytest_runtest_logreport(self, report: object) -> None:
        self._note(report)

    def pytest_collectreport(self, report: object) -> None:
        self._note(report)

    def _note(self, report: object) -> None:
        if getattr(report, "failed", False) and not self.note.read_text():
            self.note.write_text(str(getattr(report, "nodeid", "")))


def _waited_for(child: int, until: float) -> int | None:
    while time.monotonic() < until:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return status
        time.sleep(0.02)
    return None
