"""Plugins with hooks: validated before use, isolated from each other, called around enabling; and the switches over all plugins."""

from __future__ import annotations

import itertools
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from gift_core import FullFineTuningStrategy, enable_fine_tuning, factories
from gift_core.errors import (
    GiftError,
    GiftWarning,
    IncompatiblePluginError,
    InvalidPluginError,
    PluginBlockedError,
    PluginConflictError,
    PluginError,
    PluginLoadError,
    PluginSettingError,
    UnknownPluginError,
    UnknownStrategyError,
)
from gift_core.plugins import (
    PLUGINS,
    call_hooks,
    discover,
    find_provider,
    find_thing,
    hook_plugins,
    isolated_plugins,
    load_strategy,
    plugin_settings,
    provider_of,
    register_plugin,
    register_strategy,
    registered_things,
    strategy_names,
    unregister_plugin,
)
from gift_core.plugins.hook_plugins import CORE_NAMES
from gift_core.plugins.hooks import hookimpl
from gift_core.plugins.settings import VARIABLES
from gift_core.plugins.validation import hook_names

pytest_plugins = ["gift_core.plugins.pytest_plugin"]

Install = Callable[..., Path]
MARK = "from gift_core.plugins.hooks import hookimpl\nfrom gift_core import FullFineTuningStrategy\n"


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """The switches of whoever runs the tests are not those of the tests."""
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def install_hooks(install: Install) -> Install:
    """Installs a made-up plugin with hooks: ``install_hooks("name", "source")``."""

    def make(name: str, source: str, distribution: str = "", **more: Any) -> Path:
        module = f"hooks_{name.replace('-', '_')}"
        return install(distribution or f"{name}-dist", f"{name} = {module}", group=PLUGINS, **{module: MARK + source}, **more)

    return make


def mine(distribution: str = "-dist") -> dict[str, Any]:
    """The hook plugins of made-up distributions, by name."""
    return {one.provider.name: one for one in hook_plugins() if one.provider.distribution.endswith(distribution)}


def net() -> nn.Module:
    """A small model."""
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))


GOOD = """
seen = []
@hookimpl
def gift_register_strategies(registry): registry.add("{name}-strategy", FullFineTuningStrategy)
@hookimpl
def gift_register_checks(registry): registry.add("{name}-check", lambda *names: lambda *site: site[1] in names)
@hookimpl
def gift_register_actions(registry): registry.add("{name}-action", lambda *site, **params: None)
@hookimpl
def gift_before_enable(module, strategy, plan): seen.append(("before", module, strategy, plan.report.to_dict()))
@hookimpl
def gift_after_enable(report): seen.append(("after", report))
"""


def good(name: str) -> str:
    """The source of a plugin that does all that a plugin can."""
    return GOOD.replace("{name}", name)


# --- what hooks do


def test_a_plugin_registers_by_hook(install_hooks: Install) -> None:
    """Strategies, checks and actions that a plugin registers are found by name, and traced to its distribution."""
    install_hooks("good", good("good"), version="2.1")

    provider = find_provider("good-strategy")

    assert load_strategy("good-strategy") is FullFineTuningStrategy
    assert load_strategy("good-dist:good-strategy") is FullFineTuningStrategy
    assert (provider.distribution, provider.version, provider.hook_plugin) == ("good-dist", "2.1", "good")
    assert find_thing("check", "good-check")("a")(None, "a")
    assert callable(find_thing("action", "good-dist:good-action"))
    assert "good-strategy" in strategy_names(hooks=True)
    assert "good-strategy" not in strategy_names()


def test_listing_and_finding_entry_points_import_no_hook_plugin(install_hooks: Install, install: Install) -> None:
    """Plugins with hooks are imported when they are needed: not for listing, nor for what an entry point provides."""
    install_hooks("bomb", "raise RuntimeError")
    install("fake-dist", "fake = fake_made:A", fake_made="def A(): ...")

    assert "fake" in strategy_names()
    assert discover(PLUGINS).providers
    assert load_strategy("fake")
    assert "hooks_bomb" not in sys.modules


