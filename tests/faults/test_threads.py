"""Threads that compute while another changes the model, and steps that fail half way."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_table import RecordFaults
from low_rank import LowRankStrategy
from models import cnn, input_for, mlp, train
from safetensors.torch import load_file
from torch import Tensor, nn

from gift_core import (
    AdapterSet,
    FineTuningStrategy,
    disable_fine_tuning,
    enable_fine_tuning,
    full_state_dict,
    load_adapter,
    merge,
    save_adapter,
    tuning_disabled,
    unmerge,
)
from gift_core.errors import ActionError, StateError
from gift_core.factories import is_instance, keep_trainable
from gift_lora_plugin import LoRAAllFineTuningStrategy

RUNS = 300
STRATEGIES = {"plugin": LoRAAllFineTuningStrategy, "plain": LowRankStrategy}

strategies = pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=list(STRATEGIES))
crowds = pytest.mark.parametrize("crowd", [2, 4])


@pytest.fixture(autouse=True)
def _eager_switching() -> Iterator[None]:
    """Let threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.fixture(autouse=True)
def _seeded(low_rank: type[LowRankStrategy]) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        yield


class Readers:
    """Threads that compute with the model, each `RUNS` times, and count what was wrong."""

    def __init__(self, crowd: int, answer: Callable[[int], bool]) -> None:
        self.wrong = 0
        self.errors: list[BaseException] = []
        self.answer = answer
        self.threads = [threading.Thread(target=self._work, args=(number,)) for number in range(crowd)]
        for thread in self.threads:
            thread.start()

    def _work(self, number: int) -> None:
        try:
            for _ in range(RUNS):
                if not self.answer(number):
                    self.wrong += 1
        except BaseException as error:
            self.errors.append(error)

    def disturbed_by(self, deed: Callable[[], Any]) -> int:
        """Do it again and again until all are done; gives how often."""
        done = 0
        while any(thread.is_alive() for thread in self.threads):
            deed()
            done += 1
        for thread in self.threads:
            thread.join()
        return done


def close(found: Tensor, expected: Tensor) -> bool:
    """The same within rounding: merged weights are rounded at another place."""
    return torch.allclose(found, expected, atol=1e-5, rtol=1e-5)


def tuned(strategy: type[FineTuningStrategy]) -> tuple[nn.Module, Tensor, Tensor]:
    """A trained model in evaluation mode, an input, and the answer."""
    model, inputs = mlp(), input_for(mlp)
    enable_fine_tuning(model, strategy(rank=2))  # type: ignore[call-arg]
    train(model, inputs)
    with torch.no_grad():
        return model.eval(), inputs, model(inputs)


@strategies
@crowds
@pytest.mark.parametrize("deed", ["merge", "save", "save and merge"])
def test_reading_while_another_works(
    strategy: type[FineTuningStrategy], crowd: int, deed: str, tmp_path: Path, record_faults: RecordFaults
) -> None:
    """Threads that evaluate a model get its answer, while another merges and unmerges or saves it; so do readers of the files."""
    model, inputs, expected = tuned(strategy)

    def work() -> None:
        if "merge" in deed:
            merge(model)
        if "save" in deed:
            save_adapter(model, tmp_path / "adapter.safetensors")
        if "merge" in deed:
            unmerge(model)

    def answer(_: int) -> bool:
        with torch.no_grad():
            return close(model(inputs), expected)

    readers = Readers(crowd, answer)
    assert readers.disturbed_by(work)

    record_faults(f"answers while another does {deed}", crowd * RUNS, silent=readers.wrong, foreign=len(readers.errors))
    assert close(model(inputs), expected)


