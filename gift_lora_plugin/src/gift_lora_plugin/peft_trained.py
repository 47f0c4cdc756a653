"""What an adapter trains beside LoRA, as PEFT saves it: whole modules, and biases."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterator, Mapping

from torch import Tensor, nn

from gift_lora_plugin.peft_layers import places_of
from gift_lora_plugin.peft_source import Adapter, listed

#: PEFT calls a trained module in place of the original; it cannot replace a list.
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
#: PEFT reads a name of a trained module as a regular expression; of these characters only the dot means something else in one.
_PLAIN_NAME = re.compile(r"[\w.\-]+", re.ASCII)


@dataclasses.dataclass(frozen=True)
class InFull:
    """What an adapter holds beside LoRA, in PEFT's terms.

    Attributes:
        bias: ``none``, ``lora_only`` or ``all``.
        modules: full names for ``modules_to_save``.
        tensors: everything that goes into the file, by key without the prefix.
        problems: what has no form.
    """

    bias: str
    modules: list[str]
    tensors: dict[str, Tensor]
    problems: list[str]

    @classmethod
    def of(cls, adapter: Adapter) -> InFull:
        """Sort what is left of an adapter into biases and whole modules."""
        own_biases = {key: f"{name}.base_layer.bias" for name in adapter.sites if (key := f"{name}.bias") in adapter.rest}
        tensors = {theirs: adapter.rest[key] for key, theirs in own_biases.items()}
        left = {key: tensor for key, tensor in adapter.rest.items() if key not in own_biases}
        if adapter.root is None or not left:
            return cls("lora_only" if own_biases else "none", [], tensors, [])
        owners: dict[str, list[str]] = {}
        for key in left:
            owner, _, name = key.rpartition(".")
            owners.setdefault(owner, []).append(name)
        modules = dict(adapter.root.named_modules())
        biases = {owner for owner, names in owners.items() if names == ["bias"] and _has_more(modules[owner])}
        whole = _outermost(owners.keys() - biases)
        loose = {owner for owner in biases if not _lies_in(owner, set(whole))}
        tensors |= {f"{owner}.bias": left[f"{owner}.bias"] for owner in loose}
        problems = [problem for name in whole for problem in _module_problems(adapter, name, modules, set(whole))]
        for name in whole:
            tensors |= {f"{name}.{key}": tensor for key, tensor in modules[name].state_dict().items()} if not problems else {}
        return cls("all" if loose else "lora_only" if own_biases else "none", whole, tensors, problems)


def _outermost(names: Collection[str]) -> list[str]:
    """Those that lie in no other: PEFT trains a copy of a module with all that is in it, and finds nothing inside once more."""
    return sorted(name for name in names if not _lies_in(name, names))


def _lies_in(name: str, others: Collection[str]) -> bool:
    return any(name[:at] in others for at, character in enumerate(name) if character == ".")


def _has_more(module: nn.Module) -> bool:
    return sum(parameter is not None for parameter in module._parameters.values()) > 1


def _module_problems(adapter: Adapter, name: str, modules: Mapping[str, nn.Module], whole: set[str]) -> Iterator[str]:
    if not name:
        yield "the root's own parameters are trained, and PEFT trains modules inside of the model"
        return
    module = modules[name]
    if isinstance(module, _CONTAINERS):
        yield f"{name}: it is a {type(module).__name__}, which PEFT cannot train in full"
    if not _PLAIN_NAME.fullmatch(name):
        yield f"{name!r} is trained in full, and PEFT would read its name as a regular expression"
        return
    inside = [site for site in adapter.sites if re.match(rf"(^|.*\.){name}($|\..*)", site)]
    if inside:
        yield f"{name} is trained in full, and PEFT would leave out {listed(inside)}, whose names hold that name"
    if others := [other for other in modules if other.endswith(name) and other not in whole]:
        yield f"{name} is trained in full, and PEFT would train {listed(others)} too, whose names end alike"
    if _stands_elsewhere(module, modules.values()):
        yield f"{name} is trained in full, and it or a part of it stands in another place too, where PEFT would leave it as it was"
    if tied := sorted(_tied(module, modules)):
        yield f"{name}: its {listed(tied)} is shared with another module, and PEFT would train a copy"
    absent = [key for key in module.state_dict() if f"{name}.{key}" not in adapter.rest]
    if absent and not adapter.knows_base:
        yield f"{name}: PEFT saves the whole module, and the file has no {listed(absent)}: give the model its base weights"


def _stands_elsewhere(module: nn.Module, modules: Collection[nn.Module]) -> bool:
    inside, everywhere = places_of(module.modules()), places_of(modules)
    inside[id(module)] += 1  # the place that PEFT replaces
    return any(everywhere[part] > places for part, places in inside.items())


def _tied(module: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[str]:
    inside = set(map(id, module.modules()))
    elsewhere = {id(parameter) for other in modules.values() if id(other) not in inside for parameter in other._parameters.values()}
    return (name for name, parameter in module.named_parameters() if id(parameter) in elsewhere)
