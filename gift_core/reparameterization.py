"""In-place adoption: a layer keeps its identity and its keys, and computes with an effective weight.

Adopting changes one thing, the layer's class, to a generated subclass ``(Method, OriginalClass)`` on which each adapted name is a
property that gives the effective weight, while ``_parameters[name]`` keeps the frozen one. Whatever reads ``self.weight`` is
therefore right, hooks and references stay valid, and the base model's keys never change.

Nothing here knows strategies, caps or how a model is walked.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gift_core.errors import SiteError, StateError
from gift_core.structure import added

#: What to do about a model that is sharded already.
ENABLE_FIRST = "call enable_fine_tuning on the whole model, and fully_shard or parallelize_module afterwards (docs/distributed.md)."

#: How an adopted module is spelt: each adapted name with its method, in order of adoption.
Adoptions = tuple[tuple[str, "type[Reparameterization]"], ...]

if TYPE_CHECKING:
    _Mixin = nn.Module  # at run time a method stands in front of the layer's own class and must not bring nn.Module with it
else:
    _Mixin = object


class Reparameterization(_Mixin):
    """Base class of methods that replace a frozen weight by a function of it.

    A method writes two functions. ``self`` is the adopted layer, so that its own attributes (``self.groups``, ``self.training``) can
    be read; what the method registers on ``self`` becomes part of the layer. For a weight of another name than ``weight`` the core
    keeps what is registered apart under a prefix (``weight_ih_l0_lora_A``); the two functions stay the same.

    A method may also override ``forward`` where that beats building the weight. It then serves ``weight`` only, and the property
    must be right alone, because instance-level replacements of ``forward`` bypass the class.
    """

    _adoptions: ClassVar[Adoptions]
    _original_class: ClassVar[type[nn.Module]]
    _is_merged: ClassVar[bool]

    @classmethod
    def specialize(cls, module: nn.Module) -> type[Reparameterization]:
        """Choose the class that adapts this module; a method with a faster ``forward`` for one kind of layer answers with it."""
        return cls

    @classmethod
    def examine(cls, module: nn.Module, name: str, weight: Tensor, **params: Any) -> str | None:
        """Say at planning time, before anything changes, whether ``weight`` can be adapted.

        Args:
            module: the layer, untouched.
            name: the parameter's name in it.
            weight: the frozen weight.
            **params: what `init_parameters` would get.

        Returns:
            A caution that the user should read, or None.

        Raises:
            SiteError: if it cannot; say why, the core adds where.
        """
        return None

    def init_parameters(self, weight: Tensor, *args: Any, **params: Any) -> None:
        """Register the trainable parameters on ``self``. ``weight`` must not be changed."""
        raise NotImplementedError

    def reparameterize(self, weight: Tensor) -> Tensor:
        """Give the effective weight, of the same shape as the frozen ``weight``."""
        raise NotImplementedError

    def unsaved(self) -> str | None:
        """Say what of this layer no adapter file holds, because it is no tensor and not what ``init_parameters`` was told.

        A model with such a layer is not saved, because the file would bring back another one. None if there is nothing, as for most.
        """
        return None

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # a generated class cannot be found by name: name the classes it is made of instead
        return _rebuild, class_parts(type(self)), self.__getstate__()  # type: ignore[no-untyped-call]


def adopt(module: nn.Module, method: type[Reparameterization], names: Iterable[str] = ("weight",), **params: Any) -> None:
    """Let ``method`` take over the named weights of ``module``, in place; they are frozen.

    The names are checked before anything changes. If the method itself fails, the layer is left half adopted; `enable_fine_tuning`
    undoes that, a direct caller discards the layer.

    Args:
        module: a layer; adopted modules may be adopted again for further names.
        method: a subclass of `Reparameterization`.
        names: parameters of the module.
        **params: handed to ``method.init_parameters``.

    Raises:
        SiteError: if a name is no dense floating-point parameter of the module or is adapted already, the class cannot be
            extended, or the method overwrites an attribute the layer already has.
    """
    method = method.specialize(module)
    weights = {name: adoptable_parameter(module, name) for name in names}
    for name, weight in weights.items():
        weight.requires_grad_(False)
        was = adoptions_of(module)
        _set_class(module, original_class_of(module), (*was, (name, method)))
        owner = module if name == "weight" else _scope_class(method)(module, f"{name}_")
        _guarded_init(module, owner, method, weight, params)


def adoptable_parameter(module: nn.Module, name: str) -> nn.Parameter:
    """The parameter behind ``name``, if it can be adapted at all.

    Raises:
        SiteError: if not; the message gives the reason.
    """
    if isinstance(module, torch.jit.ScriptModule):
        raise SiteError("it is scripted: adapt the layer itself, then torch.jit.script what merge_and_unload(model) gives.")
    if name in dict(adoptions_of(module)):
        raise SiteError(f"its {name!r} is adapted already: each weight takes one method, so leave it out.")
    weight = module._parameters.get(name)
    if weight is None:
        if hasattr(nn.utils, "parametrize") and nn.utils.parametrize.is_parametrized(module, name):
            raise SiteError(f"its {name!r} is computed by torch.nn.utils.parametrize: remove the parametrization, or exclude it.")
        own = ", ".join(key for key, value in module._parameters.items() if value is not None) or "none"
        raise SiteError(f"it has no parameter {name!r} (its own: {own}): name one of these, or exclude it.")
    if is_lazy(weight):
        raise SiteError(f"its {name!r} has no shape yet: run one forward pass first.")
    if type(weight).__name__ == "DTensor":
        raise SiteError(f"its {name!r} is sharded: {ENABLE_FIRST}")
    if is_opaque(weight) or weight.layout is not torch.strided:
        raise SiteError(f"its {name!r} is no dense floating-point tensor ({type(weight).__name__}, {weight.dtype}): exclude it.")
    if weight.is_meta:
        raise SiteError(f"its {name!r} is on the meta device: load the base weights before you enable.")
    return weight


def is_opaque(tensor: Tensor) -> bool:
    """Whether a weight must be handed out as it is: FSDP2's or tensor parallel's own handle, or packed by a quantiser."""
    # by name, because importing torch.distributed.tensor costs more than all of GIFt
    return type(tensor).__name__ == "DTensor" or not (tensor.is_floating_point() or tensor.is_complex())


def trust_mesh(module: nn.Module) -> None:
    """Let an adopted module compute with weights that tensor parallelism has sharded, on the mesh that they are on now.

    FSDP2 shards over a mesh of its own and reads the attribute to find its shards, so that those are still handed out as they are.
    """
    weights: list[Any] = [module._parameters[name] for name, _ in adoptions_of(module)]
    if meshes := [weight.device_mesh for weight in weights if type(weight).__name__ == "DTensor"]:
        module._gift_mesh = meshes[0]


def trusts_mesh(module: nn.Module, tensor: Any) -> bool:
    """Whether an adopted module computes with this sharded tensor."""
    mesh = module.__dict__.get("_gift_mesh")
    return mesh is not None and type(tensor).__name__ == "DTensor" and tensor.device_mesh == mesh


def method_name(method: type[Reparameterization]) -> str:
    """What a method is called by users and in files: the name of its first class, whichever of its specializations is at work."""
    return next(cls.__name__ for cls in method.__mro__ if Reparameterization in cls.__bases__)


def is_adopted(module: nn.Module) -> bool:
    """Whether a method has taken over a weight of this very module."""
    return isinstance(module, Reparameterization)


def adoptions_of(module: nn.Module) -> Adoptions:
    """The adapted names of a module and their methods; empty for a plain one."""
    return module._adoptions if isinstance(module, Reparameterization) else ()


def original_class_of(module: nn.Module) -> type[nn.Module]:
    """The class that the module has without GIFt."""
    return module._original_class if isinstance(module, Reparameterization) else type(module)


def set_merged(module: nn.Module, merged: bool) -> None:
    """Switch an adopted module between computing its effective weights and reading them from ``merged_*`` buffers.

    The frozen parameter is kept in either state, so that going back restores its exact bits. A reader on another thread sees the
    right weight at every moment: the buffers are there before the class that reads them, and go after it.
    """
    names = [name for name, _ in adoptions_of(module)]
    if merged:
        for name in names:
            module.register_buffer(_merged_name(name), _detached(module, name), persistent=False)
        module._gift_merge_stamp = _stamp(module)  # type: ignore[assignment]
        _set_class(module, original_class_of(module), adoptions_of(module), merged=True)
    else:
        _set_class(module, original_class_of(module), adoptions_of(module))
        for name in names:
            module._buffers.pop(_merged_name(name), None)
            module._non_persistent_buffers_set.discard(_merged_name(name))
        module.__dict__.pop("_gift_merge_stamp", None)


def refresh_caches(root: nn.Module) -> None:
    """Let plain recurrent layers below ``root`` cache their weights anew, after their own class came back."""
    for module in root.modules():
        if isinstance(module, nn.RNNBase) and not is_adopted(module):
            module._init_flat_weights()


def effective_weight(module: nn.Module, name: str) -> Tensor:
    """Compute the effective weight behind an adopted name from the frozen one, merged or not."""
    method = dict(adoptions_of(module))[name]
    frozen = module._parameters[name]
    assert frozen is not None  # adoption checked it
    owner = module if name == "weight" else _scope_class(method)(module, f"{name}_")
    return _compute(method, owner, frozen, name)


def unsaved_settings(module: nn.Module) -> Iterator[str]:
    """What an adopted module's methods say no adapter file holds, see `Reparameterization.unsaved`."""
    for name, method in adoptions_of(module):
        owner: Any = module if name == "weight" else _scope_class(method)(module, f"{name}_")
        if (reason := method.unsaved(owner)) is not None:
            yield reason


