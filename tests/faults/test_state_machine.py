"""Any sequence of what one does with a tuned model, against plain tensors that know nothing of modules."""

from __future__ import annotations

import copy
import shutil
import tempfile
from pathlib import Path

import torch
from fault_table import RecordFaults
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test
from torch import Tensor, nn

from gift_core import (
    AdapterSet,
    disable_fine_tuning,
    enable_fine_tuning,
    load_adapter,
    merge,
    save_adapter,
    tuning_disabled,
    unmerge,
)
from gift_lora_plugin import LoRALinearFineTuningStrategy

PROFILE = settings(max_examples=80, stateful_step_count=30, derandomize=True, deadline=None, database=None)
RANK, ALPHA, RATE = 2, 4.0, 0.1
NAMES = ("a", "b")
FACTORS = ("0.lora_A", "0.lora_B", "2.lora_A", "2.lora_B")
#: How far an answer or a step may be from the formula's, whose arithmetic is in double precision where the model's is in half.
TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
#: How far one step under autocast may be: its gradients are in half precision, and the rate is small.
AUTOCAST_TOLERANCE = 2e-2
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
#: How an average takes the place of the adapter's numbers: as their memory, by a write that torch counts, by one that it does not.
WAYS = ("pointer", "counted", "past torch")

Factors = dict[str, Tensor]


def precise(tensor: Tensor) -> Tensor:
    """The same numbers, those of half precision as doubles."""
    return tensor.double() if tensor.itemsize < 4 else tensor


def formula(base: Factors, factors: Factors | None, inputs: Tensor) -> Tensor:
    """The network: two affine maps with a tanh between, each weight plus its update written out."""
    hidden = precise(inputs)
    for layer in ("0", "2"):
        weight = precise(base[f"{layer}.weight"])
        if factors is not None:
            weight = weight + ALPHA / RANK * precise(factors[f"{layer}.lora_B"]) @ precise(factors[f"{layer}.lora_A"])
        hidden = hidden @ weight.T + precise(base[f"{layer}.bias"])
        hidden = hidden.tanh() if layer == "0" else hidden
    return hidden


def gradients(base: Factors, factors: Factors, inputs: Tensor) -> Factors:
    """Of the mean square of the output."""
    leaves = {key: precise(tensor).clone().requires_grad_() for key, tensor in factors.items()}
    found = torch.autograd.grad(formula(base, leaves, inputs).square().mean(), list(leaves.values()))
    return dict(zip(leaves, found, strict=True))


