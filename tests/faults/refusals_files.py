"""Refusals of adapter files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from adapter_headers import compact, described, header_of, with_header
from faults.refusals_common import Case, broken, tuned, write_then
from low_rank import LowRankStrategy
from models import cnn, mlp
from safetensors.torch import load, save_file
from torch import nn

from gift_core import FullFineTuningStrategy, enable_fine_tuning, load_adapter, merge_and_unload, read_adapter_info, save_adapter
from gift_core.adapter_format import MAX_DESCRIPTION_BYTES, _digest_v1
from gift_lora_plugin.peft_files import export_peft, load_peft


def _loads(change: Callable[[Path], Any], source: Callable[[], nn.Module] = cnn, **options: Any) -> Callable[[Any, Path], Any]:
    """Save an adapter of ``source``, change the file, load it."""

    def run(model: Any, folder: Path) -> Any:
        path = folder / "adapter.safetensors"
        save_adapter(tuned(source)(), path)
        change(path)
        return load_adapter(model, path, **options)

    return run


def _nothing(path: Path) -> None:
    """Leave the file."""


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _no_adapter(path: Path) -> None:
    save_file({"weight": torch.ones(2)}, path)


def _nan(model: Any) -> None:
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)


def _exported(**options: Any) -> Callable[[Any, Path], Any]:
    def run(model: Any, folder: Path) -> Any:
        save_adapter(model, folder / "adapter.safetensors")
        return export_peft(folder / "adapter.safetensors", folder / "peft", **options)

    return run


def _says(**description: Any) -> Callable[[Path], None]:
    """Another description in the file, and a digest that is right."""

    def change(path: Path) -> None:
        path.write_bytes(described(path.read_bytes(), **description))

    return change


def _header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Another header in the file, and a digest that is right."""

    def apply(path: Path) -> None:
        header = header_of(path.read_bytes())
        change(header)
        path.write_bytes(with_header(path.read_bytes(), compact(header).encode()))

    return apply


def _entry(**fields: Any) -> Callable[[Path], None]:
    return _header(lambda header: next(value for key, value in header.items() if key != "__metadata__").update(fields))


def _longer(header: dict[str, Any]) -> None:
    """A last tensor that is longer than the file."""
    last = max((value for key, value in header.items() if key != "__metadata__"), key=lambda entry: entry["data_offsets"])
    start = last["data_offsets"][0]
    last |= {"dtype": "F32", "shape": [2**20], "data_offsets": [start, start + 2**22]}


def _text(old: str, new: str) -> Callable[[Path], None]:
    """Another text in the place of one in the header, and a digest that is right."""

    def apply(path: Path) -> None:
        data = path.read_bytes()
        header = data[8 : 8 + int.from_bytes(data[:8], "little")].decode()
        assert old in header
        path.write_bytes(with_header(data, header.replace(old, new, 1).encode()))

    return apply


def _huge(path: Path) -> None:
    with path.open("wb") as file:
        file.write((MAX_DESCRIPTION_BYTES + 1).to_bytes(8, "little"))
        file.truncate(MAX_DESCRIPTION_BYTES + 100)


V1 = Path(__file__).parents[1] / "data" / "adapter_v1_full.safetensors"


def _of_version_1(change: Callable[[dict[str, Any], dict[str, str]], Any], right: bool = True) -> Callable[[Any, Path], Any]:
    """A file of version 1 whose description or metadata was changed, with a digest that is right or not."""

    def run(model: Any, folder: Path) -> Any:
        data = V1.read_bytes()
        header = header_of(data)
        said = json.loads(header["__metadata__"]["gift-adapter"])
        change(said, header["__metadata__"])
        if right:
            said["digest"] = _digest_v1(said, load(data))
        header["__metadata__"]["gift-adapter"] = json.dumps(said)
        encoded = compact(header).encode()
        encoded += b" " * (-len(encoded) % 8)
        start = 8 + int.from_bytes(data[:8], "little")
        (folder / "v1.safetensors").write_bytes(len(encoded).to_bytes(8, "little") + encoded + data[start:])
        return read_adapter_info(folder / "v1.safetensors")

    return run


