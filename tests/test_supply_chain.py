"""What goes into the packages, what continuous integration may do, and the programs that check both."""

from __future__ import annotations

import ast
import importlib.metadata
import io
import json
import re
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from audit import judged
from closure import closure
from fuzz_targets import TARGETS
from reproducible import contents, differences, leaks, unexpected
from sbom import pruned

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
EVERY_WORKFLOW = [*WORKFLOWS, *sorted((ROOT / "plugins_template" / ".github" / "workflows").glob("*.yml"))]
REQUIREMENTS = ROOT / ".github" / "requirements-ci.txt"

by_name = pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
every_one = pytest.mark.parametrize("workflow", EVERY_WORKFLOW, ids=lambda path: path.relative_to(ROOT).as_posix())


#: The only way to install a program, and the lines that install none.
HASHED = re.compile(r"(python|\.venv/bin/python) -m pip (--python \.venv )?install --require-hashes -r \.github/requirements-ci\.txt")
HARMLESS = re.compile(r"python -m venv \.venv|\.venv/bin/python -m nox -s [\w -]+")


def read(workflow: Path) -> dict[Any, Any]:
    """The workflow as data; YAML takes the key ``on`` for a truth value."""
    data = yaml.safe_load(workflow.read_text(encoding="utf-8"))
    assert isinstance(data, dict)
    return data


def steps(workflow: Path) -> list[dict[str, Any]]:
    """Every step of every job."""
    return [step for job in read(workflow)["jobs"].values() for step in job["steps"]]


# --- continuous integration


@every_one
def test_actions_are_pinned_by_commit(workflow: Path) -> None:
    """Each action is named by a full commit and says its version, so that nobody can move it."""
    used = re.findall(r"^\s*(?:- )?uses:\s*(.+)$", workflow.read_text(encoding="utf-8"), re.MULTILINE)

    assert len(used) == len([step for step in steps(workflow) if "uses" in step])
    for text in used:
        assert re.fullmatch(r"[\w.-]+/[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", text), text


@every_one
def test_workflows_run_no_strangers_code_with_rights(workflow: Path) -> None:
    """No workflow runs a stranger's change with the repository's rights, keeps credentials or puts a stranger's text into a shell."""
    data, text = read(workflow), workflow.read_text(encoding="utf-8")

    assert not {"pull_request_target", "workflow_run", "issue_comment"} & set(data[True])
    assert "secrets." not in text
    for step in steps(workflow):
        assert "${{" not in step.get("run", ""), step
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False


@every_one
def test_permissions_are_least(workflow: Path) -> None:
    """A workflow may read and no more; the one job that may ask for an upload token checks out no code."""
    data = read(workflow)

    assert data["permissions"] == {"contents": "read"}
    for name, job in data["jobs"].items():
        if job.get("permissions", {}) != {}:
            assert (workflow.name, name, job["permissions"]) == ("publish.yml", "deploy", {"id-token": "write"})
            assert not any("checkout" in step.get("uses", "") or "run" in step for step in job["steps"])


@by_name
def test_tools_are_installed_by_hash(workflow: Path) -> None:
    """The workflows run what is listed here and no more: the hashed tools come first, and no other is installed by name."""
    for name, job in read(workflow)["jobs"].items():
        lines = [line for step in job["steps"] for line in step.get("run", "").splitlines()]
        others = [line for line in lines if not HARMLESS.fullmatch(line)]

        assert all(HASHED.fullmatch(line) or re.fullmatch(r"python dev\.py (setup|test)", line) for line in others), (name, others)
        assert not others or HASHED.fullmatch(others[0]), name
        assert job["timeout-minutes"] <= 60


