"""Make index.md, the list of known strategies, from index.toml.

    python docs/plugins/build_index.py

Uses the standard library only.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
KEYS = {"distribution", "strategies", "summary", "paper", "licence", "folder", "source"}

HEAD = """# Known strategies

Made from `index.toml` by `build_index.py`; change that file. Each is held to the conformance kit by tests of its own.

| strategies | package | what it does | paper | licence |
|---|---|---|---|---|
"""


def read_plugins(path: Path = FOLDER / "index.toml") -> list[dict[str, Any]]:
    """Read and check the entries.

    Raises:
        ValueError: if an entry has other keys than `KEYS`, says no place or two, or stands out of order.
    """
    plugins: list[dict[str, Any]] = tomllib.loads(path.read_text(encoding="utf-8"))["plugin"]
    for plugin in plugins:
        name = plugin.get("distribution", "an entry")
        if set(plugin) != KEYS:
            raise ValueError(f"{name} in {path.name} has the keys {sorted(plugin)}; an entry has {sorted(KEYS)}.")
        if bool(plugin["folder"]) == bool(plugin["source"]):
            raise ValueError(f"{name} in {path.name} must give a folder or a source, one of the two.")
        if plugin["folder"] and not (ROOT / plugin["folder"]).is_dir():
            raise ValueError(f"{name} in {path.name}: there is no folder {plugin['folder']!r}.")
        if plugin["source"] and not plugin["source"].startswith("https://"):
            raise ValueError(f"{name} in {path.name}: a source starts with https://, got {plugin['source']!r}.")
    return plugins


def render(plugins: list[dict[str, Any]]) -> str:
    """The page as Markdown."""
    return HEAD + "".join(_row(plugin) for plugin in plugins)


def _row(plugin: dict[str, Any]) -> str:
    names = ", ".join(f"`{name}`" for name in plugin["strategies"])
    place = plugin["source"] or f"../../{plugin['folder']}"
    paper = f"[arXiv:{plugin['paper']}](https://arxiv.org/abs/{plugin['paper']})" if plugin["paper"] else ""
    return f"| {names} | [{plugin['distribution']}]({place}) | {plugin['summary']} | {paper} | {plugin['licence']} |\n"


if __name__ == "__main__":
    (FOLDER / "index.md").write_text(render(read_plugins()), encoding="utf-8")
