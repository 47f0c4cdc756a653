"""The checks a change must pass: ``nox`` runs them all, ``nox -s lint`` one of them.

Every session runs in the environment that nox itself is in (``python3 dev.py setup`` makes one): torch is installed once.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import time
from pathlib import Path

import nox
from nox.command import CommandFailed

ROOT = Path(__file__).parent
PACKAGES = ("gift_core", "gift_lora_plugin/src/gift_lora_plugin")
PROJECTS = (".", "gift_lora_plugin")
SEEDS = ROOT / "fuzz" / "seeds"
FUZZ_SECONDS = 20
#: The matrix of faults, and how long all of it may take.
FAULTS = (
    "tests/faults",
    "tests/distributed",
    "tests/integration/test_torch_features.py",
    "tests/test_adapter_versions.py",
    "tests/test_fuzz_seeds.py",
    "gift_lora_plugin/tests/test_peft_hostile.py",
)
FAULT_SECONDS = 600

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


@nox.session(venv_backend="none")
def reproducible(session: nox.Session) -> None:
    """Build both projects twice, in other surroundings, and compare every byte; check what the archives hold."""
    _need(session, "build", "hatchling")
    session.run(sys.executable, "tools/reproducible.py")


@nox.session(venv_backend="none", default=False)
def faults(session: nox.Session) -> None:
    """Try every kind of fault, and print how many were silent, half, foreign or lost; arguments go to pytest.

    The whole matrix has to be clean, and done in ten minutes.
    """
    rows, start = Path(session.create_tmp()) / "faults.jsonl", time.monotonic()
    rows.unlink(missing_ok=True)
    _python(session, "pytest", *FAULTS, *session.posargs, env={"GIFT_FAULTS_FILE": str(rows.resolve())})
    seconds, noted = time.monotonic() - start, [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    session.log(f"{sum(row['cases'] for row in noted):,} cases in {seconds:.0f} s")
    if unclean := sorted({row["kind"] for row in noted if row["silent"] or row["half"] or row["foreign"] or row["lost"]}):
        session.error(f"not clean: {', '.join(unclean)}")
    if seconds > FAULT_SECONDS:
        session.error(f"the matrix took {seconds:.0f} s; {FAULT_SECONDS} are allowed")


@nox.session(venv_backend="none", default=False)
def fuzz(session: nox.Session) -> None:
    """Fuzz what reads strangers' bytes, each target for 20 seconds or as many as the argument says."""
    _need(session, "atheris")
    seconds = int(session.posargs[0]) if session.posargs else FUZZ_SECONDS
    found = []
    for seeds in sorted(path for path in SEEDS.iterdir() if path.is_dir()):
        corpus = Path(session.create_tmp()) / seeds.name
        corpus.mkdir(exist_ok=True)
        options = [f"-max_total_time={seconds}", "-timeout=20", "-rss_limit_mb=4096", f"-artifact_prefix={corpus.parent}/found-"]
        try:
            session.run(sys.executable, "fuzz/run_fuzz.py", seeds.name, str(corpus), str(seeds), *options)
        except CommandFailed:
            found.append(seeds.name)  # the other targets may have findings too
    if found:
        session.error(f"findings in {', '.join(found)}: the inputs are the found-* in {session.create_tmp()}")


@nox.session(venv_backend="none", default=False)
def audit(session: nox.Session) -> None:
    """Ask for known vulnerabilities of every installed package; fail where there is no answer. Arguments go to pip-audit."""
    _need(session, "pip_audit")
    session.run(sys.executable, "tools/audit.py", *session.posargs)


@nox.session(venv_backend="none", default=False)
def sbom(session: nox.Session) -> None:
    """Write a software bill of materials (CycloneDX) of both projects into ``dist``, or to the path given."""
    _need(session, "cyclonedx_py")
    session.run(sys.executable, "tools/sbom.py", *session.posargs)


@nox.session(venv_backend="none", default=False)
def mutants(session: nox.Session) -> None:
    """Change one small thing of the core at a time, and see whether a test notices; arguments go to the program."""
    _need(session, "cosmic_ray")
    session.run(sys.executable, "tools/mutants.py", *session.posargs)


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


def _python(session: nox.Session, module: str, *arguments: str, env: dict[str, str] | None = None) -> None:
    session.run(sys.executable, "-m", module, *arguments, env=env)


def _need(session: nox.Session, *modules: str) -> None:
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        session.error(f"{', '.join(missing)} not installed, nothing was checked: pip install -e '.[dev,checks]'. atheris is for Linux.")