# --- generated classes


def class_parts(cls: type[nn.Module]) -> Any:
    """A class in a form that can be pickled: a generated one as what it is made of, another as it is."""
    return (cls._original_class, cls._adoptions, cls._is_merged) if issubclass(cls, Reparameterization) else cls


def class_from(parts: Any) -> type[nn.Module]:
    """The class that `class_parts` took apart."""
    cls: type[nn.Module] = _adopted_class(*parts) if isinstance(parts, tuple) else parts
    return cls


def _rebuild(original: type[nn.Module], adoptions: Adoptions, merged: bool) -> nn.Module:
    cls = _adopted_class(original, adoptions, merged)
    return cls.__new__(cls)


def _set_class(module: nn.Module, original: type[nn.Module], adoptions: Adoptions, merged: bool = False) -> None:
    try:
        # past nn.Module.__setattr__, which looks the name up among parameters, buffers and children first
        object.__setattr__(module, "__class__", _adopted_class(original, adoptions, merged))
    except TypeError as error:
        raise SiteError(f"its class {original.__name__} cannot be extended ({error}): exclude it.") from error


def _make_adopted_class(original: type[nn.Module], adoptions: Adoptions, merged: bool) -> type[nn.Module]:
    methods = tuple(dict.fromkeys(method for _, method in adoptions))
    body: dict[str, Any] = {
        "_original_class": original,
        "_adoptions": adoptions,
        "_is_merged": merged,
        "__module__": original.__module__,
        "__doc__": original.__doc__,
    }
    if merged:
        body |= _original_behaviour(original, methods)
    for name, method in adoptions:
        body[name] = _merged_property(name) if merged else _effective_property(name, method)
    recurrent = (_RecurrentReads,) if issubclass(original, nn.RNNBase) else ()
    return type(_class_name(methods[0], original), (*methods, *recurrent, original), body)


