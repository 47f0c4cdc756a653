"""(IA)3 for GIFt: rescale what a layer gives, one learnt factor for each feature.

Source: Liu et al. 2022, arXiv:2205.05638, section 3.3.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from gift_core import FineTuningStrategy, Reparameterization
from gift_core.errors import ParameterError
from gift_core.factories import is_instance, parameter_name_contains, reparameterize, selects

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, nn.RNNBase, nn.MultiheadAttention)


class IA3(Reparameterization):
    r"""The weight with each output (or input) feature times a factor, :math:`l \odot (W x)`. Biases are left as they are.

    Attributes:
        ia3_factors: ``(features,)``, ones at the start, so that a fresh adapter changes nothing.
    """

    def init_parameters(self, weight: Tensor, *, side: str = "output") -> None:
        # an embedding's weight is (tokens, features): its outputs lie along the second axis
        self.ia3_axis = int((side == "output") == isinstance(self, nn.Embedding))
        self.ia3_factors = nn.Parameter(weight.new_ones(weight.shape[self.ia3_axis]))

    def reparameterize(self, weight: Tensor) -> Tensor:
        shape = [-1 if axis == self.ia3_axis else 1 for axis in range(weight.dim())]
        return weight * self.ia3_factors.view(shape)


class IA3FineTuningStrategy(FineTuningStrategy):
    """(IA)3 on the weights of the selected layers.

    The paper rescales keys, values and the inner activations of feed-forward blocks: name these layers in ``targets``.

    Args:
        side: ``output``, or ``input`` for a layer that reads the activation to be rescaled.
        targets: patterns of the parameters or modules to adapt; None adapts every supported layer.
        exclude: patterns to leave out.
    """

    name = "ia3"

    def __init__(
        self, side: str = "output", targets: str | Iterable[str] | None = None, exclude: str | Iterable[str] | None = None
    ) -> None:
        if side not in ("output", "input"):
            raise ParameterError(f"side must be output or input, got {side!r}.")
        check = is_instance(*LAYERS) & parameter_name_contains("weight", optional=True) & selects(targets, exclude)
        super().__init__(para_caps=[(check, reparameterize(IA3), {"side": side})])
