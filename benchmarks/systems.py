"""The systems under comparison: one class per library, each used as its own documentation says.

Constructing a system enables it on a model. What a library has no verb for raises `Unsupported`, and the tables say so.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from benchmarks.models import is_transposed

#: The adapter's factors by layer: A ``(rank, columns)`` and B ``(rows, rank)``, either with further dimensions behind.
Pairs = dict[str, tuple[nn.Parameter, nn.Parameter]]


class Unsupported(Exception):
    """A library is not installed, or cannot do what is asked; the message says which."""


@dataclass(frozen=True)
class Setting:
    """What every system is asked for.

    Attributes:
        targets: names of the layers to adapt.
        rank: of every layer; alpha is twice as much.
        patterns: the targets as a user of GIFt writes them; None for all layers.
        endings: the targets as a user of PEFT writes them.
        dropout: on the input of the update.
        float32_adapter: keep the adapter in float32 on a base of fewer bits.
    """

    targets: list[str]
    rank: int
    patterns: list[str] | None
    endings: list[str]
    dropout: float = 0.0
    float32_adapter: bool = False

    @property
    def alpha(self) -> int:
        """Numerator of the scaling."""
        return 2 * self.rank


class System:
    """A model with adapters on it, by some library.

    Attributes:
        name: as in the tables.
        module: what is called, in place of the model.
    """

    name: ClassVar[str]
    requires: ClassVar[str]

    def __init__(self, model: nn.Module, setting: Setting) -> None:
        if importlib.util.find_spec(self.requires) is None:
            raise Unsupported(f"{self.requires} is not installed")
        self.setting = setting
        self.module: Any = model
        self.enable(model)

    def enable(self, model: nn.Module) -> None:
        """Put the adapters on."""
        raise NotImplementedError  # a base: each library below has its own

    def pairs(self) -> Pairs:
        """The factors of every target, as they are trained."""
        raise NotImplementedError  # a base: each library below has its own

    def parameters(self) -> list[nn.Parameter]:
        """What an optimizer gets."""
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    def state_dict(self) -> dict[str, Tensor]:
        """The adapter as a state dict."""
        raise self._lacks("state_dict")

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take `state_dict` back."""
        raise self._lacks("load_state_dict")

    def save(self, path: Path) -> None:
        """Write the adapter to ``path``, a name that is free for a file or a folder."""
        raise self._lacks("save")

    def load(self, path: Path) -> None:
        """Read what `save` wrote into the same model."""
        raise self._lacks("load")

    def merge(self) -> None:
        """Compute with merged weights from now on."""
        raise self._lacks("merge")

    def unmerge(self) -> None:
        """Undo `merge`."""
        raise self._lacks("unmerge")

    def unload(self) -> nn.Module:
        """Give a plain model with the tuned weights."""
        raise self._lacks("unload")

    def switcher(self, count: int) -> Callable[[int], object]:
        """Add adapters up to ``count``, and give the function that switches to the i-th."""
        raise self._lacks("switch")

    def _lacks(self, verb: str) -> Unsupported:
        return Unsupported(f"{self.name} has no way to {verb}")


class Gift(System):
    """GIFt, with a convolution's factors laid out as PEFT lays them out, so that both train the same numbers."""

    name = "GIFt"
    requires = "gift_lora_plugin"
    conv_layout: ClassVar[str] = "out_as_h"

    def enable(self, model: nn.Module) -> None:
        import gift_core
        from gift_core.errors import GiftError

        try:
            gift_core.enable_fine_tuning(model, self._strategy())
        except GiftError as error:
            raise Unsupported(_first_line(error)) from error

    def _strategy(self) -> Any:
        from gift_lora_plugin import LoRAAllFineTuningStrategy

        setting = self.setting
        policy: dict[str, Any] = {"adapter_dtype": "float32"} if setting.float32_adapter else {}
        try:
            return LoRAAllFineTuningStrategy(
                rank=setting.rank,
                lora_alpha=setting.alpha,
                lora_dropout=setting.dropout,
                targets=setting.patterns,
                conv_layout=self.conv_layout,
                **policy,
            )
        except TypeError as error:
            raise Unsupported(f"this gift_lora_plugin is too old: {_first_line(error)}") from error

    def pairs(self) -> Pairs:
        layers = {name: self.module.get_submodule(name) for name in self.setting.targets}
        return {name: (_parameter(layer, "lora_A"), _parameter(layer, "lora_B")) for name, layer in layers.items()}

    def state_dict(self) -> dict[str, Tensor]:
        return self.module.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.module.load_state_dict(state)

    def save(self, path: Path) -> None:
        import gift_core

        gift_core.save_adapter(self.module, path)

    def load(self, path: Path) -> None:
        import gift_core

        gift_core.load_adapter(self.module, path)

    def merge(self) -> None:
        import gift_core

        gift_core.merge(self.module)

    def unmerge(self) -> None:
        import gift_core

        gift_core.unmerge(self.module)

    def unload(self) -> nn.Module:
        import gift_core

        return gift_core.merge_and_unload(self.module)

    def switcher(self, count: int) -> Callable[[int], object]:
        import gift_core

        if not hasattr(gift_core, "AdapterSet"):
            raise Unsupported("this gift_core is too old: it has no AdapterSet")
        gift_core.disable_fine_tuning(self.module)
        adapters = gift_core.AdapterSet(self.module)
        names = [f"adapter{i}" for i in range(count)]
        for name in names:
            adapters.add(name, self._strategy())
        return lambda i: adapters.use(names[i])


