"""Sound adapter files that lie: the digest is right, and what they ask for would hang, fill the memory or fool the reader.

They are made by saving with a strategy that says it is another one, so that they hold for every format.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from adapter_headers import described
from click.testing import CliRunner
from fault_table import RecordFaults
from low_rank import Claiming, LowRankStrategy
from models import cnn, fingerprint, input_for, train
from torch import nn

from gift_core import (
    disable_fine_tuning,
    enable_fine_tuning,
    load_adapter,
    save_adapter,
)
from gift_core.cli import main
from gift_core.errors import AdapterMismatchError, GiftError, PatternError, StateDictError

pytestmark = [pytest.mark.usefixtures("low_rank"), pytest.mark.filterwarnings("ignore::gift_core.errors.GiftWarning")]

NAME = LowRankStrategy.name


def claimed(path: Path, says: Mapping[str, Any]) -> Path:
    """A sound file of `cnn` whose strategy says what it likes."""
    enable_fine_tuning(model := cnn(), LowRankStrategy())
    save_adapter(model, path)
    path.write_bytes(described(path.read_bytes(), strategy=says))
    return path


def recorded(**parameters: Any) -> dict[str, Any]:
    """A config of the registered strategy."""
    return {"name": NAME, "parameters": parameters}


# --- a pattern is no program


HANGS = [r"re:(a+)+$", r"re:(.*)*\d", r"re:(.|.)*!", "re:" + "(.*)" * 20 + "!", r"re:(?=(.+)+!)x", r"re:head"]


@pytest.mark.parametrize("pattern", HANGS)
def test_a_regular_expression_from_a_file_is_not_run(pattern: str, tmp_path: Path, record_faults: RecordFaults) -> None:
    """A pattern that may take forever is refused with the way out, wherever in the recorded strategy it is."""
    merged = {"name": "merged", "parameters": {"strategies": [recorded(targets=pattern), {"name": "full", "parameters": {}}]}}
    model = cnn()
    before = fingerprint(model)
    silent = foreign = 0
    configs = [
        recorded(targets=pattern),
        recorded(targets=["head", pattern]),
        merged,
        {"name": "full", "parameters": {"exclude": pattern}},
    ]

    for says in configs:
        try:
            load_adapter(model, claimed(tmp_path / "adapter", says))
            silent += 1
        except PatternError as error:
            assert "trusted=True" in str(error)
        except Exception:
            foreign += 1

    record_faults("patterns from files", len(configs), silent=silent, foreign=foreign, half=int(fingerprint(model) != before))


def test_a_regular_expression_of_ones_own(tmp_path: Path) -> None:
    """A user who says that the file is trusted, or who enabled the strategy, loads it; patterns of other kinds need neither."""
    path = tmp_path / "adapter"
    for targets in ("re:(head|conv)", ["conv", "he*", "type:Linear"]):
        enable_fine_tuning(model := cnn(), LowRankStrategy(targets=targets))
        save_adapter(model, path)
        load_adapter(trusting := cnn(), path, trusted=True)
        enable_fine_tuning(enabled := cnn(), LowRankStrategy(targets=targets))
        load_adapter(enabled, path)

        assert torch.equal(trusting.eval()(input_for(cnn)), model.eval()(input_for(cnn)))
        if not isinstance(targets, str):
            load_adapter(cnn(), path)


# --- a number is no allocation


SIZES: list[Any] = [10**9, 2**40, 10**13, 10**30, -1, 0, True, 2.5, "9" * 400, float("1e300"), [10**9], {"rank": 1}, None]


@pytest.mark.parametrize("rank", SIZES, ids=lambda rank: str(rank)[:12])
def test_a_recorded_size_allocates_nothing(rank: Any, tmp_path: Path, record_faults: RecordFaults) -> None:
    """A rank in a file that the file's own tensors do not have is refused before anything of that size exists."""
    path = claimed(tmp_path / "adapter", recorded(rank=rank))
    model = cnn()
    before = fingerprint(model)
    silent = foreign = 0
    forget_the_peak()
    held = memory()

    try:
        load_adapter(model, path)
        silent = 1
    except GiftError as error:
        assert len(str(error)) < 2000
    except Exception:
        foreign = 1

    assert memory() - held < 32 * 2**20
    record_faults("sizes from files", 1, silent=silent, foreign=foreign, half=int(fingerprint(model) != before))


def test_sizes_that_are_small_one_by_one(tmp_path: Path) -> None:
    """Many layers that each ask for a little more than the file holds are refused too."""
    enable_fine_tuning(model := nn.Sequential(*[nn.Linear(64, 64) for _ in range(200)]), Claiming(recorded(rank=2000)))
    save_adapter(model, tmp_path / "adapter")
    plain = nn.Sequential(*[nn.Linear(64, 64) for _ in range(200)])
    plain.load_state_dict({key: tensor for key, tensor in disable_fine_tuning(model).state_dict().items()})

    with pytest.raises(AdapterMismatchError, match="asks for a tensor"):
        load_adapter(plain, tmp_path / "adapter")


