"""A process that is killed while it saves: the path holds the complete old file or the complete new one."""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_table import RecordFaults

from gift_core import read_adapter_info
from gift_core.atomic import ABANDONED_AFTER_SECONDS, atomic_path
from gift_core.errors import AdapterFileError

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the saving processes are made by fork")

KILLS = 400
#: Kills of the control: enough that a way of writing that can be caught half way is caught.
CONTROL_KILLS = 60

# One process imports torch and forks a child for each kill; the child saves again and again, and says when it has begun.
SAVER = """
    import os, sys
    import torch
    from torch import nn
    import gift_core

    torch.set_num_threads(1)
    path, way = sys.argv[1:]
    model = nn.Linear(200, 300)
    gift_core.enable_fine_tuning(model, "full")
    gift_core.save_adapter(model, path)
    whole = open(path, "rb").read()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            number = int(line)
            with torch.no_grad():
                model.bias.fill_(number)
            print(os.getpid(), flush=True)
            while True:
                if way == "atomic":
                    gift_core.save_adapter(model, path)
                else:
                    with open(path, "wb") as file:
                        file.write(whole)
        os.waitpid(child, 0)
        print("ended", flush=True)
"""


@contextlib.contextmanager
def saving(path: Path, way: str) -> Iterator[subprocess.Popen[str]]:
    """A process that forks one that saves for each line it gets."""
    command = [sys.executable, "-c", textwrap.dedent(SAVER), str(path), way]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as process:
        try:
            yield process
        finally:
            process.kill()


def say(process: subprocess.Popen[str], text: str) -> str:
    """Send a line and wait for the answer, bounded in time."""
    assert process.stdin is not None and process.stdout is not None
    if text:
        process.stdin.write(f"{text}\n")
    ready, _, _ = select.select([process.stdout], [], [], 60)
    assert ready, "the saving process does not answer"
    return process.stdout.readline().strip()


def kill_saves(path: Path, way: str, kills: int) -> tuple[int, int]:
    """Kill that many saves at random moments; gives how often no whole file was there, and how often it was not of a save."""
    draw = random.Random(f"kill {way}")
    broken = foreign = 0
    with saving(path, way) as process:
        for number in range(kills):
            child = int(say(process, str(number)))
            time.sleep(draw.uniform(0, 0.01))
            os.kill(child, signal.SIGKILL)
            assert say(process, "") == "ended"
            try:
                read_adapter_info(path)
            except AdapterFileError:
                broken += 1
            except Exception:
                foreign += 1
    return broken, foreign


def test_killed_saves(tmp_path: Path, record_faults: RecordFaults) -> None:
    """After kill -9 at a random moment of a save the file is whole, and the next save removes what the killed ones left."""
    path = tmp_path / "adapter.safetensors"

    broken, foreign = kill_saves(path, "atomic", KILLS)

    left = [file for file in tmp_path.iterdir() if file != path]
    assert left, "no kill fell into a save, so that this shows nothing"
    past = time.time() - 2 * ABANDONED_AFTER_SECONDS
    for item in [inside for folder in left for inside in (*folder.iterdir(), folder)]:
        os.utime(item, (past, past))
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"next")
    assert os.listdir(tmp_path) == [path.name]
    record_faults("kill -9 while saving", KILLS, lost=broken, foreign=foreign)


def test_the_kills_bite(tmp_path: Path) -> None:
    """The same kills, where the file is written in place, do leave broken files."""
    broken, _ = kill_saves(tmp_path / "adapter.safetensors", "plain", CONTROL_KILLS)

    assert broken
