"""What is wrong with a file, as a message that no file can make long."""

from __future__ import annotations

from collections.abc import Sequence

#: A message lists so many problems, and counts the others.
MAX_PROBLEMS = 20
#: A problem is cut to so many characters, because it may repeat what a file says.
MAX_LENGTH = 200


def as_lines(problems: Sequence[str]) -> str:
    """One line for each of the first problems, and how many more there are."""
    lines = [shortened(problem) for problem in problems[:MAX_PROBLEMS]]
    if more := len(problems) - len(lines):
        lines.append(f"and {more:,} more")
    return "\n  ".join(lines)


def shortened(text: str) -> str:
    """A text that may be a stranger's, cut to a length."""
    return text if len(text) <= MAX_LENGTH else f"{text[: MAX_LENGTH - 3]}..."
