"""Mutation testing of the core: change one small thing at a time, and see whether a test notices.

The modules are mutated in a copy of the repository. Each mutant meets the tests of its module, fastest first, up to the first that
fails; what survives them meets more tests. A mutant that makes the tests hang or crash is noticed too. What survives all is a promise
that no test holds, or a change that nobody can see: docs/mutants.md says for each which it is.
"""

from __future__ import annotations

import argparse
import compileall
import dataclasses
import itertools
import json
import py_compile
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from forked import ForkedTests, Outcome
from mutations import Mutant, sample

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "mutants.md"
LEFT_OUT = (".git", ".ci", ".*_cache", ".hypothesis", ".nox", ".venv*", "__pycache__", "*.pyc", "dist", "build", "*.egg-info")
#: The share of the mutants that the tests must notice, in percent, and how many must be tried.
BAR, ENOUGH = 85, 300

#: For each module the tests that every mutant meets, and those that the survivors meet then.
TESTS: dict[str, tuple[str, str]] = {
    "iterator": ("iterator plan factories", "tuning"),
    "selection": ("selection factories plan", "faults/hostile_adapters"),
    "caps": ("caps strategy plan", "tuning"),
    "factories": ("factories strategy tuning", "plan strategy_file"),
    "reading": ("strategy_file faults/bad_places", "faults/refusals"),
    "strategy_file": ("strategy_file", "fuzz_seeds faults/refusals"),
    "plugins/discovery": ("plugins hooks", "plugin_commands fuzz_seeds faults/refusals"),
    "plugins/loading": ("plugins hooks", "plugin_commands faults/refusals"),
    "plugins/registry": ("plugins hooks", "plugin_commands faults/refusals"),
    "strategy": ("strategy plan", "strategy_file faults/refusals"),
    "info": ("info plan", "tuning"),
    "plan": ("plan tuning", "factories faults/model_trees faults/refusals"),
    "structure": ("structure tuning", "merging faults/model_trees"),
    "guard": ("guard structure tuning", "faults/model_trees"),
    "record": ("record tuning state_dict", "merging adapter_set"),
    "reparameterization": ("reparameterization merging", "tuning lora/lora lora/layers"),
    "state_dict": ("state_dict tuning", "merging adapter_set"),
    "optimizers": ("faults/torch_features_under_faults", "info faults/refusals"),
    "tuning": ("tuning structure", "faults/refusals faults/threads"),
    "merging": ("merging", "faults/refusals integration/torch_features"),
    "switching": ("switching adapter_set", "lora/adapters faults/state_machine"),
    "atomic": ("atomic faults/bad_places", "adapter_file"),
    "allocation": ("allocation", "faults/hostile_adapters"),
    "adapter_format": ("adapter_versions adapter_file", "faults/hostile_metadata"),
    "adapter_file": ("adapter_file", "adapter_versions faults/refusals"),
    "adapter_set": ("adapter_set", "faults/refusals lora/adapters"),
    "distributed": ("merging", "distributed/sharded"),
}


def files(names: str) -> list[str]:
    """Test files by their short names."""
    folders = [(f"tests/{folder}", name) for folder, _, name in (text.rpartition("/") for text in names.split())]
    return [f"{folder}/test_{name}.py".replace("//", "/").replace("tests/lora/", "gift_lora_plugin/tests/") for folder, name in folders]


def main(arguments: Sequence[str]) -> int:
    """Draw mutants, try them, and print who survived.

    Returns:
        0 if enough were tried and enough of them noticed; of modules that were chosen by hand any number is enough.
    """
    given = _read(arguments)
    earlier = json.loads(given.json.read_text(encoding="utf-8")) if given.json and given.json.is_file() else {}
    with tempfile.TemporaryDirectory(prefix="gift-mutants-") as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*LEFT_OUT))
        drawn = {module: _drawn(copy, module, given) for module in given.modules}
        tests = ForkedTests(copy, ROOT)
        # by their content: a mutant may be as long as the original, and written in the same second
        compileall.compile_dir(copy / "gift_core", quiet=1, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH)
        trial = Trial(tests, given.quick)
        results = earlier if given.again else {}
        for module, mutants in drawn.items():
            results[module] = _tried(trial, module, mutants, earlier.get(module, []) if given.again else None)
            if given.json:
                given.json.write_text(json.dumps(earlier | results, indent=1), encoding="utf-8")
    print("\n".join(table(results)))
    for line in survivors(results):
        print(line)
    if given.page:
        given.page.write_text(page(given.page.read_text(encoding="utf-8"), earlier | results), encoding="utf-8")
    tried, killed = _counts(itertools.chain(*results.values()))
    enough = tried >= ENOUGH or set(given.modules) != set(TESTS)
    return 0 if enough and 100 * killed >= BAR * tried else 1


