"""``gift list``, ``show`` and ``doctor`` over plugins that work and plugins that do not."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.shell_completion import BashComplete
from click.testing import CliRunner, Result

from gift_core.cli import main
from gift_core.plugins import PLUGINS
from gift_core.plugins.settings import VARIABLES

Install = Callable[..., Path]
MARK = "from gift_core.plugins.hooks import hookimpl\n"
HEALTHY = MARK + '@hookimpl\ndef gift_register_strategies(registry): registry.add("by-hook", lambda: None)\n'

#: A broken plugin of each kind: group, entry, module, and what the reason says.
BROKEN = {
    "import": ("gift.strategies", "{m}:A", "raise RuntimeError('boom')", "raised RuntimeError: boom"),
    "exit": ("gift.strategies", "{m}:A", "raise SystemExit(0)", "ended the program"),
    "attribute": ("gift.strategies", "{m}:A", "B = 1", "no such attribute"),
    "malformed": ("gift.strategies", "not-a-module", "", "not of the form module:attribute"),
    "generation": ("gift.strategies", "{m}:A", "class A: plugin_api = 2", "plugin API 2"),
    "misspelt": (PLUGINS, "{m}", MARK + "@hookimpl\ndef gift_register_chekcs(registry): ...", "did you mean 'gift_register_checks'"),
    "signature": (PLUGINS, "{m}", MARK + "@hookimpl\ndef gift_before_enable(modul): ...", "did you mean 'module'"),
    "raising": (PLUGINS, "{m}", MARK + "@hookimpl\ndef gift_register_checks(registry): 1 / 0", "raised ZeroDivisionError"),
}


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """The switches of whoever runs the tests are not those of the tests."""
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)


def gift(*arguments: str) -> Result:
    """Run the command line."""
    return CliRunner().invoke(main, arguments)


def rows(*arguments: str) -> dict[str, dict[str, Any]]:
    """What a listing says as JSON, by ``distribution:name``."""
    result = gift(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return {f"{row['distribution']}:{row['name']}": row for row in json.loads(result.stdout)}


def install_broken(install: Install, name: str) -> None:
    """Install one of the broken plugins, in a distribution of its own."""
    group, entry, source, _ = BROKEN[name]
    install(f"{name}-dist", f"{name} = {entry.format(m=f'broken_{name}')}", group=group, **{f"broken_{name}": source})


# --- list


def test_each_broken_plugin_is_listed_with_its_reason(install: Install) -> None:
    """With --all --hooks every broken plugin has its status and reason, and the healthy ones beside them are ok."""
    for name in BROKEN:
        install_broken(install, name)
    install("healthy-dist", "healthy = healthy_strategy:A", healthy_strategy="class A: plugin_api = 1")
    install("hooks-dist", "hooks = healthy_hooks", group=PLUGINS, healthy_hooks=HEALTHY)

    listed = rows("list", "--all", "--hooks")

    for name, (_, _, _, reason) in BROKEN.items():
        assert listed[f"{name}-dist:{name}"]["status"] == "broken"
        assert reason in listed[f"{name}-dist:{name}"]["reason"]
    for key in ("healthy-dist:healthy", "hooks-dist:hooks", "hooks-dist:by-hook"):
        assert (listed[key]["status"], listed[key]["api"]) == ("ok", 1)


def test_listing_runs_nothing_without_hooks(install: Install) -> None:
    """Without --hooks, --all lists plugins with hooks as not loaded, and no plugin is imported."""
    install("bomb-dist", "bomb = bomb_hooks", group=PLUGINS, bomb_hooks="raise RuntimeError")
    install("fake-dist", "fake = bomb_strategy:A", bomb_strategy="raise RuntimeError")

    listed = rows("list", "--all")

    assert listed["bomb-dist:bomb"]["status"] == "not loaded"
    assert listed["fake-dist:fake"]["status"] == "ok"
    assert "bomb-dist:bomb" not in rows("list")
    assert not {"bomb_hooks", "bomb_strategy"} & set(sys.modules)


def test_what_metadata_tells_is_listed(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    """Conflicts, stolen names, near misses and blocked plugins have their status and reason from metadata alone."""
    install("one-dist", "shared = m:A")
    install("two-dist", "shared = m:A")
    install("thief-dist", "full = m:A")
    install("typo-dist", "mergde = m:A")
    install("blocked-dist", "blocked = m:A")
    monkeypatch.setenv("GIFT_BLOCK_PLUGINS", "blocked-dist")

    listed = rows("list", "--all")

    assert {
        key: listed[key]["status"] for key in ("one-dist:shared", "thief-dist:full", "typo-dist:mergde", "blocked-dist:blocked")
    } == {
        "one-dist:shared": "conflict",
        "thief-dist:full": "conflict",
        "typo-dist:mergde": "near-miss",
        "blocked-dist:blocked": "blocked",
    }
    assert "gift-core:full" in listed["thief-dist:full"]["reason"]
    assert "'merged', which is gift-core's" in listed["typo-dist:mergde"]["reason"]
    assert listed["blocked-dist:blocked"]["reason"] == "GIFT_BLOCK_PLUGINS names 'blocked-dist'"
    assert "blocked-dist:blocked" not in rows("list")
    assert "GIFT_BLOCK_PLUGINS names" in gift("list", "--all").stdout


def test_listing_works_beside_many_and_without_torch(install: Install, tmp_path: Path) -> None:
    """500 more distributions and no torch: everything is listed, hooks too."""
    for number in range(500):
        install(f"fake-{number}", f"fake{number} = m:A")
    install("hooks-dist", "hooks = healthy_hooks", group=PLUGINS, healthy_hooks=HEALTHY)
    code = f"""