_adopted_class: Callable[[type[nn.Module], Adoptions, bool], type[nn.Module]] = functools.cache(
    _make_adopted_class  # type: ignore[assignment]
)


def _class_name(method: type[Reparameterization], original: type[nn.Module]) -> str:
    return f"{method_name(method)}{original.__name__}"


def _original_behaviour(original: type[nn.Module], methods: tuple[type, ...]) -> dict[str, Any]:
    # merged weights run through the layer's own code, so that nothing of a method is added to them
    overridden = {
        name
        for method in methods
        for cls in method.__mro__[: method.__mro__.index(Reparameterization)]
        for name in vars(cls)
        if not name.startswith("__") and hasattr(original, name) and name != "extra_repr"
    }
    return {name: getattr(original, name) for name in overridden}


def _effective_property(name: str, method: type[Reparameterization]) -> property:
    scope, prefix = (None, "") if name == "weight" else (_scope_class(method), f"{name}_")

    def get(self: nn.Module) -> Tensor | None:
        frozen = self._parameters[name]
        if frozen is None or (is_opaque(frozen) and not trusts_mesh(self, frozen)):
            return frozen
        return _compute(method, self if scope is None else scope(self, prefix), frozen, name)

    return property(get)


def _merged_property(name: str) -> property:
    key = _merged_name(name)

    def get(self: nn.Module) -> Tensor | None:
        if torch.compiler.is_compiling():
            return self._buffers[key]
        merged, stamp = self._buffers.get(key), self.__dict__.get("_gift_merge_stamp")
        if merged is None or stamp is None:
            return effective_weight(self, name)  # another thread unmerges just now
        if self.training and torch.is_grad_enabled():
            raise StateError("the model is merged, so training would not reach its adapters: call unmerge(model) first.")
        if not _is_current(self, stamp):
            set_merged(self, False)
            set_merged(self, True)
            return self._buffers[key]
        return merged

    return property(get)


