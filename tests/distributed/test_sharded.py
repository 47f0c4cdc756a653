"""Models sharded by FSDP2, by tensor parallelism and by both: two processes over gloo, on this machine alone."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import WORLD, finish_ranks, join, leave, needs_gloo, run_ranks, start_ranks
from torch import Tensor, nn

import gift_core.adapter_file as adapter_file
from gift_core import (
    AdapterSet,
    Reparameterization,
    disable_fine_tuning,
    enable_fine_tuning,
    full_state_dict,
    load_adapter,
    merge,
    plain_layers,
    read_adapter_info,
    save_adapter,
    tuning_disabled,
)
from gift_core.adapter_file import _base_digests, tensor_digest
from gift_core.distributed import own_part, write_whole
from gift_core.errors import GiftError, ModelError, SiteError, StateError
from gift_core.factories import is_instance, reparameterize
from gift_core.record import adopted_modules
from gift_core.strategy import FineTuningStrategy
from gift_lora_plugin import LoRAAllFineTuningStrategy

# FSDP2 shards on a CPU from torch 2.7 on
pytestmark = [
    needs_gloo,
    pytest.mark.timeout(300),
    pytest.mark.skipif(torch.__version__.startswith("2.6"), reason="FSDP2 of torch 2.6 does not run on a CPU"),
]

#: Halves of a batch are averaged, and products split over processes, so that sums come in another order.
TOLERANCE = 1e-6

#: bfloat16 forward and backward, against the same on one process.
BF16_TOLERANCE = 2e-2


class Scaled(Reparameterization):
    """A method without a forward of its own, to show that tensor parallelism needs none."""

    def init_parameters(self, weight: Tensor) -> None:
        self.scale = nn.Parameter(torch.ones_like(weight[:, :1]))

    def reparameterize(self, weight: Tensor) -> Tensor:
        return weight * self.scale


SCALED = FineTuningStrategy([(is_instance(nn.Linear), reparameterize(Scaled))])


def base() -> nn.Module:
    """The base model, the same on every process."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 8), nn.Linear(8, 4))


def tuned(strategy: FineTuningStrategy | None = None) -> nn.Module:
    """The tuned model, the same on every process; biases train too, so that some of the base's own parameters move."""
    model = base()
    torch.manual_seed(1)
    enable_fine_tuning(model, strategy or LoRAAllFineTuningStrategy(rank=2, train_bias=True, targets="type:Linear"))
    return model


def tokens() -> Tensor:
    """An even number of examples."""
    return torch.randint(0, 11, (4, 3), generator=torch.Generator().manual_seed(2))


def train(model: nn.Module, inputs: Tensor, count: int = 2) -> None:
    """Steps of an optimizer that is given what ``parameters()`` gives."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(count):
        model(inputs).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def trained(strategy: FineTuningStrategy | None = None) -> nn.Module:
    """What one process makes of all the examples."""
    model = tuned(strategy)
    train(model, tokens())
    return model


def line(world: int) -> Any:
    """The processes in one dimension."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (world,))


def grid(shape: tuple[int, int]) -> Any:
    """The processes in two dimensions: by data, and by tensor parallelism."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp"))


def sharded(model: nn.Module, mesh: Any, **policy: Any) -> nn.Module:
    """The model in the hands of FSDP2, layer by layer."""
    from torch.distributed.fsdp import fully_shard

    for layer in model:  # type: ignore[attr-defined]
        if any(True for _ in layer.parameters()):
            fully_shard(layer, mesh=mesh, **policy)
    fully_shard(model, mesh=mesh, **policy)
    return model


def parallel(model: nn.Module, mesh: Any) -> nn.Module:
    """The model under tensor parallelism: one layer sharded by its outputs, the next by its inputs."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plan = {"1": ColwiseParallel(output_layouts=Replicate()), "4": RowwiseParallel(input_layouts=Replicate())}
    with plain_layers(model):
        parallelize_module(model, mesh, plan)
    return model


