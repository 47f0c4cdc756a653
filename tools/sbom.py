"""Write a software bill of materials, as CycloneDX JSON: both projects and every package that they need, as installed here.

The file says nothing of the machine, and is the same for the same packages.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from closure import closure
from packaging.utils import canonicalize_name


def main(arguments: list[str]) -> int:
    """Write it to the path given, or to ``dist/sbom.cdx.json``."""
    target = Path(arguments[0] if arguments else "dist/sbom.cdx.json")
    try:
        document = pruned(_environment(), closure())
    except LookupError as error:
        print(f"not written: {error}", file=sys.stderr)
        return 1
    text = json.dumps(document, indent=2, sort_keys=True) + "\n"
    if problem := _invalid(text):
        print(f"not written: it is no CycloneDX document: {problem}", file=sys.stderr)
        return 1
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")
    print(f"{target}: {len(document['components'])} components")
    return 0


def pruned(document: dict[str, Any], needs: dict[str, set[str]]) -> dict[str, Any]:
    """The document with the needed packages alone, their needs, and no address of this machine.

    Raises:
        LookupError: if a needed package is not in the document.
    """
    names = {component["bom-ref"]: str(canonicalize_name(component["name"])) for component in document["components"]}
    references = {name: reference for reference, name in names.items()}
    if missing := sorted(set(needs) - set(references)):
        raise LookupError(f"the environment has no {', '.join(missing)}: install both projects into it.")
    components = [_without_local(one) for one in document["components"] if names[one["bom-ref"]] in needs]
    dependencies = [{"ref": references[name], "dependsOn": sorted(references[one] for one in needs[name])} for name in sorted(needs)]
    return document | {"components": components, "dependencies": dependencies}


def _without_local(component: dict[str, Any]) -> dict[str, Any]:
    links = [link for link in component.get("externalReferences", []) if not link["url"].startswith("file:")]
    rest = {key: value for key, value in component.items() if key != "externalReferences"}
    return rest | ({"externalReferences": links} if links else {})


def _environment() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "environment.json"
        options = ["--output-reproducible", "--spec-version", "1.6", "--output-format", "JSON", "--output-file", str(path)]
        subprocess.run([sys.executable, "-m", "cyclonedx_py", "environment", *options, sys.executable], check=True)
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return document


def _invalid(text: str) -> str | None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    problem = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    return None if problem is None else str(problem)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
