"""The plugin registry: what is installed, and the loading of exactly one of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import importlib_metadata
import pytest

from gift_core.errors import (
    GiftError,
    IncompatiblePluginError,
    InvalidPluginError,
    PluginConflictError,
    PluginLoadError,
    StrategyError,
    UnknownDemoError,
    UnknownStrategyError,
)
from gift_core.plugins import (
    DEMOS,
    details,
    discover,
    find_provider,
    load,
    load_strategy,
    provider_of,
    providers,
    register_strategy,
    strategy_names,
    unregister_strategy,
)

Install = Callable[..., Path]


def names_from(distribution: str) -> list[str]:
    """The names that discovery reports for one distribution."""
    return [provider.name for provider in providers() if provider.distribution == distribution]


# --- discovery


def test_a_provider_is_what_its_metadata_says(install: Install) -> None:
    """A provider carries the entry point and its package's name, version and summary."""
    install("Fake_Dist", "fake = fake_module.sub:Thing", version="2.3")

    provider = find_provider("fake")

    assert (provider.name, provider.value, provider.group) == ("fake", "fake_module.sub:Thing", "gift.strategies")
    assert (provider.distribution, provider.version, provider.summary) == ("Fake_Dist", "2.3", "Made up.")
    assert provider.identity == "Fake_Dist:fake"


def test_discovery_imports_no_plugin(install: Install) -> None:
    """Listing, finding and describing run no plugin code."""
    install("fake-dist", "fake = fake_bomb:Thing", fake_bomb="raise RuntimeError('imported')")

    found = find_provider("fake")

    assert "fake" in strategy_names()
    assert details(found)["location"]
    assert "fake_bomb" not in sys.modules


def test_discovery_needs_no_torch() -> None:
    """Discovery works where torch cannot be imported."""
    code = "import sys; sys.modules['torch'] = None; from gift_core.plugins import providers; print([p.name for p in providers()])"

    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert result.returncode == 0, result.stderr


def test_importing_the_package_leaves_the_path_finder_alone() -> None:
    """The backport that replaces the process's path finder is imported by discovery on use, not by an import of GIFt."""
    code = "import sys, gift_core, gift_core.plugins, gift_core.cli; print('importlib_metadata' in sys.modules)"

    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert result.stdout.strip() == "False", result.stderr