@strategies
@crowds
def test_reading_while_another_switches(strategy: type[FineTuningStrategy], crowd: int, record_faults: RecordFaults) -> None:
    """Threads that compute within `using` get the answer of the adapter that they name, whatever others use meanwhile."""
    model, inputs = mlp(), input_for(mlp)
    adapters = AdapterSet(model)
    expected: dict[str | None, Tensor] = {}
    for name in ("a", "b"):
        adapters.add(name, strategy(rank=2))  # type: ignore[call-arg]
        adapters.use(name)
        train(model, inputs, steps=2 if name == "a" else 5)
    model.eval()
    for name in (None, "a", "b"):
        with adapters.using(name), torch.no_grad():
            expected[name] = model(inputs)
    names = [None, "a", "b"]

    def answer(number: int) -> bool:
        name = names[number % 3]
        with adapters.using(name), torch.no_grad():
            return close(model(inputs), expected[name])

    def turn() -> None:
        for name in names:
            adapters.use(name)

    readers = Readers(crowd, answer)
    assert readers.disturbed_by(turn)

    assert not close(expected["a"], expected["b"])
    record_faults("answers while another switches", crowd * RUNS, silent=readers.wrong, foreign=len(readers.errors))


def two_of_one_number_each(strategy: type[FineTuningStrategy]) -> AdapterSet:
    """Adapters of many layers: all numbers of ``a`` are 1, and of ``b`` 2."""
    adapters = AdapterSet(nn.Sequential(*[nn.Linear(4, 4) for _ in range(20)]))
    for name, number in (("a", 1.0), ("b", 2.0)):
        adapters.add(name, strategy(rank=1))  # type: ignore[call-arg]
        for parameter in adapters.parameters(name):
            torch.nn.init.constant_(parameter, number)
    adapters.use("a")
    return adapters


def _save(model: nn.Module, file: Path) -> Iterable[Tensor]:
    save_adapter(model, file)
    return load_file(file).values()


def _load(model: nn.Module, file: Path) -> Iterable[Tensor]:
    load_adapter(model, file.with_name("threes"))
    return ()


def _state(model: nn.Module, file: Path) -> Iterable[Tensor]:
    return model.state_dict().values()


def _load_state(model: nn.Module, file: Path) -> Iterable[Tensor]:
    model.load_state_dict(load_file(file.with_name("threes")))
    return ()


def _merge(model: nn.Module, file: Path) -> Iterable[Tensor]:
    merge(model)
    states = {type(layer)._is_merged for layer in model}  # type: ignore[attr-defined]
    unmerge(model)
    return [torch.tensor(float(state)) for state in states]


def _pause(model: nn.Module, file: Path) -> Iterable[Tensor]:
    with tuning_disabled(model):
        return [torch.tensor(float(type(layer) is nn.Linear)) for layer in model]  # type: ignore[attr-defined]


@strategies
@pytest.mark.parametrize("verb", [_save, _load, _state, _load_state, _merge, _pause], ids=lambda verb: verb.__name__[1:])
def test_verbs_while_another_switches(
    strategy: type[FineTuningStrategy], verb: Callable[[Any, Path], Iterable[Tensor]], tmp_path: Path, record_faults: RecordFaults
) -> None:
    """A verb on the model of a set sees, and writes, one adapter whole, whatever another thread puts to use meanwhile."""
    adapters = two_of_one_number_each(strategy)
    model, rounds, mixed = adapters.model, 60, 0
    stop, errors = threading.Event(), []
    with adapters.using("a"):
        for parameter in adapters.parameters("a"):
            torch.nn.init.constant_(parameter, 3.0)
        save_adapter(model, tmp_path / "threes")
        for parameter in adapters.parameters("a"):
            torch.nn.init.constant_(parameter, 1.0)

    def turn() -> None:
        while not stop.is_set():
            for name in "ba":
                try:
                    adapters.use(name)
                except StateError as error:  # merged, or within tuning_disabled
                    if "unmerge(model)" not in str(error) and "leave that context" not in str(error):
                        errors.append(error)

    thread = threading.Thread(target=turn)
    thread.start()
    try:
        for _ in range(rounds):
            mixed += len({float(tensor.flatten()[0]) for tensor in verb(model, tmp_path / "file")}) > 1
    finally:
        stop.set()
        thread.join()
    for name in "ab":
        mixed += len({float(parameter.detach()[0, 0]) for parameter in adapters.parameters(name)}) > 1

    record_faults(f"{verb.__name__[1:]} while another switches", rounds, half=mixed, foreign=len(errors))


