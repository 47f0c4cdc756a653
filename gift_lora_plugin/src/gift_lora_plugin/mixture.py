"""A model each sample of whose batch has an adapter of its own.

A layer that differs under some adapter is computed by groups: a replica of the layer, as it is under that adapter, gets the rows that
name it. Linear layers, whose update is thin, compute the base's product once for all rows, and add to each its update.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from gift_core.errors import SiteError, StateError
from gift_lora_plugin.batch_calls import BatchCall, batch_calls_of, is_time_first, tensors_in
from gift_lora_plugin.layouts import is_transformers_conv1d
from gift_lora_plugin.lora import LoRA
from gift_lora_plugin.lowrank import drop

#: What of a weight anybody may have, and is a tensor: it tells nothing of the weight's value.
_HARMLESS: tuple[Any, ...] = (vars(torch._C.TensorBase)["grad"].__get__, Tensor.requires_grad_)


def replica(module: nn.Module) -> nn.Module:
    """A layer as it is now, with the same tensors, whatever becomes of the layer itself."""
    copied: nn.Module = type(module).__new__(type(module))
    copied.__dict__.update(module.__dict__)
    for registry in ("_parameters", "_buffers"):
        copied.__dict__[registry] = dict(module.__dict__[registry])
    copied.__dict__["_modules"] = {name: child and replica(child) for name, child in module._modules.items()}
    return copied


class Survey:
    """What the layers of a plain model are made of, and which of them are others under an adapter."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._plain = {
            module: (name, type(module), dict(module._parameters), dict(module._buffers)) for name, module in model.named_modules()
        }
        # attention reads the weight of its output projection itself, so that the two are one layer
        self._holder = {module._modules["out_proj"]: module for module in self._plain if isinstance(module, nn.MultiheadAttention)}

    def replicas(self, adapter: str) -> dict[nn.Module, nn.Module]:
        """Each layer that differs under the adapter that is in use now, with a replica of how it is.

        Raises:
            StateError: if the adapter has modules of its own.
            SiteError: if what differs is no layer but holds some.
        """
        if list(self._model.modules()) != list(self._plain):
            raise StateError(f"adapter {adapter!r} has modules of its own, in which samples cannot differ: use it alone.")
        found = {}
        for module, (name, kind, parameters, buffers) in self._plain.items():
            if _differs(module, kind, parameters, buffers):
                layer = self._holder.get(module, module)
                if layer not in self._holder.values() and any(child is not None for child in layer._modules.values()):
                    raise SiteError(
                        f"{name or 'the root'!r} ({type(module).__name__}) has tensors of its own under {adapter!r} and holds other "
                        "layers, so that its samples cannot be computed apart: compute them one by one, or exclude what it trains."
                    )
                found[layer] = replica(layer)
        return found


def _differs(module: nn.Module, kind: type, parameters: Mapping[str, Any], buffers: Mapping[str, Any]) -> bool:
    if type(module) is not kind or module._buffers.keys() != buffers.keys() or module._parameters.keys() != parameters.keys():
        return True
    if any(value is not parameters[key] for key, value in module._parameters.items()):
        return True
    # an adapter has copies of the statistics that training moves, which may be as they were
    return not all(_equal(value, buffers[key]) for key, value in module._buffers.items())


def _equal(left: Tensor | None, right: Tensor | None) -> bool:
    return left is right or (left is not None and right is not None and torch.equal(left, right))