def test_the_first_copy_on_the_path_counts(install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A distribution installed twice, however spelt, is listed once, as the copy that an import finds."""
    install("fake.dist", "fake = m:Old", "gone = m:Gone", version="1.0")
    install("Fake_Dist", "fake = m:New", version="2.0", site=tmp_path / "earlier")
    monkeypatch.syspath_prepend(str(tmp_path / "earlier"))

    assert find_provider("fake").version == "2.0"
    assert "gone" not in strategy_names()


def test_a_copy_without_entry_points_hides_a_later_one(install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first copy counts also when it provides nothing."""
    install("fake-dist", "fake = m:Old")
    install("fake-dist", "other = m:Other", group="other.group", site=tmp_path / "earlier")
    monkeypatch.syspath_prepend(str(tmp_path / "earlier"))

    assert "fake" not in strategy_names()


MALFORMED = {
    "no_equals": "just words",
    "no_value": "bad =",
    "no_name": "= module:attribute",
    "dashed_module": "bad = not-a-module:attribute",
    "two_colons": "bad = module:attribute:more",
    "colon_in_name": "other:bad = module:attribute",
    "path": "bad = ../module:attribute",
    "trailing_dot": "bad = module.:attribute",
}


@pytest.mark.parametrize("line", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_entry_is_kept_apart(install: Install, line: str) -> None:
    """A malformed entry is broken with a reason, and its neighbours work."""
    install("fake-dist", "before = m:A", line, "after = m:B")

    broken = [entry for entry in discover().broken if entry.distribution == "fake-dist"]

    assert names_from("fake-dist") == ["after", "before"]
    assert len(broken) == 1
    assert broken[0].reason


def test_asking_for_a_malformed_entry_tells_why(install: Install) -> None:
    """A malformed entry is not unknown: the error says that it is there and what is wrong with it."""
    install("fake-dist", "bad = not-a-module:attribute")

    with pytest.raises(InvalidPluginError, match="not of the form module:attribute") as caught:
        load_strategy("bad")

    assert (caught.value.name, caught.value.distribution) == ("bad", "fake-dist")


def test_a_name_given_twice_by_one_package_keeps_the_first(install: Install) -> None:
    """The second entry of one name in one package is broken, not a conflict."""
    install("fake-dist", "fake = m:First", "fake = m:Second")

    assert find_provider("fake").value == "m:First"
    assert any("already" in entry.reason for entry in discover().broken)


@pytest.mark.parametrize("metadata", ["", "Metadata-Version: 2.1\nVersion: 1.0\n", "\x00\x01 no metadata"])
def test_a_distribution_without_a_name_is_broken(install: Install, metadata: str) -> None:
    """A distribution that states no name is listed with the place of its metadata, and stops no other."""
    info = install(None, "nameless = m:A", metadata=metadata)
    install("fake-dist", "fake = m:B")

    assert names_from("fake-dist") == ["fake"]
    assert "nameless" not in strategy_names()
    assert any(info.name in entry.distribution for entry in discover().broken)


def test_a_folder_with_another_name_than_its_metadata_is_read(install: Install) -> None:
    """What counts is the name in the metadata, not the name of the folder that old tools gave it."""
    info = install("fake-dist", "fake = m:A")
    info.rename(info.with_name("fake-dist-1.0.dist-info"))

    assert details(find_provider("fake"))["location"] == str(info.parent)


def test_metadata_that_is_missing_or_no_text_is_broken(install: Install) -> None:
    """A leftover folder without metadata, and entry points that are no UTF-8, stop nothing."""
    (install("gone-dist", "gone = m:A") / "METADATA").unlink()
    (install("latin-dist", "latin = m:A") / "entry_points.txt").write_bytes(b"[gift.strategies]\nlatin = \xff\xfe\n")
    install("fake-dist", "fake = m:B")

    assert names_from("fake-dist") == ["fake"]
    assert len(discover().broken) >= 2


def test_comments_and_other_groups_are_no_entries(install: Install) -> None:
    """Only the lines of the group that was asked for count."""
    install("fake-dist", "# a = m:A", "; b = m:B", "", "fake = m:C", "[gift.strategies.other]", "other = m:D", "[ console_scripts ]")

    assert names_from("fake-dist") == ["fake"]
    assert not [entry for entry in discover().broken if entry.distribution == "fake-dist"]


def test_many_distributions_are_all_found(install: Install) -> None:
    """500 more distributions are found, each by itself."""
    for number in range(500):
        install(f"fake-{number}", f"fake{number} = m:A")

    assert {f"fake{number}" for number in range(500)} <= set(strategy_names())


def test_what_was_read_is_kept_until_something_is_installed(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    """Metadata is read once; what is installed, upgraded or removed later, or put on ``sys.path``, is seen."""
    info, other = install("fake-dist", "fake = m:A"), install("other-dist", "other = m:A")
    site = info.parent
    monkeypatch.setattr(sys, "path", [str(site)])  # where nobody else installs anything meanwhile
    read: list[str] = []
    texts = importlib_metadata.PathDistribution.read_text
    monkeypatch.setattr(importlib_metadata.PathDistribution, "read_text", lambda one, name: read.append(name) or texts(one, name))

    def settled(seconds: int) -> None:
        os.utime(site, (seconds, seconds))

    settled(1000)
    assert find_provider("fake").version == "1.0"
    assert read

    read.clear()
    assert find_provider("fake").version == "1.0" and find_provider("other")
    assert not read

    shutil.rmtree(info)
    install("fake-dist", "fake = m:A", version="2.0")
    settled(1001)
    assert find_provider("fake").version == "2.0"

    shutil.rmtree(other)
    settled(1002)
    assert "other" not in strategy_names()

    install("late-dist", "late = m:A", site=site.with_name("late"))
    assert "late" not in strategy_names()
    monkeypatch.syspath_prepend(str(site.with_name("late")))
    assert "late" in strategy_names()


def test_what_changes_just_now_is_read_each_time(install: Install) -> None:
    """While something is being installed nothing is kept: a second change may carry the time of the first."""
    info = install("fake-dist", "fake = m:A")
    assert names_from("fake-dist") == ["fake"]
    (info / "entry_points.txt").write_text("[gift.strategies]\nanother = m:A\n")

    assert names_from("fake-dist") == ["another"]


# --- finding and loading


def test_loading_imports_that_plugin_alone(install: Install) -> None:
    """Loading gives the object that the entry point names and imports no other plugin."""
    install("fake-dist", "good = fake_good:Outer.Inner", "bad = fake_bad:x", fake_good="class Outer:\n    class Inner: pass")
    install("worse-dist", "worse = fake_worse:x", fake_worse="raise SystemExit(3)")

    loaded = load_strategy("good")

    assert loaded is sys.modules["fake_good"].Outer.Inner
    assert not {"fake_bad", "fake_worse"} & set(sys.modules)


def test_an_unknown_name_gets_the_nearest_ones(install: Install) -> None:
    """The error names the nearest strategies, all installed ones, and the package that would bring it."""
    install("fake-dist", "zebra = m:A")

    with pytest.raises(UnknownStrategyError) as caught:
        load_strategy("zebar")

    assert "did you mean 'zebra'" in str(caught.value)
    assert "Installed: " in str(caught.value)
    assert caught.value.hint == "Others come with packages: pip install gift-zebar-plugin."
    assert isinstance(caught.value, LookupError)


def test_a_name_of_two_packages_is_a_conflict(install: Install) -> None:
    """The bare name is an error that names both; the qualified names, in any spelling, work."""
    install("one_dist", "fake = fake_one:A", fake_one="def A(): ...")
    install("two-dist", "fake = fake_two:A", fake_two="def A(): ...")

    with pytest.raises(PluginConflictError, match=r"(?s)one_dist 1\.0 and two-dist 1\.0.*'one_dist:fake' or 'two-dist:fake'"):
        load_strategy("fake")

    assert load_strategy("One.Dist:fake") is sys.modules["fake_one"].A
    assert load_strategy("two-dist:fake") is sys.modules["fake_two"].A
    assert [one.distribution for one in discover().conflicts["fake"]] == ["one_dist", "two-dist"]


def test_the_core_keeps_its_own_names(install: Install) -> None:
    """A package that takes a name of the core hurts nobody: the name still means the core's, and the conflict is listed."""
    install("thief-dist", "full = fake_thief:A", fake_thief="raise RuntimeError")

    assert find_provider("full").distribution == "gift-core"
    assert find_provider("thief-dist:full").distribution == "thief-dist"
    assert "full" in discover().conflicts


BROKEN = {
    "raises": ("raise RuntimeError('boom')", PluginLoadError, "raised RuntimeError: boom"),
    "syntax": ("def", PluginLoadError, "SyntaxError"),
    "exits": ("import sys; sys.exit(0)", PluginLoadError, "ended the program"),
    "own_module": ("import fake_broken.inner", PluginLoadError, "its own module 'fake_broken"),
    "dependency": ("import not_there_at_all.sub", PluginLoadError, "needs the module 'not_there_at_all', a dependency"),
    "import_error": ("from json import not_there", PluginLoadError, "cannot import name"),
    "no_attribute": ("Stratagem = 1", InvalidPluginError, "no such attribute; the nearest is 'Stratagem'"),
    "lazy_attribute": ("def __getattr__(name): raise OSError('disk')", PluginLoadError, "raised OSError: disk"),
    "no_callable": ("Strategy = 3", InvalidPluginError, "neither a class nor a function"),
    "generation": ("class Strategy: plugin_api = 2", IncompatiblePluginError, "plugin API 2"),
}


@pytest.mark.parametrize(("source", "kind", "text"), BROKEN.values(), ids=BROKEN.keys())
def test_a_plugin_that_cannot_be_used_is_told_as_its_own_failure(
    install: Install, source: str, kind: type[Exception], text: str
) -> None:
    """Each way to fail has its error, with the plugin's name, distribution, version, entry point and a hint; others still work."""
    install("fake-dist", "fake = fake_broken:Strategy", version="0.3", fake_broken=source)
    install("good-dist", "good = fake_good:A", fake_good="def A(): ...")

    with pytest.raises(kind) as caught:
        load_strategy("fake")

    error = caught.value
    assert text in str(error)
    assert isinstance(error, GiftError)
    assert (error.name, error.distribution, error.version) == ("fake", "fake-dist", "0.3")  # type: ignore[attr-defined]
    assert error.entry_point == "fake_broken:Strategy"  # type: ignore[attr-defined]
    assert "fake-dist" in error.hint  # type: ignore[attr-defined]
    assert load_strategy("good") is sys.modules["fake_good"].A


def test_a_missing_module_of_the_plugin_is_no_missing_dependency(install: Install) -> None:
    """An entry point whose module is not there is told from one whose dependency is not there."""
    install("fake-dist", "fake = fake_absent.deep:Strategy")

    with pytest.raises(PluginLoadError, match="its own module 'fake_absent'"):
        load_strategy("fake")


def test_an_interrupt_passes_through(install: Install) -> None:
    """Ctrl-C while a plugin is imported is Ctrl-C."""
    install("fake-dist", "fake = fake_interrupted:A", fake_interrupted="raise KeyboardInterrupt")

    with pytest.raises(KeyboardInterrupt):
        load_strategy("fake")


def test_a_missing_dependency_names_the_extra(install: Install) -> None:
    """Where an extra brings what is missing, the hint is the command that installs it."""
    install("fake-dist", "fake = fake_demo:main", group="gift.demos", fake_demo="import not_there_at_all")

    with pytest.raises(PluginLoadError, match=r"pip install 'fake-dist\[demo\]'"):
        load(find_provider("fake", DEMOS), extra="demo")


def test_groups_are_apart(install: Install) -> None:
    """A demo is no strategy, and an unknown demo has an error of its own."""
    install("fake-dist", "fake = m:main", group="gift.demos")

    assert "fake" not in strategy_names()
    assert find_provider("fake", DEMOS).group == "gift.demos"
    with pytest.raises(UnknownDemoError, match="no demo named 'fkae'; did you mean 'fake'"):
        find_provider("fkae", DEMOS)


# --- registration


@pytest.fixture
def unregistered() -> Iterator[None]:
    """Takes back what a test registers under ``mine``."""
    yield
    if "mine" in strategy_names():
        unregister_strategy("mine")


def factory() -> object:
    """A strategy's factory, as far as the registry is concerned."""
    return object()


@pytest.mark.usefixtures("unregistered")
def test_a_registered_strategy_is_found_by_name() -> None:
    """What is registered can be loaded, listed and traced back, and registering it again changes nothing."""
    register_strategy("mine", factory)
    register_strategy("mine", factory)

    assert load_strategy("mine") is factory
    assert "mine" in strategy_names()
    assert find_provider("mine").distribution == ""
    assert load(find_provider("mine")) is factory
    assert provider_of(factory) == find_provider("mine")
    assert details(find_provider("mine")) == {}


@pytest.mark.usefixtures("unregistered")
def test_a_registered_name_is_not_taken_over() -> None:
    """Another factory under a registered name is refused, unless replacing is asked for."""
    register_strategy("mine", factory)

    with pytest.raises(PluginConflictError, match="replace=True"):
        register_strategy("mine", dict)

    assert load_strategy("mine") is factory
    register_strategy("mine", dict, replace=True)
    assert load_strategy("mine") is dict


def test_an_installed_name_is_not_taken_over(install: Install) -> None:
    """A name that a package provides cannot be registered, not even to replace it."""
    install("fake-dist", "fake = m:A")

    with pytest.raises(PluginConflictError, match=r"installed already, from fake-dist 1\.0"):
        register_strategy("fake", factory, replace=True)

    assert find_provider("fake").distribution == "fake-dist"


@pytest.mark.parametrize(("name", "what"), [("", factory), ("a:b", factory), (None, factory), ("mine", 3)])
def test_a_registration_that_cannot_work_is_refused(name: str, what: Callable[..., object]) -> None:
    """A name that is none, or a factory that cannot be called, is an error at registration."""
    with pytest.raises(StrategyError):
        register_strategy(name, what)


def test_unregistering_what_is_not_registered_is_an_error() -> None:
    """Taking back what was never given is not silent."""
    with pytest.raises(UnknownStrategyError):
        unregister_strategy("mine")


# --- provenance


def test_the_provider_of_an_object_is_found(install: Install) -> None:
    """A class that a package provides, an instance of it, and what its factory made, are traced to the package."""
    source = "class A: pass\nclass B:\n    name = 'made'\ndef make(): return B()\nclass Stranger: pass"
    install("fake-dist", "fake = fake_origin:A", "made = fake_origin:make", fake_origin=source)
    module = __import__("fake_origin")

    assert provider_of(module.A) == find_provider("fake")
    assert provider_of(module.A()) == find_provider("fake")
    assert provider_of(module.make()) == find_provider("made")
    assert provider_of("fake") == find_provider("fake")
    assert provider_of(module.Stranger()) is None


def test_the_provider_of_a_re_exported_class_is_found(install: Install) -> None:
    """The entry point may name another module of the package than the one that defines the class."""
    info = install("fake-dist", "fake = fake_package.entry:A")
    package = info.parent / "fake_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "entry.py").write_text("from fake_package.inner import A")
    (package / "inner.py").write_text("class A: pass")
    from importlib import import_module

    assert provider_of(import_module("fake_package.inner").A()) == find_provider("fake")