def test_a_set_in_use_elsewhere_is_waited_for() -> None:
    """While a thread computes within `using`, a verb of another waits, through a wrapper too, and then sees what is in use after it."""
    adapters = two_of_one_number_each(LowRankStrategy)
    found: list[float] = []

    def work() -> None:
        with full_state_dict(nn.Sequential(adapters.model)):
            found.append(float(adapters.parameters("a")[0].detach()[0, 0]))

    with adapters.using("b"):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join(0.2)
        waited = thread.is_alive()
    thread.join(60)

    assert waited
    assert found == [1.0]


def test_enabling_at_the_same_time_is_refused() -> None:
    """While one thread enables a model, another that tries is told to wait, and the first ends as if alone."""
    model = mlp()
    inside, go_on = threading.Event(), threading.Event()
    failures: list[BaseException] = []

    def slow(*site: Any) -> None:
        inside.set()
        assert go_on.wait(60)

    def first() -> None:
        try:
            enable_fine_tuning(model, FineTuningStrategy([(is_instance("Linear"), slow)]))
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=first)
    thread.start()
    assert inside.wait(60)
    with pytest.raises(StateError, match="being enabled just now: wait"):
        enable_fine_tuning(model, LowRankStrategy())
    go_on.set()
    thread.join()

    assert not failures
    with pytest.raises(StateError, match="is tuned already"):
        enable_fine_tuning(model, LowRankStrategy())


#: Who else is enabled while a model is, made of that model.
OVERLAPPING: dict[str, Callable[[Any], nn.Module]] = {
    "a part": lambda model: model[2],
    "one around it": lambda model: nn.Sequential(nn.Linear(2, 2), model),
    "one that shares a layer": lambda model: nn.Sequential(nn.Linear(4, 16), model[0]),
}


@pytest.mark.parametrize("overlap", OVERLAPPING.values(), ids=list(OVERLAPPING))
@pytest.mark.parametrize("fails", [False, True])
def test_enabling_what_overlaps_is_refused(overlap: Callable[[Any], nn.Module], fails: bool) -> None:
    """While a model is being enabled, so can be nothing that shares a module with it; whether that ends well or not, later all can."""
    model: Any = mlp()
    other = overlap(model)
    refused: list[BaseException] = []

    def meanwhile() -> None:
        try:
            enable_fine_tuning(other, LowRankStrategy(rank=1))
        except BaseException as error:
            refused.append(error)

    def act(parent: Any, name: str, full: str, kind: str, layer: nn.Module) -> None:
        thread = threading.Thread(target=meanwhile)
        thread.start()
        thread.join(60)
        if fails:
            raise ValueError("on purpose")

    strategy = FineTuningStrategy([(lambda *site: site[2] == "2", act)])
    if fails:
        with pytest.raises(ActionError, match="on purpose"):
            enable_fine_tuning(model, strategy)
    else:
        enable_fine_tuning(model, strategy)
        disable_fine_tuning(model)

    assert [type(error) for error in refused] == [StateError]
    assert "being enabled just now: wait" in str(refused[0])
    enable_fine_tuning(other, LowRankStrategy(rank=1))


def test_enabling_from_within_is_refused() -> None:
    """An action that enables the model once more is refused, and all is undone."""
    model = mlp()

    def again(*site: Any) -> None:
        enable_fine_tuning(model, LowRankStrategy())

    with pytest.raises(StateError, match="being enabled just now"):
        enable_fine_tuning(model, FineTuningStrategy([(is_instance("Linear"), again)]))

    enable_fine_tuning(model, LowRankStrategy())


