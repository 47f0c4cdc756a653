"""Several adapters on one model, one in use at a time.

The base model is held once. Each adapter has tensors and modules of its own, also for what it trains of the base (a head, biases) and
for the buffers that training moves, so that going from one to another exchanges pointers and writes no value.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import html
import os
import re
import weakref
from collections.abc import Iterator
from typing import Any, NoReturn

from torch import Tensor, nn

from gift_core.adapter_file import load_adapter, save_adapter
from gift_core.adapter_format import AdapterInfo
from gift_core.distributed import is_sharded
from gift_core.errors import AdapterNameError, AdapterNotFoundError, AdapterWriteError, GiftError, ModelError, StateError
from gift_core.info import Report, table_info
from gift_core.reading import as_path
from gift_core.record import Tuning, find_tuning, tuned_root, tuning_of, turn_of
from gift_core.strategy import FineTuningStrategy, as_strategy, strategy_from_config
from gift_core.switching import Arrangement, Surveyor, switch
from gift_core.tuning import TrainableParameters, disable_fine_tuning, enable_fine_tuning

#: What an adapter may be called: it becomes the name of a file.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_SUFFIX = ".safetensors"
_HEADER = ("in use", "adapter", "strategy", "numbers", "bytes")


@dataclasses.dataclass
class _Adapter:
    name: str
    strategy: FineTuningStrategy | None
    tuning: Tuning
    arrangement: Arrangement


class AdapterSet:
    """Adapters of any strategies on one model, of which one at a time is in use, or none.

    With an adapter in use the model is an ordinary tuned model: it trains, saves, merges and copies as one. With none it is the base
    model: the same objects and flags, computing the same bits.

    - **Optimizers.** Each adapter has parameters of its own (`parameters`), which stay the same objects. An optimizer made for one
      stays valid; a step while another is in use changes nothing of either, because no gradient arrives there (`zero_grad` first if
      one was left). Weight decay, too, needs a gradient.
    - **What you do between switches stays**: hooks, modes, `to()`. What was out of the model during a move or a change of mode catches
      up when it comes back.
    - **torch.compile**: switching between adapters of one strategy and the same shapes does not recompile.
    - **A merged model** is not switched: `unmerge` it first.
    - **Copies** (`copy.deepcopy`, pickle, `torch.save`) of the model are ordinary models with the adapter in use; the set itself is not
      copied.
    - **Threads.** A switch during another thread's forward pass would give it parts of both. Within `using` the set is locked, so that
      threads that compute in this context take turns and are right. `use` alone waits for such a context and protects nobody after it.
      GIFt's own verbs on the model (saving, loading, merging, disabling, its state dict) take turns with both by themselves, and with
      each other; what torch does alone (a copy, ``parameters()``, the state dict of a larger model) needs `using`.
    - **Wrappers** (torch.compile, DDP) come after: make the set of the model itself. DDP reduces the adapter that is in use when DDP is
      made, so that it is made anew after `use`. A sharded model (FSDP2) is not switched.

    Args:
        model: a plain model, or a tuned one, whose adapter then becomes the set's first and stays in use.
        name: what to call the adapter of a tuned model.

    Raises:
        ModelError: if ``model`` is no module.
        StateError: if it is tuned and no ``name`` is given, or belongs to a set already, or its original values were not kept.
    """

    def __init__(self, model: nn.Module, name: str | None = None) -> None:
        if not isinstance(model, nn.Module):
            raise ModelError(f"AdapterSet needs a torch.nn.Module, got {type(model).__name__}: pass the model itself.")
        self._model = model
        self._lock = turn_of(model)
        self._base = Arrangement()
        self._adapters: dict[str, _Adapter] = {}
        self._active: _Adapter | None = None
        self._trains: list[nn.Parameter] = []  # what trains of the base when it is plain
        self._surveyor = Surveyor(model)
        if find_tuning(model) is not None:
            self._take_over(name)
        elif name is not None:
            raise StateError(f"the model is not tuned, so there is no adapter to call {name!r}: add(name, strategy or file).")

    # --- what there is

    @property
    def model(self) -> nn.Module:
        """The model that is switched."""
        return self._model

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters, in the order in which they came."""
        return tuple(self._adapters)

    @property
    def active(self) -> str | None:
        """The adapter in use, None for the base model."""
        return None if self._active is None else self._active.name

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._adapters

    def __len__(self) -> int:
        return len(self._adapters)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def strategy(self, name: str) -> FineTuningStrategy | None:
        """The strategy of an adapter; None if it has no form as data and the set was made from a tuned model."""
        return self._find(name).strategy

    def report(self, name: str) -> Report:
        """What enabling an adapter's strategy did."""
        return self._find(name).tuning.report

    def parameters(self, name: str) -> list[nn.Parameter]:
        """The parameters that train in an adapter, in use or not, in the model's order; its own, and always the same objects.

        They are what ``model.parameters()`` gives while the adapter is in use.

        Raises:
            AdapterNameError: if there is no such adapter.
            StateError: as in `use`, if another one is in use; and within `tuning_disabled`.
        """
        with self._lock:
            if self._find(name) is self._active:
                if tuning_of(self._model).paused:
                    self._refuse_state()
                return list(TrainableParameters(self._model)())
            with self.using(name):
                return self.parameters(name)

    # --- what one does

    def add(
        self, name: str, source: FineTuningStrategy | str | os.PathLike[str], *, check_base: bool = True, trusted: bool = False
    ) -> Report:
        """Add an adapter, all or nothing; what is in use stays in use.

        Args:
            name: letters, digits, ``_``, ``-`` and ``.``.
            source: a strategy or the name of a registered one, for a new adapter, which starts as `enable_fine_tuning` starts it; or a
                path of an adapter file (a `pathlib.Path`, or text that ends in ``.safetensors`` or has a folder in it).
            check_base: as in `load_adapter`.
            trusted: as in `load_adapter`.

        Returns:
            What enabling its strategy did.

        Raises:
            AdapterNameError: if the name is taken or not allowed.
            StateError: if the model is merged or was tuned outside the set.
            GiftError: for any reason that `enable_fine_tuning` or `load_adapter` gives.
        """
        with self._lock:
            self._refuse_state()
            self._refuse_name(name)
            with self._returning():
                self._activate(None)
                trains = self._base_parameters()
                strategy = self._tune(source, check_base, trusted)
                try:
                    self._adopt(name, strategy, trains, keep_objects=False)
                except BaseException:
                    disable_fine_tuning(self._model)
                    raise
            return self.report(name)

    def add_all(self, folder: str | os.PathLike[str], *, check_base: bool = True, trusted: bool = False) -> tuple[str, ...]:
        """Add every adapter file of a folder under its file's name, all or none; ``check_base`` and ``trusted`` as in `load_adapter`.

        Returns:
            The names added.

        Raises:
            AdapterNotFoundError: if there is none.
            GiftError: for any reason that `add` gives.
        """
        files = sorted(as_path(folder).glob(f"*{_SUFFIX}"))
        if not files:
            raise AdapterNotFoundError(f"there is no *{_SUFFIX} in {folder}: name a folder that save_all wrote.")
        done: list[str] = []
        with self._lock:
            try:
                for file in files:
                    self.add(file.name.removesuffix(_SUFFIX), file, check_base=check_base, trusted=trusted)
                    done.append(file.name.removesuffix(_SUFFIX))
            except BaseException:
                for name in done:
                    self.remove(name)
                raise
        return tuple(done)

    def use(self, name: str | None) -> nn.Module:
        """Let the model compute with an adapter, or as the base model with None.

        Returns:
            The model.

        Raises:
            AdapterNameError: if there is no such adapter.
            StateError: if the model is merged, within `tuning_disabled` or `full_state_dict`, or was tuned outside the set.
        """
        with self._lock:
            target = None if name is None else self._find(name)
            self._refuse_state()
            self._activate(target)
        return self._model

    @contextlib.contextmanager
    def using(self, name: str | None) -> Iterator[nn.Module]:
        """`use` within the context, and what was in use before after it. Other threads wait, see the class."""
        with self._lock, self._returning():
            yield self.use(name)

    def remove(self, name: str) -> None:
        """Forget an adapter. If it is in use, the base model is afterwards.

        Raises:
            AdapterNameError: if there is no such adapter.
            StateError: as in `use`, if it is in use.
        """
        with self._lock:
            if self._find(name) is self._active:
                self.use(None)
            self._adapters.pop(name).tuning.governor = None

    def save(self, name: str, path: str | os.PathLike[str]) -> AdapterInfo:
        """Write an adapter into one file, in use or not, as `save_adapter` does.

        Raises:
            AdapterNameError: if there is no such adapter.
            GiftError: for any reason that `save_adapter` gives.
        """
        with self._lock:
            if self._find(name) is self._active:
                return save_adapter(self._model, path)
            with self.using(name):
                return save_adapter(self._model, path)

    def save_all(self, folder: str | os.PathLike[str]) -> dict[str, AdapterInfo]:
        """Write each adapter into ``folder/name.safetensors``; the folder is made if need be. `add_all` is the inverse.

        Each file is written whole or not at all. An error names the adapter; those before it are written.

        Raises:
            AdapterNameError: if two names differ in case alone, which some file systems take for one.
            AdapterWriteError: if the folder cannot be made.
            GiftError: for any reason that `save` gives.
        """
        place = as_path(folder)
        with self._lock:
            same = {name.casefold(): name for name in self.names}
            if apart := [name for name in self.names if same[name.casefold()] != name]:
                raise AdapterNameError(
                    f"{apart[0]!r} and {same[apart[0].casefold()]!r} differ in case alone, and some file systems would take their "
                    "files for one: save each with save(name, path)."
                )
            try:
                place.mkdir(parents=True, exist_ok=True)
            except (OSError, ValueError) as error:  # a ValueError is about the name
                raise AdapterWriteError(f"the folder {folder} could not be made: {error}. Choose another.") from error
            return {name: self.save(name, place / f"{name}{_SUFFIX}") for name in self.names}

    def release(self) -> nn.Module:
        """End the set: the model keeps the adapter in use, as its only one, and the others are forgotten.

        Afterwards it is an ordinary tuned model, which `merge_and_unload` may turn into a plain one, or a plain model if none was in
        use. What the adapter trains of the base stays in the adapter's own objects.

        Returns:
            The model.
        """
        with self._lock:
            self._refuse_state()
            for adapter in self._adapters.values():
                adapter.tuning.governor = None
            self._adapters, self._active = {}, None
        return self._model

    # --- how it looks

    def __repr__(self) -> str:
        names = ", ".join(f"{name} (in use)" if name == self.active else name for name in self.names)
        return f"{type(self).__name__}({type(self._model).__name__}: {names or 'no adapters'})"

    def __str__(self) -> str:
        return f"{self!r}\n{table_info(self._rows(), _HEADER)}"

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in self._rows())
        head = "".join(f"<th>{cell}</th>" for cell in _HEADER)
        return f"<p><code>{html.escape(repr(self))}</code></p><table><tr>{head}</tr>{rows}</table>"

    def _rows(self) -> list[list[str]]:
        return [self._row(adapter) for adapter in self._adapters.values()]

    def _row(self, adapter: _Adapter) -> list[str]:
        own = self._tensors(adapter)
        numbers, size = sum(t.numel() for t in own), sum(t.numel() * t.element_size() for t in own)
        return ["*" if adapter is self._active else "", adapter.name, adapter.tuning.strategy, f"{numbers:,}", f"{size:,}"]

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise StateError(
            "a set of adapters is not copied: copy the model, and save_all(folder) here, add_all(folder) on a set of the copy."
        )

    # --- inside

    def _find(self, name: str) -> _Adapter:
        if name in self:
            return self._adapters[name]
        close = difflib.get_close_matches(str(name), self._adapters, n=3)
        hint = f"did you mean {', '.join(map(repr, close))}?" if close else f"there are: {', '.join(self._adapters) or 'none'}."
        raise AdapterNameError(f"no adapter is called {name!r}; {hint}")

    def _refuse_name(self, name: object) -> None:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise AdapterNameError(
                f"an adapter's name is letters, digits, '_', '-' and '.', up to 100 and no '-' or '.' first, got {name!r}."
            )
        if name in self._adapters:
            raise AdapterNameError(f"there is an adapter called {name!r} already: choose another name, or remove({name!r}) first.")

    def _refuse_state(self) -> None:
        first = next(nn.Module.parameters(self._model), None)
        if first is not None and is_sharded(first):
            raise StateError("the model is sharded, so its adapters cannot be exchanged: release() it, or switch before fully_shard.")
        found, known = find_tuning(self._model), self._active and self._active.tuning
        if found is not known:
            what = "was tuned" if found is not None else "was changed"
            raise StateError(f"the model {what} outside its set of adapters: disable_fine_tuning(model), and add to the set instead.")
        if found is None:
            return
        if found.paused:
            raise StateError("tuning is switched off by tuning_disabled(model) just now: leave that context first.")
        if found.merged:
            raise StateError(f"adapter {self.active!r} is merged into the model: unmerge(model) before you switch.")
        if found.full:
            raise StateError("full_state_dict(model) is active just now: leave that context first.")

    @contextlib.contextmanager
    def _returning(self) -> Iterator[None]:
        before, adapters = self._active, self._adapters
        try:
            yield
        finally:
            is_here = before is None or adapters.get(before.name) is before
            if is_here and self._adapters is adapters:  # release() was not called meanwhile
                self._refuse_state()
                self._activate(before)

    def _activate(self, target: _Adapter | None) -> None:
        source = self._active
        if target is source:
            return
        if source is None:
            self._trains = self._base_parameters()
        try:
            switch(self._base if source is None else source.arrangement, self._base if target is None else target.arrangement)
            self._settle(source, target)
        except BaseException:  # an interrupt may come at any moment; one of the two is in use, whole
            self._settle(source, target)
            raise

    def _settle(self, source: _Adapter | None, target: _Adapter | None) -> None:
        """Let the set agree with what the model shows, and the base train where it is plain."""
        shown = find_tuning(self._model)
        self._active = next((adapter for adapter in (source, target) if adapter is not None and adapter.tuning is shown), None)
        if source is None or target is None:
            for parameter in self._trains:
                parameter.requires_grad_(self._active is None)

    def _base_parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in nn.Module.parameters(self._model) if parameter.requires_grad]

    def _tune(self, source: FineTuningStrategy | str | os.PathLike[str], check_base: bool, trusted: bool) -> FineTuningStrategy | None:
        if isinstance(source, os.PathLike) or (isinstance(source, str) and _is_path(source)):
            info = load_adapter(self._model, source, check_base=check_base, trusted=trusted)
            return _strategy_of(info.strategy)
        strategy = as_strategy(source)
        enable_fine_tuning(self._model, strategy)
        return strategy

    def _adopt(self, name: str, strategy: FineTuningStrategy | None, trains: list[nn.Parameter], *, keep_objects: bool) -> None:
        """Make an adapter of what the model is tuned with."""
        tuning = tuning_of(self._model)
        arrangement = self._surveyor.arrangement(tuning, keep_objects=keep_objects)
        tuning.governor = weakref.ref(self)
        self._trains = trains
        self._active = self._adapters[name] = _Adapter(name, strategy, tuning, arrangement)

    def _take_over(self, name: str | None) -> None:
        tuning = tuning_of(tuned_root(self._model))
        if name is None:
            raise StateError(
                'the model is tuned already: call AdapterSet(model, "a name"), which makes its adapter the first of the set.'
            )
        self._refuse_name(name)
        if tuning.governed_by() is not None:
            raise StateError("the model belongs to a set of adapters already: use that one, or release() it first.")
        if tuning.merged or not tuning.has_originals:
            raise StateError("the model is merged, or its original values were not kept: unmerge(model), or start from the base model.")
        self._adopt(name, _strategy_of(tuning.config), [], keep_objects=True)
        slots = {(id(slot.mapping), slot.key): slot for slot in self._adapters[name].arrangement.slots}
        found = ((slots.get((id(module._parameters), key)), module._parameters.get(key)) for module, key, flag in tuning.flags if flag)
        self._trains = [base for slot, parameter in found if (base := parameter if slot is None else slot.base) is not None]

    def _tensors(self, adapter: _Adapter) -> list[Tensor]:
        """The tensors that are an adapter's own: what it added, and its copies of what it trains of the base."""
        if adapter is self._active:
            adapter.arrangement.read()
        values = adapter.arrangement.values
        modules = [value for value in values if isinstance(value, nn.Module)]
        own = [value for value in values if isinstance(value, Tensor)]
        own += [tensor for module in modules for tensor in (*nn.Module.parameters(module), *module.buffers())]
        base = {id(slot.base) for slot in adapter.arrangement.slots}
        base |= {id(t) for slot in adapter.arrangement.slots if isinstance(slot.base, nn.Module) for t in slot.base.parameters()}
        return list({id(tensor): tensor for tensor in own if id(tensor) not in base}.values())


def _is_path(text: str) -> bool:
    return text.endswith(_SUFFIX) or os.sep in text or "/" in text


def _strategy_of(config: dict[str, Any] | None) -> FineTuningStrategy | None:
    try:
        return None if config is None else strategy_from_config(config)
    except GiftError:
        return None
