"""Refusals about plugins: names, what is installed, what is loaded, hooks, settings, and projects of one's own."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from fake_distributions import Install, installing
from faults.refusals_common import Case, bystander

from gift_core import FullFineTuningStrategy, strategy_from_config
from gift_core.plugins import (
    DEMOS,
    FORMATS,
    PLUGINS,
    find_provider,
    find_thing,
    isolated_plugins,
    load_strategy,
    plugin_settings,
    register_plugin,
    register_strategy,
    strategy_names,
    unregister_plugin,
    unregister_strategy,
)
from gift_core.plugins.hooks import hookimpl
from gift_core.scaffold import create_project, derive_names

MARK = "from gift_core.plugins.hooks import hookimpl\n"
NAME = "made-up"


def _alone(call: Callable[[], Any]) -> Callable[[Any, Path], Any]:
    """A call where nothing but the core's own is installed."""

    def run(_: Any, __: Path) -> Any:
        with isolated_plugins():
            return call()

    return run


def _installed(prepare: Callable[[Install], Any], call: Callable[[], Any]) -> Callable[[Any, Path], Any]:
    """A call where made-up distributions are installed."""

    def run(_: Any, folder: Path) -> Any:
        with installing(folder) as install:
            prepare(install)
            return call()

    return run


def _loading(entry: str, **modules: str) -> Callable[[Any, Path], Any]:
    return _installed(lambda install: install("made-up-dist", f"{NAME} = {entry}", **modules), lambda: load_strategy(NAME))


def _two(install: Install, group: str = "gift.strategies") -> None:
    install("first-dist", f"{NAME} = first:Thing", group=group)
    install("second-dist", f"{NAME} = second:Thing", group=group)


def _hook(source: str) -> Callable[[Any, Path], Any]:
    """A call that asks for a check, with a plugin of this source installed and every failure an error."""

    def call() -> Any:
        with plugin_settings(strict=True):
            return find_thing("check", "is_anything")

    return _installed(lambda install: install("hook-dist", "hook = hook_module", group=PLUGINS, hook_module=MARK + source), call)


def _registers(body: str, kind: str = "checks") -> Callable[[Any, Path], Any]:
    return _hook(f"@hookimpl\ndef gift_register_{kind}(registry):\n    {body}\n")


class Checks:
    """A plugin with one check."""

    @hookimpl
    def gift_register_checks(self, registry: Any) -> None:
        registry.add("is_anything", bool)


class Broken(Checks):
    """A plugin that may not be looked at."""

    def __dir__(self) -> list[str]:
        raise RuntimeError("do not look")


class OfTomorrow(Checks):
    """A plugin of another generation."""

    plugin_api = 2


def _twice() -> None:
    register_plugin(Checks(), "one")
    try:
        register_plugin(Checks(), "one")
    finally:
        unregister_plugin("one")


def _two_checks() -> None:
    register_plugin(Checks(), "one")
    register_plugin(Checks(), "two")
    try:
        find_thing("check", "is_anything")
    finally:
        unregister_plugin("one")
        unregister_plugin("two")


def _taken_here() -> None:
    register_strategy(NAME, FullFineTuningStrategy)
    register_strategy(NAME, dict)


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    with mock.patch.dict(os.environ, variables):
        yield


def _under(call: Callable[[], Any], **variables: str) -> Callable[[Any, Path], Any]:
    def run(_: Any, __: Path) -> Any:
        with _environment(**variables):
            return call()

    return run


def _gives_none() -> Any:
    register_strategy(NAME, lambda: None)
    return strategy_from_config({"name": NAME, "parameters": {}})


def _of_another_generation() -> Any:
    class Later(FullFineTuningStrategy):
        plugin_api = 2

    register_strategy(NAME, Later)


def _project(call: Callable[[Path], Any]) -> Callable[[Any, Path], Any]:
    return lambda _, folder: call(folder)


def _created(folder: Path, **options: Any) -> Any:
    return create_project(folder, derive_names(Path("my-method")), **options)


REGISTRY_CASES: list[Case] = [
    ("register no name", bystander, _alone(lambda: register_strategy("a:b", FullFineTuningStrategy)), "'a:b'"),
    ("register nothing", bystander, _alone(lambda: register_strategy(NAME, 3)), "is 3"),  # type: ignore[arg-type]
    ("register a name that is taken", bystander, _alone(_taken_here), NAME),
    ("register a name that is installed", bystander, lambda m, f: register_strategy("lora", dict), "gift-lora-plugin"),
    ("register for another generation", bystander, _alone(_of_another_generation), "plugin API 2"),
    ("unregister what is not there", bystander, _alone(lambda: unregister_strategy(NAME)), NAME),
    ("a strategy that is none", bystander, _alone(_gives_none), "NoneType"),
    ("find no demo", bystander, lambda m, f: find_provider("no-demo", DEMOS), "no-demo"),
    ("find no format", bystander, lambda m, f: find_provider("no-format", FORMATS), "no-format"),
    ("find no plugin", bystander, lambda m, f: find_provider("no-plugin", PLUGINS), "no-plugin"),
    ("find no check", bystander, lambda m, f: find_thing("check", "name_iz"), "name_is"),
    ("find two strategies", bystander, _installed(_two, lambda: find_provider(NAME)), "'first-dist:made-up'"),
    ("find two checks", bystander, _alone(_two_checks), "is_anything"),
    (
        "find what is blocked",
        bystander,
        _under(lambda: load_strategy("lora"), GIFT_BLOCK_PLUGINS="gift-lora-plugin"),
        "GIFT_BLOCK_PLUGINS",
    ),
    ("find what is broken", bystander, _loading("no module:no attribute"), "made-up-dist"),
    (
        "find what is broken in another package",
        bystander,
        _installed(
            lambda install: install("made-up-dist", f"{NAME} = no module:no attribute"), lambda: load_strategy(f"no-dist:{NAME}")
        ),
        "no strategy named 'no-dist:made-up'",
    ),
    ("a switch that is none", bystander, _under(strategy_names, GIFT_DISABLE_PLUGIN_AUTOLOAD="maybe"), "'maybe'"),
    ("a list that is a text", bystander, lambda m, f: plugin_settings(block="lora").__enter__(), "['lora']"),
]