def test_the_life_cycle_hooks_are_called_around_enabling(install_hooks: Install) -> None:
    """Before: the plain model, the strategy and the plan. After: the report that the caller gets."""
    install_hooks("good", good("good"))
    model, strategy = net(), FullFineTuningStrategy()

    report = enable_fine_tuning(model, strategy)

    before, after = sys.modules["hooks_good"].seen
    assert before[:3] == ("before", model, strategy)
    assert before[3]["before"] == report.to_dict()["before"]
    assert after == ("after", report)


def test_a_hook_that_raises_stops_nobody(install_hooks: Install) -> None:
    """The failure is a warning with the distribution; the model is tuned and other plugins are called."""
    install_hooks("bad", "@hookimpl\ndef gift_before_enable(plan): raise OSError('no disk')")
    install_hooks("good", good("good"))

    with pytest.warns(GiftWarning, match=r"plugin 'bad' of bad-dist 1\.0: its hook gift_before_enable raised OSError: no disk"):
        report = enable_fine_tuning(net(), "full")

    assert report.trainable.numbers == 9
    assert [event[0] for event in sys.modules["hooks_good"].seen] == ["before", "after"]


@pytest.mark.parametrize("hook", ["gift_before_enable", "gift_after_enable"])
def test_strict_settings_make_a_failing_hook_an_error(install_hooks: Install, hook: str) -> None:
    """With strict settings a hook that raises ends enabling, and the model is as before."""
    install_hooks("bad", f"@hookimpl\ndef {hook}(): raise OSError('no disk')")
    model = net()
    keys = list(model.__dict__)

    with plugin_settings(strict=True), pytest.raises(PluginLoadError, match="no disk"):
        enable_fine_tuning(model, "full")

    assert list(model.__dict__) == keys
    assert len(list(model.parameters())) == 4


def test_without_plugins_pluggy_is_not_imported() -> None:
    """Where no package has hooks, enabling imports no pluggy."""
    code = """
import sys
from torch import nn
from gift_core import enable_fine_tuning
from gift_core.plugins import isolated_plugins
with isolated_plugins():
    enable_fine_tuning(nn.Linear(2, 2), "full")
print("pluggy" in sys.modules)
"""

    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert result.stdout.strip() == "False", result.stderr


def test_the_names_of_the_core_are_those_of_the_factories() -> None:
    """The names that no plugin may take are exactly the checks and actions that files may use."""
    assert CORE_NAMES["check"] == factories._FACTORIES.keys()
    assert all(callable(getattr(factories, name)()) for name in CORE_NAMES["action"])


# --- broken plugins

