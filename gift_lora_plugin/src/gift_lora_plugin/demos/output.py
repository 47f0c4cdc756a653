"""What a demo shows while it works: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

#: Plain lines come at most this often, in seconds; the last epoch always gets one.
PLAIN_INTERVAL = 2.0


def say(text: str) -> None:
    """Print a line at once, also into a pipe."""
    print(text, flush=True)


class Progress:
    """The progress of one training, as a context.

    Args:
        label: what is trained.
        epochs: how many there will be.
        batches: how many each has.
    """

    def __init__(self, label: str, epochs: int, batches: int) -> None:
        self.label, self.epochs, self.batches = label, epochs, batches
        self._done = 0
        self._last_line = time.monotonic()
        self._bar = _Bar(label, epochs * batches) if sys.stdout.isatty() else None

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()

    def batch(self) -> None:
        """One batch is done."""
        if self._bar:
            self._bar.advance()

    def epoch(self, accuracy: float) -> None:
        """One epoch is done, with that accuracy on the validation part."""
        self._done += 1
        text = f"epoch {self._done}/{self.epochs}, validation {accuracy:.1%}"
        if self._bar:
            self._bar.tell(text)
        elif self._done == self.epochs or time.monotonic() - self._last_line > PLAIN_INTERVAL:
            self._last_line = time.monotonic()
            say(f"  {self.label}: {text}")


class _Bar:
    """One line of rich's progress display; rich is imported when a terminal is there to draw on."""

    def __init__(self, label: str, total: int) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = TextColumn("  {task.description}"), BarColumn(), TimeRemainingColumn(), TextColumn("{task.fields[text]}")
        self._progress = Progress(*columns)
        self._task = self._progress.add_task(label, total=total, text="")
        self.start, self.stop = self._progress.start, self._progress.stop

    def advance(self) -> None:
        self._progress.advance(self._task)

    def tell(self, text: str) -> None:
        self._progress.update(self._task, text=text)
