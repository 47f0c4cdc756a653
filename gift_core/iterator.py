"""Walking a model, one level at a time or all of it at once, and the positional contracts of a site.

A site is a place in the model that a cap may match: a module under its parent, or a parameter of a module. Nothing here decides
anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from gift_core.errors import ModelError


class ChildModule(NamedTuple):
    """A direct child as `ModuleIterator` yields it."""

    current_name: str
    global_name: str
    class_name: str
    current_module: nn.Module
    has_children: bool


class ModuleSite(NamedTuple):
    """The positional arguments of a check or action on a module. The root has no parent and empty names."""

    parent_module: nn.Module | None
    current_name: str
    global_name: str
    class_name: str
    current_module: nn.Module

    @property
    def full_name(self) -> str:
        """The dotted name of the module below the root."""
        return self.global_name


class ParameterSite(NamedTuple):
    """The positional arguments of a check or action on a parameter: its module's site, then its name and itself."""

    parent_module: nn.Module | None
    current_name: str
    global_name: str
    class_name: str
    current_module: nn.Module
    parameter_name: str
    parameter: nn.Parameter

    @property
    def full_name(self) -> str:
        """The dotted name of the parameter below the root."""
        return join_name(self.global_name, self.parameter_name)


def join_name(parent_name: str, name: str) -> str:
    """Join two parts of a dotted name; an empty parent adds no leading dot."""
    return f"{parent_name}.{name}" if parent_name else name


def walk_modules(root: nn.Module) -> list[tuple[str, nn.Module]]:
    """The root and everything below it with its full name, parents first; a shared module comes under each of its names."""
    found = [("", root)]
    if root._modules:
        try:
            _descend(root, "", found)
        except RecursionError as error:
            raise too_deep(root, found[-1][0]) from error
    return found


def too_deep(root: nn.Module, name: str) -> ModelError:
    """That a model is nested deeper than Python calls functions at ``name``, or goes round in a circle on the way there."""
    module, seen = root, {root: ""}
    parts = name.split(".")
    for place, part in enumerate(parts, 1):
        module, here = module._modules[part], ".".join(parts[:place])  # type: ignore[assignment]
        if (first := seen.setdefault(module, here)) != here:
            holds = f"{here!r} ({type(module).__name__}) is {repr(first) if first else 'the model'} again, which holds it"
            return ModelError(f"{holds}: keep the reference out of the tree of modules, as in a list.")
    start = ".".join(parts[:5])
    return ModelError(f"the modules below {start!r} are nested {len(parts)} deep, more than Python follows: nest them less.")


def _descend(module: nn.Module, prefix: str, found: list[tuple[str, nn.Module]]) -> None:
    for name, child in module._modules.items():
        if child is not None:
            full_name = prefix + name
            found.append((full_name, child))
            if child._modules:
                _descend(child, f"{full_name}.", found)


def named_parameters_below(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters of a module and its children, each under every name it has, as a state dict sees them."""
    if not module._modules:
        return [(name, parameter) for name, parameter in module._parameters.items() if parameter is not None]
    return [
        (join_name(prefix, name), parameter)
        for prefix, holder in walk_modules(module)
        for name, parameter in holder._parameters.items()
        if parameter is not None
    ]


#: A tensor under one of its keys: the key, the module that holds it, its name there, itself.
NamedTensor = tuple[str, nn.Module, str, Tensor]


def tensors_of(modules: list[tuple[str, nn.Module]], registry: str) -> list[NamedTensor]:
    """The tensors in ``_parameters`` or ``_buffers`` of modules that `walk_modules` gave, under each of their keys."""
    return [
        (f"{prefix}.{name}" if prefix else name, module, name, tensor)
        for prefix, module in modules
        for name, tensor in getattr(module, registry).items()
        if tensor is not None
    ]


class Inventory(NamedTuple):
    """What a model holds at one moment, under each of its names: one walk for all who ask."""

    modules: list[tuple[str, nn.Module]]
    parameters: list[NamedTensor]
    buffers: list[NamedTensor]

    @classmethod
    def of(cls, root: nn.Module) -> Inventory:
        """Take stock of a model."""
        modules = walk_modules(root)
        return cls(modules, tensors_of(modules, "_parameters"), tensors_of(modules, "_buffers"))

    @property
    def persistent_buffers(self) -> list[NamedTensor]:
        """The buffers that a state dict holds."""
        return [item for item in self.buffers if item[2] not in item[1]._non_persistent_buffers_set]

    def own_parameters(self) -> list[nn.Parameter]:
        """Every parameter once."""
        parameters: Any = {id(tensor): tensor for _, _, _, tensor in self.parameters}
        return list(parameters.values())

    def ids(self) -> set[int]:
        """The ``id`` of every tensor; good for as long as the inventory is kept."""
        return {id(tensor) for tensors in (self.parameters, self.buffers) for _, _, _, tensor in tensors}


class ModuleIterator:
    """The direct children of a module, with the names a user knows them by.

    Iterating yields ``(current_name, global_name, class_name, current_module, has_children)`` for each child that is not None,
    in the order of registration. It can be iterated again and has a length.

    Args:
        module: the module whose children are wanted.
        parent_name: put before each child's name with a dot; nothing is put before it when empty.

    Raises:
        ModelError: if ``module`` is no `torch.nn.Module`.
    """

    def __init__(self, module: nn.Module, parent_name: str = "") -> None:
        if not isinstance(module, nn.Module):
            raise ModelError(f"ModuleIterator needs a torch.nn.Module, got {type(module).__name__}: pass the model itself.")
        self.module = module
        self.parent_name = parent_name

    def __iter__(self) -> Iterator[ChildModule]:
        for name, child in self.module._modules.items():
            if child is not None:
                has_children = any(grandchild is not None for grandchild in child._modules.values())
                yield ChildModule(name, join_name(self.parent_name, name), type(child).__name__, child, has_children)

    def __len__(self) -> int:
        return sum(child is not None for child in self.module._modules.values())

    def __repr__(self) -> str:
        return f"ModuleIterator({type(self.module).__name__}, parent_name={self.parent_name!r})"