import sys
sys.modules["torch"] = None
sys.path.insert(0, {str(tmp_path / "site")!r})
from gift_core.cli import main
main(["list", "--all", "--hooks", "--json"][: {{}}] + ["--json"])
"""

    for arguments in (1, 2):
        result = subprocess.run([sys.executable, "-c", code.replace("{}", str(arguments))], capture_output=True, text=True)

        assert result.returncode == 0, result.stderr
        assert len(json.loads(result.stdout)) > 500


# --- asking for what cannot be used


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--block-plugins", "fake", "show", "fake"], 3, "is blocked: GIFT_BLOCK_PLUGINS names 'fake'"),
        (["--plugins", "lora", "show", "fake"], 3, "is blocked: GIFT_PLUGINS names others only"),
        (["--no-autoload", "show", "fake"], 3, "is blocked: GIFT_DISABLE_PLUGIN_AUTOLOAD is set"),
        (["show", "fakk"], 3, "did you mean 'fake'"),
        (["show", "fake", "--load"], 1, "could not be imported"),
    ],
)
def test_errors_say_what_to_do(install: Install, arguments: list[str], code: int, text: str) -> None:
    """Blocked and unknown plugins end with 3, one that cannot be loaded with 1; each has a message."""
    install("fake-dist", "fake = fake_bomb:A", fake_bomb="raise RuntimeError('boom')")

    result = gift(*arguments)

    assert result.exit_code == code
    assert text in result.stderr


def test_showing_an_unknown_name_runs_no_plugin(install: Install) -> None:
    """A name that no entry point has is unknown without --load; plugins are not asked for it."""
    install("bomb-dist", "bomb = bomb_hooks", group=PLUGINS, bomb_hooks="raise RuntimeError")

    assert gift("show", "nowhere").exit_code == 3
    assert "bomb_hooks" not in sys.modules


def test_switches_end_with_the_command(install: Install) -> None:
    """What is switched off for one command is on again for the next."""
    install("fake-dist", "fake = m:A")

    assert "fake-dist" not in gift("--no-autoload", "list").stdout
    assert "fake-dist" in gift("list").stdout


# --- show


def test_show_tells_where_the_code_is(install: Install, tmp_path: Path) -> None:
    """The file and whether the package is editable are told without importing it, inside of packages too."""
    info = install("fake-dist", "fake = fake_package.inner:A")
    (info.parent / "fake_package").mkdir()
    (info.parent / "fake_package" / "__init__.py").write_text("raise RuntimeError")
    (info.parent / "fake_package" / "inner.py").write_text("")
    (info / "direct_url.json").write_text('{"url": "file:///x", "dir_info": {"editable": true}}')

    facts = json.loads(gift("show", "fake", "--json").stdout)

    assert facts["file"] == str(info.parent / "fake_package" / "inner.py")
    assert facts["editable"] is True
    assert "fake_package" not in sys.modules


def test_show_load_tells_the_parameters(install: Install) -> None:
    """With --load there are parameters with types and defaults, and the docstring."""
    source = 'class A:\n    """What A does."""\n    def __init__(self, rank: int, alpha: float = 1.5, *rest): ...'
    install("fake-dist", "fake = fake_made:A", fake_made=source)

    facts, text = json.loads(gift("show", "fake", "--load", "--json").stdout), gift("show", "fake", "--load").stdout

    assert facts["parameters"] == [
        {"name": "rank", "type": "int", "default": None},
        {"name": "alpha", "type": "float", "default": "1.5"},
        {"name": "*rest", "type": None, "default": None},
    ]
    assert (facts["docstring"], facts["api"]) == ("What A does.", 1)
    assert "What A does." in text
    assert "required" in text


# --- doctor


@pytest.mark.usefixtures("install")
def test_doctor_finds_each_plugin_by_itself(install: Install) -> None:
    """A plugin that kills its process, one that patches torch and one that is fine are told apart, with the code of the worst."""
    install("deadly-dist", "deadly = doctor_deadly:A", doctor_deadly="import os; os._exit(7)")
    install("patching-dist", "patching = doctor_patching:A", doctor_patching="import torch\ntorch.relu = A = lambda x: x")
    install("fine-dist", "fine = doctor_fine", group=PLUGINS, doctor_fine=HEALTHY)

    result = gift("doctor", "deadly", "patching-dist", "fine-dist:fine", "--json")

    found = {row["name"]: row for row in json.loads(result.stdout)["plugins"]}
    assert result.exit_code == 1
    assert found["deadly"]["status"] == "broken"
    assert "code 7" in found["deadly"]["reason"]
    assert found["patching"]["patched"] == ["torch.relu"]
    assert (found["fine"]["status"], found["fine"]["patched"]) == ("ok", [])
    assert all(found[name]["seconds"] >= 0 for name in ("patching", "fine"))


def test_doctor_tells_conflicts_and_variables(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two packages with one name end with 3 and both are named; the variables in force are printed."""
    install("one-dist", "shared = doctor_shared:A", doctor_shared="def A(): ...")
    install("two-dist", "shared = doctor_shared:A")
    monkeypatch.setenv("GIFT_TRACE_PLUGINS", "1")

    result = gift("doctor", "shared")

    assert result.exit_code == 3
    assert "The name 'shared' is provided by one-dist:shared and two-dist:shared" in result.stdout
    assert "GIFT TRACE PLUGINS  1" in result.stdout


def test_doctor_of_nothing_is_not_found() -> None:
    """A name that nothing has ends with 3."""
    result = gift("doctor", "nowhere-at-all")

    assert result.exit_code == 3
    assert "nowhere-at-all" in result.stderr


# --- completion


@pytest.mark.parametrize(("arguments", "incomplete"), [(["show"], "zeb"), (["inspect", "m:f", "--strategy"], "zeb")])
def test_the_shell_completes_strategies(install: Install, arguments: list[str], incomplete: str) -> None:
    """Names of strategies complete, qualified where two packages share one; nothing is imported for it."""
    install("one-dist", "zebra = complete_bomb:A", complete_bomb="raise RuntimeError")
    complete = BashComplete(main, {}, "gift", "_GIFT_COMPLETE")

    assert [item.value for item in complete.get_completions(arguments, incomplete)] == ["zebra"]
    install("two-dist", "zebra = m:A")
    assert [item.value for item in complete.get_completions(arguments, "one-d")] == ["one-dist:zebra"]
    assert "complete_bomb" not in sys.modules