def sharded_and_parallel(model: nn.Module, mesh: Any, **policy: Any) -> nn.Module:
    """The model under both: tensor parallelism over one dimension of the mesh, FSDP2 over the other."""
    return sharded(parallel(model, mesh["tp"]), mesh["dp"], **policy)


def gathered(model: nn.Module) -> dict[str, Tensor]:
    """The whole trained part (collective)."""
    return {key: value.full_tensor() if hasattr(value, "full_tensor") else value for key, value in model.state_dict().items()}


def refusal(call: Callable[[], object]) -> str:
    """The kind and the text of the error that a call raises."""
    try:
        call()
    except GiftError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


# --- what the processes do


def train_sharded(folder: Path, rank: int, world: int) -> None:
    """Train, save, load, and try what must be refused."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    half = tokens().chunk(world)[rank]
    model = sharded(tuned(), line(world))
    train(model, half)
    torch.save(gathered(model), folder / f"fsdp-{rank}.pt")
    save_adapter(model, folder / "fsdp.safetensors")
    other = sharded(tuned(), line(world))
    load_adapter(other, folder / "fsdp.safetensors")
    torch.save(gathered(other), folder / f"loaded-{rank}.pt")
    with full_state_dict(model):
        torch.save(list(model.state_dict()), folder / f"all-keys-{rank}.pt")
    calls = {
        "merge": lambda: merge(model),
        "enable after sharding": lambda: enable_fine_tuning(sharded(base(), line(world)), "lora"),
        "load after sharding": lambda: load_adapter(sharded(base(), line(world)), folder / "fsdp.safetensors"),
        "train all after sharding": lambda: enable_fine_tuning(sharded(base(), line(world)), "full"),
        "enable after FSDP1": lambda: enable_fine_tuning(fsdp1(True), "lora"),
        "enable after FSDP1, flat": lambda: enable_fine_tuning(fsdp1(False), "lora"),
        "enable inside FSDP1": lambda: enable_fine_tuning(fsdp1(True).module, "lora"),
        "enable around FSDP1": lambda: enable_fine_tuning(nn.Sequential(nn.Linear(8, 8), fsdp1(True)), "lora"),
        "the base of a sharded model": lambda: tuning_disabled(model).__enter__(),
        "an unwritable path": lambda: save_adapter(model, folder / "absent" / "fsdp.safetensors"),
        "sharding inside plain_layers": lambda: _shard_inside(world),
        "switching": lambda: _switch_sharded(world),
    }
    torch.save({name: refusal(call) for name, call in calls.items()}, folder / f"refusals-{rank}.pt")
    disable_fine_tuning(model)
    torch.save(gathered(model), folder / f"disabled-{rank}.pt")
    mixed = sharded(tuned(), line(world), mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    train(mixed, half)
    torch.save(gathered(mixed), folder / f"mixed-{rank}.pt")


def fsdp1(use_orig_params: bool) -> Any:
    """The base model in the hands of the first version of FSDP."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(base(), use_orig_params=use_orig_params, device_id=torch.device("cpu"))


def _shard_inside(world: int) -> None:
    model = tuned()
    with plain_layers(model):
        sharded(model, line(world))


def _switch_sharded(world: int) -> None:
    adapters = AdapterSet(base())
    adapters.add("a", "lora-linear")
    adapters.add("b", "lora-linear")
    adapters.use("a")
    sharded(adapters.model, line(world))
    adapters.use("b")


def train_parallel(folder: Path, rank: int, world: int) -> None:
    """Train under tensor parallelism with two kinds of method, save, and load."""
    for name, strategy in (("lora", None), ("scaled", SCALED)):
        model = parallel(tuned(strategy), line(world))
        train(model, tokens())
        torch.save(gathered(model), folder / f"{name}-{rank}.pt")
        torch.save(
            {key: str(getattr(p, "placements", None)) for key, p in nn.Module.named_parameters(model)},
            folder / f"{name}-placed-{rank}.pt",
        )
        save_adapter(model, folder / f"{name}.safetensors")
        other = parallel(tuned(strategy), line(world))
        load_adapter(other, folder / f"{name}.safetensors")
        torch.save(gathered(other), folder / f"{name}-loaded-{rank}.pt")


