"""Headers and descriptions that no one wrote in good faith: deep, huge, doubled, misspelt. Each is refused as what it is."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_headers import compact, described, header_of, mutated_header, with_header
from click.testing import CliRunner
from fault_table import RecordFaults
from fuzz_targets import TARGETS, sound_file
from models import cnn, fingerprint
from torch import nn

from gift_core import FullFineTuningStrategy, enable_fine_tuning, load_adapter, read_adapter_info, save_adapter
from gift_core.cli import main
from gift_core.errors import AdapterFileError, StrategyError

#: Memory for Python objects while a header is read, over the size of the file. SECURITY.md states it.
MEMORY_MULTIPLE = 64
MEMORY_CONSTANT = 2**20

MILLION = 1_000_000

#: Where the longest texts are not tried, which are slow and read there by the same code as elsewhere.
SMALL_TEXTS_ONLY = {"tensor", "key", "name", "metadata[format]", "metadata[extra]"}

#: Hostile text, each for a place where JSON is read; `%` stands for the JSON that belongs there.
TEXTS = {
    "empty": "",
    "no JSON": "{]",
    "null": "null",
    "list": "[]",
    "number": "1",
    "deep lists": "[" * 100_000 + "]" * 100_000,
    "deep lists, open": "[" * 500_000,
    "deep objects": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "deep beside": '{"x":' + "[" * 50_000 + "]" * 50_000 + "}",
    "a key twice": '{"a": 1, "a": 1}',
    "a key twice, spelt otherwise": '{"a": 1, "\\u0061": 1}',
    "huge integer": '{"format_version": ' + "9" * 5000 + "}",
    "huge integer below Python's limit": '{"format_version": ' + "9" * 4000 + "}",
    "negative": '{"format_version": -1}',
    "not a number": '{"format_version": NaN}',
    "infinite": '{"format_version": Infinity}',
    "overflowing": '{"format_version": 1e999}',
    "true for one": '{"format_version": true}',
    "float for one": '{"format_version": 1.0}',
    "lone surrogate": '{"\\ud800": "\\udfff"}',
    "lone surrogate alone": '"\\ud800"',
    "control characters": '{"a\\u0000": "\\u001b[2J\\u0007\\u0008"}',
    "raw control characters": '{"a": "\x00\x1b[2J"}',
    "comment": '{"a": 1} // fine',
    "two values": "{} {}",
    "byte order mark": "\ufeff{}",
    "spaces": " " * MILLION,
    "a million keys": "{" + ",".join(f'"{number}":1' for number in range(MILLION)) + "}",
    "a million empty lists": "[" + ",".join(["[]"] * MILLION) + "]",
    "a million empty objects": "[" + ",".join(["{}"] * MILLION) + "]",
    "a long key": '{"' + "k" * MILLION + '": 1}',
    "wide text": '{"a": "' + "\U0001f600" * 300_000 + '"}',
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a sound file."""
    path = tmp_path_factory.mktemp("saved") / "adapter.safetensors"
    enable_fine_tuning(model := cnn(), "full")
    save_adapter(model, path)
    return path.read_bytes()