class TunedModel(RuleBasedStateMachine):
    """A model with two adapters, or without a set and with one or none, and what it ought to compute."""

    steps = 0

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.expected: dict[str, Factors] = {}
        self.states: list[tuple[Factors, Factors]] = []
        self.files: list[tuple[Path, Factors, Factors]] = []
        self.merged = False
        self.dtype = torch.float32
        self.device = "cpu"

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    @initialize(seed=st.integers(0, 99), has_set=st.booleans())
    def build(self, seed: int, has_set: bool) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).eval()
        self.inputs32 = torch.randn(5, 4)
        self.base = {key: tensor.detach().clone() for key, tensor in self.model.state_dict().items()}
        self.adapters = AdapterSet(self.model) if has_set else None
        self.alone: str | None = None  # the adapter in use where there is no set
        if self.adapters is None:
            self._enable()
            return
        for name in NAMES:
            self._add(name)
        self.adapters.use("a")

    def _add(self, name: str) -> None:
        assert self.adapters is not None
        self.adapters.add(name, LoRALinearFineTuningStrategy(rank=RANK, lora_alpha=ALPHA))
        with self.adapters.using(name):
            self._note_fresh(name)

    def _enable(self) -> None:
        enable_fine_tuning(self.model, LoRALinearFineTuningStrategy(rank=RANK, lora_alpha=ALPHA))
        self.alone = NAMES[0]
        self._note_fresh(NAMES[0])

    def _note_fresh(self, name: str) -> None:
        self.expected[name] = self._own()
        assert not any(tensor.any() for key, tensor in self.expected[name].items() if key.endswith("B"))

    def _own(self) -> Factors:
        held = dict(self.model.named_parameters())
        return {key: held[key].detach().clone() for key in FACTORS}

    @property
    def active(self) -> str | None:
        return self.alone if self.adapters is None else self.adapters.active

    @property
    def inputs(self) -> Tensor:
        return self.inputs32.to(self.device, self.dtype)

    def _here(self, factors: Factors) -> Factors:
        """The same numbers, where the model is and in its type."""
        return {key: tensor.to(self.device, self.dtype) for key, tensor in factors.items()}

    def _is_tuned(self) -> bool:
        return self.active is not None

    def _is_merged(self) -> bool:
        return self.merged

    def _may_switch(self) -> bool:
        return not self.merged and self.adapters is not None

    def _may_train(self) -> bool:
        return self.active is not None and not self.merged

    def _stepped(self) -> None:
        """What one step of SGD makes of the factors in use."""
        assert self.active is not None
        factors = self.expected[self.active]
        slopes = gradients(self.base, factors, self.inputs)
        self.expected[self.active] = {key: (tensor - RATE * slopes[key]).to(self.dtype) for key, tensor in factors.items()}

    def _compare_step(self, autocast: bool = False) -> None:
        """Hold the step that was made against the formula's, and in half precision go on from it, so that roundings do not add up."""
        assert self.active is not None
        held, allowed = self._own(), AUTOCAST_TOLERANCE if autocast else None
        assert all(self._is_close(held[key], tensor, allowed) for key, tensor in self.expected[self.active].items())
        if self.dtype.itemsize < 4 or autocast:
            self.expected[self.active] = held

    def _is_close(self, found: Tensor, wanted: Tensor, allowed: float | None = None) -> bool:
        allowed = allowed or TOLERANCES[self.dtype]
        return torch.allclose(found.double(), wanted.double(), atol=allowed, rtol=allowed)

    def _autocast(self, enabled: bool = True) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=enabled)

    def _backward(self, model: nn.Module, autocast: bool = False) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        optimizer.zero_grad()
        model.train()
        with self._autocast(autocast):
            output = model(self.inputs)
        output.to(self.dtype).square().mean().backward()
        model.eval()
        return optimizer

    # --- what one does

    @rule(name=st.sampled_from([*NAMES, None]))
    @precondition(_may_switch)
    def switch(self, name: str | None) -> None:
        assert self.adapters is not None
        self.adapters.use(name)
        if name is not None:
            # one that is not in use keeps its numbers when the model moves, and takes the model's type when it is used
            self.expected[name] = self._here(self.expected[name])

    @rule(autocast=st.booleans())
    @precondition(_may_train)
    def train_step(self, autocast: bool) -> None:
        autocast &= self.dtype == torch.float32
        optimizer = self._backward(self.model, autocast)
        self._stepped()
        optimizer.step()
        self._compare_step(autocast)

    @rule()
    @precondition(_may_train)
    def step_while_merged(self) -> None:
        optimizer = self._backward(self.model)
        self._stepped()
        merge(self.model)
        self.merged = True
        self.model(self.inputs)
        optimizer.step()
        self._compare_step()

    @rule(autocast=st.booleans())
    @precondition(_may_train)
    def merge(self, autocast: bool) -> None:
        with self._autocast(autocast):
            merge(self.model)
        self.merged = True

    @rule()
    @precondition(_is_merged)
    def unmerge(self) -> None:
        unmerge(self.model)
        self.merged = False

    @rule()
    @precondition(_is_tuned)
    def keep_state(self) -> None:
        assert self.active is not None
        state = {key: tensor.detach().clone() for key, tensor in self.model.state_dict().items()}
        assert sorted(state) == sorted(FACTORS)
        self.states.append((state, dict(self.expected[self.active])))

    @rule(assign=st.booleans(), at=st.integers(0, 9))
    @precondition(lambda self: self.active is not None and self.states)
    def load_state(self, assign: bool, at: int) -> None:
        assert self.active is not None
        state, factors = self.states[at % len(self.states)]
        state = {key: tensor.to(self.device, self.dtype, copy=True) for key, tensor in state.items()}
        self.model.load_state_dict(state, assign=assign)
        self.expected[self.active] = self._here(factors)

    @rule()
    @precondition(_is_tuned)
    def save(self) -> None:
        assert self.active is not None
        path = self.folder / f"{len(self.files)}.safetensors"
        save_adapter(self.model, path)
        self.files.append((path, self.base, dict(self.expected[self.active])))

    def _loadable(self) -> list[tuple[Path, Factors, Factors]]:
        """The files that were saved over this very base; one that went through half precision is another."""
        return [file for file in self.files if all(_same(tensor, file[1][key]) for key, tensor in self.base.items())]

    @rule(at=st.integers(0, 9))
    @precondition(lambda self: self.active is not None and self._loadable())
    def load(self, at: int) -> None:
        assert self.active is not None
        files = self._loadable()
        path, _, factors = files[at % len(files)]
        load_adapter(self.model, path)
        self.expected[self.active] = self._here(factors)

    @rule(way=st.sampled_from(WAYS), weight=st.floats(0.5, 1.0), and_back=st.booleans())
    @precondition(_is_tuned)
    def swap_average_in(self, way: str, weight: float, and_back: bool) -> None:
        assert self.active is not None
        before = self.expected[self.active]
        self._write(way, {key: weight * tensor for key, tensor in before.items()})
        if and_back:
            self.answers_are_the_formula()
            self._write(way, before)

    def _write(self, way: str, factors: Factors) -> None:
        """Let the adapter have other numbers; what torch does not count has to be merged again."""
        assert self.active is not None
        held = dict(self.model.named_parameters())
        for key, tensor in factors.items():
            if way == "pointer":
                held[key].data = tensor.clone()
            elif way == "past torch":
                held[key].data.copy_(tensor)
            else:
                with torch.no_grad():
                    held[key].copy_(tensor)
        self.expected[self.active] = dict(factors)
        if way == "past torch" and self.merged:
            unmerge(self.model)
            merge(self.model)

    @rule()
    @precondition(lambda self: self.dtype == torch.float32)
    def autocast(self) -> None:
        with torch.no_grad(), self._autocast():
            found = self.model(self.inputs)
        assert torch.allclose(found.float(), self._answer(), atol=0.1, rtol=0.1)

    @rule()
    @precondition(_may_train)
    def train_a_copy(self) -> None:
        assert self.active is not None
        twin, before = copy.deepcopy(self.model), self._own()
        own = {tensor.data_ptr() for tensor in _all_tensors(self.model)}
        assert own.isdisjoint(tensor.data_ptr() for tensor in _all_tensors(twin))
        slopes = gradients(self.base, self.expected[self.active], self.inputs)

        self._backward(twin).step()

        held = dict(twin.named_parameters())
        assert all(self._is_close(held[key].detach(), precise(before[key]) - RATE * slopes[key]) for key in FACTORS)
        assert all(_same(tensor, before[key]) for key, tensor in self._own().items())

    @rule(dtype=st.sampled_from(list(TOLERANCES)))
    def move(self, dtype: torch.dtype) -> None:
        self.model.to(dtype)
        self.dtype = dtype
        self._moved()

    @rule(device=st.sampled_from(DEVICES))
    @precondition(lambda self: len(DEVICES) > 1)
    def move_device(self, device: str) -> None:
        self.model.to(device)
        self.device = device
        self._moved()

    def _moved(self) -> None:
        self.base = self._here(self.base)
        if self.active is not None:
            self.expected[self.active] = self._here(self.expected[self.active])

    @rule()
    def disable(self) -> None:
        if self.active is not None:
            disable_fine_tuning(self.model)
        self.merged, self.alone = False, None
        assert self.active is None

    @rule()
    @precondition(lambda self: self.adapters is None and self.alone is None)
    def enable_again(self) -> None:
        self._enable()

    @rule()
    @precondition(_is_tuned)
    def look_at_the_base(self) -> None:
        with tuning_disabled(self.model):
            assert torch.equal(self.model(self.inputs), self._base_answer())

    @rule(name=st.sampled_from(NAMES))
    @precondition(_may_switch)
    def add_again(self, name: str) -> None:
        assert self.adapters is not None
        self.adapters.remove(name)
        del self.expected[name]
        self._add(name)

    # --- what holds at every moment

    def _answer(self) -> Tensor:
        return formula(self.base, None if self.active is None else self.expected[self.active], self.inputs)

    def _base_answer(self) -> Tensor:
        plain = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(self.device, self.dtype).requires_grad_(False)
        plain.load_state_dict(self.base)
        return plain(self.inputs)

    @invariant()
    def base_is_untouched(self) -> None:
        if hasattr(self, "adapters"):
            type(self).steps += 1
            held = {f"{at}.{name}": self.model[int(at)]._parameters[name] for at, _, name in (k.partition(".") for k in self.base)}
            assert all(torch.equal(held[key].detach(), tensor) for key, tensor in self.base.items())  # type: ignore[union-attr]

    @invariant()
    def answers_are_the_formula(self) -> None:
        if hasattr(self, "adapters"):
            with torch.no_grad():
                found = self.model(self.inputs)
            assert found.dtype == self.dtype
            assert self._is_close(found, self._answer())


def _same(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(left.cpu(), right.cpu())


def _all_tensors(model: nn.Module) -> list[Tensor]:
    return [*nn.Module.parameters(model), *model.buffers()]


def test_any_sequence(record_faults: RecordFaults) -> None:
    """After any sequence of verbs the answers are the formula's, and the base's tensors have not moved by a bit."""
    TunedModel.steps = 0

    with torch.random.fork_rng(devices=[]):
        run_state_machine_as_test(TunedModel, settings=PROFILE)

    record_faults("steps of random sequences", TunedModel.steps)