#: Two processes as a grid: what either dimension does where the other has one process.
GRIDS = {"by data": (2, 1), "by tensors": (1, 2)}


def train_on_grids(folder: Path, rank: int, world: int) -> None:
    """Train under FSDP2 over tensor parallelism with two kinds of method, save, load, and try what must be refused."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    for name, shape in GRIDS.items():
        mesh = grid(shape)
        part = tokens().chunk(shape[0])[mesh.get_local_rank("dp")]
        for method, strategy in (("lora", None), ("scaled", SCALED)):
            model, path = sharded_and_parallel(tuned(strategy), mesh), folder / f"{name} {method}.safetensors"
            train(model, part)
            torch.save(gathered(model), folder / f"{name} {method}-{rank}.pt")
            save_adapter(model, path)
            other = sharded_and_parallel(tuned(strategy), mesh)
            load_adapter(other, path)
            torch.save(gathered(other), folder / f"{name} {method} loaded-{rank}.pt")
            disable_fine_tuning(model)
            torch.save(gathered(model), folder / f"{name} {method} disabled-{rank}.pt")
        mixed = sharded_and_parallel(tuned(), mesh, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
        train(mixed, part)
        torch.save(gathered(mixed), folder / f"{name} mixed-{rank}.pt")
        calls = {
            "merge": lambda mesh=mesh: merge(sharded_and_parallel(tuned(), mesh)),
            "the base": lambda mesh=mesh: tuning_disabled(sharded_and_parallel(tuned(), mesh)).__enter__(),
            "the other order": lambda mesh=mesh: parallel(sharded(tuned(), mesh["dp"]), mesh["tp"]),
            "enable afterwards": lambda mesh=mesh: enable_fine_tuning(sharded(base(), mesh["dp"]), "lora"),
        }
        torch.save({call: refusal(act) for call, act in calls.items()}, folder / f"{name} refusals-{rank}.pt")


def in_threads(work: Callable[[Any, int, nn.Module], None], build: Callable[[], nn.Module]) -> None:
    """Work with a mesh of two by two, a rank and a model of one's own, as four processes that are threads of this one."""
    from torch.testing._internal.distributed import multi_threaded_pg

    multi_threaded_pg._install_threaded_pg()
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    store, models = dist.HashStore(), [build() for _ in range(4)]

    def run(rank: int) -> None:
        dist.init_process_group("threaded", rank=rank, world_size=4, store=store)
        try:
            work(grid((2, 2)), rank, models[rank])
        finally:
            dist.destroy_process_group()

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(run, range(4)))


def train_as_threads(folder: Path) -> None:
    """Train on a grid of two by two, whose processes are threads of this one, save nothing, load, and disable."""

    def work(mesh: Any, rank: int, models: Any) -> None:
        model, other = (sharded_and_parallel(model, mesh) for model in models)
        train(model, tokens().chunk(2)[mesh.get_local_rank("dp")])
        state = gathered(model)
        torch.save(state, folder / f"trained-{rank}.pt")
        tensors = dict(other.named_parameters())
        with torch.no_grad():
            for key, value in state.items():
                write_whole(tensors[key], value)
        torch.save(gathered(other), folder / f"loaded-{rank}.pt")
        disable_fine_tuning(model)
        torch.save(gathered(model), folder / f"disabled-{rank}.pt")

    in_threads(work, lambda: nn.ModuleList([tuned(), tuned()]))


