"""A strategy whose module draws a random number when it is imported, and says so."""

from __future__ import annotations

import torch

from broken_strategies.healthy import Healthy

_DRAWN = torch.rand(1)


class LoudImport(Healthy):
    """Is fine in itself; its module is not."""


BROKEN = {"import_is_quiet": (LoudImport, "torch's random state")}
