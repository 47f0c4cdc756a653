"""LoRA for GIFt: low-rank adaptation of any model's Linear layers and convolutions."""

from gift_lora_plugin.adapters import LoRAAdapterSet
from gift_lora_plugin.lora import LoRA
from gift_lora_plugin.lowrank import CONV_LAYOUTS, add_low_rank, low_rank_update, matrix_shape
from gift_lora_plugin.peft_files import export_peft, import_peft, load_peft
from gift_lora_plugin.strategies import (
    LoRAAllFineTuningStrategy,
    LoRAConvFineTuningStrategy,
    LoRALinearFineTuningStrategy,
)

__version__ = "0.1.0"

__all__ = [
    "CONV_LAYOUTS",
    "LoRA",
    "LoRAAdapterSet",
    "LoRAAllFineTuningStrategy",
    "LoRAConvFineTuningStrategy",
    "LoRALinearFineTuningStrategy",
    "add_low_rank",
    "export_peft",
    "import_peft",
    "load_peft",
    "low_rank_update",
    "matrix_shape",
]
