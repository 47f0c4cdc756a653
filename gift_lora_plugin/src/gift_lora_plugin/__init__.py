"""LoRA for GIFt: low-rank adaptation of the layers of any model.

What only some programs need (several adapters at once, PEFT's files) is loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gift_lora_plugin.initialization import INITIALIZATIONS
from gift_lora_plugin.lora import LoRA
from gift_lora_plugin.lowrank import CONV_LAYOUTS, add_low_rank, low_rank_update, matrix_shape
from gift_lora_plugin.strategies import (
    LoRAAllFineTuningStrategy,
    LoRAConvFineTuningStrategy,
    LoRALinearFineTuningStrategy,
)

if TYPE_CHECKING:
    from gift_lora_plugin.adapters import LoRAAdapterSet
    from gift_lora_plugin.param_groups import lora_plus_param_groups
    from gift_lora_plugin.peft_files import export_peft, import_peft, load_peft

__version__ = "0.1.0"

__all__ = [
    "CONV_LAYOUTS",
    "INITIALIZATIONS",
    "LoRA",
    "LoRAAdapterSet",
    "LoRAAllFineTuningStrategy",
    "LoRAConvFineTuningStrategy",
    "LoRALinearFineTuningStrategy",
    "add_low_rank",
    "export_peft",
    "import_peft",
    "load_peft",
    "lora_plus_param_groups",
    "low_rank_update",
    "matrix_shape",
]

_MODULE_OF = {
    "LoRAAdapterSet": "adapters",
    "export_peft": "peft_files",
    "import_peft": "peft_files",
    "load_peft": "peft_files",
    "lora_plus_param_groups": "param_groups",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'gift_lora_plugin' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"gift_lora_plugin.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
