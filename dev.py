"""One command for each thing a newcomer wants: see the demo, run the tests.

    python3 dev.py demo [image]        set up, then run `gift demo`
    python3 dev.py test [pytest args]  set up, then run all tests
    python3 dev.py setup               set up only

Setting up means: an environment in `.venv` beside this file, with both projects installed in it, editable. It is skipped when
nothing that it depends on has changed. A set-up that was interrupted is started afresh by the next command. Your own `.venv`
is installed into and never removed.

Uses the standard library only. The syntax is kept to what old Pythons can read, so that they get a message and no traceback.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

OLDEST_PYTHON = (3, 11)
ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
OLD_VENV = ROOT / ".venv.old"
MADE_HERE = VENV / "made-by-dev.py"
STAMP = VENV / "gift-setup"
PROJECTS = ("pyproject.toml", "gift_lora_plugin/pyproject.toml")
INSTALL = ("-e", ".[dev]", "-e", "./gift_lora_plugin[image]")


def main(arguments):
    """Run one command.

    Returns:
        Its exit code: 0 if all went well, else that of the program that failed.
    """
    command, rest = read_arguments(arguments)
    if sys.version_info < OLDEST_PYTHON:
        versions = [".".join(str(part) for part in version[:3]) for version in (OLDEST_PYTHON, sys.version_info)]
        return fail(f"GIFt needs Python {versions[0]} or newer; this is {versions[1]} ({sys.executable}).")
    try:
        code = set_up()
    except OSError as error:
        return fail(f"setting up failed: {error}.")
    if code or command == "setup":
        return code
    if command == "demo":
        return run([program("gift"), "demo", *rest])
    return run([program("python"), "-m", "pytest", *rest])


def read_arguments(arguments):
    """Split the command from what is handed on to the program it runs."""
    parser = argparse.ArgumentParser(
        prog="dev.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage="%(prog)s COMMAND ..."
    )
    parser.add_argument("command", choices=("demo", "test", "setup"), help="what to do")
    command = parser.parse_args(arguments[:1]).command
    rest = arguments[1:]
    if command == "setup" and rest:
        parser.error("setup takes no arguments, got: " + " ".join(rest))
    return command, rest


# --- setting up


def set_up():
    """Bring `.venv` up to date: leave it, install into it, or make it anew."""
    base = f"Python {sys.version_info[0]}.{sys.version_info[1]}, {ROOT}\n"
    wanted = base + digest_of_projects()
    found = STAMP.read_text(encoding="utf-8") if STAMP.is_file() else ""
    works = is_program(program("python"))
    if works and found == wanted:
        return 0
    print(f"Setting up {VENV}. The first time this downloads PyTorch and takes minutes.", flush=True)
    remove(OLD_VENV)
    if not VENV.exists() or is_empty(VENV) or (MADE_HERE.is_file() and not (works and found.startswith(base))):
        code = make_environment()
    elif works:
        code = 0
    else:
        code = fail(f"{VENV} holds no working Python and was not made by this program: move it elsewhere, then try again.")
    return code or install(wanted)


def digest_of_projects():
    """Tell apart any two states of what is to be installed."""
    digest = hashlib.sha256(repr(INSTALL).encode())
    for name in PROJECTS:
        # Line endings differ between checkouts of one and the same file.
        digest.update((ROOT / name).read_bytes().replace(b"\r\n", b"\n"))
    return digest.hexdigest() + "\n"


def make_environment():
    """Replace `.venv`, if there is one, by an empty environment."""
    if Path(sys.prefix).resolve() == VENV:
        return fail(f"{VENV} must be made anew, but it is the one running this: run `deactivate`, then the same command.")
    if VENV.exists():
        # Renamed first: a removal that is interrupted half way must not leave something that looks like an environment.
        os.replace(str(VENV), str(OLD_VENV))
        remove(OLD_VENV)
    VENV.mkdir()
    MADE_HERE.write_text("Made by dev.py, which may remove it.\n", encoding="utf-8")
    # Some systems package ensurepip apart; pip can serve the environment from outside.
    flags = [] if importlib.util.find_spec("ensurepip") else ["--without-pip"]
    return run([sys.executable, "-m", "venv", *flags, VENV])


def install(wanted):
    """Install both projects; the stamp is there only while the environment is complete."""
    pip = find_pip()
    if pip is None:
        return fail(f"no pip: this Python ({sys.executable}) has neither pip nor ensurepip. Install one of them first.")
    if STAMP.exists():
        STAMP.unlink()
    code = run([*pip, "install", "--disable-pip-version-check", *INSTALL])
    if code:
        return fail("setting up failed, see above. Run the same command to try again.", code)
    complete = STAMP.with_name(STAMP.name + ".new")
    complete.write_text(wanted, encoding="utf-8")
    os.replace(str(complete), str(STAMP))
    return 0


def find_pip():
    """The environment's own pip, or else this Python's, pointed at the environment."""
    own = [program("python"), "-m", "pip"]
    outside = [sys.executable, "-m", "pip", "--python", program("python")]
    for pip in (own, outside):
        if subprocess.run([*map(str, pip), "--version"], capture_output=True).returncode == 0:
            return pip
    return None


# --- programs


def program(name):
    """Where the environment keeps a program of that name."""
    return VENV / "Scripts" / (name + ".exe") if os.name == "nt" else VENV / "bin" / name


def is_program(path):
    """Whether the program is there and starts; the Python below an environment may have been removed."""
    try:
        return subprocess.run([str(path), "-c", ""], capture_output=True).returncode == 0
    except OSError:
        return False


def is_empty(folder):
    """Whether it is a folder with nothing in it."""
    return folder.is_dir() and not any(folder.iterdir())


def remove(folder):
    """Remove a folder if there is one."""
    if folder.exists():
        shutil.rmtree(str(folder))


def run(command):
    """Run a program in the repository root and give back its exit code, as a shell would."""
    code = subprocess.call([str(part) for part in command], cwd=str(ROOT))
    return 128 - code if code < 0 else code


def fail(message, code=1):
    """Say what is wrong and give back the exit code."""
    print("dev.py: " + message, file=sys.stderr)
    return code


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