LOADING_CASES: list[Case] = [
    ("load what is not callable", bystander, _loading("thing:VALUE", thing="VALUE = 3"), "is 3"),
    ("load a module that is not there", bystander, _loading("nowhere.at_all:Thing"), "'nowhere'"),
    ("load what needs another", bystander, _loading("thing:Thing", thing="import absent_dependency"), "'absent_dependency'"),
    ("load what raises", bystander, _loading("thing:Thing", thing="1 / 0"), "ZeroDivisionError"),
    ("load an attribute that is not there", bystander, _loading("thing:Thnig", thing="class Thing: ..."), "'Thing'"),
    (
        "load an attribute that raises",
        bystander,
        _loading("thing:Thing", thing="def __getattr__(name):\n    raise RuntimeError(name)"),
        "RuntimeError",
    ),
    (
        "load an attribute that ends the program",
        bystander,
        _loading("thing:Thing", thing="def __getattr__(name):\n    raise SystemExit(name)"),
        "ended the program",
    ),
    ("load another generation", bystander, _loading("thing:Thing", thing="class Thing:\n    plugin_api = 2"), "plugin API 2"),
]

HOOK_CASES: list[Case] = [
    ("a plugin twice", bystander, _alone(_twice), "'one'"),
    ("a plugin that is not there", bystander, _alone(lambda: unregister_plugin("one")), "'one'"),
    ("a plugin of another generation", bystander, _alone(lambda: register_plugin(OfTomorrow())), "plugin API 2"),
    ("a plugin that is a class", bystander, _alone(lambda: register_plugin(Checks)), "the class Checks"),
    ("a plugin that may not be looked at", bystander, _alone(lambda: register_plugin(Broken())), "do not look"),
    ("a plugin without hooks", bystander, _hook(""), "implements no hook"),
    ("a hook without a mark", bystander, _hook("def gift_register_checks(registry): ..."), "gift_register_checks"),
    ("a misspelt hook", bystander, _hook("@hookimpl\ndef gift_register_chekcs(registry): ..."), "'gift_register_checks'"),
    ("a hook as a wrapper", bystander, _hook("@hookimpl(wrapper=True)\ndef gift_register_checks(registry): yield"), "wrapper"),
    ("a hook as a generator", bystander, _hook("@hookimpl\ndef gift_register_checks(registry): yield"), "generator"),
    ("a hook of another argument", bystander, _hook("@hookimpl\ndef gift_register_checks(registri): ..."), "'registri'"),
    ("a hook of a default", bystander, _hook("@hookimpl\ndef gift_register_checks(registry=None): ..."), "default"),
    ("a hook that raises", bystander, _registers("1 / 0"), "ZeroDivisionError"),
    ("a hook that registers no name", bystander, _registers("registry.add('a:b', bool)"), "'a:b'"),
    ("a hook that registers nothing", bystander, _registers("registry.add('a', 3)"), "as 3"),
    ("a hook that registers twice", bystander, _registers("registry.add('a', bool), registry.add('a', int)"), "'a' twice"),
    ("a hook that registers a name of the core", bystander, _registers("registry.add('name_is', bool)"), "gift-core"),
    ("a hook that registers an installed name", bystander, _registers("registry.add('lora', dict)", "strategies"), "gift-lora-plugin"),
]

PROJECT_CASES: list[Case] = [
    ("a project of no name", bystander, _project(lambda folder: derive_names(folder / "---")), "'---'"),
    ("a project of no distribution", bystander, _project(lambda folder: derive_names(folder, "-x-")), "'-x-'"),
    ("a project of no author", bystander, _project(lambda folder: derive_names(folder / "a", author=" ")), "author"),
    ("a project of no package", bystander, _project(lambda folder: derive_names(folder / "a", package="class")), "'class'"),
    (
        "a project of a package that is taken",
        bystander,
        _project(lambda folder: derive_names(folder / "a", package="torch")),
        "'torch'",
    ),
    ("a project of a strategy that is taken", bystander, _project(lambda folder: derive_names(folder / "lora")), "'lora'"),
    ("a project of no kind", bystander, _project(lambda folder: _created(folder / "a", kind="x")), "'x'"),
    ("a project that is there", bystander, _project(lambda folder: _created(folder)), "exists already"),
    ("a project below a file", bystander, _project(lambda folder: _created(_file(folder) / "a")), "cannot be made"),
]


def _file(folder: Path) -> Path:
    (folder / "file").write_text("")
    return folder / "file"


PLUGIN_CASES = [*REGISTRY_CASES, *LOADING_CASES, *HOOK_CASES, *PROJECT_CASES]
