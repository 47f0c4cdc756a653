"""Ask pip-audit for known vulnerabilities of every installed package; what could not be asked is a failure, and said.

pip-audit leaves a package out that the service does not know, as a version with a local label (``2.6.0+cpu``): labels are taken off
and whatever is still left out fails. It writes a report whenever it has an answer, so that no report means no answer.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from closure import installed


def main(arguments: list[str]) -> int:
    """Audit, and say what was found; arguments go to pip-audit."""
    packages = installed()
    with tempfile.TemporaryDirectory() as folder:
        asked, report = Path(folder) / "requirements.txt", Path(folder) / "report.json"
        asked.write_text("".join(f"{name}=={version.partition('+')[0]}\n" for name, version in packages.items()), encoding="utf-8")
        options = ["--no-deps", "--disable-pip", "--progress-spinner", "off", "--format", "json", "--output", str(report)]
        code = subprocess.run([sys.executable, "-m", "pip_audit", "-r", str(asked), *options, *arguments]).returncode
        problems = judged(code, report.read_text(encoding="utf-8") if report.is_file() else "", set(packages))
    for problem in problems:
        print(problem, file=sys.stderr)
    if not problems:
        print(f"{len(packages)} packages, none with a known vulnerability")
    return 1 if problems else 0


def judged(code: int, report: str, asked: set[str]) -> list[str]:
    """What is wrong, in lines; none only if every package was asked about and none is known to be vulnerable.

    Args:
        code: pip-audit's exit code.
        report: its report as JSON; empty if there is none.
        asked: the names of the packages.
    """
    if not report:
        return [f"NOTHING WAS AUDITED: pip-audit gave no report (exit code {code}). See above; is the advisory service reachable?"]
    known = json.loads(report)["dependencies"]
    if all("skip_reason" in entry for entry in known):
        return [f"NOTHING WAS AUDITED: the advisory service knows none of {len(asked)} packages; is it the advisory service?"]
    entries = {entry["name"]: entry for entry in known}
    skipped = [f"not audited: {name}: {entry['skip_reason']}" for name, entry in entries.items() if "skip_reason" in entry]
    skipped += [f"not audited: {name}: the report has no word of it" for name in sorted(asked - set(entries))]
    found = [
        f"{name} {entry['version']}: {one['id']}, fixed in {', '.join(one['fix_versions']) or 'no version'}"
        for name, entry in entries.items()
        for one in entry.get("vulns", [])
    ]
    unexplained = [f"pip-audit failed with exit code {code}, see above."] if code and not (found or skipped) else []
    return found + skipped + unexplained


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
