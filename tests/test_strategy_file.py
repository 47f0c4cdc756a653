"""Strategies written as files: what they can say, and how a mistake in one is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from torch import nn

from gift_core import Cap, FineTuningStrategy, disable_fine_tuning, enable_fine_tuning, factories, hookimpl, register_plugin
from gift_core.cli import main
from gift_core.errors import StrategyError, StrategyFileError, StrategyFileNotFoundError, UnknownPluginError
from gift_core.strategy_file import MAX_EXPRESSION_LENGTH, MAX_FILE_BYTES, parse_check, strategy_from_file

pytest_plugins = ["gift_core.plugins.pytest_plugin"]

Write = Callable[[str], Path]


@pytest.fixture
def toml(tmp_path: Path) -> Write:
    """Writes a strategy file."""

    def write(text: str) -> Path:
        path = tmp_path / "my.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


class Net(nn.Module):
    """A body of two layers and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        self.head = nn.Linear(3, 2)


HEAD = """# trains the head
[[module_caps]]
check = 'is_instance("Linear") & ~(name_is("0", "1") | layer_index(7, optional=True))'
action = "keep_trainable"

[[para_caps]]
check = 'parameter_name_is("bias")'
action = "freeze"
"""


def test_a_file_says_what_python_says(toml: Write) -> None:
    """The caps of a file are those that Python's factories make, and do the same."""
    strategy = strategy_from_file(toml(HEAD))
    one = factories.is_instance("Linear") & ~(factories.name_is("0", "1") | factories.layer_index(7, optional=True))

    report = enable_fine_tuning(net := Net(), strategy)

    assert strategy.module_caps == (Cap(one, factories.keep_trainable()),)
    assert strategy.para_caps == (Cap(factories.parameter_name_is("bias"), factories.freeze()),)
    assert report.trainable.numbers == 8
    assert len(list(disable_fine_tuning(net).parameters())) == 6


def test_json_says_the_same_as_toml(toml: Write, tmp_path: Path) -> None:
    """A file in JSON gives the caps of the same file in TOML."""
    import tomllib

    path = tmp_path / "my.json"
    path.write_text(json.dumps(tomllib.loads(HEAD)))

    assert repr(strategy_from_file(path)) == repr(strategy_from_file(toml(HEAD)))


def test_a_cap_may_name_a_strategy(toml: Write) -> None:
    """A strategy by name, with parameters, is an action; alone it is the whole file."""
    nested = strategy_from_file(toml('[[module_caps]]\ncheck = \'name_is("body")\'\nstrategy = "full"\nparams = { targets = ["*1"] }'))
    whole = strategy_from_file(toml('strategy = "full"\n[parameters]\ntargets = "head"'))

    assert enable_fine_tuning(Net(), nested).trainable.numbers == 12
    assert enable_fine_tuning(Net(), whole).trainable.numbers == 8


@pytest.mark.usefixtures("isolated_plugins")
def test_a_file_may_name_what_plugins_register(toml: Write) -> None:
    """Checks and actions that a plugin registers are used by name, with arguments and parameters."""
    seen: list[Any] = []

    class Plugin:
        @hookimpl
        def gift_register_checks(self, registry: Any) -> None:
            registry.add("is-called", lambda name: lambda *site: site[1] == name)

        @hookimpl
        def gift_register_actions(self, registry: Any) -> None:
            registry.add("note", lambda *site, size=1: seen.append((site[2], size)))

    register_plugin(Plugin(), "mine")

    enable_fine_tuning(
        Net(), strategy_from_file(toml("[[module_caps]]\ncheck = '\"is-called\"(\"head\")'\naction = 'note'\nparams.size = 3"))
    )

    assert seen == [("head", 3)]


@pytest.mark.usefixtures("isolated_plugins")
def test_an_action_takes_what_its_site_has(toml: Write) -> None:
    """An action for modules takes five arguments and one for parameters seven; in the other place each is refused with its line."""

    class Plugin:
        @hookimpl
        def gift_register_actions(self, registry: Any) -> None:
            registry.add("of-module", lambda parent, name, full, kind, module: None)
            registry.add("of-parameter", lambda parent, name, full, kind, module, own, parameter: None)

    register_plugin(Plugin(), "mine")

    def file(kind: str, action: str) -> Path:
        return toml(f"[[{kind}]]\ncheck = 'everything()'\naction = '{action}'")

    assert strategy_from_file(file("module_caps", "of-module"))
    assert strategy_from_file(file("para_caps", "of-parameter"))
    for kind, action in (("module_caps", "of-parameter"), ("para_caps", "of-module")):
        with pytest.raises(StrategyFileError, match=f"line 3: action '{action}'"):
            strategy_from_file(file(kind, action))


