"""Data-parallel training of a tuned model: two processes over gloo, on this machine alone."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from models import cnn, encoder, input_for, mlp, tied, train
from ranks import WORLD, join, leave, needs_gloo, run_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gift_core import enable_fine_tuning, load_adapter, merged, save_adapter
from gift_lora_plugin import LoRAAllFineTuningStrategy

BUILDERS = {builder.__name__: builder for builder in (mlp, cnn, encoder, tied)}

#: Gradients of two halves are averaged instead of summed at once: a few roundings of float32.
TOLERANCE = 1e-6

pytestmark = [needs_gloo, pytest.mark.timeout(180)]


def tuned(name: str, rank: int = 0) -> nn.Module:
    """A tuned model; ranks other than 0 start from another adapter, because it is DDP's business to make them equal."""
    model = BUILDERS[name]()
    torch.manual_seed(rank)
    enable_fine_tuning(model, LoRAAllFineTuningStrategy(rank=2, train_bias=True))
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # its batch would be half as large
    return model


def batch(name: str) -> Tensor:
    """An even number of examples."""
    one = input_for(BUILDERS[name])
    return torch.cat([one, one.flip(0)])


def steps(model: nn.Module, inputs: Tensor, count: int = 2) -> None:
    """Steps of an optimizer that is given what ``parameters()`` gives."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    for _ in range(count):
        optimizer.zero_grad()
        (model(inputs) - 1).square().mean().backward()
        optimizer.step()


def worker(rank: int, folder: Path) -> None:
    """What one process does: train each model on its half, and leave what the test looks at."""
    join(folder, rank, WORLD)
    for name in BUILDERS:
        model = DistributedDataParallel(tuned(name, rank))
        steps(model, batch(name).chunk(WORLD)[rank])
        state = model.state_dict()
        torch.save(state, folder / f"{name}-{rank}.pt")
        model.load_state_dict(state)
        save_adapter(model, folder / f"{name}-{rank}.safetensors")
        load_adapter(model, folder / f"{name}-{rank}.safetensors")
        model.eval()
        with merged(model), torch.no_grad():
            torch.save(model(batch(name)), folder / f"{name}-{rank}-merged.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the two processes, which have ended by now, left their results."""
    return run_ranks(__file__, tmp_path_factory.mktemp("ddp"))


@pytest.mark.parametrize("name", BUILDERS)
def test_two_processes_are_one(name: str, folder: Path) -> None:
    """Two steps on two processes, half a batch each, are two steps of one process on the whole batch."""
    model = tuned(name)
    steps(model, batch(name))
    expected = model.state_dict()

    for rank in range(WORLD):
        state = torch.load(folder / f"{name}-{rank}.pt", weights_only=True)

        assert list(state) == [f"module.{key}" for key in expected]
        assert all(torch.allclose(state[f"module.{key}"], value, atol=TOLERANCE, rtol=0) for key, value in expected.items())


@pytest.mark.parametrize("name", BUILDERS)
def test_both_processes_agree(name: str, folder: Path) -> None:
    """Both processes hold the same adapter, bit for bit, though they started from different ones."""
    first, second = (torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in range(WORLD))

    assert list(first) == list(second)
    assert all(torch.equal(value, second[key]) for key, value in first.items())


@pytest.mark.parametrize("name", BUILDERS)
def test_the_adapter_of_a_wrapped_model(name: str, folder: Path) -> None:
    """The adapter saved from a DDP model loads into a fresh base and gives the merged DDP model's outputs."""
    fresh = BUILDERS[name]().eval()

    load_adapter(fresh, folder / f"{name}-0.safetensors")

    with torch.no_grad():
        inside = torch.load(folder / f"{name}-0-merged.pt", weights_only=True)
        assert torch.allclose(fresh(batch(name)), inside, atol=1e-5)


def test_training_goes_on_without_the_wrapper(folder: Path) -> None:
    """The state dict of a DDP model loads into the bare one once the prefix is off, and training continues."""
    model = tuned("mlp", rank=1)
    state = torch.load(folder / "mlp-0.pt", weights_only=True)
    torch.nn.modules.utils.consume_prefix_in_state_dict_if_present(state, "module.")

    model.load_state_dict(state)
    train(model, batch("mlp"), 1)

    assert not torch.equal(model.state_dict()["0.lora_B"], state["0.lora_B"])


if __name__ == "__main__":
    worker(int(sys.argv[2]), Path(sys.argv[1]))
    leave()