def checkpoint(folder: Path, rank: int, world: int) -> None:
    """Save a distributed checkpoint of what was trained, or load the last one on other processes and save it again."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    step = int(sys.argv[5])
    model = sharded(tuned(), line(world))
    if step:
        state = {"model": get_model_state_dict(model)}
        dcp.load(state, checkpoint_id=folder / str(step - 1))
        set_model_state_dict(model, state["model"])
    else:
        train(model, tokens().chunk(world)[rank])
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=folder / str(step))
    whole = gathered(model)
    if rank == 0:
        torch.save(whole, folder / f"whole-{step}.pt")


#: The moments at which a process dies: what it is doing, and the function of `gift_core.adapter_file` that it does not come back from.
MOMENTS = {
    "before saving": (save_adapter, "_adapter_tensors"),
    "gathering": (save_adapter, "_on_cpu"),
    "within saving": (save_adapter, "encode"),
    "checking": (load_adapter, "_base_digests"),
    "taking parts": (load_adapter, "agreed"),
}


def die(folder: Path, rank: int, world: int) -> None:
    """Save once and train; then the last process dies in the middle of a verb, and the others leave their error and their model."""
    verb, function = MOMENTS[sys.argv[5]]
    path, model = folder / "adapter.safetensors", sharded(tuned(), line(world))
    save_adapter(model, path)
    train(model, tokens().chunk(world)[rank])
    before = local_parts(model)
    if rank == world - 1:
        setattr(adapter_file, function, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    (folder / "error").write_text(refusal(lambda: verb(model, path)))
    (folder / "same").write_text(str(all(map(torch.equal, before, local_parts(model)))))
    leave()


def local_parts(model: nn.Module) -> list[Tensor]:
    """Copies of what this process holds of the model."""
    return [own_part(tensor.detach()).clone() for tensor in nn.Module.parameters(model)]


def fail_on_one(folder: Path, rank: int, world: int) -> None:
    """Load what one process cannot, and what is another file there; the model stays as it was."""
    model = sharded(tuned(), line(world))
    save_adapter(model, folder / "0")
    train(model, tokens().chunk(world)[rank])
    save_adapter(model, folder / "1")
    (folder / "cut").write_bytes((folder / "1").read_bytes()[:-9])
    dist.barrier()
    before = gathered(model)
    paths = {"another file": str(rank), "no file": "absent" if rank else "0", "a part of a file": "0" if rank else "cut"}
    texts = {name: refusal(lambda path=path: load_adapter(model, folder / path)) for name, path in paths.items()}
    torch.save(texts, folder / f"refusals-{rank}.pt")
    torch.save([before, gathered(model)], folder / f"states-{rank}.pt")


def count_calls(folder: Path, rank: int, world: int) -> None:
    """Leave the shapes that are gathered while saving and loading, and how many files this process puts in place."""
    from torch.distributed.tensor import DTensor

    model, shapes, replaced = sharded(tuned(), line(world)), [], []
    gather, replace = DTensor.full_tensor, os.replace
    DTensor.full_tensor = lambda self: shapes.append(tuple(self.shape)) or gather(self)  # type: ignore[method-assign, func-returns-value]
    os.replace = lambda *paths: replaced.append(paths[1].name) or replace(*paths)  # type: ignore[assignment, func-returns-value]
    save_adapter(model, folder / "adapter.safetensors")
    torch.save([sorted(shapes), replaced], folder / f"saving-{rank}.pt")
    shapes.clear()
    load_adapter(model, folder / "adapter.safetensors")
    torch.save(shapes, folder / f"loading-{rank}.pt")


def digest_parts(folder: Path, rank: int, world: int) -> None:
    """Leave which tensors have another digest in parts than whole, by shape, dtype and placement, and how often one was gathered."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    generator, mesh = torch.Generator().manual_seed(3), line(world)
    gather, wrong, count, gathers = DTensor.full_tensor, [], 0, []
    DTensor.full_tensor = lambda self: gathers.append(self.placements) or gather(self)  # type: ignore[method-assign, func-returns-value]
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.uint8):
        for shape in ((6, 4), (7, 5), (1, 3), (3, 1), (5, 3, 2, 3), (9,), (1,), (0, 4), ()):
            whole = torch.randn(shape, generator=generator).mul(50).to(dtype)
            for placement in (Replicate(), *map(Shard, range(len(shape)))):
                count += 1
                if tensor_digest(distribute_tensor(whole, mesh, [placement])) != tensor_digest(whole):
                    wrong.append((str(dtype), shape, str(placement)))
    torch.save([count, wrong, len(gathers)], folder / f"digests-{rank}.pt")
    sums = DTensor.from_local(torch.full((2, 3), 1.0 + rank), mesh, [Partial()], run_check=False)
    torch.save(tensor_digest(sums), folder / f"partial-{rank}.pt")


