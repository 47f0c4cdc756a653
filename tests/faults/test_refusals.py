"""Every kind of refusal, as a table: a GiftError that names the subject and says what to do, and nothing has changed."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_table import RecordFaults
from low_rank import LowRankStrategy
from models import CNN, Delta, cnn, fingerprint, input_for, mlp, shared, tied, train
from safetensors.torch import save_file
from torch import nn

from gift_core import (
    AdapterSet,
    FineTuningStrategy,
    FullFineTuningStrategy,
    adopt,
    check_optimizer,
    disable_fine_tuning,
    enable_fine_tuning,
    full_state_dict,
    load_adapter,
    merge,
    merge_and_unload,
    merge_strategies,
    plan_fine_tuning,
    read_adapter_info,
    save_adapter,
    strategy_from_config,
    strategy_from_file,
    tuning_disabled,
    unmerge,
)
from gift_core.errors import GiftError
from gift_core.factories import is_instance, keep_trainable, name_matches, reparameterize, replace_module
from gift_lora_plugin import LoRAAllFineTuningStrategy, LoRAConvFineTuningStrategy, LoRALinearFineTuningStrategy
from gift_lora_plugin.peft_files import export_peft, load_peft

#: A model, the call that is refused, and what the message has to name.
Case = tuple[str, Callable[[], nn.Module], Callable[[Any, Path], Any], str]

#: How a message says what to do, what is allowed, or what there is instead.
REMEDY = re.compile(
    r"\b(call|pass|use|must|needs|exclude|did you mean|there are|choose|load|install|unmerge|undoes|does it|start|leaves?|write|adapt|"
    r"let|name (one|the)|merge|between|at least|one of|true or false|allowed|remove|instead|expected|takes|check the|copy|save|keep|"
    r"look like|the model has|reads what|true and false|in the model|is no regular expression|afterwards|match its|name a|ends in|"
    r"is another name|makes its adapter)\b|\b(is|are)\b[^,]*.*, got ",
    re.IGNORECASE,
)

#: What went wrong in a user's own code, or in the system: the message has the site and the cause, and the traceback the rest.
OWN = re.compile(r"raised at|gave int, not a module|line \d+|could not be written: |cannot be read: ")


def tuned(builder: Callable[[], nn.Module] = cnn) -> Callable[[], nn.Module]:
    """A builder of a trained model."""

    def build() -> nn.Module:
        model = builder()
        enable_fine_tuning(model, LowRankStrategy(rank=2))
        train(model, input_for(builder))
        return model

    return build


def merged_model() -> nn.Module:
    """A trained model, merged."""
    model = tuned()().eval()
    merge(model)
    return model


def broken(fault: Callable[[Any], Any], builder: Callable[[], nn.Module] = cnn) -> Callable[[], nn.Module]:
    """A builder of a model to which something was done."""

    def build() -> nn.Module:
        model = builder()
        return fault(model) or model

    return build


def enabling(strategy: Callable[[], Any]) -> Callable[[Any, Path], Any]:
    """Making a strategy and enabling it."""
    return lambda model, _: enable_fine_tuning(model, strategy())


def everything(*_: Any) -> bool:
    """A check that every site passes."""
    return True


def parameter_cases() -> list[Case]:
    """A value that is not allowed, for each parameter of the strategies."""
    values: dict[str, list[Any]] = {
        "rank": [0, -1, 1.5, "4", None, True, math.nan, [2], 10**30],
        "lora_alpha": ["x", math.nan, math.inf, -math.inf, [1]],
        "lora_dropout": [-0.1, 1.0, 2, "a", math.nan, None],
        "train_bias": ["yes", None, 2],
        "targets": [5, [3], "re:(", "nowhere", ["head", "nowhere"], ""],
        "exclude": [5, "re:[", "nowhere"],
        "conv_layout": ["x", None, 3],
        "use_rslora": ["yes", 3],
        "use_dora": ["yes", None],
        "init": ["x", None, 3],
        "freeze_A": ["no", 2],
        "adapter_dtype": ["int8", 16, "float99"],
        "rank_pattern": [{"head": 0}, {"head": "a"}, [1], {"nowhere": 2}, {3: 2}, "head"],
        "alpha_pattern": [{"head": "a"}, {"nowhere": 2.0}, {"head": math.nan}],
        "dropout_pattern": [{"head": 1.5}, {"head": -1}, {"nowhere": 0.1}],
        "attention": [("x",), "q", 3, ("q", "q", "z")],
        "parameters": [3, "nowhere", [1]],
        "parameter_layout": ["x", None],
    }
    return [
        (
            f"{name}={value!r}",
            cnn,
            enabling(lambda name=name, value=value: LoRAAllFineTuningStrategy(**{name: value})),
            _subject(name, value),
        )
        for name, several in values.items()
        for value in several
    ]


def _subject(name: str, value: Any) -> str:
    if "nowhere" in repr(value):
        return "nowhere"
    if name in ("targets", "exclude", "parameters") or value == {3: 2}:
        return "" if name == "parameters" and value == 3 else "pattern"
    return "conv" if value == 10**30 else name


def _write_then(text: str, call: Callable[[Any, Path], Any], name: str = "adapter.safetensors") -> Callable[[Any, Path], Any]:
    def run(model: Any, folder: Path) -> Any:
        (folder / name).write_text(text)
        return call(model, folder / name)

    return run


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


def _with_set(call: Callable[[AdapterSet, Path], Any]) -> Callable[[Any, Path], Any]:
    """Call something on a set of one adapter, which is put away before the model is compared."""

    def run(model: Any, folder: Path) -> Any:
        adapters = AdapterSet(model)
        adapters.add("a", LowRankStrategy())
        adapters.use(None)
        before = adapters.names, adapters.active
        try:
            return call(adapters, folder)
        finally:
            assert (adapters.names, adapters.active) == before

    return run


def _raises(*_: Any) -> None:
    raise ValueError("of a user's own")


def _writes(*site: Any) -> None:
    with torch.no_grad():
        site[4].weight.add_(1)


def _nan(model: Any) -> None:
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)


def _exported(**options: Any) -> Callable[[Any, Path], Any]:
    def run(model: Any, folder: Path) -> Any:
        save_adapter(model, folder / "adapter.safetensors")
        return export_peft(folder / "adapter.safetensors", folder / "peft", **options)

    return run


LINEAR = is_instance("Linear")

STRATEGY_CASES: list[Case] = [
    ("a cap of one", cnn, enabling(lambda: FineTuningStrategy([(LINEAR,)])), ""),
    ("a cap that is no tuple", cnn, enabling(lambda: FineTuningStrategy([3])), "3"),
    ("a check that is none", cnn, enabling(lambda: FineTuningStrategy([("x", keep_trainable())])), "'x'"),
    ("an action that is none", cnn, enabling(lambda: FineTuningStrategy([(LINEAR, 7)])), "7"),
    ("params that are none", cnn, enabling(lambda: FineTuningStrategy([(LINEAR, keep_trainable(), [1])])), ""),
    (
        "a type that is none",
        cnn,
        enabling(lambda: FineTuningStrategy([(everything, keep_trainable())], constraint_type=["CNN"])),
        "CNN",
    ),
    ("another type", cnn, enabling(lambda: FineTuningStrategy([(everything, keep_trainable())], constraint_type=[nn.GRU])), "GRU"),
    ("types that exclude each other", cnn, enabling(lambda: merge_strategies([_only(nn.GRU), _only(CNN)])), ""),
    ("no strategies", cnn, enabling(lambda: merge_strategies([])), ""),
    ("no strategy", cnn, enabling(lambda: 3), "3"),
    ("an unknown name", cnn, enabling(lambda: "loar"), "lora"),
    ("a config of nothing", cnn, lambda m, _: strategy_from_config({}), ""),
    ("a config that is none", cnn, lambda m, _: strategy_from_config([1]), ""),  # type: ignore[arg-type]
    ("a config of a stranger", cnn, lambda m, _: strategy_from_config({"name": "no-such-thing", "parameters": {}}), "no-such-thing"),
    ("a parameter of a stranger", cnn, lambda m, _: strategy_from_config({"name": "lora", "parameters": {"rnak": 2}}), "rnak"),
    ("a strategy file that is missing", cnn, lambda m, f: strategy_from_file(f / "s.toml"), "s.toml"),
    ("a strategy file of another kind", cnn, _write_then("x", lambda m, p: strategy_from_file(p), "s.yaml"), "s.yaml"),
    ("a strategy file that is no TOML", cnn, _write_then("[[", lambda m, p: strategy_from_file(p), "s.toml"), "s.toml"),
    ("a strategy file that is no JSON", cnn, _write_then("{", lambda m, p: strategy_from_file(p), "s.json"), "s.json"),
    ("a strategy file of nothing", cnn, _write_then("{}", lambda m, p: strategy_from_file(p), "s.json"), "s.json"),
    ("a pattern that is none", cnn, enabling(lambda: FineTuningStrategy([(name_matches("re:("), keep_trainable())])), "re:("),
    ("a method that is none", cnn, enabling(lambda: FineTuningStrategy([(LINEAR, reparameterize(nn.Linear))])), "Linear"),  # type: ignore[arg-type]
]


def _only(kind: type[nn.Module]) -> FineTuningStrategy:
    return FineTuningStrategy([(everything, keep_trainable())], constraint_type=[kind])


ENABLE_CASES: list[Case] = [
    ("tuned already", tuned(), enabling(LowRankStrategy), "LowRankStrategy"),
    ("a tuned part", broken(lambda m: enable_fine_tuning(m.head, LowRankStrategy()) and None), enabling(LowRankStrategy), "'head'"),
    ("merged already", merged_model, enabling(LowRankStrategy), "LowRankStrategy"),
    ("nothing matches", cnn, enabling(lambda: LoRAAllFineTuningStrategy(targets="bn")), "bn"),
    ("no such kind", mlp, enabling(LoRAConvFineTuningStrategy), "Linear"),
    ("nothing trains", cnn, enabling(lambda: FineTuningStrategy([(LINEAR, lambda *s: s[4].requires_grad_(False))])), "frozen"),
    ("on meta", broken(lambda m: m.to("meta")), enabling(LowRankStrategy), "meta"),
    ("lazy", broken(lambda m: m.add_module("lazy", nn.LazyLinear(3))), enabling(LowRankStrategy), "lazy"),
    ("scripted", broken(lambda m: torch.jit.script(m.head)), enabling(LowRankStrategy), "script"),
    ("DataParallel", broken(lambda m: nn.DataParallel(m)), enabling(LowRankStrategy), "DataParallel"),
    ("a check that raises", cnn, enabling(lambda: FineTuningStrategy([(_raises, keep_trainable())])), "of a user's own"),
    ("a check that answers nothing", cnn, enabling(lambda: FineTuningStrategy([(lambda *s: None, keep_trainable())])), "None"),
    ("an action that raises", cnn, enabling(lambda: FineTuningStrategy([(LINEAR, _raises)])), "head"),
    ("an action that writes", cnn, enabling(lambda: FineTuningStrategy([(LINEAR, _writes)])), "head"),
    ("a replaced root", broken(lambda m: m.head), enabling(lambda: FineTuningStrategy([(LINEAR, replace_module(nn.Identity))])), ""),
    ("a replacement that is none", cnn, enabling(lambda: FineTuningStrategy([(LINEAR, replace_module(lambda *s: 3))])), "head"),
    ("both ends of a tie", tied, enabling(lambda: FineTuningStrategy([(is_instance("Embedding"), keep_trainable()), *_low()])), "tied"),
    ("a second name", shared, enabling(lambda: LowRankStrategy(targets="second")), "first"),
    ("a method's own keyword", cnn, enabling(lambda: FineTuningStrategy([(LINEAR, reparameterize(Delta), {"strat": 1})])), "strat"),
    ("a name that is close", cnn, enabling(lambda: LoRALinearFineTuningStrategy(targets="haed")), "head"),
    ("planning nothing", cnn, lambda m, _: plan_fine_tuning(m, LowRankStrategy(targets="nowhere")), "nowhere"),
    ("planning no model", cnn, lambda m, _: plan_fine_tuning(3, LowRankStrategy()), "int"),  # type: ignore[arg-type]
    ("enabling no model", cnn, lambda m, _: enable_fine_tuning(None, LowRankStrategy()), "got nothing"),  # type: ignore[arg-type]
    ("adopting what is not there", cnn, lambda m, _: adopt(m.head, Delta, ["wieght"]), "wieght"),
    ("adopting twice", tuned(), lambda m, _: adopt(m.head, Delta), "weight"),
    ("whole numbers", broken(lambda m: setattr(m.head, "weight", _whole())), enabling(LowRankStrategy), "head"),
]


def _low() -> list[Any]:
    return list(LowRankStrategy().module_caps)


def _whole() -> nn.Parameter:
    return nn.Parameter(torch.ones(4, 6, dtype=torch.int64), requires_grad=False)


def _within(context: Callable[[Any], Any], call: Callable[[Any], Any]) -> Callable[[Any, Path], Any]:
    def run(model: Any, _: Path) -> Any:
        with context(model):
            return call(model)

    return run


STATE_CASES: list[Case] = [
    ("disable what is plain", cnn, lambda m, _: disable_fine_tuning(m), "not tuned"),
    ("disable no model", cnn, lambda m, _: disable_fine_tuning(3), "int"),  # type: ignore[arg-type]
    ("merge what is plain", cnn, lambda m, _: merge(m), "not tuned"),
    ("merge twice", merged_model, lambda m, _: merge(m), "merged already"),
    ("unmerge what is not merged", tuned(), lambda m, _: unmerge(m), "not merged"),
    ("train what is merged", merged_model, lambda m, _: _trained(m), "unmerge"),
    ("unload what is plain", cnn, lambda m, _: merge_and_unload(m), "not tuned"),
    ("unload what is replaced", broken(lambda m: _replaced(m)), lambda m, _: merge_and_unload(m), "head"),
    ("merge within the base", tuned(), _within(tuning_disabled, merge), "tuning_disabled"),
    ("save within the base", tuned(), _within(tuning_disabled, lambda m: save_adapter(m, "x")), "tuning_disabled"),
    ("the base of what is plain", cnn, lambda m, _: tuning_disabled(m).__enter__(), "not tuned"),
    ("all of what is plain", cnn, lambda m, _: full_state_dict(m).__enter__(), "not tuned"),
    (
        "no originals",
        broken(lambda m: enable_fine_tuning(m, _full(), keep_originals=False) and None),
        lambda m, _: disable_fine_tuning(m),
        "kept",
    ),
    ("an optimizer of a plain model", cnn, lambda m, _: check_optimizer(m, torch.optim.SGD(m.parameters())), "not tuned"),
    ("an optimizer that is none", tuned(), lambda m, _: check_optimizer(m, 3), "int"),  # type: ignore[arg-type]
    ("a state dict of nothing", tuned(), lambda m, _: m.load_state_dict({}), "missing"),
    ("a state dict with more", tuned(), lambda m, _: m.load_state_dict({**m.state_dict(), "more": torch.ones(1)}), "more"),
    ("a state dict misshapen", tuned(), lambda m, _: m.load_state_dict({key: torch.ones(1, 1, 1) for key in m.state_dict()}), "head"),
]


def _trained(model: nn.Module) -> None:
    model.train()
    try:
        model(input_for(cnn))
    finally:
        model.eval()


def _replaced(model: nn.Module) -> None:
    enable_fine_tuning(model, FineTuningStrategy([(LINEAR, replace_module(lambda layer: nn.Linear(6, 4)))]))


def _full() -> FineTuningStrategy:
    return FullFineTuningStrategy()


FILE_CASES: list[Case] = [
    ("save what is plain", cnn, lambda m, f: save_adapter(m, f / "a"), "not tuned"),
    ("save where no folder is", tuned(), lambda m, f: save_adapter(m, f / "no" / "a"), "no"),
    ("save onto a folder", tuned(), lambda m, f: save_adapter(m, f), ""),
    ("save NaN", broken(_nan, tuned()), lambda m, f: save_adapter(m, f / "a"), "thin_left"),
    ("load what is missing", cnn, lambda m, f: load_adapter(m, f / "gone"), "gone"),
    ("load a folder", cnn, lambda m, f: load_adapter(m, f), ""),
    ("load an empty file", cnn, _write_then("", lambda m, p: load_adapter(m, p)), "adapter.safetensors"),
    ("load text", cnn, _write_then("hello, world, hello", lambda m, p: load_adapter(m, p)), "adapter.safetensors"),
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
    ("read text", cnn, _write_then("hello, world, hello", lambda m, p: read_adapter_info(p)), "adapter.safetensors"),
    ("convert what no converter knows", tuned(), _exported(), "2 sites"),
    ("convert what is missing", cnn, lambda m, f: export_peft(f / "gone", f / "peft"), "gone"),
    ("read PEFT's files where none are", cnn, lambda m, f: load_peft(m, f / "gone"), "gone"),
    ("read PEFT's files from an empty folder", cnn, lambda m, f: load_peft(m, f), "adapter_config.json"),
    (
        "read PEFT's config that is none",
        cnn,
        _write_then("[", lambda m, p: load_peft(m, p.parent), "adapter_config.json"),
        "adapter_config.json",
    ),
]

SET_NAMES = ["", "a b", "../x", "a/b", "-x", ".x", "x" * 200, None, 3, "a\n", "é", "a"]
SET_CASES: list[Case] = [
    *(
        (f"an adapter called {name!r}"[:60], cnn, _with_set(lambda s, _, name=name: s.add(name, LowRankStrategy())), "")
        for name in SET_NAMES
    ),
    ("use what is not there", cnn, _with_set(lambda s, _: s.use("b")), "'b'"),
    ("remove what is not there", cnn, _with_set(lambda s, _: s.remove("b")), "'b'"),
    ("save what is not there", cnn, _with_set(lambda s, f: s.save("b", f / "b")), "'b'"),
    ("parameters of what is not there", cnn, _with_set(lambda s, _: s.parameters("b")), "'b'"),
    ("report of what is not there", cnn, _with_set(lambda s, _: s.report("b")), "'b'"),
    ("strategy of what is not there", cnn, _with_set(lambda s, _: s.strategy("b")), "'b'"),
    ("add what matches nothing", cnn, _with_set(lambda s, _: s.add("b", LowRankStrategy(targets="nowhere"))), "nowhere"),
    ("add what is no strategy", cnn, _with_set(lambda s, _: s.add("b", 3)), "3"),  # type: ignore[arg-type]
    ("add a file that is missing", cnn, _with_set(lambda s, f: s.add("b", f / "gone.safetensors")), "gone"),
    ("add a folder of nothing", cnn, _with_set(lambda s, f: s.add_all(f)), ""),
    ("copy a set", cnn, _with_set(lambda s, _: copy.deepcopy(s)), "save_all"),
    ("a set of no model", cnn, lambda m, _: AdapterSet(3), "int"),  # type: ignore[arg-type]
    ("a set of a tuned model", tuned(), lambda m, _: AdapterSet(m), "a name"),
    ("a set of a merged model", merged_model, lambda m, _: AdapterSet(m, "a"), "unmerge"),
    ("a name for nothing", cnn, lambda m, _: AdapterSet(m, "a"), "'a'"),
]

CASES: list[Case] = [*parameter_cases(), *STRATEGY_CASES, *ENABLE_CASES, *STATE_CASES, *FILE_CASES, *SET_CASES]


def state_of(model: nn.Module) -> Any:
    """All that may be compared, also of what has no bytes or is no Python."""
    return None if isinstance(model, torch.jit.ScriptModule) else fingerprint(model)


@pytest.mark.usefixtures("low_rank")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("build", "call", "subject"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_a_refusal(
    build: Callable[[], nn.Module], call: Callable[[Any, Path], Any], subject: str, tmp_path: Path, record_faults: RecordFaults
) -> None:
    """What cannot be done is a GiftError that names the subject and the remedy, and model and generator are as they were."""
    with torch.random.fork_rng(devices=[]):
        model = build()
        before, random = state_of(model), torch.get_rng_state()
        silent = foreign = 0
        try:
            call(model, tmp_path)
            silent = 1
        except GiftError as error:
            assert subject in str(error), error
            assert REMEDY.search(str(error)) or OWN.search(str(error)), error
        except Exception:
            foreign = 1
            raise
        finally:
            half = int(state_of(model) != before or not torch.equal(torch.get_rng_state(), random))
            record_faults("refusals", 1, silent=silent, half=half, foreign=foreign)


def test_the_table_is_long() -> None:
    """There are more than a hundred kinds, each with a name of its own."""
    assert len(CASES) == len({case[0] for case in CASES}) > 150