def _compute(method: type[Reparameterization], owner: Any, frozen: Tensor, name: str) -> Tensor:
    if _is_traced_symbolically():
        raise SiteError(
            f"torch.fx traces into the layer and would take its {name!r}, which is computed, for a constant: make the layer a leaf of "
            "the tracer, as layers of torch.nn inside a model are, or merge_and_unload(model) first."
        )
    device = frozen.device.type
    try:
        if _is_autocasting(device):
            # a weight is built in its own precision, so that merged and unmerged weights agree under autocast
            with torch.autocast(device, enabled=False):
                weight = method.reparameterize(owner, frozen)
        else:
            weight = method.reparameterize(owner, frozen)
    except AttributeError as error:
        # nn.Module would answer an AttributeError from a property with the frozen parameter, silently
        raise SiteError(
            f"{method.__name__}.reparameterize failed on {name!r}: {error}. Set in init_parameters what it reads."
        ) from error
    if weight.shape != frozen.shape:
        raise SiteError(
            f"{method.__name__}.reparameterize gave {tuple(weight.shape)} for {name!r} of {tuple(frozen.shape)}: return that shape."
        )
    return weight if weight.dtype == frozen.dtype else weight.to(frozen.dtype)


def _is_autocasting(device: str) -> bool:
    # a device that autocast does not know must not be asked, and torch 2.6 cannot compile the question whether it knows one
    knows = device != "meta" and (torch.compiler.is_compiling() or torch.amp.is_autocast_available(device))
    return knows and torch.is_autocast_enabled(device)


#: Private to torch, and of another name in its older versions.
_fx_traces: Callable[[], bool] = (
    getattr(torch.fx._symbolic_trace, "is_fx_symbolic_tracing", None) or torch.fx._symbolic_trace.is_fx_tracing
)


def _is_traced_symbolically() -> bool:
    """Whether `torch.fx.symbolic_trace` or the like runs, and not what traces the operators themselves, as ``make_fx`` does."""
    if torch.compiler.is_compiling() or not _fx_traces():
        return False
    from torch.fx.experimental.proxy_tensor import get_proxy_mode  # not loaded by every torch

    return get_proxy_mode() is None


def _merged_name(name: str) -> str:
    return f"merged_{name}"


def _stamp(module: nn.Module) -> tuple[tuple[nn.Parameter, Tensor, int], ...]:
    # what was read when merging; the tensors are kept, so that no later one can have their id or address
    parameters = [parameter for parameter in module._parameters.values() if parameter is not None]
    return tuple((parameter, parameter.detach(), _version(parameter)) for parameter in parameters)