def digest_as_threads(folder: Path) -> None:
    """Leave the digests of an uneven model's weights, whole and on a grid of two by two, whose processes are threads of this one."""

    def uneven() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Identity(), nn.Linear(6, 10), nn.GELU(), nn.Identity(), nn.Linear(10, 5), nn.Linear(5, 3))
        enable_fine_tuning(model, LoRAAllFineTuningStrategy(rank=2))
        return model

    def work(mesh: Any, rank: int, model: nn.Module) -> None:
        from torch.distributed.tensor import Shard, distribute_tensor

        digests = _base_digests(adopted_modules(sharded_and_parallel(model, mesh)))
        weight = torch.arange(35.0).view(7, 5)
        several = {
            f"{first}, {second}": tensor_digest(distribute_tensor(weight, mesh, [Shard(first), Shard(second)]))
            for first in (0, 1)
            for second in (0, 1)
        }
        torch.save([digests, several], folder / f"digests-{rank}.pt")

    in_threads(work, uneven)


JOBS = (train_sharded, train_parallel, train_on_grids, checkpoint, die, fail_on_one, count_calls, digest_parts)
THREADS = (train_as_threads, digest_as_threads)


@contextlib.contextmanager
def process_group(folder: Path, rank: int, world: int) -> Iterator[None]:
    """The processes' common start and end."""
    join(folder, rank, world)
    yield
    dist.destroy_process_group()


# --- what the tests look at


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes under FSDP2 left."""
    return run_ranks(__file__, tmp_path_factory.mktemp("fsdp"), "train_sharded")


@pytest.fixture(scope="module")
def tp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes under tensor parallelism left."""
    return run_ranks(__file__, tmp_path_factory.mktemp("tp"), "train_parallel")


def load(folder: Path, name: str) -> list[Any]:
    """What each process left under a name."""
    return [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in range(WORLD)]


