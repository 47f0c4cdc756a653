"""What every test of the core shares."""

from __future__ import annotations

import torch
from fake_distributions import install

__all__ = ["install"]

# Two threads on two busy cores are several times slower than one.
torch.set_num_threads(1)