class _Layer:
    """One layer for the length of a mixture.

    Args:
        place: what it is called.
        module: the layer, plain.
        adapted: rows, and the replica that computes them.
        plain: the rows that the layer itself computes.
        time_first: see `batch_calls_of`.

    Raises:
        SiteError: if its samples cannot be told apart.
    """

    def __init__(
        self, place: str, module: nn.Module, adapted: Sequence[tuple[Tensor, nn.Module]], plain: Tensor, time_first: bool
    ) -> None:
        self.place = place
        self.module = module
        self.forward = module.forward
        self.adapted = adapted
        self.plain = plain
        self.is_thin = all(_adds_thinly(module, layer) for _, layer in adapted)
        is_rerouted = "forward" in vars(module)
        self.alone = adapted[0][1] if len(adapted) == 1 and not (len(plain) or is_rerouted) else None
        if is_rerouted and not self.is_thin:
            raise self.refusal("has a forward that was put on this very object, and bypasses what adapts it")
        try:
            self.ways = batch_calls_of(module, time_first)
        except SiteError as error:
            raise self.refusal(str(error)) from error

    def refusal(self, reason: str) -> SiteError:
        """An error that names the layer."""
        return SiteError(f"{self.place!r} ({type(self.module).__name__}) {reason}: compute the samples one by one, or exclude it.")

    def compute(self, size: int, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> Any:
        """The output for a batch."""
        call = self.ways[0].signature.bind(*arguments, **keywords)
        way = self._way(call, size)
        for _, layer in self.adapted:
            layer.training = self.module.training
        if self.alone is not None:
            return self.alone.forward(*arguments, **keywords)
        if self.is_thin:
            return self._sum(self.forward(*arguments, **keywords), *call.args, axis=way.outputs[0])
        groups = [(rows, layer.forward) for rows, layer in self.adapted]
        try:
            return way.apart(call, [(self.plain, self.forward), *groups] if len(self.plain) else groups)
        except SiteError as error:
            raise self.refusal(str(error)) from error

    def _way(self, call: inspect.BoundArguments, size: int) -> BatchCall:
        misfits = [way.misfit(call, size) for way in self.ways]
        fits = [way for way, misfit in zip(self.ways, misfits, strict=True) if misfit is None]
        if len(fits) == 1 or (fits and self.alone is not None):
            return fits[0]
        found = f"{misfits[0]}" if not fits else "as many steps of time as samples, which cannot be told apart in this model"
        raise StateError(
            f"{self.place!r} is called with {found}, and per_sample names {size} samples: pass as many names as samples"
            f"{', or another number of them' if fits else ''}, compute them one by one, or exclude the layer."
        )

    def _sum(self, output: Tensor, value: Tensor, *, axis: int) -> Tensor:
        groups = [(rows.to(value.device), layer) for rows, layer in self.adapted]
        updates = [_update(layer, value.index_select(axis, rows)).to(output.dtype) for rows, layer in groups]
        return output.index_add(axis, torch.cat([rows for rows, _ in groups]), torch.cat(updates, axis))

    def weights(self) -> Iterator[Tensor]:
        """The tensors of the plain layer in place of which an adapter has others."""
        for plain, adapted in ((self.module, layer) for _, layer in self.adapted):
            for one, other in zip(plain.modules(), adapted.modules(), strict=True):
                for name, parameter in one._parameters.items():
                    is_computed = isinstance(getattr(type(other), name, None), property)
                    if parameter is not None and (is_computed or other._parameters[name] is not parameter):
                        yield parameter


def _adds_thinly(plain: nn.Module, adapted: Any) -> bool:
    """Whether a layer is linear, and all that an adapter does is to add a thin update to its output."""
    if not isinstance(adapted, LoRA) or adapted._parameters.get("bias") is not plain._parameters.get("bias"):
        return False
    is_conv1d, forward = is_transformers_conv1d(plain), type(plain).forward
    is_linear = forward is nn.Linear.forward or (is_conv1d and forward.__module__ == "transformers.pytorch_utils")
    layout: Any = adapted.lora_layout if is_linear else None
    return is_linear and layout.blocks is None and layout.transposed is is_conv1d and not adapted.lora_dora


def _update(adapted: Any, value: Tensor) -> Tensor:
    lora_B, lora_A = adapted.factors()
    dropped = drop(value, adapted.lora_dropout) if adapted.lora_dropout and adapted.training else value
    update: Tensor = F.linear(F.linear(dropped.to(lora_A.dtype), lora_A), lora_B) * adapted.lora_scaling
    return update


class _Watch(TorchFunctionMode):
    """Notices that a weight is read by something else than its layer: it would be the base's for every sample."""

    def __init__(self, places: Mapping[int, str]) -> None:
        super().__init__()
        self._places = places
        self._allowed: list[frozenset[int]] = []

    @contextlib.contextmanager
    def allow(self, own: frozenset[int]) -> Iterator[None]:
        """Let a layer read its own weights."""
        self._allowed.append(own)
        try:
            yield
        finally:
            self._allowed.pop()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function not in _HARMLESS and any(True for _ in tensors_in(result)):
            for tensor in tensors_in((args, kwargs)):
                if id(tensor) in self._places and not any(id(tensor) in own for own in self._allowed):
                    raise StateError(
                        f"the weight of {self._places[id(tensor)]!r} differs by sample here, and something else than the layer "
                        "reads it: compute the samples one by one, or leave per_sample first."
                    )
        return result


class Mixture:
    """The layers of a plain model that differ by sample, and letting the model compute with them.

    Args:
        model: the plain model.
        adapters: of each adapter its rows, ascending, and the replicas that `Survey` took of it.
        size: how many samples there are.

    Raises:
        SiteError: if the samples of a layer cannot be told apart; the message names it.
    """

    def __init__(self, model: nn.Module, adapters: Sequence[tuple[Sequence[int], Mapping[nn.Module, nn.Module]]], size: int) -> None:
        self._size = size
        self._names = {module: name or "the root" for name, module in model.named_modules()}
        self._layers = {}
        time_first = any(map(is_time_first, self._names))
        for module, name in self._names.items():
            if adapted := [(torch.tensor(rows), replicas[module]) for rows, replicas in adapters if module in replicas]:
                taken = {int(row) for rows, _ in adapted for row in rows}
                plain = torch.tensor([row for row in range(size) if row not in taken], dtype=torch.long)
                self._layers[module] = _Layer(name, module, adapted, plain, time_first)
        self._weights = {id(weight): layer.place for layer in self._layers.values() for weight in layer.weights()}

    @contextlib.contextmanager
    def active(self, is_plain: Callable[[], bool]) -> Iterator[None]:
        """Let the model compute with the mixture within the context, as long as ``is_plain()`` says that no adapter is in use."""
        before = {module: vars(module).get("forward") for module in self._names}
        with contextlib.ExitStack() as stack:
            if "torch._dynamo" in sys.modules:
                # what was compiled before knows nothing of the mixture
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(watch := _Watch(self._weights))
            try:
                for module in self._names:
                    if (forward := self._forward(module, watch, is_plain)) is not None:
                        vars(module)["forward"] = forward
                yield
            finally:
                for module, forward in before.items():
                    vars(module).pop("forward", None)
                    if forward is not None:
                        vars(module)["forward"] = forward

    def _forward(self, module: nn.Module, watch: _Watch, is_plain: Callable[[], bool]) -> Callable[..., Any] | None:
        """What stands for the forward of a module meanwhile; None where nothing has to."""
        layer = self._layers.get(module)
        held = nn.Module.parameters(module) if layer else (tensor for tensor in module._parameters.values() if tensor is not None)
        own = frozenset(map(id, held)) & self._weights.keys()
        if not (layer or own or isinstance(module, nn.modules.batchnorm._BatchNorm)):
            return None
        plain = module.forward

        def forward(*arguments: Any, **keywords: Any) -> Any:
            if not is_plain():
                raise StateError("an adapter was put to use within per_sample: leave that context first.")
            _refuse_mixing(self._names[module], module)
            with watch.allow(own):
                return layer.compute(self._size, arguments, keywords) if layer else plain(*arguments, **keywords)

        return forward


def _refuse_mixing(place: str, module: nn.Module) -> None:
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
        raise SiteError(f"{place!r} ({type(module).__name__}) mixes the samples of a batch: call eval() on it first.")
