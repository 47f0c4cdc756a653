"""The refusals that the table does not reach, each with the reason."""

from __future__ import annotations

_PROTOCOL = "Python's protocol for a module's attributes wants this very error, and no GiftError"
_SHARDED = "needs a sharded model, so several processes: tests/distributed/test_sharded.py"
_ABSTRACT = "a base without the function: who writes a method meets it in the first test of it"
_NO_TORCHVISION = "needs a machine without torchvision, or with one that is broken"
_OF_A_CHECK = "is raised for a check of the conformance kit, which catches it"

#: A file, a part of what it raises, and why no case of the table gets there.
NOT_REACHED: list[tuple[str, str, str]] = [
    ("gift_core/__init__.py", "has no attribute", _PROTOCOL),
    ("gift_lora_plugin/__init__.py", "has no attribute", _PROTOCOL),
    ("gift_core/adapter_set.py", "the model is sharded", _SHARDED),
    ("gift_core/distributed.py", "could not {self._what}", _SHARDED),
    ("gift_core/distributed.py", "is sharded already", _SHARDED),
    ("gift_core/merging.py", "is sharded or packed", _SHARDED),
    ("gift_core/reparameterization.py", "is sharded: ", _SHARDED),
    ("gift_core/tuning.py", "parameters of the base move and are sharded", _SHARDED),
    ("gift_core/tuning.py", "is sharded: ", _SHARDED),
    ("gift_core/tuning.py", "is sharded by FSDP already", _SHARDED),
    ("gift_core/reparameterization.py", "NotImplementedError", _ABSTRACT),
    ("gift_lora_plugin/lora.py", "NotImplementedError", _ABSTRACT),
    ("gift_core/cli/models.py", "torchvision is not installed", _NO_TORCHVISION),
    ("gift_core/cli/models.py", "'importing torchvision'", _NO_TORCHVISION),
    ("gift_core/scaffold.py", "the template is missing", "needs an installation from which files were removed"),
    (
        "gift_core/plugins/validation.py",
        "does not follow the specification",
        "the checks before it refuse what pluggy would",
    ),
    ("gift_core/strategy.py", "neither a class nor a function", "what cannot be called is refused when it is registered or loaded"),
    ("gift_core/testing/models.py", "no full support for complex numbers", _OF_A_CHECK),
    ("gift_core/testing/tuning_checks.py", "this failure is the check's own", _OF_A_CHECK),
    ("gift_lora_plugin/demos/comparison.py", "answers differ from the trained model's", "needs a merge or a file that is wrong"),
    (
        "gift_lora_plugin/demos/efficientnet.py",
        "it was not loaded",
        "needs weights that were altered: test_demos.py::test_altered_weights_are_refused",
    ),
    ("gift_lora_plugin/demos/efficientnet.py", "EfficientNet-Lite0 is not installed", "needs a machine without that package"),
    ("gift_lora_plugin/peft_source.py", "cannot be read", "needs a file that is lost between two reads of it"),
]