class Trial:
    """Trying mutants in a copy of the repository.

    Args:
        tests: of the copy.
        quick: let mutants meet the first tests alone.
    """

    def __init__(self, tests: ForkedTests, quick: bool) -> None:
        self.tests = tests
        self.quick = quick
        self.seconds: dict[str, float] = {}

    def control(self, module: str) -> None:
        """Check that the tests of a module fail where it cannot be imported.

        Raises:
            RuntimeError: if they pass, so that it is another module that they import.
        """
        if self.with_source(module, "raise ImportError('planted')\n", TESTS[module][0]).passed:
            raise RuntimeError(f"the tests of {module} pass without it: they import another one.")

    def attempt(self, mutant: Mutant) -> Outcome:
        """Meet the first tests, and then the others."""
        first, more = TESTS[mutant.module]
        outcome = self.with_source(mutant.module, mutant.source, first)
        if not outcome.passed or not more or self.quick:
            return outcome
        further = self.with_source(mutant.module, mutant.source, more)
        return dataclasses.replace(further, seconds=outcome.seconds + further.seconds)

    def with_source(self, module: str, source: str, names: str) -> Outcome:
        """Run tests with another text in the place of a module; they must pass with its own.

        Raises:
            RuntimeError: if they do not.
        """
        limit = 30 + 3 * sum(map(self._seconds_of, files(names)))
        place = self.tests.copy / "gift_core" / f"{module}.py"
        original = place.read_bytes()
        try:
            place.write_text(source, encoding="utf-8")
            return self.tests.run(files(names), limit)
        finally:
            place.write_bytes(original)

    def _seconds_of(self, file: str) -> float:
        if file not in self.seconds:
            outcome = self.tests.run([file], 900)
            if not outcome.passed:
                raise RuntimeError(f"{file} fails without any mutation ({outcome.reason}):\n{self.tests.log.read_text()[-3000:]}")
            self.seconds[file] = outcome.seconds
            _tell(f"control: {file} passes in {outcome.seconds:.1f} s")
        return self.seconds[file]


def table(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """The counts as lines of Markdown, one for each module and one for all."""
    rows = [(module, *_counts(found)) for module, found in results.items()]
    rows.append(("all", sum(row[1] for row in rows), sum(row[2] for row in rows)))
    lines = [
        f"| {module} | {tried} | {killed} | {tried - killed} | {100 * killed / max(1, tried):.0f} % |" for module, tried, killed in rows
    ]
    return ["| module | mutants | killed | survived | killed |", "|---|---|---|---|---|", *lines]


def survivors(results: Mapping[str, Iterable[Mapping[str, Any]]]) -> list[str]:
    """Each survivor as a line of Markdown, without its reason."""
    return [
        f"- `{module}{'.' if one['function'] else ''}{one['function']}`: `{one['before']}` → `{one['after'] or 'nothing'}`"
        for module, found in results.items()
        for one in found
        if not one["killed"]
    ]


def page(text: str, results: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The page with new results, with the reasons that it has already for the same survivors."""
    known = dict(line.split("`. ", 1) for line in text.splitlines() if line.startswith("- `") and "`. " in line)
    head = text.partition("## Result\n")[0]
    listed = [f"{line}. {known.get(line[:-1], 'Not looked at yet.')}" for line in survivors(results)]
    return "\n".join([f"{head}## Result\n", *table(results), "\n## Survivors\n", *listed, ""])


def _drawn(copy: Path, module: str, given: argparse.Namespace) -> list[Mutant]:
    source = (copy / "gift_core" / f"{module}.py").read_text(encoding="utf-8")
    found = sample(module, source, given.seed, given.share, given.least)
    _tell(f"{module}: {len(found)} mutants drawn")
    return found


def _tried(trial: Trial, module: str, mutants: list[Mutant], earlier: list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    trial.control(module)
    known: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for one in earlier or ():
        known.setdefault(_key(one), []).append(one)
    results = []
    for number, mutant in enumerate(mutants, 1):
        result = {key: value for key, value in dataclasses.asdict(mutant).items() if key != "source"}
        if (before := known.get(_key(result))) and (last := before.pop(0))["killed"]:
            results.append(last)
            continue
        outcome = trial.attempt(mutant)
        results.append(result | {"killed": not outcome.passed, "by": outcome.reason, "seconds": round(outcome.seconds, 2)})
        verdict = f"survived: {mutant.before!r} -> {mutant.after!r}" if outcome.passed else f"killed by {outcome.reason}"
        _tell(f"{module} {number}/{len(mutants)} {mutant.function} {mutant.operator}, {outcome.seconds:.1f} s, {verdict}")
    return results


def _key(result: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(result[name] for name in ("module", "function", "operator", "before", "after"))


def _counts(found: Iterable[Mapping[str, Any]]) -> tuple[int, int]:
    verdicts = [one["killed"] for one in found]
    return len(verdicts), sum(verdicts)


def _tell(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def _read(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="mutants.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", nargs="+", choices=sorted(TESTS), metavar="MODULE", help="modules of the core; all, if left out")
    parser.add_argument("--seed", type=int, default=1, help="which mutants are drawn (1)")
    parser.add_argument("--share", type=int, default=6, help="try one in so many places of a module (6)")
    parser.add_argument("--least", type=int, default=10, help="at least so many mutants of each module (10)")
    parser.add_argument("--json", type=Path, help="keep the results in this file; those of modules not tried now stay in it")
    parser.add_argument("--again", action="store_true", help="try only what the file of --json has as survived, or has not")
    parser.add_argument("--quick", action="store_true", help="meet the first tests of each module alone")
    parser.add_argument("--page", type=Path, help=f"write the results into this page too, as in {PAGE.relative_to(ROOT)}")
    given = parser.parse_args(arguments)
    if given.again and given.json is None:
        parser.error("--again needs --json FILE, which says what survived")
    given.modules = given.modules or list(TESTS)
    return given


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