def assert_close(state: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """The same keys in the same order, and numbers that differ by no more than the tolerance."""
    assert list(state) == list(expected)
    for key, value in expected.items():
        assert torch.allclose(state[key], value, atol=tolerance, rtol=0), key


def test_fsdp2_trains_as_one_process(fsdp: Path) -> None:
    """Two steps under FSDP2, half a batch on each process, are two steps of one process on the whole batch."""
    expected = trained().state_dict()

    for state in load(fsdp, "fsdp"):
        assert_close(state, expected, TOLERANCE)


def test_fsdp2_with_mixed_precision(fsdp: Path) -> None:
    """With bfloat16 computation and float32 reduction the adapter stays in float32, near what float32 gives."""
    expected = trained().state_dict()

    for state in load(fsdp, "mixed"):
        assert {value.dtype for value in state.values()} == {torch.float32}
        assert_close(state, expected, BF16_TOLERANCE)


def test_a_sharded_model_saves_one_whole_file(fsdp: Path) -> None:
    """The file of a sharded model loads into a whole base, and there gives the gathered tensors, bit for bit."""
    model = base()

    load_adapter(model, fsdp / "fsdp.safetensors")

    assert_close(model.state_dict(), load(fsdp, "fsdp")[0], 0)
    assert read_adapter_info(fsdp / "fsdp.safetensors").strategy == {
        "name": "lora",
        "parameters": tuned_config(),
    }


def tuned_config() -> Any:
    """The parameters of the strategy as one process writes them."""
    return LoRAAllFineTuningStrategy(rank=2, train_bias=True, targets="type:Linear").to_config()["parameters"]


def test_a_file_loads_into_a_sharded_model(fsdp: Path) -> None:
    """What a sharded model loads is what was saved, bit for bit, on every process."""
    for state, expected in zip(load(fsdp, "loaded"), load(fsdp, "fsdp"), strict=True):
        assert_close(state, expected, 0)


def test_full_state_dict_of_a_sharded_model(fsdp: Path) -> None:
    """Within full_state_dict, a sharded model's state dict has every key of the base and of the adapter."""
    with full_state_dict(model := tuned()):
        expected = list(model.state_dict())

    assert load(fsdp, "all-keys") == [expected] * WORLD


def test_disable_of_a_sharded_model(fsdp: Path) -> None:
    """Disabling gives the base's own values back, into their shards."""
    for state in load(fsdp, "disabled"):
        assert_close(state, base().state_dict(), 0)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ("merge", (SiteError.__name__, "save_adapter it and merge on one process")),
        ("enable after sharding", ("enable_fine_tuning on the whole model", "afterwards")),
        ("enable after FSDP1", (ModelError.__name__, "enable_fine_tuning on the whole model", "fully_shard", "afterwards")),
        ("enable after FSDP1, flat", (ModelError.__name__, "enable_fine_tuning on the whole model", "fully_shard", "afterwards")),
        ("enable inside FSDP1", (ModelError.__name__, "enable_fine_tuning on the whole model", "fully_shard", "afterwards")),
        ("enable around FSDP1", (ModelError.__name__, "enable_fine_tuning on the whole model", "fully_shard", "afterwards")),
        ("load after sharding", ("afterwards",)),
        ("train all after sharding", ("enable_fine_tuning on the whole model", "afterwards")),
        ("the base of a sharded model", (StateError.__name__, "on a copy")),
        ("switching", (StateError.__name__, "before fully_shard")),
        ("sharding inside plain_layers", (StateError.__name__, "after the context")),
    ],
)
def test_what_cannot_be_done_says_what_can(call: str, words: tuple[str, ...], fsdp: Path) -> None:
    """What a sharded model cannot do is refused on every process, with the way that works."""
    for refusals in load(fsdp, "refusals"):
        assert all(word in refusals[call] for word in words), refusals[call]


def test_every_process_fails_where_one_does(fsdp: Path) -> None:
    """When the writing process cannot write, the others raise too instead of going on as if the file were there."""
    first, second = (refusals["an unwritable path"] for refusals in load(fsdp, "refusals"))

    assert "AdapterWriteError" in first or "AdapterFileError" in first
    assert "another process could not save the adapter" in second


@pytest.mark.parametrize("name", ["lora", "scaled"])
def test_tensor_parallelism_trains_as_one_process(name: str, tp: Path) -> None:
    """Two steps on a model whose layers are split over processes are two steps of one process."""
    expected = trained(None if name == "lora" else SCALED).state_dict()

    for state in load(tp, name):
        assert_close(state, expected, TOLERANCE)


@pytest.mark.parametrize("name", ["lora", "scaled"])
def test_files_of_tensor_parallel_models(name: str, tp: Path) -> None:
    """A file saved under tensor parallelism loads there again and into a whole base, bit for bit."""
    model = tuned(None if name == "lora" else SCALED)

    load_adapter(model, tp / f"{name}.safetensors")

    for loaded, state in zip(load(tp, f"{name}-loaded"), load(tp, name), strict=True):
        assert_close(loaded, state, 0)
        assert_close(model.state_dict(), state, 0)


