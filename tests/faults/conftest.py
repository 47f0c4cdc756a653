"""What tests of faults share; the table of what faults did is counted by the conftest.py of the repository."""

from __future__ import annotations

from low_rank import low_rank

__all__ = ["low_rank"]
