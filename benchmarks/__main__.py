"""Run the benchmark: ``python -m benchmarks``; ``--help`` says with what."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # every model is made here, and none is looked up
os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # the profiler, which counts bytes here, speaks of its start and end otherwise

import torch

from benchmarks import report
from benchmarks.plan import Record, Settings, Task
from benchmarks.suites import SUITES

HERE = Path(__file__).parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen suites, print the tables, and write what was asked for."""
    options = _parser().parse_args(arguments)
    settings = Settings(quick=options.quick, threads=tuple(options.threads), repeats=options.repeats)
    start = time.perf_counter()
    record = run([task for suite in options.suite or SUITES for task in SUITES[suite](settings)], settings)
    data = report.to_data(record, settings, time.perf_counter() - start)
    text = report.markdown(data)
    print(text)
    if options.json:
        options.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    if options.plot:
        from benchmarks.plot import draw

        draw(data, options.plot)
    if options.readme:
        options.readme.write_text(report.insert(options.readme.read_text(encoding="utf-8"), text), encoding="utf-8")
    return 0


def run(tasks: list[Task], settings: Settings) -> Record:
    """Run tasks one after another, saying on stderr how far it is; a task that fails is left out with its reason."""
    record = Record()
    torch.set_num_threads(settings.threads[0])
    quiet()
    start = time.perf_counter()
    done = 0.0
    for number, task in enumerate(tasks, 1):
        spent = time.perf_counter() - start
        pace = spent / done if done else 1.0
        left = pace * (sum(one.seconds for one in tasks) - done)
        print(f"[{number}/{len(tasks)}] {task.name}; about {left / 60:.1f} min left", file=sys.stderr, flush=True)
        try:
            task.run(record)
        except ImportError as error:
            record.leave_out(task.name, {"all": f"{error}"})
        done += task.seconds
    return record


def quiet() -> None:
    """Keep the libraries' advice out of the tables."""
    warnings.simplefilter("ignore")
    for name in ("transformers", "LyCORIS", "peft", "timm"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="What low-rank fine-tuning costs, in GIFt and its peers.")
    parser.add_argument("--suite", action="append", choices=list(SUITES), help="only this one; may be given several times")
    parser.add_argument("--quick", action="store_true", help="small models and few rounds: does it work, not how fast is it")
    parser.add_argument("--threads", type=_positive, nargs="+", default=[1, 2], metavar="N", help="threads for training steps (1 2)")
    parser.add_argument("--repeats", type=_positive, metavar="N", help="the most rounds of any measurement")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the picture (needs matplotlib)")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="put the tables between the markers of this page")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 up")
    return number


if __name__ == "__main__":
    sys.exit(main())
