"""Refusals of the command ``gift`` and of the conformance kit; wrong usage is click's to tell."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fake_distributions import Install, installing
from faults.refusals_common import Case, bystander, command, tuned
from models import mlp
from safetensors.torch import save_file

from gift_core import FineTuningStrategy, save_adapter
from gift_core.testing import check_distribution, check_strategy

MODELS = (
    "import torch\nfrom torch import nn\ndef model():\n    torch.manual_seed(0)\n"
    "    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))\n"
)


def _inspect(model: str, source: str = MODELS, name: str = "m.py") -> Callable[[Any, Path], Any]:
    """``gift inspect`` of a model in a file."""

    def run(bystander: Any, folder: Path) -> Any:
        (folder / name).write_text(source)
        return command("inspect", model, "--strategy", "full")(bystander, folder)

    return run


def _merge(weights: Callable[[Path], Any], *more: str, source: str = MODELS) -> Callable[[Any, Path], Any]:
    """``gift merge`` of an adapter, with a file of weights."""

    def run(bystander: Any, folder: Path) -> Any:
        (folder / "m.py").write_text(source)
        save_adapter(tuned(mlp)(), folder / "a.safetensors")
        weights(folder / "w.pt")
        options = more or ("--weights", "{folder}/w.pt")
        arguments = ("merge", "{folder}/m.py:model", "{folder}/a.safetensors", *options, "-o", "{folder}/out.safetensors")
        return command(*arguments)(bystander, folder)

    return run


def _module(source: str) -> Callable[[Any, Path], Any]:
    """``gift inspect`` of a model in a module that is installed."""

    def run(bystander: Any, folder: Path) -> Any:
        with installing(folder) as install:
            install("module-dist", made_up_module=source)
            return command("inspect", "made_up_module:model", "--strategy", "full")(bystander, folder)

    return run


def _cut(path: Path) -> None:
    save_file({"x": torch.ones(2)}, path.with_suffix(".safetensors"))
    path.with_suffix(".safetensors").write_bytes(path.with_suffix(".safetensors").read_bytes()[:-1])


#: A model whose state dict has more than tensors.
STATE = "class Model(nn.Sequential):\n    def get_extra_state(self): return 'x'\n    def set_extra_state(self, state): ...\n" + (
    "plain = model\ndef model(): return Model(*plain())\n"
)


def _nothing(_: Path) -> None:
    """No file."""


def _with(prepare: Callable[[Install], Any], *arguments: str) -> Callable[[Any, Path], Any]:
    """A command where made-up distributions are installed."""

    def run(bystander: Any, folder: Path) -> Any:
        with installing(folder) as install:
            prepare(install)
            return command(*arguments)(bystander, folder)

    return run


def _format(install: Install) -> None:
    install("format-dist", "made-up = made_up_format:FORMAT", group="gift.formats", made_up_format="FORMAT = object()")


def _demo(install: Install) -> None:
    source = "def main(arguments):\n    import absent_dependency\n"
    install("demo-dist", "made-up = made_up_demo:main", group="gift.demos", made_up_demo=source)


def _into_a_file(bystander: Any, folder: Path) -> Any:
    (folder / "file").write_text("")
    return command("demo", "digits", "--output", "{folder}/file/x")(bystander, folder)


def _project(text: str) -> Callable[[Any, Path], Any]:
    def run(bystander: Any, folder: Path) -> Any:
        (folder / "pyproject.toml").write_text(text)
        return command("check", "{folder}")(bystander, folder)

    return run


_REASONLESS = {"pickles": " "}


class Needs(FineTuningStrategy):
    """A strategy that cannot be made of nothing."""

    def __init__(self, size: int) -> None:
        super().__init__()


COMMAND_CASES: list[Case] = [
    ("gift info of nothing", bystander, command("info", "{folder}/gone"), "gone"),
    ("gift show of a stranger", bystander, command("show", "loar"), "'lora'"),
    ("gift doctor of a stranger", bystander, command("doctor", "no-such-thing"), "no-such-thing"),
    ("gift check of a stranger", bystander, command("check", "loar"), "loar"),
    ("gift check of no project", bystander, command("check", "{folder}/"), "pyproject.toml"),
    ("gift check of a nameless project", bystander, _project("[project]\n"), "no project name"),
    ("gift check of a project that is not installed", bystander, _project("[project]\nname = 'not-there'\n"), "pip install -e"),
    ("gift demo of a stranger", bystander, command("demo", "no-demo"), "no-demo"),
    ("gift demo into a file", bystander, _into_a_file, "--output"),
    ("gift demo that needs another", bystander, _with(_demo, "demo", "made-up"), "absent_dependency"),
    ("gift convert to a stranger", bystander, command("convert", "--to", "no-format", "a", "b"), "no-format"),
    ("gift convert to what is none", bystander, _with(_format, "convert", "--to", "made-up", "a", "b"), "'export'"),
    (
        "gift inspect of a strategy that is not there",
        bystander,
        command("inspect", "torchvision:resnet18", "--strategy", "x.toml"),
        "x.toml",
    ),
    ("a model torchvision has not", bystander, command("inspect", "torchvision:resnet81", "--strategy", "full"), "resnet18"),
    ("a model in no file", bystander, _inspect("{folder}/n.py:model"), "n.py"),
    ("a model in no Python file", bystander, _inspect("{folder}/m.txt:model", name="m.txt"), "m.txt"),
    ("a model in a file that raises", bystander, _inspect("{folder}/m.py:model", "1 / 0"), "ZeroDivisionError"),
    ("a model in no module", bystander, _inspect("a-b:model"), "'a-b'"),
    ("a model in a module that is not there", bystander, _inspect("torch.nm:model"), "'torch.nm'"),
    ("a model in a module that needs another", bystander, _module("import absent_dependency"), "absent_dependency"),
    ("a model in a module that raises", bystander, _module("1 / 0"), "ZeroDivisionError"),
    ("a model that is not there", bystander, _inspect("{folder}/m.py:modle"), "'model'"),
    ("a model that is a number", bystander, _inspect("{folder}/m.py:x", "x = 3"), "int"),
    ("a model that raises", bystander, _inspect("{folder}/m.py:x", "def x(): 1 / 0"), "ZeroDivisionError"),
    ("a model that gives none", bystander, _inspect("{folder}/m.py:x", "def x(): pass"), "None"),
    ("a model that wants arguments", bystander, _inspect("{folder}/m.py:x", "def x(size): pass"), "'size'"),
    ("weights that do not fit", bystander, _merge(lambda path: torch.save({"x": torch.ones(1)}, path)), "w.pt"),
    ("weights that are no file", bystander, _merge(lambda path: path.write_text("x")), "w.pt"),
    ("weights that are a list", bystander, _merge(lambda path: torch.save([1], path)), "list"),
    ("weights that are cut off", bystander, _merge(_cut, "--weights", "{folder}/w.safetensors"), "w.safetensors"),
    (
        "merged weights over a file",
        bystander,
        _merge(lambda path: (path.parent / "out.safetensors").write_text(""), "--trusted"),
        "--force",
    ),
    ("merged weights that are no tensors", bystander, _merge(_nothing, "--trusted", source=MODELS + STATE), "_extra_state"),
    ("a conformance check of arguments", bystander, lambda m, f: check_strategy(Needs), "Needs"),
    ("a conformance check of no models", bystander, lambda m, f: check_strategy("full", models=[]), "models"),
    ("a conformance check at no level", bystander, lambda m, f: check_strategy("full", level="x"), "'x'"),  # type: ignore[arg-type]
    (
        "a conformance check that expects a stranger",
        bystander,
        lambda m, f: check_strategy("full", expected_failures={"x": "y"}),
        "'x'",
    ),
    (
        "a conformance check that expects without reason",
        bystander,
        lambda m, f: check_strategy("full", expected_failures=_REASONLESS),
        "reason",
    ),
    ("a conformance check of no distribution", bystander, lambda m, f: check_distribution("gift-lora-plugni"), "gift-lora-plugin"),
]