def places(data: bytes, text: str) -> Iterator[tuple[str, bytes]]:
    """The text as the header itself, as its metadata, as each value of it, as a further key or value, and as a tensor's entry."""
    header = header_of(data)
    metadata = header["__metadata__"]
    assert isinstance(metadata, dict)
    raw = text.encode("utf-8", "surrogatepass")
    yield "header", raw
    yield "metadata", b'{"__metadata__":' + raw + b"}"
    yield "tensor", compact(header).encode()[:-1] + b',"conv.weight":' + raw + b"}"
    for key in (*metadata, "extra"):
        yield f"metadata[{key}]", compact(header | {"__metadata__": metadata | {key: text}}).encode()
    yield "key", compact(header | {"__metadata__": metadata | {text: ""}}).encode()
    yield "name", compact(header | {text: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}).encode()


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_hostile_text(text: str, saved: bytes, tmp_path: Path, record_faults: RecordFaults) -> None:
    """Wherever JSON is read, hostile text raises AdapterFileError, and takes memory within a stated multiple of the file."""
    path, model = tmp_path / "adapter.safetensors", cnn()
    before = fingerprint(model)
    silent, foreign, greedy, cases = [], [], [], 0

    for place, header in places(saved, text):
        if len(text) > MILLION and place in SMALL_TEXTS_ONLY:
            continue
        data = with_header(saved, header)
        path.write_bytes(data)
        cases += 1
        tracemalloc.start()
        try:
            load_adapter(model, path)
            silent.append(place)
        except AdapterFileError as error:
            assert len(str(error)) < 5000, "the message repeats what the file says at length"
            assert "\x1b" not in str(error) and "\x00" not in str(error), "the message speaks to the terminal"
        except Exception as error:
            foreign.append((place, error))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        if peak > MEMORY_MULTIPLE * len(data) + MEMORY_CONSTANT:
            greedy.append((place, peak / len(data)))

    assert not silent
    assert not foreign
    assert not greedy
    record_faults("hostile JSON", cases, half=int(fingerprint(model) != before))