def forget_the_peak() -> None:
    """Let the most memory that the process has held be what it holds now; where the system cannot, an earlier peak hides others."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def memory() -> int:
    """The most memory that the process has held since, in bytes; 0 where the system does not tell."""
    if sys.platform == "win32":
        return 0
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forgets a peak")
def test_the_measure_sees_growth_below_an_earlier_peak() -> None:
    """Memory that is taken and given back is seen, also where the process has held more before."""
    del (larger := [bytearray(200 * 2**20)])[:]
    forget_the_peak()
    held = memory()
    del (smaller := [bytearray(100 * 2**20)])[:]

    assert not larger and not smaller
    assert 90 * 2**20 < memory() - held < 150 * 2**20


# --- a name is no import, no path, no format


NAMES = [
    "os:system",
    "os.system",
    "__import__('os').system('true')",
    "../../../../etc/passwd",
    "/etc/passwd",
    "file:///etc/passwd",
    "gift_core.strategy:FullFineTuningStrategy",
    "gift-core:../full",
    "{0.__class__}",
    "%s%n",
    "full\0",
    "full ",
    "",
    "\ud800",
    "\u202elluf",
    "a" * 100_000,
    "re:.*",
    "*",
    "-rf",
    "$(true)",
]


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name)[:20])
def test_a_strange_name_is_no_more_than_unknown(name: str, tmp_path: Path, record_faults: RecordFaults) -> None:
    """A strategy's name in a file imports nothing, opens nothing and is refused in a message that a terminal can show."""
    path = tmp_path / "adapter"
    model = cnn()
    before, modules = fingerprint(model), set(sys.modules)
    opened: list[str] = []
    says = {"name": name, "parameters": {}}
    claimed(path, says)
    silent = foreign = 0

    with watching(opened):
        try:
            load_adapter(model, path)
            silent = 1
        except GiftError as error:
            str(error).encode()
        except Exception:
            foreign = 1

    assert not [file for file in opened if "passwd" in file]
    assert not {module for module in set(sys.modules) - modules if not module.startswith(("gift", "importlib_metadata", "numpy"))}
    record_faults("names from files", 1, silent=silent, foreign=foreign, half=int(fingerprint(model) != before))


