"""PEFT's adapter files, ``adapter_config.json`` and ``adapter_model.safetensors``, read and written without PEFT.

`export_peft` writes them, `load_peft` tunes a model with them, `import_peft` makes an adapter file of them. `PEFT` is what the command
``gift convert`` finds under the entry-point group ``gift.formats``.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from gift_core.errors import StateError
from gift_lora_plugin.peft_directory import Conversion
from gift_lora_plugin.peft_export import export_peft, export_with_warnings
from gift_lora_plugin.peft_import import import_peft, load_peft

__all__ = ["PEFT", "Conversion", "PeftFormat", "export_peft", "import_peft", "load_peft"]


class PeftFormat:
    """PEFT's files as a format of ``gift convert``."""

    plugin_api = 1

    def export(
        self,
        adapter: Path,
        target: Path,
        *,
        model: nn.Module | None = None,
        force: bool = False,
        base_model: str | None = None,
        task_type: str | None = None,
    ) -> dict[str, Any]:
        """Write the adapter file as a folder of PEFT's files; see `export_peft`."""
        # the command shows every note
        done, _ = export_with_warnings(adapter, target, model=model, base_model=base_model, task_type=task_type, force=force)
        return done.to_dict()

    def import_(
        self, source: Path, adapter: Path, *, model: nn.Module | None = None, force: bool = False, ignore: str | Iterable[str] = ()
    ) -> dict[str, Any]:
        """Write a folder of PEFT's files as an adapter file; see `import_peft`."""
        if model is None:
            raise StateError(
                "an adapter file holds digests of its base model, so that reading PEFT's files needs it: name it with --model."
            )
        return import_peft(source, adapter, model, ignore=ignore, force=force).to_dict()


PEFT = PeftFormat()
