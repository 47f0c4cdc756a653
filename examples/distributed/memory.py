"""What training an adapter takes in memory, from the shapes alone: nothing of the size of a model is allocated.

    python memory.py                            # models of 1 to 70 billion parameters
    python memory.py --processes 8 --length 8192
    python memory.py --write docs/distributed.md    # renew the table of a page, between its two markers

Base, adapter and optimizer are counted from the parameters of the adapted model; activations are the bytes that autograd saves in a
forward pass, found by running it on tensors without memory (torch's fake tensors).
"""

import argparse
import dataclasses
from collections.abc import Iterable
from pathlib import Path

import torch
from decoder import Decoder, Sizes, next_token_loss
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from gift_core import enable_fine_tuning
from gift_lora_plugin import LoRALinearFineTuningStrategy

#: From the configurations that were published with the models of these sizes (Llama 3.1 and 3.2, Qwen 2.5).
MODELS = {
    "1 B": Sizes(16, 2048, 8192, 32, 8, 128256, tied=True),
    "3 B": Sizes(28, 3072, 8192, 24, 8, 128256, tied=True),
    "8 B": Sizes(32, 4096, 14336, 32, 8, 128256),
    "14 B": Sizes(48, 5120, 13824, 40, 8, 152064),
    "32 B": Sizes(64, 5120, 27648, 40, 8, 152064),
    "70 B": Sizes(80, 8192, 28672, 64, 8, 128256),
}
START, END = "<!-- memory table -->", "<!-- end of the memory table -->"
ADAMW_BYTES = 8  # two moments in float32 for each number that trains


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes for one model and one batch on one process that holds all of it."""

    base: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    checkpointed: int

    def total(self, processes: int) -> int:
        """Bytes on each of several processes that share all but the activations, which are checkpointed block by block."""
        return (self.base + self.adapter + self.gradients + self.optimizer) // processes + self.checkpointed


def memory_of(sizes: Sizes, rank: int, batch: int, length: int) -> Memory:
    """Count what a model of these sizes takes, with a bfloat16 base and LoRA on every Linear layer but the head."""
    own = counted(sizes, rank)
    one, two = (saved_bytes(dataclasses.replace(sizes, layers=layers), rank, batch, length) for layers in (1, 2))
    block = two - one  # blocks are alike
    between = batch * length * sizes.width * torch.bfloat16.itemsize
    return Memory(*own, one + (sizes.layers - 1) * block, one + (sizes.layers - 1) * between)


def counted(sizes: Sizes, rank: int) -> tuple[int, int, int, int]:
    """Bytes of the base, of the adapter, of its gradients, and of AdamW's state."""
    with FakeTensorMode():
        parameters = list(adapted(sizes, rank).named_parameters())
    trained = [parameter for _, parameter in parameters if parameter.requires_grad]
    frozen = nbytes(parameter for _, parameter in parameters if not parameter.requires_grad)
    return frozen, nbytes(trained), nbytes(trained), ADAMW_BYTES * sum(parameter.numel() for parameter in trained)


def saved_bytes(sizes: Sizes, rank: int, batch: int, length: int) -> int:
    """Bytes of what autograd saves in one forward pass, parameters apart."""
    stored: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        stored[storage._cdata] = storage.nbytes()
        return tensor

    with FakeTensorMode():
        model = adapted(sizes, rank)
        own = {parameter.untyped_storage()._cdata for _, parameter in model.named_parameters()}
        tokens = torch.zeros(batch, length, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = next_token_loss(model(tokens), tokens)
        assert loss.requires_grad  # and is alive, with all that was saved for it
    return sum(size for storage, size in stored.items() if storage not in own)


def adapted(sizes: Sizes, rank: int) -> Decoder:
    """The adapted model, within a `FakeTensorMode`."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = Decoder(sizes)
    finally:
        torch.set_default_dtype(default)
    enable_fine_tuning(model, LoRALinearFineTuningStrategy(rank=rank, exclude="head"))
    return model


def nbytes(tensors: Iterable[Tensor]) -> int:
    """The bytes of several tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def table(rank: int, batch: int, length: int, processes: int) -> str:
    """All models as a table in Markdown."""
    heads = ["model", "base", "adapter", "gradients", "AdamW", "activations", "checkpointed", "1 process", f"each of {processes}"]
    lines = [" | ".join(heads), " | ".join(["---", *["---:"] * (len(heads) - 1)])]
    for name, sizes in MODELS.items():
        memory = memory_of(sizes, rank, batch, length)
        values = [*dataclasses.astuple(memory), memory.total(1), memory.total(processes)]
        lines.append(" | ".join([name, *(f"{value / 1e9:.2f}" for value in values)]))
    said = (
        f"GB (10^9 bytes); bfloat16 base; LoRA of rank {rank} on every Linear layer but the head; {batch} x {length} tokens a process."
    )
    return "\n".join([said, "", *(f"| {line} |" for line in lines)])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"rank": 16, "batch": 1, "length": 4096, "processes": 8}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--write", type=Path, metavar="PAGE", help="a page with the two markers")
    options = parser.parse_args()
    made = table(options.rank, options.batch, options.length, options.processes)
    if options.write is None:
        print(made)
        return
    before, _, rest = options.write.read_text().partition(START)
    after = rest.partition(END)[2]
    options.write.write_text(f"{before}{START}\n{made}\n{END}{after}")


if __name__ == "__main__":
    main()