def test_tensor_parallel_placements(tp: Path) -> None:
    """What ColwiseParallel splits by outputs has factors that are split likewise; those of a layer split by inputs are replicated."""
    for placed in load(tp, "lora-placed"):
        kinds = {key: ("0" if "dim=0" in text else "1") if "Shard" in text else text for key, text in placed.items()}

        assert kinds["1.weight"] == kinds["1.lora_A"] == kinds["1.lora_B"] == "0"
        assert kinds["4.weight"] == "1"
        assert "Replicate" in kinds["4.lora_A"]
        assert "Replicate" in kinds["4.lora_B"]
        assert kinds["5.weight"] == kinds["5.lora_A"] == "None"


@pytest.fixture(scope="module")
def grids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes under FSDP2 over tensor parallelism left."""
    return run_ranks(__file__, tmp_path_factory.mktemp("grids"), "train_on_grids")


@pytest.mark.parametrize("method", ["lora", "scaled"])
@pytest.mark.parametrize("shape", GRIDS)
def test_both_at_once_train_as_one_process(shape: str, method: str, grids: Path) -> None:
    """Two steps under FSDP2 over tensor parallelism are two steps of one process; files load there and into a whole base."""
    strategy = None if method == "lora" else SCALED
    expected, whole = trained(strategy).state_dict(), tuned(strategy)

    load_adapter(whole, grids / f"{shape} {method}.safetensors")

    for state, loaded in zip(load(grids, f"{shape} {method}"), load(grids, f"{shape} {method} loaded"), strict=True):
        assert_close(state, expected, TOLERANCE)
        assert_close(loaded, state, 0)
        assert_close(whole.state_dict(), state, 0)
    for state in load(grids, f"{shape} {method} disabled"):
        assert_close(state, base().state_dict(), 0)


@pytest.mark.parametrize("shape", GRIDS)
def test_both_at_once_with_mixed_precision(shape: str, grids: Path) -> None:
    """With bfloat16 computation the adapter stays in float32, near what float32 gives."""
    for state in load(grids, f"{shape} mixed"):
        assert {value.dtype for value in state.values()} == {torch.float32}
        assert_close(state, trained().state_dict(), BF16_TOLERANCE)


@pytest.mark.parametrize("shape", GRIDS)
@pytest.mark.parametrize(
    ("call", "words"),
    [
        ("merge", "save_adapter it and merge on one process"),
        ("the base", "on a copy"),
        ("the other order", "parallelize_module comes first, in plain_layers, and fully_shard afterwards"),
        ("enable afterwards", "enable_fine_tuning on the whole model"),
    ],
)
def test_what_cannot_be_done_under_both(call: str, words: str, shape: str, grids: Path) -> None:
    """What cannot be done, the wrong order among it, is refused on every process, with the way that works."""
    for refusals in load(grids, f"{shape} refusals"):
        assert words in refusals[call], refusals[call]


def test_two_by_two(tmp_path: Path) -> None:
    """Where both dimensions split, also unevenly, training, loading and disabling do what one process does."""
    pytest.importorskip("torch.testing._internal.distributed.multi_threaded_pg")

    run_ranks(__file__, tmp_path, "train_as_threads", world=1)

    for rank in range(4):
        state, loaded, disabled = (
            torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True) for name in ("trained", "loaded", "disabled")
        )
        assert_close(state, trained().state_dict(), TOLERANCE)
        assert_close(loaded, state, 0)
        assert_close(disabled, base().state_dict(), 0)


def test_distributed_checkpoints_reshard(tmp_path: Path) -> None:
    """A distributed checkpoint of the trained part, saved by two processes, loads on one and then on two again, bit for bit."""
    for step, world in enumerate((2, 1, 2)):
        (tmp_path / "rendezvous").unlink(missing_ok=True)
        run_ranks(__file__, tmp_path, "checkpoint", str(step), world=world)

    first, *others = (torch.load(tmp_path / f"whole-{step}.pt", weights_only=True) for step in range(3))

    assert not torch.equal(first["1.lora_B"], torch.zeros_like(first["1.lora_B"]))
    for state in others:
        assert_close(state, first, 0)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_process_that_dies(moment: str, tmp_path: Path) -> None:
    """When a process dies while saving or loading, the others raise our error; their model is as it was, and the file complete."""
    results = finish_ranks(start_ranks(__file__, tmp_path, "die", moment))
    verb, _ = MOMENTS[moment]
    message = (tmp_path / "error").read_text()
    model = base()

    load_adapter(model, tmp_path / "adapter.safetensors")

    assert [code for code, _ in results] == [0, -signal.SIGKILL], results
    assert message.startswith(f"StateError: could not {verb.__name__.replace('_', ' the ')}: the processes")
    assert "start all anew" in message
    assert (tmp_path / "same").read_text() == "True"
    is_old = all(torch.equal(value, tuned().state_dict()[key]) for key, value in model.state_dict().items())
    assert is_old or moment == "within saving"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter.safetensors", "error", "rendezvous", "same"]


def test_every_process_fails_where_one_cannot_read(tmp_path: Path) -> None:
    """A file that one process cannot read, or that is another one there, is loaded by none; each says why, or that another does."""
    run_ranks(__file__, tmp_path, "fail_on_one")
    (first, second), states = load(tmp_path, "refusals"), load(tmp_path, "states")

    assert "there is no adapter file" in second["no file"]
    assert "AdapterFileError" in first["a part of a file"]
    for text in (first["no file"], second["a part of a file"]):
        assert text == "StateError: another process could not load the adapter: its own error says why. Nothing was loaded."
    for texts in (first, second):
        assert "given different files" in texts["another file"]
    for before, after in states:
        assert_close(after, before, 0)


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes counted while they saved and loaded."""
    return run_ranks(__file__, tmp_path_factory.mktemp("calls"), "count_calls")