def _nested(depth: int) -> dict[str, Any]:
    says: dict[str, Any] = {"name": LowRankStrategy.name, "parameters": {}}
    for _ in range(depth):
        says = {"name": "merged", "parameters": {"strategies": [says]}}
    return says


def _complex() -> nn.Module:
    model = nn.Linear(2, 2, dtype=torch.complex128)
    enable_fine_tuning(model, "full")
    return model


def _without_head() -> nn.Module:
    model = tuned()()
    model.head = nn.Linear(6, 4)
    return model


def _with_another_norm() -> nn.Module:
    model = tuned()()
    model.bn = nn.BatchNorm2d(6).requires_grad_(False)
    return model


def _thawed() -> nn.Module:
    model = tuned()()
    model.bn.requires_grad_()
    return model


def _claiming(says: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        class Careless(FullFineTuningStrategy):
            def to_config(self) -> Any:
                return says

        model = cnn()
        enable_fine_tuning(model, Careless())
        return model

    return build


LOST = {"name": "lora-of-tomorrow", "parameters": {}}
TOMORROW = {"distribution": "gift-tomorrow", "version": "3.1"}


def _linked(model: Any, folder: Path) -> Any:
    (folder / "a").symlink_to(folder / "b")
    (folder / "b").symlink_to(folder / "a")
    return save_adapter(model, folder / "a")


def _append(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(with_header(data + b"\0" * 8, data[8 : 8 + int.from_bytes(data[:8], "little")]))


def _cut_copy(folder: Path) -> Path:
    (folder / "cut.safetensors").write_bytes(V1.read_bytes()[:-4])
    return folder / "cut.safetensors"


FILE_CASES: list[Case] = [
    ("save what is plain", cnn, lambda m, f: save_adapter(m, f / "a"), "not tuned"),
    ("save where no folder is", tuned(), lambda m, f: save_adapter(m, f / "no" / "a"), "no"),
    ("save onto a folder", tuned(), lambda m, f: save_adapter(m, f), "is a folder"),
    ("save NaN", broken(_nan, tuned()), lambda m, f: save_adapter(m, f / "a"), "thin_left"),
    ("load what is missing", cnn, lambda m, f: load_adapter(m, f / "gone"), "gone"),
    ("load a folder", cnn, lambda m, f: load_adapter(m, f), "no regular file"),
    ("load an empty file", cnn, write_then("", lambda m, p: load_adapter(m, p)), "adapter.safetensors"),
    ("load text", cnn, write_then("hello, world, hello", lambda m, p: load_adapter(m, p)), "adapter.safetensors"),
    ("load a cut file", cnn, _loads(_cut), "adapter.safetensors"),
    ("load a flipped bit", cnn, _loads(_flip), "adapter.safetensors"),
    ("load no adapter", cnn, _loads(_no_adapter), "adapter.safetensors"),
    ("load for another structure", mlp, _loads(_nothing), "Sequential"),
    ("load for another base", broken(lambda m: m.head.weight.data.add_(1) is None), _loads(_nothing), "head"),
    (
        "load for another strategy",
        broken(lambda m: enable_fine_tuning(m, LowRankStrategy(rank=1)) and None),
        _loads(_nothing),
        "thin_left",
    ),
    ("load into no model", cnn, lambda m, f: _loads(_nothing)(3, f), "int"),
    ("read what is missing", cnn, lambda m, f: read_adapter_info(f / "gone"), "gone"),
    ("read text", cnn, write_then("hello, world, hello", lambda m, p: read_adapter_info(p)), "adapter.safetensors"),
    ("convert what no converter knows", tuned(), _exported(), "2 sites"),
    ("convert what is missing", cnn, lambda m, f: export_peft(f / "gone", f / "peft"), "gone"),
    ("read PEFT's files where none are", cnn, lambda m, f: load_peft(m, f / "gone"), "gone"),
    ("read PEFT's files from an empty folder", cnn, lambda m, f: load_peft(m, f), "adapter_config.json"),
    (
        "read PEFT's config that is none",
        cnn,
        write_then("[", lambda m, p: load_peft(m, p.parent), "adapter_config.json"),
        "adapter_config.json",
    ),
    ("save to a number", tuned(), lambda m, f: save_adapter(m, 3), "got 3"),  # type: ignore[arg-type]
    ("save to bytes", tuned(), lambda m, f: save_adapter(m, b"x"), "b'x'"),  # type: ignore[arg-type]
    ("save to no name", tuned(), lambda m, f: save_adapter(m, f / "a\0b"), "no file can be called so"),
    ("load nothing", cnn, lambda m, f: load_adapter(m, None), "got None"),  # type: ignore[arg-type]
    ("read a number", cnn, lambda m, f: read_adapter_info(0), "got 0"),  # type: ignore[arg-type]
    ("read no name", cnn, lambda m, f: read_adapter_info(f / "a\0b"), "no file can be called so"),
    ("save what has no place", _complex, lambda m, f: save_adapter(m, f / "a"), "complex128"),
    ("save without a layer", _without_head, lambda m, f: save_adapter(m, f / "a"), "head"),
    ("save what came in the base's place", _with_another_norm, lambda m, f: save_adapter(m, f / "a"), "bn.weight"),
    ("save beside what trains unknown", _thawed, lambda m, f: save_adapter(m, f / "a"), "bn.bias"),
    ("unload without a layer", _without_head, lambda m, _: merge_and_unload(m), "head"),
    ("save a config without a name", _claiming({"parameters": {}}), lambda m, f: save_adapter(m, f / "a"), "'name'"),
    ("save a config that is no data", _claiming({"name": "full", "x": {1, 2}}), lambda m, f: save_adapter(m, f / "a"), "to_config"),
    ("save over a circle of links", tuned(), _linked, "circle"),
    ("load a plugin's that is not installed", cnn, _loads(_says(strategy=LOST, provider=TOMORROW)), "pip install gift-tomorrow"),
    ("load strategies within strategies", cnn, _loads(_says(strategy=_nested(300))), "nested too deep"),
    (
        "load what asks for much",
        cnn,
        _loads(_says(strategy={"name": LowRankStrategy.name, "parameters": {"rank": 10**9}})),
        "6,000,000,000",
    ),
    ("load a regular expression", cnn, _loads(_says(strategy={"name": "full", "parameters": {"targets": "re:x"}})), "re:x"),
    ("load a strategy without a name", cnn, _loads(_says(strategy=None, strategy_text="Mine()")), "Mine()"),
    ("load other metadata", cnn, _loads(_header(lambda h: h["__metadata__"].update(extra="x"))), "metadata"),
    ("load more than tensors", cnn, _loads(_append), "it goes on behind"),
    ("load a tensor behind the end", cnn, _loads(_header(_longer)), "behind its end"),
    ("load a tensor elsewhere", cnn, _loads(_entry(data_offsets=[4, 8])), "elsewhere"),
    ("load a shape that is none", cnn, _loads(_entry(shape=["x"])), "a shape is a list"),
    ("load sites that are none", cnn, _loads(_says(sites=[["x", "weight", [1]]])), "its sites"),
    ("load sites without digests", cnn, _loads(_says(base="x")), "one digest per adapted weight"),
    ("load a key twice", cnn, _loads(_text('"format":"pt"', '"format":"pt","format":"pt"')), "a key occurs twice"),
    (
        "load a description that is a list",
        cnn,
        _loads(_header(lambda h: h["__metadata__"].update({"gift-adapter": "[]"}))),
        "no JSON object",
    ),
    ("load the next version", cnn, _loads(_says(format_version=3)), "format version 3"),
    ("load a description of the wrong kind", cnn, _loads(_says(structure=7)), "'structure'"),
    ("load a huge description", cnn, _loads(_huge), "16,777,216 are allowed"),
    ("read version 1 with spaces", cnn, _of_version_1(lambda said, meta: meta.update(extra="x")), "metadata"),
    ("read version 1 of another digest", cnn, _of_version_1(lambda said, meta: said.update(digest="0" * 64), right=False), "digest"),
    ("read version 1 of other tensors", cnn, _of_version_1(lambda said, meta: said.update(tensors={})), "its tensors"),
    ("read a cut file of version 1", cnn, lambda m, f: read_adapter_info(_cut_copy(f)), "truncated"),
]
