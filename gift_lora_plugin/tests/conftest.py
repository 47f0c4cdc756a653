"""What every test of the plugin shares."""

from __future__ import annotations

import importlib
import sys

import torch

# Two threads on two busy cores are several times slower than one.
torch.set_num_threads(1)

# pytest names these files after their folders, gift_lora_plugin.tests.*, and so puts the project's folder, as an empty package, where
# the installed package belongs.
if getattr(sys.modules.get("gift_lora_plugin"), "__file__", None) is None:
    sys.modules.pop("gift_lora_plugin", None)
    importlib.import_module("gift_lora_plugin")
