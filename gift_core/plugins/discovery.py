"""What is installed, read from metadata alone: no plugin code runs here.

A provider is one entry point of one distribution. An entry that cannot be read is kept as broken, so that it can be shown and
never stops another.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from gift_core.errors import GiftWarning
from gift_core.plugins.names import CORE, did_you_mean, is_near_miss, normalise
from gift_core.plugins.settings import PluginSettings, current_settings, stands_for

#: The entry-point group of strategies: a name and the class, or the function, that makes one.
STRATEGIES = "gift.strategies"
#: The entry-point group of modules and objects with hooks (see `gift_core.plugins.hooks`).
PLUGINS = "gift.plugins"
#: The entry-point group of the programs behind ``gift demo``: a name and a function ``main(argv) -> int``.
DEMOS = "gift.demos"
#: The entry-point group of the file formats of ``gift convert``: a name and an object with ``export`` and ``import_``.
FORMATS = "gift.formats"
#: Every group, with what one of its entries is called.
NOUNS = {STRATEGIES: "strategy", PLUGINS: "plugin", DEMOS: "demo", FORMATS: "format"}

_SECTION = re.compile(r"\[(?P<group>[^\[\]]+)\]")
_ENTRY = re.compile(r"(?P<name>[^=]*[^=\s])\s*=\s*(?P<value>.*)")
_VALUE = re.compile(r"(?P<module>\w+(?:\.\w+)*)\s*(?::\s*(?P<attribute>\w+(?:\.\w+)*)\s*)?(?:\[[^\[\]]*\])?")


@dataclasses.dataclass(frozen=True)
class Provider:
    """One entry point of one installed distribution, as its metadata states it.

    Attributes:
        name: the entry point's name, which is how users call what it provides.
        value: ``module:attribute``.
        group: the entry-point group.
        distribution: the package's name as it writes it; empty for what `register_strategy` was given.
        version: the package's version; empty likewise.
        summary: the package's one line about itself.
        hook_plugin: the name of the plugin that registered it by hook; empty for an entry point.
    """

    name: str
    value: str
    group: str
    distribution: str
    version: str
    summary: str
    hook_plugin: str = ""

    @property
    def identity(self) -> str:
        """``distribution:name``, which no other package can provide."""
        return f"{self.distribution}:{self.name}"

    @property
    def module(self) -> str:
        """The module that the entry point names."""
        return self.value.partition(":")[0].partition("[")[0].strip()

    @property
    def attribute(self) -> str:
        """What the entry point names inside of its module; empty if it names a module only."""
        return self.value.partition(":")[2].partition("[")[0].strip()


@dataclasses.dataclass(frozen=True)
class BrokenEntry:
    """Something in a group that cannot be used, and why.

    Attributes:
        name: the entry point's name, as far as one can be read.
        value: its value, likewise.
        group: the entry-point group.
        distribution: the package's name, or the place of its metadata where it states none.
        version: the package's version, if it states one.
        reason: what is wrong with it.
    """

    name: str
    value: str
    group: str
    distribution: str
    version: str
    reason: str


@dataclasses.dataclass(frozen=True)
class BlockedEntry:
    """A provider that a setting keeps from being used, and which one."""

    provider: Provider
    reason: str


@dataclasses.dataclass(frozen=True)
class Discovery:
    """All that the installed distributions say about one group, sorted by name."""

    providers: tuple[Provider, ...]
    broken: tuple[BrokenEntry, ...]
    blocked: tuple[BlockedEntry, ...] = ()

    @property
    def conflicts(self) -> dict[str, tuple[Provider, ...]]:
        """The names that more than one distribution provides."""
        names: dict[str, list[Provider]] = {}
        for provider in self.providers:
            names.setdefault(provider.name, []).append(provider)
        return {name: tuple(same) for name, same in names.items() if len(same) > 1}

    def near_miss(self, provider: Provider) -> Provider | None:
        """The provider of the core whose name this one could be taken for, if there is one."""
        if normalise(provider.distribution) == CORE:
            return None
        official = [one for one in self.providers if normalise(one.distribution) == CORE]
        return next((one for one in official if is_near_miss(provider.name, one.name)), None)


def providers(group: str = STRATEGIES) -> list[Provider]:
    """List what the installed distributions provide in a group, by name; imports none of it."""
    return list(discover(group).providers)


def discover(group: str = STRATEGIES) -> Discovery:
    """Read a group from every installed distribution.

    Where a distribution is installed twice the first on ``sys.path`` counts, because its code is what an import finds. What
    cannot be read is in ``broken``, and what a setting forbids in ``blocked``.

    Raises:
        PluginSettingError: if a variable has a value that is not allowed; nothing else raises.
    """
    settings = current_settings()
    providers, broken = _read(group)
    if settings.isolated:
        providers = [one for one in providers if normalise(one.distribution) == CORE]
        broken = []
    elif settings.allow or settings.block:
        _warn_of_unknown_names(settings)
    reasons = [(one, settings.refusal(one.distribution, one.name)) for one in providers]
    return Discovery(
        tuple(one for one, reason in reasons if reason is None),
        tuple(broken),
        tuple(BlockedEntry(one, reason) for one, reason in reasons if reason is not None),
    )


def path_state() -> tuple[tuple[str, int], ...]:
    """Changes when something is installed, removed or put on ``sys.path``; cheap to compare."""
    return tuple((entry, _modified(entry)) for entry in sys.path)


def _modified(entry: str) -> int:
    try:
        return os.stat(entry or ".").st_mtime_ns
    except OSError:
        return 0


_Found = tuple[list[Provider], list[BrokenEntry]]

#: What was read of a group, and of what state of things.
_kept: dict[str, tuple[object, _Found]] = {}
#: A folder that changed within so many nanoseconds may change again without another time on it, as while something is installed.
_SETTLED = 2 * 10**9


def _read(group: str) -> _Found:
    """What the distributions say, kept until something is installed or removed: reading hundreds of files takes milliseconds.

    A running process does not see what is written over the metadata of a distribution in its place.
    """
    path = path_state()
    state = (path, tuple(sys.meta_path))
    was, found = _kept.get(group, (None, ([], [])))
    if was != state:
        found = _read_anew(group)
        if max((modified for _, modified in path), default=0) + _SETTLED < time.time_ns():
            _kept[group] = (state, found)
    return found


def _read_anew(group: str) -> _Found:
    found: dict[str, Provider] = {}
    broken: list[BrokenEntry] = []
    for entry in (entry for _, entries in _candidates(group) for entry in entries):
        if isinstance(entry, BrokenEntry):
            broken.append(entry)
            continue
        key = f"{normalise(entry.distribution)}:{entry.name}"
        if key in found:
            broken.append(_broken(entry, f"the same package already gives this name the value {found[key].value!r}"))
        else:
            found[key] = entry
    providers = sorted(found.values(), key=lambda one: (one.name, normalise(one.distribution)))
    return providers, sorted(broken, key=lambda one: (one.distribution, one.name))


_checked: set[tuple[object, ...]] = set()


def _warn_of_unknown_names(settings: PluginSettings) -> None:
    # once for what is installed and set now: a list that is wrong is wrong once, however often it is read
    state = (path_state(), settings)
    if state in _checked:
        return
    _checked.add(state)
    entries = [(one.distribution, one.name) for group in NOUNS for found in _read(group) for one in found]
    known = {name for entry in entries for name in (*entry, ":".join(entry))}
    for item in (*settings.allow, *settings.block):
        if not any(stands_for(item, *entry) for entry in entries):
            text = f"no installed plugin or package is called {item!r}, which the plugin settings name"
            warnings.warn(text + did_you_mean(item, known), GiftWarning, stacklevel=3)


def details(provider: Provider) -> dict[str, Any]:
    """What the provider's package says about itself: home page, licence, author, the Python it needs, where it is installed.

    Only what it states is there. Empty for a provider that no installed package has.
    """
    distribution = distribution_of(provider)
    return {} if distribution is None else _facts(distribution)


def distribution_of(provider: Provider) -> Any:
    """The installed distribution, as the metadata library has it, that provides an entry point; None if none does."""
    return next((distribution for distribution, found in _candidates(provider.group) if provider in found), None)


def _facts(distribution: Any) -> dict[str, Any]:
    metadata = distribution.metadata
    links = dict(_link(text) for text in metadata.get_all("Project-URL") or [])
    home = next((url for label, url in links.items() if label.lower() in {"homepage", "home", "home-page"}), None)
    facts = {
        "home_page": metadata.get("Home-page") or home or next(iter(links.values()), None),
        "license": metadata.get("License-Expression") or metadata.get("License"),
        "author": metadata.get("Author") or metadata.get("Author-email"),
        "requires_python": metadata.get("Requires-Python"),
        "location": str(distribution.locate_file("")),
    }
    return {key: value for key, value in facts.items() if value and value != "UNKNOWN"}


def _link(text: str) -> tuple[str, str]:
    label, _, url = text.partition(",")
    return label.strip(), url.strip()


def _candidates(group: str) -> Iterator[tuple[Any, list[Provider | BrokenEntry]]]:
    """Each distribution that has entries in the group, with them; a later copy of one is left out."""
    # the backport replaces the path finder of the whole process, so that it is imported on use and nowhere else
    import importlib_metadata

    seen: set[str] = set()
    for distribution in importlib_metadata.distributions():
        try:
            lines = _lines(distribution.read_text("entry_points.txt") or "", group)
        except Exception as error:
            yield distribution, [BrokenEntry("", "", group, _place(distribution), "", f"its entry points cannot be read: {error}")]
            continue
        if lines:
            yield distribution, _of_distribution(distribution, lines, group, seen)


def _of_distribution(distribution: Any, lines: list[str], group: str, seen: set[str]) -> list[Provider | BrokenEntry]:
    try:
        name, version, summary = _identity(distribution)
    except Exception as error:
        return [BrokenEntry("", "", group, _place(distribution), "", f"its metadata cannot be read: {error}")]
    if not name:
        return [BrokenEntry("", "", group, _place(distribution), version, "its metadata states no name")]
    if normalise(name) in seen or _is_shadowed(distribution, name):
        return []
    seen.add(normalise(name))
    return [_entry(line, group, name, version, summary) for line in lines]


def _identity(distribution: Any) -> tuple[str, str, str]:
    metadata = distribution.metadata or {}  # None without a metadata file, in some versions of the backport
    # a missing field is None for [] in some versions and a KeyError in others; get() gives None in all
    return _one_line(metadata.get("Name")), _one_line(metadata.get("Version")), _one_line(metadata.get("Summary"))


def _one_line(text: object) -> str:
    line = " ".join(str(text).split()) if text is not None else ""
    return "" if line == "UNKNOWN" else line


def _is_shadowed(distribution: Any, name: str) -> bool:
    # another copy, earlier on sys.path, is the one that is imported, be it without entry points
    import importlib_metadata

    try:
        first = importlib_metadata.distribution(name)
        return bool(first.locate_file("") != distribution.locate_file(""))
    except Exception:
        # its folder is not named as its metadata says, or its finder knows no files: there is no other copy to compare with
        return False


def _place(distribution: Any) -> str:
    try:
        # most versions of the backport write a distribution as an object at an address; the path is what tells where to look
        return str(getattr(distribution, "_path", distribution))
    except Exception:
        return type(distribution).__name__


def _lines(text: str, group: str) -> list[str]:
    if group not in text:
        return []
    current, result = "", []
    for line in _content(text.splitlines()):
        if section := _SECTION.fullmatch(line):
            current = section["group"].strip()
        elif current == group:
            result.append(line)
    return result


def _content(lines: Iterable[str]) -> Iterator[str]:
    return (line for line in map(str.strip, lines) if line and not line.startswith(("#", ";")))


def _entry(line: str, group: str, distribution: str, version: str, summary: str) -> Provider | BrokenEntry:
    match = _ENTRY.fullmatch(line)
    if match is None:
        return BrokenEntry("", line, group, distribution, version, f"{line!r} is no entry of the form name = module:attribute")
    provider = Provider(match["name"], match["value"].strip(), group, distribution, version, summary)
    if ":" in provider.name:
        return _broken(provider, f"the name {provider.name!r} has a colon, which separates a distribution from a name")
    if _VALUE.fullmatch(provider.value) is None:
        return _broken(provider, f"its entry point {provider.value!r} is not of the form module:attribute")
    return provider


def _broken(provider: Provider, reason: str) -> BrokenEntry:
    return BrokenEntry(provider.name, provider.value, provider.group, provider.distribution, provider.version, reason)
