"""Train an adapter of a model that no process holds in full; the same script on a laptop and on a cluster.

    torchrun --nproc-per-node 2 train.py                                # two processes on one machine, with or without GPUs
    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 train.py --layers 80 --width 8192 ...

The base lies in one file that every process can read. It is mapped into memory rather than read, adapted where it lies, and then
sharded block by block: a process keeps its own part and never has more than one block besides.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from decoder import Decoder, Sizes, next_token_loss, on_meta
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from gift_core import enable_fine_tuning, save_adapter
from gift_lora_plugin import LoRALinearFineTuningStrategy


def main() -> None:
    """Train, and leave an adapter file that loads into the whole base on one process."""
    options = parse()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    sizes = Sizes(options.layers, options.width, 3 * options.width, options.heads, options.heads, options.vocabulary)

    if dist.get_rank() == 0 and not options.base.exists():
        make_base(sizes, options.base)
    dist.barrier()
    model = on_meta(sizes, torch.float32)
    model.load_state_dict(torch.load(options.base, mmap=True, weights_only=True), assign=True)

    # enable first, shard afterwards; every process starts from the same adapter
    torch.manual_seed(0)
    report = enable_fine_tuning(model, LoRALinearFineTuningStrategy(rank=options.rank))
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if options.bf16 else MixedPrecisionPolicy()
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)

    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)
    data = torch.Generator().manual_seed(1)
    for step in range(options.steps):
        tokens = batch(options, data).chunk(dist.get_world_size())[dist.get_rank()].to(device)
        loss = next_token_loss(model(tokens), tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        shown = loss.detach().clone()
        dist.all_reduce(shown)
        if dist.get_rank() == 0:
            print(f"step {step}: loss {shown.item() / dist.get_world_size():.4f}", flush=True)

    # every process takes part in gathering the adapter; one writes it
    info = save_adapter(model, options.adapter)
    if dist.get_rank() == 0:
        print(report)
        print(f"wrote {options.adapter}: {info.file_bytes} bytes")
    dist.barrier()  # a process that leaves early takes the connection away from under the others
    dist.destroy_process_group()


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"layers": 4, "width": 64, "heads": 4, "vocabulary": 31}
    for name, value in (sizes | {"rank": 8, "steps": 30, "batch": 16, "length": 32}).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16 and reduce gradients in float32")
    parser.add_argument("--base", type=Path, default=Path("base.pt"), help="the base's state dict; random numbers if absent")
    parser.add_argument("--adapter", type=Path, default=Path("adapter.safetensors"))
    return parser.parse_args()


def make_base(sizes: Sizes, path: Path) -> None:
    """Write a base of random numbers, in place of one from somewhere else."""
    torch.manual_seed(0)
    torch.save(Decoder(sizes).state_dict(), path)


def batch(options: argparse.Namespace, generator: torch.Generator) -> torch.Tensor:
    """Sequences to learn: each token is one more than that before it."""
    start = torch.randint(options.vocabulary, (options.batch, 1), generator=generator)
    return (start + torch.arange(options.length)) % options.vocabulary


if __name__ == "__main__":
    main()