def entry(dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4)) -> dict[str, object]:
    """A tensor's entry in a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


ENTRIES = {
    "larger than the file": entry(shape=[2**40], offsets=[0, 2**42]),
    "a product beyond 64 bits": entry(shape=[2**32, 2**32, 4], offsets=[0, 0]),
    "a product that wraps to the right size": entry(shape=[2**62 + 1], offsets=[0, 4]),
    "huge sides and a zero": entry(shape=[2**62, 0], offsets=[0, 0]),
    "many sides": entry(shape=[1] * 100_000, offsets=[0, 4]),
    "negative side": entry(shape=[-1], offsets=[0, 4]),
    "side as text": entry(shape=["1"], offsets=[0, 4]),
    "side as float": entry(shape=[1.5], offsets=[0, 4]),
    "offsets backwards": entry(offsets=[4, 0]),
    "offsets into the next": entry(offsets=[2, 6]),
    "offsets of another's": entry(shape=[2], offsets=[0, 8]),
    "offsets behind the end": entry(offsets=[2**40, 2**40 + 4]),
    "negative offsets": entry(offsets=[-4, 0]),
    "three offsets": entry(offsets=[0, 4, 8]),
    "unknown dtype": entry(dtype="F33"),
    "no dtype": entry(dtype=None),
    "dtype as list": entry(dtype=["F32"]),
    "another dtype of that size": entry(dtype="I32"),
    "no entry": {},
    "list": [],
    "null": None,
}


@pytest.mark.parametrize("hostile", ENTRIES.values(), ids=ENTRIES)
def test_hostile_entry(hostile: object, saved: bytes, tmp_path: Path, record_faults: RecordFaults) -> None:
    """A tensor's entry that lies about its type, shape or place is refused, instead of one of the file's and beside them."""
    path, model = tmp_path / "adapter.safetensors", cnn()
    before = fingerprint(model)
    header = header_of(saved)
    names = [name for name in header if name != "__metadata__"]
    silent, foreign = [], []

    for name in (*names, "another", "", "../up", "conv.missing"):
        path.write_bytes(with_header(saved, compact(header | {name: hostile}).encode()))
        try:
            load_adapter(model, path)
            silent.append(name)
        except AdapterFileError:
            pass
        except Exception as error:
            foreign.append((name, error))

    assert not silent
    assert not foreign
    record_faults("hostile tensor entries", len(names) + 4, half=int(fingerprint(model) != before))


DESCRIPTIONS: dict[str, dict[str, Any]] = {
    "no name": {"strategy": {"parameters": {}}},
    "name as a list": {"strategy": {"name": ["full"], "parameters": {}}},
    "parameters as text": {"strategy": {"name": "full", "parameters": "x"}},
    "parameters as a list": {"strategy": {"name": "full", "parameters": [1]}},
    "parameters as a number": {"strategy": {"name": "full", "parameters": 7}},
    "no version": {"provider": {"distribution": "x"}},
    "a version as a table": {"provider": {"distribution": "x", "version": {"a": 1}}},
    "a distribution as a list": {"provider": {"distribution": [1], "version": None}},
    "a provider as text": {"provider": "x"},
    "sites as text": {"sites": "x"},
    "a site as a number": {"sites": [["x", "weight", [1]]]},
}


@pytest.mark.parametrize("says", DESCRIPTIONS.values(), ids=DESCRIPTIONS)
def test_hostile_description(says: dict[str, Any], saved: bytes, tmp_path: Path, record_faults: RecordFaults) -> None:
    """A description of the wrong kind is refused by name where it is read, shown, or loaded, into a plain and a tuned model."""
    path, plain, tuned = tmp_path / "adapter.safetensors", cnn(), cnn()
    path.write_bytes(described(saved, **says))
    enable_fine_tuning(tuned, "full")
    before = fingerprint(plain), fingerprint(tuned)
    reads = [lambda: read_adapter_info(path), lambda: load_adapter(plain, path), lambda: load_adapter(tuned, path, check_base=False)]

    for read in reads:
        with pytest.raises(AdapterFileError, match=r"get a fresh copy"):
            read()
    shown = CliRunner().invoke(main, ["info", str(path)])

    assert shown.exit_code == 1 and isinstance(shown.exception, SystemExit)
    record_faults("hostile descriptions", len(reads) + 1, half=int((fingerprint(plain), fingerprint(tuned)) != before))


@pytest.mark.parametrize("seed", range(8))
def test_random_descriptions(seed: int, record_faults: RecordFaults) -> None:
    """Headers with values changed, left out or added, and a digest that is right, do no more than those that the fuzzer makes."""
    source, cases, foreign = random.Random(seed), 150, []

    for _ in range(cases):
        header = mutated_header(sound_file(), source)
        try:
            TARGETS["described_adapter"](header)
        except Exception as error:
            foreign.append((header, error))

    assert not foreign
    record_faults("random descriptions", cases, foreign=len(foreign))


def test_the_description_is_refused_before_it_is_saved(tmp_path: Path) -> None:
    """A strategy whose config could not be read back is refused when its adapter is saved, not when it is needed."""

    class Careless(FullFineTuningStrategy):
        def to_config(self) -> dict[str, Any]:
            return {"name": "full", "parameters": [1]}

    enable_fine_tuning(model := cnn(), Careless())

    with pytest.raises(StrategyError, match=r"not saved.*'parameters'"):
        save_adapter(model, tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


def test_another_default_device(saved: bytes, tmp_path: Path) -> None:
    """A file is read and loaded where its model is, whatever device new tensors go to by default."""
    path, model = tmp_path / "adapter", cnn()
    path.write_bytes(saved)
    try:
        torch.set_default_device("meta")  # stands for a GPU, which not every machine has
        info = read_adapter_info(path)
        load_adapter(model, path)
        save_adapter(model, tmp_path / "again")
    finally:
        torch.set_default_device(None)  # a device, also the usual one, would leave a mode behind

    assert info.tensors and (tmp_path / "again").read_bytes() == saved
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"cpu"}


def test_a_sound_file_takes_little_more_than_itself(tmp_path: Path) -> None:
    """Reading a sound file of some megabytes takes a few times its size and no more."""
    enable_fine_tuning(model := nn.Linear(1500, 1500), "full")
    save_adapter(model, tmp_path / "adapter.safetensors")
    size = (tmp_path / "adapter.safetensors").stat().st_size

    tracemalloc.start()
    read_adapter_info(tmp_path / "adapter.safetensors")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < 4 * size


def test_a_header_that_is_written_anew_is_taken(saved: bytes, tmp_path: Path) -> None:
    """The same header with its digest put right loads: what the hostile ones are refused for is what they say."""
    (tmp_path / "adapter").write_bytes(with_header(saved, compact(header_of(saved)).encode()))

    load_adapter(cnn(), tmp_path / "adapter")