def test_every_tool_is_pinned_and_hashed() -> None:
    """Each requirement has one version and a SHA-256, each tool asked for is there, and no line says anything else."""
    text = REQUIREMENTS.read_text(encoding="utf-8")
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line and not line.lstrip().startswith("#")]
    wanted = REQUIREMENTS.with_suffix(".in").read_text(encoding="utf-8").splitlines()
    asked = {line.partition(" ;")[0] for line in wanted if line and line[0] != "#"}

    for line in lines:
        assert re.fullmatch(r"[a-z0-9.-]+==[\w.]+( ; [^#]+?)?(\s+--hash=sha256:[0-9a-f]{64})+", line.strip()), line
    assert {"pytest", "hypothesis", "pytest-timeout"} < asked <= {line.partition("==")[0] for line in lines}


def test_the_workflows_cover_the_sessions() -> None:
    """Each nox session but the measurements, and those that the tests contain, is run by a workflow; CONTRIBUTING.md lists each."""
    run = {word for workflow in WORKFLOWS for step in steps(workflow) for word in step.get("run", "").split()}
    listed = set(re.findall(r"^\| `([\w-]+)` \|", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.MULTILINE))

    assert sessions() - {"bench", "tests", "docs-examples"} <= run
    assert listed == sessions()


def sessions() -> set[str]:
    """The names of nox's sessions, read without nox."""
    tree = ast.parse((ROOT / "noxfile.py").read_text(encoding="utf-8"))
    found = set()
    for function in (node for node in tree.body if isinstance(node, ast.FunctionDef)):
        for call in (one for one in function.decorator_list if isinstance(one, ast.Call)):
            given = {keyword.arg: keyword.value for keyword in call.keywords}
            found.add(ast.literal_eval(given["name"]) if "name" in given else function.name)
    return found


def test_the_threat_model_names_tests_that_exist() -> None:
    """Each defence in SECURITY.md names a test that is there."""
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", (ROOT / "SECURITY.md").read_text(encoding="utf-8"))

    assert len(named) > 10
    for file, test in named:
        assert f"\ndef {test}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{test}"


# --- two builds


def wheel(**members: bytes) -> bytes:
    """A wheel with these members, their names with ``__`` for a slash."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, data in members.items():
            archive.writestr(name.replace("__", "/"), data)
    return stream.getvalue()


def source(**members: bytes) -> bytes:
    """A source distribution, likewise."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(f"thing-1.0/{name.replace('__', '/')}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def test_one_byte_is_a_difference() -> None:
    """Two builds are the same only if each archive is there twice with the same bytes."""
    assert differences({"a": b"1"}, {"a": b"1"}) == []
    assert len(differences({"a": b"1", "b": b"2", "c": b"3"}, {"a": b"1", "b": b"0", "d": b"3"})) == 3


def test_what_does_not_belong_is_told() -> None:
    """A cache, a test or a stray file in an archive, or a file that is missing, is told by name."""
    expected = {"thing wheel": {"thing/a.py", "METADATA"}, "thing source": {"a.py", "PKG-INFO"}}
    sound = {
        "thing-1.0-py3-none-any.whl": wheel(**{"thing__a.py": b"", "thing-1.0.dist-info__METADATA": b""}),
        "thing-1.0.tar.gz": source(**{"a.py": b"", "PKG-INFO": b""}),
    }
    stray = {
        "thing-1.0-py3-none-any.whl": wheel(**{"thing__a.py": b"", "tests__b.py": b"", "thing-1.0.dist-info__METADATA": b""}),
        "thing-1.0.tar.gz": source(**{"a.pyc": b"", "PKG-INFO": b""}),
    }

    assert unexpected(sound, expected) == []
    told = "\n".join(unexpected(stray, expected))
    assert all(name in told for name in ("tests/b.py", "holds a.pyc", "lacks a.py"))


def test_a_folder_of_the_builder_is_told() -> None:
    """A path of the machine inside of an archive is told; another text is not."""
    archives = {"a-1.0-py3-none-any.whl": wheel(**{"a.py": b"open('/home/builder/x')", "b.py": b"open('/etc')"})}

    assert leaks(archives, ["/home/builder", "/"]) == ["a-1.0-py3-none-any.whl: a.py names a folder of this machine"]


