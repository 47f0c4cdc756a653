"""The scripts of examples/distributed, run as a user runs them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import needs_gloo

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "distributed"
PAGE = ROOT / "docs" / "distributed.md"


def run(*command: str, cwd: Path) -> str:
    """Run a command in a folder of its own, and give what it printed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else ""}
    for _ in range(2):
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=100)
        # seen once, and in none of 40 tries since: gloo's threads outlive destroy_process_group, also when nothing of
        # the script's is left, and C++ aborts where one of them is still at work while its process ends
        if "terminate called without an active exception" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_gloo
@pytest.mark.timeout(240)
@pytest.mark.skipif(torch.__version__.startswith("2.6"), reason="FSDP2 of torch 2.6 does not run on a CPU")
def test_training_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes learn the sequences, and the file they leave predicts them on one process with the whole base."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    shown = run(*launch, str(FOLDER / "train.py"), cwd=tmp_path)
    losses = [float(text) for text in re.findall(r"loss ([0-9.]+)", shown)]
    monkeypatch.syspath_prepend(FOLDER)
    from decoder import Decoder, Sizes, next_token_loss

    from gift_core import load_adapter

    model = Decoder(Sizes(4, 64, 192, 4, 4, 31))
    model.load_state_dict(torch.load(tmp_path / "base.pt", weights_only=True))
    load_adapter(model, tmp_path / "adapter.safetensors")
    tokens = (torch.arange(5)[:, None] + torch.arange(32)) % 31

    assert losses[0] > 3 and losses[-1] < 0.1
    assert next_token_loss(model(tokens), tokens).item() < 0.1


@pytest.mark.skipif(torch.__version__.startswith("2.6"), reason="torch 2.6 counts attention that is quadratic in the length")
def test_the_page_shows_what_the_script_counts(tmp_path: Path) -> None:
    """The memory table of the page is what the script gives today, within 5 %: versions of torch save a little more or less."""
    copy = tmp_path / "page.md"
    copy.write_text(PAGE.read_text())

    run(sys.executable, str(FOLDER / "memory.py"), "--write", str(copy), cwd=tmp_path)

    decimal = re.compile(r"\d+\.\d\d")
    assert decimal.sub("_", copy.read_text()) == decimal.sub("_", PAGE.read_text())
    counted, shown = ([float(text) for text in decimal.findall(page.read_text())] for page in (copy, PAGE))
    assert shown == pytest.approx(counted, rel=0.05, abs=0.011)
