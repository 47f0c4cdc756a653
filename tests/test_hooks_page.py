"""The examples of docs/plugins/hooks.md, run as plugins."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest
from torch import nn

import gift_core
from gift_core.plugins import isolated_plugins, register_plugin
from gift_core.plugins.validation import hook_names

PAGE = Path(__file__).resolve().parent.parent / "docs" / "plugins" / "hooks.md"
EXAMPLE = re.compile(r"<!-- example:? ?(?P<call>.*?) ?-->\n```python\n(?P<code>.*?)```(?:\n\n```toml\n(?P<toml>.*?)```)?", re.DOTALL)
SECTION = re.compile(r"^## (\w+)\n(.*?)(?=^## |\Z)", re.DOTALL | re.MULTILINE)


class Net(nn.Module):
    """A body and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 8)
        self.head = nn.Linear(8, 2)


def sections() -> dict[str, str]:
    """The page's text by heading."""
    return dict(SECTION.findall(PAGE.read_text(encoding="utf-8")))


def test_each_hook_has_its_heading() -> None:
    """The page has one heading for each hook, in their order, with its arguments as they are."""
    import inspect

    from gift_core.plugins import hooks

    assert list(sections()) == hook_names()
    for name, text in sections().items():
        assert f"`{name}({', '.join(inspect.signature(getattr(hooks, name)).parameters)})`" in text


@pytest.mark.parametrize("hook", hook_names())
def test_the_example_of_a_hook_works(hook: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example is a valid plugin, and what the page says to call with it tunes a model."""
    monkeypatch.chdir(tmp_path)
    example = EXAMPLE.search(sections()[hook])
    assert example is not None
    module = ModuleType(hook)
    exec(compile(example["code"], f"{PAGE}: {hook}", "exec"), vars(module))
    Path("my.toml").write_text(example["toml"] or "")

    with isolated_plugins():
        register_plugin(module)
        report = eval(example["call"], vars(gift_core) | {name: getattr(gift_core, name) for name in gift_core.__all__}, {"net": Net()})

    expected = {"gift_register_strategies": 18, "gift_register_checks": 40, "gift_register_actions": 10}.get(hook, 58)
    assert report.trainable.numbers == expected
    assert [len(events) for name, events in vars(module).items() if name in ("plans", "tuned")] == [1] * hook.endswith("enable")


def test_the_first_example_is_a_plugin(capsys: pytest.CaptureFixture[str]) -> None:
    """The module at the top of the page prints what it promises."""
    example = EXAMPLE.search(PAGE.read_text(encoding="utf-8"))
    assert example is not None
    module = ModuleType("first")
    exec(example["code"], vars(module))

    with isolated_plugins():
        register_plugin(module)
        gift_core.enable_fine_tuning(Net(), "full")

    assert capsys.readouterr().out == "58 numbers train\n"