class GiftBalanced(Gift):
    """GIFt as it is by default: a convolution's first kernel dimension in the rows, which takes fewer numbers for the same rank."""

    name = "GIFt (balanced)"
    conv_layout = "balanced"


class Peft(System):
    """PEFT's LoRA."""

    name = "PEFT"
    requires = "peft"

    def enable(self, model: nn.Module) -> None:
        from peft import get_peft_model

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about Conv1D, which it then handles
            self.module = get_peft_model(model, self._config())

    def _config(self) -> Any:
        from peft import LoraConfig

        setting = self.setting
        return LoraConfig(r=setting.rank, lora_alpha=setting.alpha, lora_dropout=setting.dropout, target_modules=setting.endings)

    def pairs(self) -> Pairs:
        layers: dict[str, Any] = {name: self.module.base_model.model.get_submodule(name) for name in self.setting.targets}
        active = self.module.active_adapter
        return {name: (layer.lora_A[active].weight, layer.lora_B[active].weight) for name, layer in layers.items()}

    def state_dict(self) -> dict[str, Tensor]:
        from peft import get_peft_model_state_dict

        state: dict[str, Tensor] = get_peft_model_state_dict(self.module)
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(self.module, state)

    def save(self, path: Path) -> None:
        self.module.save_pretrained(str(path))

    def load(self, path: Path) -> None:
        from peft.utils.save_and_load import load_peft_weights

        self.load_state_dict(load_peft_weights(str(path), device="cpu"))

    def merge(self) -> None:
        self.module.merge_adapter()

    def unmerge(self) -> None:
        self.module.unmerge_adapter()

    def unload(self) -> nn.Module:
        plain: nn.Module = self.module.merge_and_unload()
        return plain

    def switcher(self, count: int) -> Callable[[int], object]:
        names = ["default", *(f"adapter{i}" for i in range(1, count))]
        for name in names[1:]:
            self.module.add_adapter(name, self._config())
        return lambda i: self.module.set_adapter(names[i])


class LoraLib(System):
    """loralib: its user writes the replacing of layers, which is done here as its README shows."""

    name = "loralib"
    requires = "loralib"

    def enable(self, model: nn.Module) -> None:
        import loralib

        if self.setting.float32_adapter:
            raise Unsupported("loralib's adapters have the dtype of the base")
        for name in self.setting.targets:
            parent, _, child = name.rpartition(".")
            holder = model.get_submodule(parent)
            holder.register_module(child, self._replacement(name, holder.get_submodule(child)))
        loralib.mark_only_lora_as_trainable(model)

    def _replacement(self, name: str, layer: nn.Module) -> nn.Module:
        import loralib

        setting = self.setting
        options: dict[str, Any] = {"r": setting.rank, "lora_alpha": setting.alpha, "lora_dropout": setting.dropout}
        options["bias"] = layer.bias is not None
        if isinstance(layer, nn.Linear):
            new: Any = loralib.Linear(layer.in_features, layer.out_features, **options)
            held: Any = new
        elif isinstance(layer, nn.Conv2d) and len(set(layer.kernel_size)) == 1 and layer.padding_mode == "zeros":
            places = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
            new = loralib.Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size[0], **options, **places)
            held = new.conv
        else:
            raise Unsupported(f"loralib has no working layer for {type(layer).__name__} ({name})")
        held.weight, held.bias = layer.weight, layer.bias
        new.lora_A.data, new.lora_B.data = (factor.to(layer.weight.dtype) for factor in (new.lora_A.data, new.lora_B.data))
        new.train(layer.training)  # it returns nothing
        return new  # type: ignore[no-any-return]

    def pairs(self) -> Pairs:
        layers: dict[str, Any] = {name: self.module.get_submodule(name) for name in self.setting.targets}
        return {name: (layer.lora_A, layer.lora_B) for name, layer in layers.items()}

    def state_dict(self) -> dict[str, Tensor]:
        import loralib

        state: dict[str, Tensor] = loralib.lora_state_dict(self.module)
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.module.load_state_dict(state, strict=False)

    def save(self, path: Path) -> None:
        torch.save(self.state_dict(), path)

    def load(self, path: Path) -> None:
        self.load_state_dict(torch.load(path))

    # merging is what its layers do in eval()
    def merge(self) -> None:
        self.module.eval()

    def unmerge(self) -> None:
        self.module.train()


