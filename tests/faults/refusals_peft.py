"""Refusals of PEFT's files, read and written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adapter_headers import described
from faults.refusals_common import Case, bystander, prepared, tuned
from models import mlp
from torch import nn

from gift_core import enable_fine_tuning, save_adapter
from gift_lora_plugin import LoRALinearFineTuningStrategy
from gift_lora_plugin.peft_files import PEFT, export_peft, import_peft, load_peft

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def lora() -> nn.Module:
    """A model tuned with LoRA on its Linear layers."""
    model = mlp()
    enable_fine_tuning(model, LoRALinearFineTuningStrategy(rank=2))
    return model


def _changed(change: Callable[[Path], Any], read: Callable[[Any, Path], Any] = load_peft) -> Callable[[Any, Path], Any]:
    """Sound files of PEFT, changed and read."""

    def run(model: Any, folder: Path) -> Any:
        export_peft(lora(), folder / "peft")
        change(folder / "peft")
        return read(model, folder / "peft")

    return prepared(run)


def _says(**values: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text()) | values
        (folder / CONFIG).write_text(json.dumps(config))

    return change


def _writes(name: str, data: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(data)


def _pickled(folder: Path) -> None:
    (folder / TENSORS).rename(folder / "adapter_model.bin")


def _folder_for(name: str) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return change


def _large(name: str) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        with (folder / name).open("r+b") as file:
            file.write((2**40).to_bytes(8, "little"))
            file.truncate(2**25)

    return change


def _exporting(prepare: Callable[[Path], Any], **options: Any) -> Callable[[Any, Path], Any]:
    """Exporting a tuned model into a folder in which something is."""

    def run(model: Any, folder: Path) -> Any:
        prepare(folder)
        return export_peft(model, folder / "peft", **options)

    return prepared(run)


def _one_file(folder: Path) -> None:
    (folder / "peft").mkdir()
    for name in (CONFIG, TENSORS):
        (folder / "peft" / name).symlink_to(folder / "both")


def _there(folder: Path) -> None:
    export_peft(lora(), folder / "peft")


def _set_aside(folder: Path) -> None:
    """What a killed export leaves, but for a folder where a file belongs."""
    _there(folder)
    (folder / "peft" / CONFIG).rename(folder / "peft" / f".{CONFIG}.{'0' * 32}.old")
    shutil.move(folder / "peft" / TENSORS, folder / "peft" / f".{TENSORS}.{'0' * 32}.old")
    (folder / "peft" / TENSORS / "in the way").mkdir(parents=True)


def _of_file(change: Callable[[Path], Any], model: Callable[[], nn.Module] | None = None) -> Callable[[Any, Path], Any]:
    """Exporting an adapter file."""

    def run(_: Any, folder: Path) -> Any:
        save_adapter(lora(), folder / "a.safetensors")
        change(folder / "a.safetensors")
        return export_peft(folder / "a.safetensors", folder / "peft", model=model and model())

    return prepared(run)


def _keep(_: Path) -> None:
    """Leave the file."""


def _other_site(path: Path) -> None:
    path.write_bytes(described(path.read_bytes(), sites=[["LinearLoRA", "weight", ["0", "2", "9"]]], base="0" * 24))


def _other_strategy(path: Path) -> None:
    path.write_bytes(described(path.read_bytes(), strategy={"name": "lora", "parameters": {}}))


def _importing(_: Path, model: Any, folder: Path, **options: Any) -> Any:
    (folder.parent / "a.safetensors").write_text("")
    return import_peft(folder, folder.parent / "a.safetensors", model, **options)


def _wrapped() -> nn.Module:
    return nn.Sequential(lora())


PEFT_CASES: list[Case] = [
    ("PEFT's config of another method", mlp, _changed(_says(peft_type="IA3")), "'IA3'"),
    ("PEFT's config that is malformed", mlp, _changed(_says(lora_alpha="x", bias=3)), "lora_alpha is 'x'"),
    ("PEFT's config that asks for more", mlp, _changed(_says(layer_replication=[[0, 1]])), "layer_replication"),
    ("PEFT's config of an unknown key", mlp, _changed(_says(of_tomorrow=True)), "'of_tomorrow'"),
    ("PEFT's config of a start that changes the base", mlp, _changed(_says(init_lora_weights="corda")), "init_lora_weights"),
    ("PEFT's pattern that is too long", mlp, _changed(_says(alpha_pattern={"x" * 5000: 1})), "5000 characters"),
    ("PEFT's pattern of a class", mlp, _changed(_says(alpha_pattern={"\\d": 1})), "\\\\d"),
    ("PEFT's pattern that is an expression", mlp, _changed(_says(alpha_pattern={".*": 1})), "'.*'"),
    ("PEFT's pattern of nothing", mlp, _changed(_says(alpha_pattern={"^": 1})), "'^'"),
    (
        "PEFT's patterns for more layers than there are",
        mlp,
        _changed(_says(alpha_pattern={str(n): 1 for n in range(5000)})),
        "5,000 keys",
    ),
    ("PEFT's config that is a list", mlp, _changed(_writes(CONFIG, b"[]")), CONFIG),
    ("PEFT's config with a key twice", mlp, _changed(_writes(CONFIG, b'{"r": 1, "r": 2}')), "a key occurs twice"),
    ("PEFT's config that is no number", mlp, _changed(_writes(CONFIG, b'{"r": NaN}')), "NaN"),
    ("PEFT's config that is large", mlp, _changed(_large(CONFIG)), "are allowed"),
    ("PEFT's config that is a folder", mlp, _changed(_folder_for(CONFIG)), CONFIG),
    ("PEFT's tensors as a pickle", mlp, _changed(_pickled), "adapter_model.bin"),
    ("PEFT's tensors with a large header", mlp, _changed(_large(TENSORS)), "are allowed"),
    ("PEFT's tensors cut off", mlp, _changed(_writes(TENSORS, b"\0" * 7)), TENSORS),
    ("PEFT's tensors for another model", lambda: nn.Sequential(nn.Linear(3, 3)), _changed(_keep), "nothing was loaded"),
    ("PEFT's files into a tuned model", tuned(mlp), _changed(_keep), "tuned already"),
    ("PEFT's files of a number", mlp, lambda m, _: load_peft(m, 3), "got 3"),  # type: ignore[arg-type]
    ("PEFT's files without what is no key", mlp, _changed(_keep, lambda m, p: load_peft(m, p, ignore=[3])), "ignore"),  # type: ignore[list-item]
    ("PEFT's files over a file", mlp, lambda m, f: _changed(_keep, lambda m, p: _importing(f, m, p))(m, f), "a.safetensors"),
    ("PEFT's files without a model", mlp, _changed(_keep, lambda m, p: PEFT.import_(p, p.parent / "a")), "--model"),
    ("export over files", lora, _exporting(_there), "choose another folder"),
    ("export over one file", lora, _exporting(_one_file), "lead to one file"),
    ("export into a file", lora, _exporting(lambda folder: (folder / "peft").write_text("")), "peft"),
    ("export into no folder", lora, lambda m, f: export_peft(m, f / "no" / "peft"), "peft could not be made"),
    ("export to no name", lora, lambda m, f: export_peft(m, f / "a\0b"), "cannot be written"),
    ("export to a number", lora, lambda m, f: export_peft(m, 3), "got 3"),  # type: ignore[arg-type]
    ("export from a number", bystander, lambda m, f: export_peft(3, f / "peft"), "got 3"),  # type: ignore[arg-type]
    ("export what cannot be brought back", lora, _exporting(_set_aside), "could not be brought back"),
    ("export for a task that is none", lora, _exporting(_keep, task_type=3), "task_type"),
    ("export with a second model", lora, _exporting(_keep, model=mlp()), "leave model out"),
    ("export what is wrapped", _wrapped, _exporting(_keep), "Sequential holds the tuned model"),
    ("export a file for a tuned model", bystander, _of_file(_keep, lora), "tuned already"),
    ("export a file that lists too much", bystander, _of_file(_other_site), "'9'"),
    ("export a file of other layers", bystander, _of_file(_other_strategy), "a.safetensors"),
    ("export a method that PEFT has not", tuned(mlp), _exporting(_keep), "0: "),
]
