from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import gift_lora_plugin  # noqa: F401  the file names a strategy of it
from gift_core import load_adapter
from gift_core.adapter_format import FORMAT_VERSION

DATA = Path(__file__).parent / "data"


def plain_numbers(shape: tuple[int, ...], start: int) -> Tensor:
    """Numbers that are the same on every machine and in every version of torch."""
    count = torch.Size(shape).numel()
    return (((torch.arange(count) + start) * 7919 % 257 - 128) / 256).reshape(shape)


class Net(nn.Module):
    """The base model that the files of older versions were made with."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)
        with torch.no_grad():
            for place, parameter in enumerate(self.parameters()):
                parameter.copy_(plain_numbers(tuple(parameter.shape), 31 * place))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.bn(self.conv(x)).relu().mean((2, 3)))


NAMES = ["v1_lora", "v1_full", "v2_lora", "v2_full"]


def test_every_version_is_covered() -> None:
    """There are files of each version that was ever written, of both kinds."""
    assert [f"v{version}_{kind}" for version in range(1, FORMAT_VERSION + 1) for kind in ("lora", "full")] == NAMES
    assert {path.name for path in DATA.glob("adapter_v*[!t].safetensors")} == {f"adapter_{name}.safetensors" for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_files_of_every_version_load(name: str) -> None:
    """A file that an earlier version wrote gives, on its base model, the outputs that were recorded then."""
    model = Net()
    expected = load_file(DATA / f"adapter_v1_{name[3:]}_output.safetensors")["output"]

    load_adapter(model, DATA / f"adapter_{name}.safetensors")
    outputs = model.eval()(plain_numbers((2, 3, 5, 5), 7))

    # other processors and versions of torch add up in another order
    torch.testing.assert_close(outputs.detach(), expected, rtol=1e-5, atol=1e-6)