class Lycoris(System):
    """LyCORIS' LoCon, which is LoRA on Linear layers and convolutions."""

    name = "LyCORIS"
    requires = "lycoris"

    def enable(self, model: nn.Module) -> None:
        if self.setting.dropout or self.setting.float32_adapter:
            raise Unsupported("LyCORIS' dropout is another one, and its adapters have no dtype policy")
        transposed = [name for name in self.setting.targets if is_transposed(model.get_submodule(name))]
        if transposed:
            raise Unsupported(f"LyCORIS does not adapt {type(model.get_submodule(transposed[0])).__name__} ({transposed[0]})")
        self.network = self._network(model)
        dtype = next(model.parameters()).dtype
        model.requires_grad_(False)
        self.network.apply_to()
        self.network.to(dtype)
        missing = len(self.setting.targets) - len(self.network.loras)
        if missing:
            raise Unsupported(f"LyCORIS left {missing} of {len(self.setting.targets)} layers out")

    def _network(self, model: nn.Module) -> Any:
        from lycoris import LycorisNetwork

        logging.getLogger("LyCORIS").setLevel(logging.ERROR)  # after the import, which sets it too
        setting = self.setting
        if setting.patterns is None:
            LycorisNetwork.apply_preset({"target_module": ["Linear"], "target_name": []})
        else:
            LycorisNetwork.apply_preset({"target_module": [], "target_name": setting.targets})
        sizes = {"lora_dim": setting.rank, "conv_lora_dim": setting.rank, "alpha": setting.alpha, "conv_alpha": setting.alpha}
        return LycorisNetwork(model, 1.0, network_module="lora", warn_on_unmatched=False, **sizes)

    def pairs(self) -> Pairs:
        found = {lora.lora_name: lora for lora in self.network.loras}
        loras = {name: found["lycoris_" + name.replace(".", "_")] for name in self.setting.targets}
        return {name: (lora.lora_down.weight, lora.lora_up.weight) for name, lora in loras.items()}

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.network.parameters() if parameter.requires_grad]

    def state_dict(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.network.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.network.load_state_dict(state)

    def save(self, path: Path) -> None:
        self.network.save_weights(f"{path}.safetensors", None, None)

    def load(self, path: Path) -> None:
        self.network.load_weights(f"{path}.safetensors")

    def merge(self) -> None:
        self.network.restore()  # the layers' own forward, which reads the weight that is written next
        self.network.merge_to(1.0)

    def unmerge(self) -> None:
        self.network.merge_to(-1.0)
        for lora in self.network.loras:
            lora.apply_to()


#: GIFt and the libraries that it is compared with.
PEERS: tuple[type[System], ...] = (Gift, Peft, LoraLib, Lycoris)

#: Names of the systems of which no bar speaks.
BESIDE = frozenset(kind.name for kind in (LoraLib, Lycoris, GiftBalanced))


def without_adapter(model: nn.Module, embedding: str | None) -> nn.Module:
    """The limit: a frozen model through which a gradient flows back to its input, and nothing else is computed.

    Args:
        model: frozen here.
        embedding: the layer whose output is the input that gets a gradient; None where the batch itself does.
    """
    model.requires_grad_(False)
    if embedding is not None:
        model.get_submodule(embedding).register_forward_hook(lambda _module, _args, output: output.requires_grad_())
    return model


def _parameter(layer: nn.Module, name: str) -> nn.Parameter:
    found = layer._parameters[name]
    assert found is not None
    return found


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