@crowds
def test_one_of_many_enables(crowd: int, record_faults: RecordFaults) -> None:
    """Of threads that enable one model at once, one does, and the others get a StateError; the model computes as one tuned once."""
    rounds, wins, refusals, foreign = 40, 0, 0, 0

    for _ in range(rounds):
        model, outcomes = mlp(), []
        gate = threading.Barrier(crowd)

        def work(model: nn.Module = model, outcomes: list[Any] = outcomes, gate: threading.Barrier = gate) -> None:
            gate.wait(60)
            try:
                outcomes.append(enable_fine_tuning(model, LowRankStrategy(rank=2)))
            except BaseException as error:
                outcomes.append(error)

        threads = [threading.Thread(target=work) for _ in range(crowd)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        refused = sum(isinstance(outcome, StateError) for outcome in outcomes)
        refusals += refused
        wins += sum(not isinstance(outcome, BaseException) for outcome in outcomes)
        foreign += sum(isinstance(outcome, BaseException) for outcome in outcomes) - refused
        assert torch.equal(model(input_for(mlp)), mlp()(input_for(mlp)))

    assert (wins, refusals) == (rounds, rounds * (crowd - 1))
    record_faults("enabling at once", rounds * crowd, foreign=foreign)


# --- a step that fails half way


class Stop(Exception):
    """What goes wrong in a training step."""


def _stop(*_: Any) -> None:
    raise Stop


def _in_forward(model: Any, optimizer: torch.optim.Optimizer) -> None:
    model.head.register_forward_pre_hook(_stop)


def _in_backward(model: Any, optimizer: torch.optim.Optimizer) -> None:
    model.conv.register_full_backward_pre_hook(_stop)


def _in_gradient(model: Any, optimizer: torch.optim.Optimizer) -> None:
    next(model.parameters()).register_hook(_stop)


def _in_step(model: Any, optimizer: torch.optim.Optimizer) -> None:
    *_, last = model.parameters()
    plain = optimizer.step

    def step() -> None:
        kept, last.grad = last.grad, None  # all but the last parameter have moved when it fails
        plain()
        last.grad = kept
        raise Stop

    optimizer.step = step  # type: ignore[method-assign, assignment]


@strategies
@pytest.mark.parametrize("fault", [_in_forward, _in_backward, _in_gradient, _in_step], ids=lambda fault: fault.__name__[1:])
def test_a_step_that_fails(
    strategy: type[FineTuningStrategy], fault: Callable[..., None], tmp_path: Path, record_faults: RecordFaults
) -> None:
    """After an error in the middle of a training step the model saves, and the file gives its answers to a fresh one."""
    model: Any = cnn()
    inputs = input_for(cnn)
    enable_fine_tuning(model, strategy(rank=2))  # type: ignore[call-arg]
    train(model, inputs)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fault(model, optimizer)
    model.train()

    with pytest.raises(Stop):
        model(inputs).square().mean().backward()
        optimizer.step()
    save_adapter(model, tmp_path / "adapter.safetensors")
    load_adapter(fresh := cnn(), tmp_path / "adapter.safetensors")

    for hooks in (model.head._forward_pre_hooks, model.conv._backward_pre_hooks):
        hooks.clear()
    with torch.no_grad():
        same = close(fresh.eval()(inputs), model.eval()(inputs))
    record_faults("training steps that fail", 1, lost=int(not same))


def test_models_side_by_side(record_faults: RecordFaults) -> None:
    """Threads that each enable and train a model of their own do not disturb each other."""
    results: list[Tensor] = []

    def work(model: nn.Module) -> None:
        enable_fine_tuning(model, FineTuningStrategy([(is_instance("Linear"), keep_trainable())]))
        train(model, input_for(mlp), steps=20)
        results.append(model(input_for(mlp)).detach())

    threads = [threading.Thread(target=work, args=(mlp(),)) for _ in range(4)]  # building a model draws, so not within the threads
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    wrong = sum(not torch.equal(result, results[0]) for result in results)
    assert len(results) == 4
    record_faults("models trained side by side", 4, silent=wrong)