def test_saving_gathers_the_adapter_alone(calls: Path) -> None:
    """Of a sharded model saving gathers the tensors of the file and no weight of the base; loading gathers nothing."""
    expected = sorted(tuple(tensor["shape"]) for tensor in read_adapter_info(calls / "adapter.safetensors").tensors.values())

    assert [shapes for shapes, _ in load(calls, "saving")] == [expected] * WORLD
    assert load(calls, "loading") == [[]] * WORLD


def test_one_process_writes(calls: Path) -> None:
    """The first process puts the file in place, and the others write none."""
    assert [replaced for _, replaced in load(calls, "saving")] == [["adapter.safetensors"], []]


def test_digests_of_parts(tmp_path: Path) -> None:
    """A tensor in parts has the digest that it has whole, however it is split, and is not gathered; a sum is gathered first."""
    run_ranks(__file__, tmp_path, "digest_parts")

    for count, wrong, gathers in load(tmp_path, "digests"):
        assert count == 6 * (9 + 16)
        assert not wrong
        assert not gathers
    assert load(tmp_path, "partial") == [tensor_digest(torch.full((2, 3), 3.0))] * WORLD


def test_digests_two_by_two(tmp_path: Path) -> None:
    """The same where both dimensions of a mesh split, also unevenly and one after another along one dimension of the weight."""
    pytest.importorskip("torch.testing._internal.distributed.multi_threaded_pg")
    run_ranks(__file__, tmp_path, "digest_as_threads", world=1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Identity(), nn.Linear(6, 10), nn.GELU(), nn.Identity(), nn.Linear(10, 5), nn.Linear(5, 3))
    expected = {f"{name}.weight": tensor_digest(layer.weight) for name, layer in model.named_children() if hasattr(layer, "weight")}

    for rank in range(4):
        digests, several = torch.load(tmp_path / f"digests-{rank}.pt", weights_only=True)
        assert digests == expected
        assert set(several.values()) == {tensor_digest(torch.arange(35.0).view(7, 5))}


if __name__ == "__main__":
    place, rank, world, job = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    if job in {work.__name__ for work in THREADS}:
        globals()[job](place)
    else:
        with process_group(place, rank, world):
            {work.__name__: work for work in JOBS}[job](place, rank, world)
    leave()