@pytest.mark.parametrize(
    "text", ["everything()", "~is_root()", "name_is('a') & name_is('b') | ~name_is('c')", "layer_index(1, 2, optional=True)"]
)
def test_an_expression_is_read_as_python_reads_it(text: str) -> None:
    """Operators bind as in Python, and the check is the one that Python makes."""
    expected = eval(text, {name: getattr(factories, name) for name in factories._FACTORIES})

    assert repr(parse_check(text)) == repr(expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name_is('a') and name_is('b')", "is not allowed"),
        ("everything", "write everything()"),
        ("nam_is('a')", "no check named 'nam_is'; did you mean 'name_is'"),
        ("__import__('os')", "no check named '__import__'"),
        ("name_is('a').to_config()", "is not allowed"),
        ("name_is(open('x'))", "is not allowed"),
        ("name_is(*['a'])", "is not allowed"),
        ("name_is(**{'a': 1})", "name each argument"),
        ("name_is(f'{1}')", "is not allowed"),
        ("name_is(b'a')", "is not allowed"),
        ("(lambda: 1)()", "is not allowed"),
        ("name_is('a'", "cannot be read"),
        ("", "cannot be read"),
        ("name_is()", "one or more non-empty strings"),
        ("name_is('a', x=1)", "cannot be made: TypeError"),
        ("name_matches('re:" + "a" * 1001 + "')", "1001 characters"),
        ("is_instance('Linaer')", "is_instance takes classes"),
        ("x" * (MAX_EXPRESSION_LENGTH + 1), "at most"),
        ("~" * (MAX_EXPRESSION_LENGTH - 20) + "everything()", "cannot be read"),
        (3, "a check is text"),
    ],
)
def test_what_an_expression_cannot_say(text: Any, message: str) -> None:
    """An expression is calls with constants and three operators; anything else is an error that says so, and runs nothing."""
    with pytest.raises((StrategyError, UnknownPluginError)) as caught:
        parse_check(text)

    assert message in str(caught.value)


CAP = "[[module_caps]]\ncheck = 'everything()'\naction = 'freeze'\n"


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("[[module_cap]]\ncheck = 'x'", 1, "no key 'module_cap'; did you mean 'module_caps'"),
        (CAP + "[[module_caps]]\nchek = 'everything()'", 5, "no key 'chek'; did you mean 'check'"),
        (CAP + "[[module_caps]]\n\ncheck = 'nam_is(\"a\")'\naction = 'freeze'", 6, "did you mean 'name_is'"),
        (CAP + "[[para_caps]]\ncheck = 'everything()'\naction = 'freese'", 6, "no action named 'freese'; did you mean 'freeze'"),
        ("[[module_caps]]\naction = 'freeze'", 1, "no 'check'"),
        ("[[module_caps]]\ncheck = 'everything()'", 1, "one of them"),
        (CAP + "[module_caps.params]\nrank = 3", 4, "unexpected keyword argument 'rank'"),
        (CAP + "strategy = 'full'", 1, "one of them"),
        ("[[para_caps]]\ncheck = 'everything()'\nstrategy = 'full'", 3, "acts on modules"),
        ("[[module_caps]]\ncheck = 'everything()'\nstrategy = 'fulk'", 3, "no strategy named 'fulk'; did you mean 'full'"),
        ("strategy = 'full'\n[parameters]\ntarget = 'a'", 3, "no parameter 'target'; did you mean 'targets'"),
        ("strategy = 'full'\nparameters = 3", 2, "a table of names and values"),
        ("parameters = {}", 1, "belong to a strategy"),
        ("strategy = 'full'\n[parameters]\nx = '''\ntargets = 3\n'''\ntargets = 1979-05-27", 6, "a value is text, a number"),
        ("module_caps = 3", 1, "write [[module_caps]]"),
        ("module_caps = [3]", 1, "a cap is a table"),
        ("", 1, "there is no cap"),
        ("a = 1\nb = ", 2, "it is no TOML"),
    ],
)
def test_a_mistake_is_told_with_its_line(toml: Write, text: str, line: int, message: str) -> None:
    """Each mistake has the file, the line and what is allowed."""
    path = toml(text)

    with pytest.raises(StrategyFileError) as caught:
        strategy_from_file(path)

    assert str(caught.value).startswith(f"{path}, line {line}: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ('{\n "module_caps": [\n  {"check": "everything()",\n   "acton": "freeze"}\n ]\n}', 4, "did you mean 'action'"),
        ('{\n "module_caps": [{},\n  {"check": 1}]\n}', 2, "no 'check'"),
        ('{\n "module_caps": [\n],\n"x": 1}', 4, "no key 'x'"),
        ('{\n "x" 1}', 2, "it is no JSON"),
        ("[]", 1, "an object with caps"),
    ],
)
def test_a_mistake_in_json_is_told_with_its_line(tmp_path: Path, text: str, line: int, message: str) -> None:
    """JSON too has lines."""
    path = tmp_path / "my.json"
    path.write_text(text)

    with pytest.raises(StrategyFileError) as caught:
        strategy_from_file(path)

    assert str(caught.value).startswith(f"{path}, line {line}: ")
    assert message in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    """A file that is missing, of another kind, too large, no text or with a key twice is an error."""
    with pytest.raises(StrategyFileNotFoundError) as missing:
        strategy_from_file(tmp_path / "gone.toml")
    (tmp_path / "large.toml").write_text("#" * (MAX_FILE_BYTES + 1))
    (tmp_path / "latin.toml").write_bytes(b"\xff")
    (tmp_path / "twice.json").write_text('{"a": 1, "a": 2}')

    assert isinstance(missing.value, FileNotFoundError)
    for name in ("my.yaml", "large.toml", "latin.toml", "twice.json"):
        with pytest.raises(StrategyFileError, match=name.replace(".", r"\.")):
            strategy_from_file(tmp_path / name)


def test_inspect_takes_a_file(toml: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The verb inspect reads a strategy file; other options beside it are wrong usage, and a missing file is not found."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_net.py").write_text("from torch import nn\ndef net(): return nn.Sequential(nn.Linear(3, 2))")
    toml(CAP.replace("freeze", "keep_trainable"))

    def gift(*options: str) -> Any:
        return CliRunner().invoke(main, ["inspect", "a_net.py:net", "--json", "--strategy", *options])

    assert json.loads(gift("my.toml").stdout)["trainable"]["numbers"] == 8
    assert gift("my.toml", "--set", "rank=3").exit_code == 2
    assert gift("gone.toml").exit_code == 3
    assert isinstance(strategy_from_file("my.toml"), FineTuningStrategy)
