"""A method as one function of the weight; saving, merging, undoing and copying are the core's."""

from __future__ import annotations

from collections.abc import Iterable

from gift_core import FineTuningStrategy, Reparameterization
from gift_core.capabilities import Capabilities
from gift_core.factories import is_instance, reparameterize, selects
from torch import Tensor, nn

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class TemplateMethod(Reparameterization):
    """Scales each output of a layer: row ``i`` of the weight times ``1 + s_i``.

    ``s`` starts at zero, so a fresh adapter changes nothing.

    Attributes:
        output_scale: ``s``, ``(out,)``, dtype and device of the weight.
    """

    output_scale: nn.Parameter

    def init_parameters(self, weight: Tensor) -> None:
        """Register what trains."""
        self.output_scale = nn.Parameter(weight.new_zeros(weight.shape[0]))

    def reparameterize(self, weight: Tensor) -> Tensor:
        """Give the effective weight, of the shape of ``weight``, ``(out, in, *kernel)``."""
        return weight * (1 + self.output_scale).view(-1, *[1] * (weight.dim() - 1))


class TemplateStrategy(FineTuningStrategy):
    """Scales the outputs of every linear layer and convolution.

    Args:
        targets: patterns of the layers to adapt (see `gift_core.selection`); None means all of these types.
        exclude: patterns of layers to leave out.
    """

    name = "template"
    plugin_api = 1
    capabilities = Capabilities(layers=("Linear", "Conv1d", "Conv2d", "Conv3d"))

    def __init__(self, targets: str | Iterable[str] | None = None, exclude: str | Iterable[str] | None = None) -> None:
        check = is_instance(*LAYERS) & selects(targets, exclude)
        super().__init__(module_caps=[(check, reparameterize(TemplateMethod))])
