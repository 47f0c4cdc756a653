"""Adapter files that were damaged or tampered with: none is taken, and none takes more memory than its size is worth.

A mutation follows from its number alone, so that one that fails can be tried again by itself.
"""

from __future__ import annotations

import random
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fault_table import RecordFaults
from low_rank import LowRankStrategy
from models import cnn, fingerprint, input_for, train
from test_adapter_versions import DATA, Net

from gift_core import enable_fine_tuning, load_adapter, read_adapter_info, save_adapter
from gift_core.errors import AdapterFileError

CASES = 20_000
#: Every so many-th of them is a file of format version 1, whose digest is over what it means.
VERSION_1_EVERY = 10

#: Python objects while a file is read take at most this many times the file's size and a constant; both are measured below.
MEMORY_MULTIPLE = 40
MEMORY_CONSTANT = 2**19
#: All that the process grows by over the whole run, torch's and safetensors' memory included.
PROCESS_GROWTH = 64 * 2**20

#: A sound file of version 1, for `Net`.
VERSION_1 = DATA / "adapter_v1_full.safetensors"

Mutation = Callable[[random.Random, bytearray], None]


def flip_bit(draw: random.Random, data: bytearray) -> None:
    """One bit, anywhere."""
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)


def cut(draw: random.Random, data: bytearray) -> None:
    """The end is missing, or a piece from the middle."""
    start = draw.randrange(len(data))
    del data[start : None if draw.random() < 0.5 else start + draw.randrange(1, 64)]


def insert(draw: random.Random, data: bytearray) -> None:
    """Bytes that were not there."""
    data[(at := draw.randrange(len(data) + 1)) : at] = draw.randbytes(draw.randrange(1, 64))


def length_field(draw: random.Random, data: bytearray) -> None:
    """The length of the header is another: near, far, or absurd."""
    length = int.from_bytes(data[:8], "little")
    near, far = length + draw.choice([-9, -2, -1, 1, 2, 9]), draw.choice([0, 1, len(data), 2**31, 2**32 + length, 2**63, 2**64 - 1])
    data[:8] = draw.choice([near, far, draw.randrange(2**64)]).to_bytes(8, "little")


def zero_run(draw: random.Random, data: bytearray) -> None:
    """A run of zeros, as a hole in a file reads."""
    start = draw.randrange(len(data))
    length = min(len(data) - start, draw.randrange(1, 600))
    data[start : start + length] = bytes(length)


def copied_run(draw: random.Random, data: bytearray) -> None:
    """A piece of the file over another, as a lost block's."""
    length = draw.randrange(1, 400)
    source, target = draw.randrange(len(data) - length), draw.randrange(len(data) - length)
    data[target : target + length] = data[source : source + length]


def swapped_runs(draw: random.Random, data: bytearray) -> None:
    """Two pieces of equal length change places."""
    length = 4 * draw.randrange(1, 50)
    first, second = (4 * draw.randrange((len(data) - length) // 4) for _ in range(2))
    a, b = bytes(data[first : first + length]), bytes(data[second : second + length])
    data[first : first + length], data[second : second + length] = b, a


def digit(draw: random.Random, data: bytearray) -> None:
    """A digit of the description is another: a shape, an offset, a rank, a version."""
    header = int.from_bytes(data[:8], "little")
    places = [at for at in range(8, 8 + header) if 0x30 <= data[at] <= 0x39]
    data[draw.choice(places)] = draw.choice(b"0123456789")


def scatter(draw: random.Random, data: bytearray) -> None:
    """Random bytes at random places."""
    for _ in range(draw.randrange(1, 40)):
        data[draw.randrange(len(data))] = draw.randrange(256)


def noise(draw: random.Random, data: bytearray) -> None:
    """Nothing of the file is left, or nothing but its first bytes."""
    kept = draw.choice([0, 8, 16, 64])
    data[kept:] = draw.randbytes(draw.randrange(1, 2 * len(data)))


MUTATIONS: tuple[Mutation, ...] = (
    flip_bit,
    cut,
    insert,
    length_field,
    zero_run,
    copied_run,
    swapped_runs,
    digit,
    scatter,
    noise,
)


@pytest.fixture
def adapter(tmp_path: Path, low_rank: type[LowRankStrategy]) -> Path:
    """A small adapter file, as saved."""
    model = cnn()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        enable_fine_tuning(model, low_rank(rank=2))
        train(model, input_for(cnn))
    save_adapter(model, tmp_path / "adapter.safetensors")
    return tmp_path / "adapter.safetensors"


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_no_damaged_file_is_taken(mutation: Mutation, adapter: Path, record_faults: RecordFaults) -> None:
    """A damaged file raises AdapterFileError, the model is as it was, and memory stays within a multiple of the file."""
    files = [(VERSION_1.read_bytes(), Net())] + [(adapter.read_bytes(), cnn())] * (VERSION_1_EVERY - 1)
    load_adapter(cnn(), adapter)  # what is loaded once, is loaded
    load_adapter(Net(), VERSION_1)
    before, grown = [fingerprint(model) for _, model in files], process_memory()
    silent, foreign, greedy = [], [], []

    tracemalloc.start()
    try:
        for number in range(CASES // len(MUTATIONS)):
            original, model = files[number % len(files)]
            data = mutated(mutation, number, original)
            adapter.write_bytes(data)
            tracemalloc.reset_peak()
            held = tracemalloc.get_traced_memory()[0]
            try:
                load_adapter(model, adapter)
                silent.append(number)
            except AdapterFileError:
                pass
            except Exception as error:
                foreign.append((number, error))
            if tracemalloc.get_traced_memory()[1] - held > MEMORY_MULTIPLE * len(data) + MEMORY_CONSTANT:
                greedy.append(number)
    finally:
        tracemalloc.stop()

    assert not greedy
    assert process_memory() - grown < PROCESS_GROWTH
    assert not foreign, foreign[:3]
    half = int([fingerprint(model) for _, model in files] != before)
    record_faults("damaged adapter files", CASES // len(MUTATIONS), silent=len(silent), half=half)


def mutated(mutation: Mutation, number: int, original: bytes) -> bytes:
    """The file of that number; never the original."""
    draw = random.Random(f"{mutation.__name__} {number}")
    data = bytearray(original)
    while bytes(data) == original:
        mutation(draw, data)
    return bytes(data)


def test_a_tuned_model_keeps_what_it_has(adapter: Path, record_faults: RecordFaults) -> None:
    """A damaged file leaves a tuned model's adapter as it was, bit for bit."""
    original = adapter.read_bytes()
    model = cnn()
    load_adapter(model, adapter)
    before = fingerprint(model)
    silent = 0

    for number in range(200):
        adapter.write_bytes(mutated(MUTATIONS[number % len(MUTATIONS)], number, original))
        try:
            load_adapter(model, adapter)
            silent += 1
        except AdapterFileError:
            pass

    record_faults("damaged files, tuned model", 200, silent=silent, half=int(fingerprint(model) != before))


def test_the_undamaged_file_is_taken(adapter: Path) -> None:
    """The file that the mutations start from is sound, and so is a copy of it: what they show is the damage."""
    data = adapter.read_bytes()
    adapter.write_bytes(bytes(data))

    assert read_adapter_info(adapter).file_bytes == len(data)
    load_adapter(cnn(), adapter)


def process_memory() -> int:
    """The most memory that the process has held, in bytes; 0 where the system does not tell."""
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
