"""Refusals of a set of adapters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults.refusals_common import Case, merged_model, tuned
from low_rank import LowRankStrategy
from models import cnn

from gift_core import (
    AdapterSet,
    disable_fine_tuning,
    enable_fine_tuning,
    full_state_dict,
    merge,
    tuning_disabled,
    unmerge,
)


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


def _file(folder: Path) -> Path:
    (folder / "file").write_text("")
    return folder / "file"


def _two_cases(adapters: AdapterSet, folder: Path) -> Any:
    adapters.add("A", LowRankStrategy())
    try:
        return adapters.save_all(folder)
    finally:
        adapters.remove("A")


def _tuned_meanwhile(adapters: AdapterSet, _: Path) -> Any:
    enable_fine_tuning(adapters.model, LowRankStrategy())
    try:
        return adapters.use("a")
    finally:
        disable_fine_tuning(adapters.model)


def _within(context: Callable[[Any], Any]) -> Callable[[AdapterSet, Path], Any]:
    def run(adapters: AdapterSet, _: Path) -> Any:
        adapters.use("a")
        try:
            with context(adapters.model):
                return adapters.use(None)
        finally:
            adapters.use(None)

    return run


def _merged_meanwhile(adapters: AdapterSet, _: Path) -> Any:
    merge(adapters.use("a").eval())
    try:
        return adapters.use(None)
    finally:
        unmerge(adapters.model)
        adapters.model.train()
        adapters.use(None)


def _on_meta(_: Any, __: Path) -> Any:
    adapters = AdapterSet(cnn())
    adapters.add("a", LowRankStrategy())
    adapters.model.to("meta")
    return adapters.use("a")


def _second_set(model: Any, _: Path) -> Any:
    first = AdapterSet(model, "a")
    try:
        return AdapterSet(model, "b")
    finally:
        first.release()


SET_NAMES = ["", "a b", "../x", "a/b", "-x", ".x", "x" * 200, None, 3, "a\n", "é", "a"]
SET_CASES: list[Case] = [
    *(
        (f"an adapter called {name!r}"[:60], cnn, _with_set(lambda s, _, name=name: s.add(name, LowRankStrategy())), repr(name))
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
    ("add a folder of nothing", cnn, _with_set(lambda s, f: s.add_all(f)), "there is no *.safetensors in"),
    ("use a list", cnn, _with_set(lambda s, _: s.use([])), "[]"),  # type: ignore[arg-type]
    ("remove a list", cnn, _with_set(lambda s, _: s.remove([])), "[]"),  # type: ignore[arg-type]
    ("parameters of a list", cnn, _with_set(lambda s, _: s.parameters([])), "[]"),  # type: ignore[arg-type]
    ("add the files of a number", cnn, _with_set(lambda s, _: s.add_all(3)), "got 3"),  # type: ignore[arg-type]
    ("save into a number", cnn, _with_set(lambda s, _: s.save_all(3)), "got 3"),  # type: ignore[arg-type]
    ("save into no name", cnn, _with_set(lambda s, f: s.save_all(f / "a\0b")), "could not be made"),
    ("save into a file", cnn, _with_set(lambda s, f: s.save_all(_file(f))), "could not be made"),
    ("save names that differ in case", cnn, _with_set(_two_cases), "'A'"),
    ("switch what was tuned otherwise", cnn, _with_set(_tuned_meanwhile), "was tuned outside"),
    ("switch within the base", cnn, _with_set(_within(tuning_disabled)), "tuning_disabled"),
    ("switch within the full state dict", cnn, _with_set(_within(full_state_dict)), "full_state_dict"),
    ("switch what is merged", cnn, _with_set(_merged_meanwhile), "'a' is merged"),
    ("switch on meta", cnn, _on_meta, "meta"),
    ("a second set", tuned(), _second_set, "belongs to a set"),
    ("copy a set", cnn, _with_set(lambda s, _: copy.deepcopy(s)), "save_all"),
    ("a set of no model", cnn, lambda m, _: AdapterSet(3), "int"),  # type: ignore[arg-type]
    ("a set of a tuned model", tuned(), lambda m, _: AdapterSet(m), "a name"),
    ("a set of a merged model", merged_model, lambda m, _: AdapterSet(m, "a"), "unmerge"),
    ("a name for nothing", cnn, lambda m, _: AdapterSet(m, "a"), "'a'"),
]