class watching:
    """A context that notes every file that is opened, by Python's audit events."""

    _lists: ClassVar[list[list[str]]] = []

    def __init__(self, opened: list[str]) -> None:
        self.opened = opened

    def __enter__(self) -> None:
        if not self._lists:
            sys.addaudithook(self._note)  # there is no way to take a hook back: it stays, and notes nothing
        self._lists.append(self.opened)

    def __exit__(self, *_: object) -> None:
        self._lists.remove(self.opened)

    @classmethod
    def _note(cls, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            for opened in cls._lists:
                opened.append(str(arguments[0]))


@pytest.mark.parametrize("key", ["../../up", "a/b", "/root", "C:\\x", "con", "__class__", "__dict__", "re:.*", "\u202e", " ", "é ∂ 😀"])
def test_strange_tensor_names(key: str, tmp_path: Path) -> None:
    """A parameter of any name that torch allows is saved and loaded under it, in the one file, and is nothing but a key."""
    enable_fine_tuning(model := named(key), "full")
    train(model, torch.ones(2, 2), steps=1)

    save_adapter(model, tmp_path / "adapter")
    load_adapter(plain := named(key), tmp_path / "adapter")

    assert os.listdir(tmp_path) == ["adapter"]
    assert torch.equal(plain(torch.ones(2, 2)), model(torch.ones(2, 2)))


class Named(nn.Module):
    """A model with one parameter of a given name."""

    def __init__(self, key: str) -> None:
        super().__init__()
        self._parameters[key] = nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * next(iter(self._parameters.values()))


def named(key: str) -> nn.Module:
    """A `Named`."""
    return Named(key)


TERMINAL = "\x1b[2J\x1b]0;owned\x07\r\n\u202e\u2066"
OBEYED = re.compile("[\x00-\x09\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]")


def test_what_a_file_says_is_shown_and_not_obeyed(tmp_path: Path) -> None:
    """`gift info` and every error show a file's strings without control characters, so that they cannot drive a terminal."""

    class Shouting(LowRankStrategy):
        def __repr__(self) -> str:
            return TERMINAL

        def to_config(self) -> dict[str, Any]:
            return {"name": TERMINAL, "parameters": {TERMINAL: TERMINAL}}

    enable_fine_tuning(model := cnn(), Shouting())
    save_adapter(model, tmp_path / "adapter")

    shown = CliRunner().invoke(main, ["info", str(tmp_path / "adapter")]).output
    with pytest.raises(GiftError) as caught:
        load_adapter(cnn(), tmp_path / "adapter")

    for text in (shown, str(caught.value)):
        assert not OBEYED.search(text), ascii(text)


def test_no_refusal_lets_a_file_speak_to_the_terminal(tmp_path: Path) -> None:
    """A tensor's name, a parameter's, a strategy's text and a provider from a file are escaped in what is said of them."""

    class Unnamed(LowRankStrategy):
        def __repr__(self) -> str:
            return TERMINAL

        def to_config(self) -> None:  # type: ignore[override]
            return None

    enable_fine_tuning(unnamed := cnn(), Unnamed())
    enable_fine_tuning(strange := named(TERMINAL + "\ud800"), "full")
    enable_fine_tuning(target := named("plain"), "full")
    files = [
        (cnn(), unnamed, "text"),
        (target, strange, "tensor"),
        (target, cnn(), claimed(tmp_path / "claimed", recorded(**{TERMINAL: 1})).name),
    ]

    for model, saved, name in files:
        if name != "claimed":
            save_adapter(saved, tmp_path / name)
        with pytest.raises(AdapterMismatchError) as caught:
            load_adapter(model, tmp_path / name)
        str(caught.value).encode()
        assert not OBEYED.search(str(caught.value)), ascii(str(caught.value))
    with pytest.raises(StateDictError) as told:
        target.load_state_dict(strange.state_dict())
    assert not OBEYED.search(str(told.value)), ascii(str(told.value))


# --- a file of another method cannot reach the base


def test_a_file_cannot_name_the_base(tmp_path: Path) -> None:
    """A file whose strategy says "full" on a model that is tuned otherwise is refused, and the base keeps its bits."""
    path = claimed(tmp_path / "adapter", {"name": "full", "parameters": {}})
    for model in (plain := cnn(), tuned := cnn()):
        before = fingerprint(model)
        with pytest.raises(AdapterMismatchError):
            load_adapter(model, path)
        assert fingerprint(model) == before
    del plain, tuned


def test_hostile_parameters(tmp_path: Path, record_faults: RecordFaults) -> None:
    """Parameters of every JSON kind in every place give an error of ours, and the model is as it was."""
    values: list[Any] = [None, True, -1, 10**40, 1e308, "", "x" * 10_000, [], [[]], {}, {"a": {"b": []}}, ["head"] * 1000]
    configs = [recorded(**{key: value}) for key in ("rank", "targets", "unknown", "self", "cls", "") for value in values]
    configs += [{"name": NAME, "parameters": value} for value in values if value != {}]
    configs += [{"name": value, "parameters": {}} for value in values if isinstance(value, str)]
    configs += [{"name": "merged", "parameters": {"strategies": value}} for value in values]
    model = cnn()
    before = fingerprint(model)
    foreign: list[tuple[object, Exception]] = []
    half = 0
    for says in configs:
        try:
            load_adapter(model, claimed(tmp_path / "adapter", says))
            disable_fine_tuning(model)  # as `targets=None`, which is the truth
        except GiftError:
            pass
        except Exception as error:
            foreign.append((says, error))
        half += fingerprint(model) != before

    assert not foreign
    record_faults("parameters from files", len(configs), half=half)


def nested(depth: int) -> Any:
    """Strategies merged of strategies, so deep."""
    says: Any = recorded()
    for _ in range(depth):
        says = {"name": "merged", "parameters": {"strategies": [says]}}
    return says


@pytest.mark.parametrize("depth", [1, 50, 150])
def test_strategies_within_strategies(depth: int, tmp_path: Path) -> None:
    """However deep strategies are merged, loading either works or is an error of ours."""
    path = claimed(tmp_path / "adapter", nested(depth))
    model = cnn()
    before = fingerprint(model)

    try:
        load_adapter(model, path)
        disable_fine_tuning(model)
    except GiftError:
        pass

    assert fingerprint(model) == before


def test_no_code_runs_in_a_process_that_reads(tmp_path: Path) -> None:
    """Reading a file imports no plugin and no module that the core does not import by itself."""
    path = claimed(tmp_path / "adapter", {"name": "os:system", "parameters": {}})
    code = (
        "import sys, gift_core, gift_core.adapter_file; before = set(sys.modules); "
        f"gift_core.read_adapter_info({str(path)!r}); "
        "new = {m for m in set(sys.modules) - before if not m.startswith(('torch', 'numpy', 'encodings'))}; assert not new, new"
    )

    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