def _is_current(module: nn.Module, then: tuple[tuple[nn.Parameter, Tensor, int], ...]) -> bool:
    """Whether nothing was written or replaced since merging: by an optimizer, a load, a move, another adapter's tensors."""
    now = [parameter for parameter in module._parameters.values() if parameter is not None]
    return len(now) == len(then) and all(
        parameter is read and version == _version(parameter) and _address(parameter) == _address(data)
        for parameter, (read, data, version) in zip(now, then, strict=True)
    )


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _address(tensor: Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:
        return 0  # a tensor of torch.func has no memory of its own


def _detached(module: nn.Module, name: str) -> Tensor:
    # a buffer made in inference mode could never take part in autograd again
    with torch.inference_mode(False), torch.no_grad():
        weight = effective_weight(module, name)
        return weight.clone() if weight is module._parameters[name] else weight.detach()


class _RecurrentReads(_Mixin):
    """Lets a recurrent layer read its weights by name at each use, instead of the list it caches."""

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        return [getattr(self, name, None) for name in self._flat_weights_names]  # type: ignore[union-attr]

    def _update_flat_weights(self) -> None:
        """Nothing is cached, so nothing is out of date."""

    _flat_weight_refs: list[Any]

    def _init_flat_weights(self) -> None:
        self._flat_weight_refs = []

    def flatten_parameters(self) -> None:
        """The effective weights are new tensors each time; cuDNN packs them as it needs them."""

    def __getstate__(self) -> dict[str, Any]:
        # the cached list belongs to the original class: it must name the frozen leaves, never effective weights
        state = dict(self.__dict__)
        state.pop("_flat_weight_refs", None)
        state["_flat_weights"] = [self._parameters.get(name) for name in self._flat_weights_names]  # type: ignore[union-attr]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__setstate__(self, state)
        self._flat_weight_refs = []


# --- scopes: what a method registers for a weight that is not called "weight"


class _Scope:
    """The module as one adapted name sees it: what is set lands on the module under a prefix, and is found there again."""

    def __init__(self, module: nn.Module, prefix: str) -> None:
        object.__setattr__(self, "_module", module)
        object.__setattr__(self, "_prefix", prefix)

    def __getattr__(self, name: str) -> Any:
        module, scoped = self._module, self._prefix + name
        for registry in (module._parameters, module._buffers, module._modules, module.__dict__):
            if scoped in registry:
                return registry[scoped]
        return getattr(module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if hasattr(type(self), name):
            raise SiteError(f"the method sets {name!r} on itself and on its class: name one of them differently.")
        setattr(self._module, self._prefix + name, value)

    def register_parameter(self, name: str, value: nn.Parameter | None) -> None:
        self._module.register_parameter(self._prefix + name, value)

    def register_buffer(self, name: str, value: Tensor | None, persistent: bool = True) -> None:
        self._module.register_buffer(self._prefix + name, value, persistent)

    def register_module(self, name: str, value: nn.Module | None) -> None:
        self._module.register_module(self._prefix + name, value)

    add_module = register_module


def adopted_weight(owner: Any) -> tuple[nn.Module, str]:
    """The layer and the name of its parameter that ``self`` stands for in a method's functions.

    A method that reads some weights differently from others (the gates of an LSTM, the projections of attention) asks here.
    """
    return (owner._module, owner._prefix[:-1]) if isinstance(owner, _Scope) else (owner, "weight")


def _make_scope_class(method: type[Reparameterization]) -> Callable[[nn.Module, str], Any]:
    return type(f"{method.__name__}Scope", (_Scope, method), {})


_scope_class: Callable[[type[Reparameterization]], Callable[[nn.Module, str], Any]] = functools.cache(
    _make_scope_class  # type: ignore[assignment]
)


def _guarded_init(
    module: nn.Module, owner: Any, method: type[Reparameterization], weight: nn.Parameter, params: dict[str, Any]
) -> None:
    # where nothing is, nothing can be overwritten
    places: list[Any] = [place for place in (module.__dict__, module._parameters, module._buffers, module._modules) if place]
    before = [place.copy() for place in places]
    method.init_parameters(owner, weight.detach(), **params)
    new = [added(old, now) for old, now in zip(before, places, strict=True)]
    names = module.__dict__.keys() - before[0].keys() if new[0] is None else new[0]
    overwritten = [name for name in names if hasattr(original_class_of(module), name)]
    if None in new:
        overwritten += [name for old, now in zip(before, places, strict=True) for name in old if now.get(name) is not old[name]]
    if overwritten:
        raise SiteError(f"{method.__name__} overwrites {', '.join(sorted(overwritten))} of the layer: choose other names.")
