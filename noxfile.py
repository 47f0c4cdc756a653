"""The checks a change must pass: ``nox`` runs them all, ``nox -s lint`` one of them.

Every session runs in the environment that nox itself is in (``python3 dev.py setup`` makes one): torch is installed once.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

import nox

ROOT = Path(__file__).parent
PACKAGES = ("gift_core", "gift_lora_plugin/src/gift_lora_plugin")
PROJECTS = (".", "gift_lora_plugin")

nox.options.error_on_missing_interpreters = True


@nox.session(venv_backend="none")
def tests(session: nox.Session) -> None:
    """Run the tests of both projects; arguments after ``--`` go to pytest."""
    _python(session, "pytest", *session.posargs)


@nox.session(venv_backend="none")
def lint(session: nox.Session) -> None:
    """Check style and formatting."""
    _python(session, "ruff", "check", ".")
    _python(session, "ruff", "format", "--check", ".")


@nox.session(venv_backend="none")
def types(session: nox.Session) -> None:
    """Check the types of both packages, strictly."""
    _python(session, "mypy", "--strict", *PACKAGES)


@nox.session(name="docs-examples", venv_backend="none")
def docs_examples(session: nox.Session) -> None:
    """Run the Python code that the READMEs show."""
    _python(session, "pytest", "tests/test_readme.py", *session.posargs)


@nox.session(venv_backend="none")
def build(session: nox.Session) -> None:
    """Build source and wheel distributions of both projects into ``dist`` and check their metadata."""
    dist = ROOT / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    isolation = ["--no-isolation"] if importlib.util.find_spec("hatchling") else []
    for project in PROJECTS:
        _python(session, "build", *isolation, "--outdir", str(dist), project)
    _python(session, "twine", "check", "--strict", *sorted(str(path) for path in dist.iterdir() if path.name != ".gitignore"))


@nox.session(venv_backend="none", default=False)
def bench(session: nox.Session) -> None:
    """Measure speed, memory and scale against the peers, and write the page and the picture; arguments go to the program."""
    arguments = session.posargs or [
        "--json",
        "benchmarks/results.json",
        "--plot",
        "benchmarks/results.png",
        "--readme",
        "benchmarks/README.md",
    ]
    _python(session, "benchmarks", *arguments)


def _python(session: nox.Session, module: str, *arguments: str) -> None:
    session.run(sys.executable, "-m", module, *arguments)