BROKEN = {
    "raises": ("raise RuntimeError('boom')", PluginLoadError, "raised RuntimeError: boom"),
    "exits": ("raise SystemExit(0)", PluginLoadError, "ended the program"),
    "misspelt": ("@hookimpl\ndef gift_register_strategy(registry): ...", InvalidPluginError, "did you mean 'gift_register_strategies'"),
    "argument": (
        "@hookimpl\ndef gift_before_enable(modul): ...",
        InvalidPluginError,
        "'modul', which the hook does not get; did you mean 'module'",
    ),
    "default": ("@hookimpl\ndef gift_before_enable(plan=None): ...", InvalidPluginError, "a default for 'plan'"),
    "keywords": ("@hookimpl\ndef gift_before_enable(**all): ...", InvalidPluginError, "named one by one"),
    "wrapper": ("@hookimpl(wrapper=True)\ndef gift_before_enable(): yield", InvalidPluginError, "a wrapper"),
    "generator": ("@hookimpl\ndef gift_before_enable(): yield", InvalidPluginError, "would not run"),
    "unmarked": ("def gift_before_enable(): ...", InvalidPluginError, "is not marked"),
    "no-hooks": ("", InvalidPluginError, "implements no hook"),
    "hook-raises": (good("x") + "@hookimpl\ndef gift_register_actions(registry): 1 / 0", PluginLoadError, "raised ZeroDivisionError"),
    "generation": ("plugin_api = 2\n" + good("x"), IncompatiblePluginError, "plugin API 2"),
    "steals": (
        "@hookimpl\ndef gift_register_strategies(registry): registry.add('full', FullFineTuningStrategy)",
        PluginConflictError,
        "'full', a name of gift-core",
    ),
    "steals-check": (
        "@hookimpl\ndef gift_register_checks(registry): registry.add('name_is', print)",
        PluginConflictError,
        "'name_is', a name of gift-core",
    ),
    "no-name": ("@hookimpl\ndef gift_register_checks(registry): registry.add('a:b', print)", InvalidPluginError, "without a colon"),
    "no-thing": ("@hookimpl\ndef gift_register_checks(registry): registry.add('a', 3)", InvalidPluginError, "cannot be called"),
    "twice": (
        "@hookimpl\ndef gift_register_checks(registry): registry.add('a', print); registry.add('a', len)",
        PluginConflictError,
        "'a' twice",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_plugin_is_refused_whole(install_hooks: Install, name: str) -> None:
    """A plugin that is broken in any way has its error, keeps nothing that it registered, and hurts no other."""
    source, kind, text = BROKEN[name]
    install_hooks(name, source)
    install_hooks("good", good("good"))

    with pytest.warns(GiftWarning, match=f"plugin '{name}' of {name}-dist"):
        plugins = mine()

    assert isinstance(plugins[name].error, kind)
    assert text in str(plugins[name].error)
    assert (plugins[name].error.name, plugins[name].error.distribution) == (name, f"{name}-dist")
    assert plugins[name].things == {}
    assert set(plugins["good"].things["strategy"]) == {"good-strategy"}


def test_a_missing_attribute_and_a_class_are_refused(install: Install) -> None:
    """An entry point that names nothing, or a class instead of an object, is told as such."""
    install("gone-dist", "gone = fake_things:Gone", group=PLUGINS, fake_things="class Gon: pass")
    install("class-dist", "class = fake_things:Gon", group=PLUGINS)

    with pytest.warns(GiftWarning):
        plugins = mine()

    assert "the nearest is 'Gon'" in str(plugins["gone"].error)
    assert "names the class Gon" in str(plugins["class"].error)


def test_an_object_can_be_a_plugin(install: Install) -> None:
    """The entry point may name an object; a hook is a method then."""
    source = (
        MARK
        + "class Plugin:\n    calls = 0\n    @hookimpl\n    def gift_after_enable(self, report): self.calls += 1\nplugin = Plugin()"
    )
    install("object-dist", "object = fake_object:plugin", group=PLUGINS, fake_object=source)

    enable_fine_tuning(net(), "full")

    assert sys.modules["fake_object"].plugin.calls == 1


SUBSET = ("raises", "exits", "misspelt", "argument", "hook-raises", "generation", "steals", "no-hooks")


@pytest.mark.parametrize("size", range(9))
def test_two_healthy_plugins_work_beside_any_broken_ones(install_hooks: Install, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Beside every subset of this size of eight broken plugins both healthy ones register and are called."""
    for name in SUBSET:
        install_hooks(name, BROKEN[name][0])
    for name in ("healthy", "hearty"):
        install_hooks(name, good(name))
    for subset in itertools.combinations(SUBSET, size):
        allow = ["healthy", "hearty", *subset]
        with plugin_settings(allow=allow), warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for name in ("healthy", "hearty"):
                sys.modules.pop(f"hooks_{name}", None)
            enable_fine_tuning(net(), "full")

            assert {one.provider.name for one in hook_plugins() if one.error is None} == {"healthy", "hearty"}
            assert {name for name in subset if any(f"{name}-dist" in str(one.message) for one in told)} == set(subset)
            assert load_strategy("healthy-strategy") and load_strategy("hearty-strategy")
            assert all(len(sys.modules[f"hooks_{name}"].seen) == 2 for name in ("healthy", "hearty"))


def test_a_name_of_two_hook_plugins_is_a_conflict(install_hooks: Install) -> None:
    """The bare name is an error that names both; the qualified names work."""
    install_hooks("one", good("same"))
    install_hooks("two", good("same"))

    with pytest.raises(PluginConflictError, match="'one-dist:same-strategy' or 'two-dist:same-strategy'"):
        load_strategy("same-strategy")
    with pytest.raises(PluginConflictError, match="check name 'same-check'"):
        find_thing("check", "same-check")

    assert load_strategy("two-dist:same-strategy") is FullFineTuningStrategy


def test_an_unknown_thing_gets_the_nearest_names(install_hooks: Install) -> None:
    """A check or action that nobody registered is an error with the nearest names, the core's included."""
    install_hooks("good", good("good"))

    with pytest.raises(UnknownPluginError, match="no check named 'good-chekc'; did you mean 'good-check'"):
        find_thing("check", "good-chekc")
    with pytest.raises(UnknownPluginError, match="did you mean 'keep_trainable'"):
        find_thing("action", "keep_trainabel")


def test_an_unknown_strategy_counts_those_of_hooks(install_hooks: Install) -> None:
    """The nearest names of an unknown strategy include those that plugins register."""
    install_hooks("good", good("good"))

    with pytest.raises(UnknownStrategyError, match="did you mean 'good-strategy'"):
        load_strategy("good-stratgy")


def test_a_plugin_that_needs_plugins_while_it_is_imported(install_hooks: Install) -> None:
    """A plugin that enables a model while it is imported ends in no loop; it sees no plugins with hooks."""
    install_hooks("early", good("early") + "import torch, gift_core\ngift_core.enable_fine_tuning(torch.nn.Linear(1, 1), 'full')")

    enable_fine_tuning(net(), "full")

    assert len(sys.modules["hooks_early"].seen) == 2


# --- registration by hand and isolation


def plugin(name: str = "hand", **hooks: Callable[..., Any]) -> SimpleNamespace:
    """A plugin made in a test; pluggy reads the attributes of a class, so that the hooks are there."""
    return type(name, (SimpleNamespace,), {hook: staticmethod(hookimpl(function)) for hook, function in hooks.items()})()


@pytest.mark.usefixtures("isolated_plugins")
def test_a_plugin_is_registered_by_hand() -> None:
    """A plugin given in the process is used like an installed one, until it is taken back."""
    calls: list[str] = []
    register_plugin(plugin(gift_after_enable=lambda report: calls.append("after")), "mine")

    enable_fine_tuning(net(), "full")
    unregister_plugin("mine")
    enable_fine_tuning(net(), "full")

    assert calls == ["after"]
    with pytest.raises(InvalidPluginError):
        unregister_plugin("mine")


@pytest.mark.usefixtures("isolated_plugins")
def test_a_plugin_given_by_hand_must_be_right() -> None:
    """A broken plugin is an error where it is registered, and a name is taken once."""
    with pytest.raises(InvalidPluginError, match="gift_after_enable with the argument 'x'"):
        register_plugin(plugin(gift_after_enable=lambda x: None))
    register_plugin(plugin(gift_after_enable=lambda: None), "mine")
    with pytest.raises(PluginConflictError, match="registered already"):
        register_plugin(plugin(gift_after_enable=lambda: None), "mine")


def test_isolation_hides_what_is_installed_and_forgets_what_is_registered(install: Install, install_hooks: Install) -> None:
    """Inside, only the core's names and what is registered there; afterwards all is as before."""
    install("fake-dist", "fake = m:A")
    install_hooks("bomb", "raise RuntimeError")
    before = strategy_names()

    with isolated_plugins():
        inside = strategy_names()
        register_strategy("mine", FullFineTuningStrategy)
        register_plugin(plugin(gift_register_checks=lambda registry: registry.add("x", print)))
        things = [provider.name for provider, _ in registered_things("check")]
        enable_fine_tuning(net(), "mine")

    assert {find_provider(name).distribution for name in inside} == {"gift-core"}
    assert things == ["x"]
    assert strategy_names() == before
    assert "mine" not in before


def test_the_core_needs_no_pytest() -> None:
    """Importing the core and using plugins imports no pytest."""
    code = "import sys; sys.modules['pytest'] = None; from gift_core.plugins import strategy_names; strategy_names(hooks=True)"

    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


# --- switches


@pytest.mark.parametrize("item", ["fake-dist", "Fake_Dist", "fake", "fake-dist:fake"])
@pytest.mark.parametrize("by", ["variable", "argument"])
def test_a_blocked_plugin_is_not_used(install: Install, monkeypatch: pytest.MonkeyPatch, item: str, by: str) -> None:
    """A plugin that a variable or an argument blocks is not imported; asking for it says what blocks it."""
    install("fake-dist", "fake = fake_bomb:A", fake_bomb="raise RuntimeError")
    if by == "variable":
        monkeypatch.setenv("GIFT_BLOCK_PLUGINS", f" {item} ,")
    with plugin_settings(block=[item] if by == "argument" else None):
        with pytest.raises(PluginBlockedError, match=f"is blocked: GIFT_BLOCK_PLUGINS names '{item}'"):
            load_strategy("fake")

        assert "fake" not in strategy_names()
        assert [entry.provider.name for entry in discover().blocked] == ["fake"]
    assert "fake_bomb" not in sys.modules


def test_an_allow_list_leaves_the_others_out(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a list of allowed plugins, only these and the core's are used; a block wins over it."""
    install("one-dist", "one = m:A")
    install("two-dist", "two = m:A")
    monkeypatch.setenv("GIFT_PLUGINS", "one,two-dist")
    monkeypatch.setenv("GIFT_BLOCK_PLUGINS", "two")

    names = strategy_names()

    assert "one" in names
    assert "full" in names
    assert not {"two", "lora"} & set(names)


@pytest.mark.parametrize(
    ("text", "off"), [("1", True), ("TRUE", True), ("on", True), ("0", False), ("false", False), ("no", False), ("", False)]
)
def test_a_switch_is_a_real_boolean(install: Install, monkeypatch: pytest.MonkeyPatch, text: str, off: bool) -> None:
    """A variable set to 0 or false is off."""
    install("fake-dist", "fake = m:A")
    monkeypatch.setenv("GIFT_DISABLE_PLUGIN_AUTOLOAD", text)

    assert ("fake" not in strategy_names()) == off
    assert "full" in strategy_names()


def test_without_autoload_the_listed_ones_are_used(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    """Autoload off and a list of plugins: those of the list."""
    install("fake-dist", "fake = m:A", "other = m:B")
    monkeypatch.setenv("GIFT_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("GIFT_PLUGINS", "fake-dist:fake")

    assert "fake" in strategy_names()
    assert "other" not in strategy_names()


def test_a_switch_that_is_none_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A value that is neither on nor off is an error that names the variable."""
    monkeypatch.setenv("GIFT_STRICT_PLUGINS", "maybe")

    with pytest.raises(PluginSettingError, match="GIFT_STRICT_PLUGINS is 'maybe'") as caught:
        strategy_names()

    assert isinstance(caught.value, ValueError)
    with pytest.raises(PluginSettingError, match=r"write \['fake'\]"), plugin_settings(block="fake"):
        pass


def test_an_unknown_name_in_a_list_is_warned_about(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    """A list that names nothing installed is warned about, with the nearest name."""
    install("zebra-dist", "zebra = m:A")
    monkeypatch.setenv("GIFT_BLOCK_PLUGINS", "zebar")

    with pytest.warns(GiftWarning, match="no installed plugin or package is called 'zebar'.*did you mean 'zebra'"):
        strategy_names()


def test_arguments_come_before_the_environment(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is given as an argument replaces the variable within its context, and only there."""
    install("fake-dist", "fake = m:A")
    monkeypatch.setenv("GIFT_BLOCK_PLUGINS", "fake")

    with plugin_settings(block=[]) as settings:
        inside = strategy_names()

    assert settings.block == ()
    assert "fake" in inside
    assert "fake" not in strategy_names()


def test_strict_makes_a_broken_plugin_an_error(install_hooks: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    """With strict settings a broken plugin is an error each time that plugins are needed."""
    install_hooks("raises", "raise RuntimeError('boom')")
    monkeypatch.setenv("GIFT_STRICT_PLUGINS", "1")

    for _ in range(2):
        with pytest.raises(PluginLoadError, match="boom"):
            call_hooks("gift_before_enable")


def test_tracing_says_what_is_imported_and_called(
    install_hooks: Install, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The trace on stderr has each import and each hook, with its time."""
    install_hooks("good", good("good"))
    monkeypatch.setenv("GIFT_TRACE_PLUGINS", "yes")

    enable_fine_tuning(net(), "full")

    told = capsys.readouterr().err
    assert "imported plugin 'good' of good-dist 1.0" in told
    assert "called gift_after_enable of plugin 'good' of good-dist 1.0 in 0." in told


def test_a_near_miss_of_a_name_of_the_core_is_told(install: Install) -> None:
    """A strategy that could be taken for one of the core's works, and says so when it is loaded."""
    install("typo-dist", "fulll = fake_near:A", fake_near="def A(): ...")
    provider = find_provider("fulll")

    official = discover().near_miss(provider)

    assert official is not None
    assert (official.name, official.distribution) == ("full", "gift-core")
    with pytest.warns(GiftWarning, match=r"(?s)'fulll' is typo-dist's; 'full'.*write 'full'"):
        load_strategy("fulll")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("full", False),
        ("fulll", True),
        ("Full", True),
        ("fu-ll", True),
        ("flul", True),
        ("ful", False),
        ("lora", False),
        ("bull", True),
    ],
)
def test_what_a_near_miss_is(name: str, near: bool) -> None:
    """One letter more, less, other or swapped; case and separators do not count; short names are never near."""
    from gift_core.plugins.names import is_near_miss

    assert is_near_miss(name, "full") == near


def test_the_hooks_are_the_documented_ones() -> None:
    """The hooks are five, and none of their arguments has a default."""
    assert hook_names() == [
        "gift_register_strategies",
        "gift_register_checks",
        "gift_register_actions",
        "gift_before_enable",
        "gift_after_enable",
    ]


def test_many_distributions_cost_one_reading(install: Install, install_hooks: Install) -> None:
    """With 500 more distributions a plugin is found, and calling hooks again reads nothing again."""
    for number in range(500):
        install(f"fake-{number}", f"fake{number} = m:A")
    install_hooks("good", good("good"))
    assert load_strategy("good-strategy")

    first = hook_plugins()

    assert hook_plugins() is first


def test_every_error_is_of_the_family(install_hooks: Install) -> None:
    """A plugin's failure is a PluginError with what is known of it."""
    install_hooks("raises", "raise RuntimeError('boom')", version="0.3")

    with pytest.warns(GiftWarning):
        error = mine()["raises"].error

    assert isinstance(error, PluginError)
    assert isinstance(error, GiftError)
    assert (error.version, error.entry_point) == ("0.3", "hooks_raises")


def test_the_provider_of_what_a_hook_registered() -> None:
    """An object that is nobody's has no provider, also where hooks were asked."""
    assert provider_of(object()) is None
