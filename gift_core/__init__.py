"""GIFt: adapt any pre-trained PyTorch model by training a small part of it.

The public names below are loaded on first use, so that ``import gift_core`` and the listing commands need no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "adapter_file": ("load_adapter", "read_adapter_info", "save_adapter"),
    "adapter_format": ("AdapterInfo",),
    "atomic": ("atomic_path",),
    "adapter_set": ("AdapterSet",),
    "capabilities": ("Capabilities",),
    "caps": ("Cap", "Caps"),
    "distributed": ("plain_layers",),
    "errors": ("GiftError", "GiftWarning"),
    "info": ("Report", "collect_trainable_parameters", "table_info"),
    "iterator": ("ModuleIterator", "ModuleSite", "ParameterSite"),
    "merging": ("merge", "merge_and_unload", "merged", "unmerge"),
    "optimizers": ("OptimizerReport", "check_optimizer"),
    "plan": ("TuningPlan", "plan_fine_tuning"),
    "plugins": ("isolated_plugins", "plugin_settings", "register_plugin", "register_strategy"),
    "plugins.hooks": ("hookimpl",),
    "reading": ("as_path", "open_regular"),
    "reparameterization": ("Reparameterization", "adopt", "adopted_weight"),
    "state_dict": ("full_state_dict",),
    "strategy": ("FineTuningStrategy", "FullFineTuningStrategy", "merge_strategies", "strategy_from_config"),
    "strategy_file": ("strategy_from_file",),
    "tuning": ("disable_fine_tuning", "enable_fine_tuning", "tuning_disabled"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

if TYPE_CHECKING:
    from gift_core.adapter_file import load_adapter, read_adapter_info, save_adapter
    from gift_core.adapter_format import AdapterInfo
    from gift_core.adapter_set import AdapterSet
    from gift_core.atomic import atomic_path
    from gift_core.capabilities import Capabilities
    from gift_core.caps import Cap, Caps
    from gift_core.distributed import plain_layers
    from gift_core.errors import GiftError, GiftWarning
    from gift_core.info import Report, collect_trainable_parameters, table_info
    from gift_core.iterator import ModuleIterator, ModuleSite, ParameterSite
    from gift_core.merging import merge, merge_and_unload, merged, unmerge
    from gift_core.optimizers import OptimizerReport, check_optimizer
    from gift_core.plan import TuningPlan, plan_fine_tuning
    from gift_core.plugins import isolated_plugins, plugin_settings, register_plugin, register_strategy
    from gift_core.plugins.hooks import hookimpl
    from gift_core.reading import as_path, open_regular
    from gift_core.reparameterization import Reparameterization, adopt, adopted_weight
    from gift_core.state_dict import full_state_dict
    from gift_core.strategy import FineTuningStrategy, FullFineTuningStrategy, merge_strategies, strategy_from_config
    from gift_core.strategy_file import strategy_from_file
    from gift_core.tuning import disable_fine_tuning, enable_fine_tuning, tuning_disabled

__all__ = [
    "AdapterInfo",
    "AdapterSet",
    "Cap",
    "Capabilities",
    "Caps",
    "FineTuningStrategy",
    "FullFineTuningStrategy",
    "GiftError",
    "GiftWarning",
    "ModuleIterator",
    "ModuleSite",
    "OptimizerReport",
    "ParameterSite",
    "Reparameterization",
    "Report",
    "TuningPlan",
    "__version__",
    "adopt",
    "adopted_weight",
    "as_path",
    "atomic_path",
    "check_optimizer",
    "collect_trainable_parameters",
    "disable_fine_tuning",
    "enable_fine_tuning",
    "full_state_dict",
    "hookimpl",
    "isolated_plugins",
    "load_adapter",
    "merge",
    "merge_and_unload",
    "merge_strategies",
    "merged",
    "open_regular",
    "plain_layers",
    "plan_fine_tuning",
    "plugin_settings",
    "read_adapter_info",
    "register_plugin",
    "register_strategy",
    "save_adapter",
    "strategy_from_config",
    "strategy_from_file",
    "table_info",
    "tuning_disabled",
    "unmerge",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'gift_core' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"gift_core.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
