"""Build both projects twice and compare every byte; check that each archive holds what it should and nothing else.

The second build has another folder, other times and rights of the files, another hash seed and time zone, and caches lie about.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: Each project, with what its wheel holds and from where, and what its source distribution holds.
PROJECTS: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
    ".": ({"gift_core": "gift_core", "plugins_template": "gift_core/_template"}, ("gift_core", "plugins_template", "CHANGELOG.md")),
    "gift_lora_plugin": ({"src/gift_lora_plugin": "gift_lora_plugin"}, ("src", "tests")),
}
WHEEL_METADATA = {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"}
SOURCE_METADATA = {"PKG-INFO", "README.md", "LICENSE", "pyproject.toml", ".gitignore"}
#: What the builds read; the rest of a checkout may be large.
READ = (".gitignore", "CHANGELOG.md", "LICENSE", "README.md", "gift_core", "gift_lora_plugin", "plugins_template", "pyproject.toml")
LEFT_OUT = (".*_cache", ".hypothesis", ".venv*", "__pycache__", "*.pyc", "dist", "build", "*.egg-info")


def main() -> int:
    """Build, compare, and print the digests or what is wrong."""
    with tempfile.TemporaryDirectory() as folder:
        copies = [Path(folder) / name for name in ("one", "another-folder")]
        for copy in copies:
            _copy(copy)
        expected = contents(copies[0])
        _disturb(copies[1])
        first, second = (_built(copy, number) for number, copy in enumerate(copies))
        problems = differences(first, second) + unexpected(first, expected) + leaks(first, [folder, str(ROOT), sys.prefix])
        for line in problems or [f"the same twice: {name} ({len(data):,} bytes)" for name, data in sorted(first.items())]:
            print(line)
    return 1 if problems else 0


def differences(first: Mapping[str, bytes], second: Mapping[str, bytes]) -> list[str]:
    """Which archives are not there twice with the same bytes."""
    return [f"differs between two builds: {name}" for name in sorted({*first, *second}) if first.get(name) != second.get(name)]


def contents(repository: Path) -> dict[str, set[str]]:
    """The files that each archive should hold, by project and kind, as in ``"gift_core wheel"``."""
    expected: dict[str, set[str]] = {}
    for project, (wheel, source) in PROJECTS.items():
        folder = repository / project
        name = "gift_core" if project == "." else project
        expected[f"{name} wheel"] = {
            f"{target}/{path}" for origin, target in wheel.items() for path in _files(folder / origin)
        } | WHEEL_METADATA
        expected[f"{name} source"] = {
            origin if path == "." else f"{origin}/{path}" for origin in source for path in _files(folder / origin)
        } | SOURCE_METADATA
    return expected


def unexpected(archives: Mapping[str, bytes], expected: Mapping[str, set[str]]) -> list[str]:
    """What an archive holds and should not, or should and does not."""
    problems = []
    for archive, data in sorted(archives.items()):
        kind = "wheel" if archive.endswith(".whl") else "source"
        wanted = expected[f"{archive.partition('-')[0]} {kind}"]
        found = {_within(name, kind) for name in _members(archive, data)}
        problems += [f"{archive} holds {name}, which is no part of it" for name in sorted(found - wanted)]
        problems += [f"{archive} lacks {name}" for name in sorted(wanted - found)]
    return problems


def leaks(archives: Mapping[str, bytes], places: Iterable[str]) -> list[str]:
    """Which members name a folder of the machine that built them."""
    wanted = [place.encode() for place in places if len(place) > 1]
    return [
        f"{archive}: {name} names a folder of this machine"
        for archive, data in sorted(archives.items())
        for name, text in _members(archive, data).items()
        if any(place in text for place in wanted)
    ]


def _members(archive: str, data: bytes) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / archive
        path.write_bytes(data)
        if archive.endswith(".whl"):
            with zipfile.ZipFile(path) as wheel:
                return {name: wheel.read(name) for name in wheel.namelist()}
        with tarfile.open(path) as source:
            files = {member.name: source.extractfile(member) for member in source.getmembers() if not member.isdir()}
            return {name: file.read() if file else b"" for name, file in files.items()}


def _within(name: str, kind: str) -> str:
    first, _, rest = name.partition("/")
    return rest if kind == "source" or first.endswith(".dist-info") else name


def _files(folder: Path) -> set[str]:
    if folder.is_file():
        return {"."}
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def _copy(target: Path) -> None:
    target.mkdir()
    for name in READ:
        origin = ROOT / name
        if origin.is_dir():
            shutil.copytree(origin, target / name, ignore=shutil.ignore_patterns(*LEFT_OUT))
        else:
            shutil.copy2(origin, target / name)


def _disturb(copy: Path) -> None:
    for path in copy.rglob("*"):
        if path.is_file():
            os.chmod(path, 0o600)
        os.utime(path, (10**9, 10**9))
    for package in (copy / "gift_core", copy / "gift_lora_plugin/src/gift_lora_plugin"):
        (package / "__pycache__").mkdir()
        (package / "__pycache__/planted.cpython-311.pyc").write_bytes(b"planted")


def _built(copy: Path, number: int) -> dict[str, bytes]:
    target = copy.with_name(f"{copy.name}-dist")
    surroundings = {"PYTHONHASHSEED": str(number), "TZ": ("UTC", "Asia/Kathmandu")[number]}
    epoch = {"SOURCE_DATE_EPOCH": os.environ.get("SOURCE_DATE_EPOCH", "1577836800")}
    for project in PROJECTS:
        command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(target), str(copy / project)]
        subprocess.run(command, check=True, env=os.environ | surroundings | epoch, stdout=subprocess.DEVNULL, cwd=copy)
    return {path.name: path.read_bytes() for path in target.iterdir() if path.name != ".gitignore"}


if __name__ == "__main__":
    sys.exit(main())
