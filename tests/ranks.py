"""Running a test file as several processes over gloo, on this machine alone, bounded in time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

WORLD = 2

needs_gloo = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch was built without gloo")


def start_ranks(file: str, folder: Path, *arguments: str, world: int = WORLD) -> list[subprocess.Popen[str]]:
    """Start ``python file folder rank world *arguments`` once for each rank."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    command = [sys.executable, file, str(folder)]
    return [
        subprocess.Popen([*command, str(rank), str(world), *arguments], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(world)
    ]


def finish_ranks(processes: list[subprocess.Popen[str]], timeout: float = 120) -> list[tuple[int, str]]:
    """Wait for the processes, kill what is left, and give each one's exit code and error text."""
    try:
        errors = [process.communicate(timeout=timeout)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [(process.returncode, error) for process, error in zip(processes, errors, strict=True)]


def run_ranks(file: str, folder: Path, *arguments: str, world: int = WORLD) -> Path:
    """Run the processes to their end, which must be a good one, and give the folder where they left their results."""
    results = finish_ranks(start_ranks(file, folder, *arguments, world=world))
    assert [code for code, _ in results] == [0] * world, "\n".join(error for _, error in results)
    return folder


def join(folder: Path, rank: int, world: int) -> None:
    """What each process does first."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)


def leave() -> None:
    """What each process does last, its work done: gloo's threads outlive the group, and C++ aborts where one is at work at the end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