def test_wheels_should_hold_the_packages_alone() -> None:
    """What a wheel should hold is the package and its metadata: no test, but the template's, which is what it is for."""
    expected = contents(ROOT)

    for name in ("gift_core", "gift_lora_plugin"):
        own = {path for path in expected[f"{name} wheel"] if path.startswith(f"{name}/")}
        assert f"{name}/__init__.py" in own and f"{name}/py.typed" in own
        assert not [path for path in own if "/test_" in path and not path.startswith("gift_core/_template/")]
        assert len(expected[f"{name} wheel"] - own) == 5


# --- what is needed, and what is known of it


def test_the_closure_is_what_is_declared() -> None:
    """It has both projects, what they declare and what that needs, and nothing that only an extra brings."""
    needs = closure()
    required = [text for text in importlib.metadata.requires("gift-core") or [] if "extra ==" not in text]
    declared = {re.split(r"[<>=!~; \[]", text)[0].lower() for text in required}

    assert needs["gift-core"] == declared
    assert needs["gift-lora-plugin"] == {"gift-core"}
    assert {one for needed in needs.values() for one in needed} | {"gift-lora-plugin"} == set(needs)
    assert not {"pytest", "ruff", "peft", "nox", "scikit-learn"} & set(needs)


DOCUMENT = {
    "bomFormat": "CycloneDX",
    "components": [
        {"bom-ref": "Thing==1", "name": "Thing", "externalReferences": [{"url": "file:///home/builder"}]},
        {"bom-ref": "part==2", "name": "part", "externalReferences": [{"url": "https://example.org"}]},
        {"bom-ref": "tool==3", "name": "tool"},
    ],
    "dependencies": [{"ref": "Thing==1", "dependsOn": ["part==2", "tool==3"]}],
}


def test_the_bill_has_what_is_needed_alone() -> None:
    """A bill of materials keeps the needed packages and their needs, and no path of the machine."""
    bill = pruned(DOCUMENT, {"thing": {"part"}, "part": set()})

    assert [one["name"] for one in bill["components"]] == ["Thing", "part"]
    assert bill["dependencies"] == [{"ref": "part==2", "dependsOn": []}, {"ref": "Thing==1", "dependsOn": ["part==2"]}]
    assert "file:" not in json.dumps(bill) and "https:" in json.dumps(bill)
    with pytest.raises(LookupError, match="absent"):
        pruned(DOCUMENT, {"absent": set()})


CLEAN = {"name": "a", "version": "1", "vulns": []}
VULNERABLE = {"name": "b", "version": "1", "vulns": [{"id": "X-1", "fix_versions": ["2"]}]}
SKIPPED = {"name": "b", "skip_reason": "not found"}


@pytest.mark.parametrize(
    ("code", "entries", "says"),
    [
        (0, [CLEAN], None),
        (1, [CLEAN, VULNERABLE], "b 1: X-1, fixed in 2"),
        (0, [CLEAN, SKIPPED], "not audited: b: not found"),
        (0, [SKIPPED], "NOTHING WAS AUDITED"),
        (0, [], "NOTHING WAS AUDITED"),
        (0, None, "NOTHING WAS AUDITED"),
        (1, None, "NOTHING WAS AUDITED"),
        (2, [CLEAN], "failed with exit code 2"),
    ],
)
def test_no_answer_is_no_clean_answer(code: int, entries: list[Any] | None, says: str | None) -> None:
    """An audit passes only with a report that has an answer for every package."""
    report = "" if entries is None else json.dumps({"dependencies": entries})
    problems = judged(code, report, {entry["name"] for entry in entries or []})

    assert problems == [] if says is None else says in "\n".join(problems)
    assert judged(0, json.dumps({"dependencies": [CLEAN]}), {"a", "c"}) == ["not audited: c: the report has no word of it"]


def test_the_fuzz_session_has_a_folder_for_each_target() -> None:
    """What `nox -s fuzz` runs, which goes by the folders of seeds, is every target."""
    assert {path.name for path in (ROOT / "fuzz" / "seeds").iterdir()} == set(TARGETS)
