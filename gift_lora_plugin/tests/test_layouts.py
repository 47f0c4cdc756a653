"""How weights are read as matrices, against index arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gift_core.errors import SiteError
from gift_lora_plugin.layouts import ATTENTION_PARTS, Layout, layout_of

CASES: dict[str, tuple[nn.Module, str, tuple[int, ...], dict[str, Any]]] = {
    "linear": (nn.Linear(5, 4), "weight", (4, 5), {}),
    "conv": (nn.Conv2d(4, 6, (3, 2), groups=2), "weight", (6, 2, 3, 2), {}),
    "conv out_as_h": (nn.Conv2d(4, 6, (3, 2), groups=2), "weight", (6, 2, 3, 2), {"conv_layout": "out_as_h"}),
    "transposed conv": (nn.ConvTranspose2d(4, 6, 3, groups=2), "weight", (4, 3, 3, 3), {}),
    "embedding": (nn.Embedding(7, 4), "weight", (7, 4), {}),
    "bilinear": (nn.Bilinear(2, 3, 4), "weight", (4, 2, 3), {}),
    "attention": (nn.MultiheadAttention(4, 2), "in_proj_weight", (12, 4), {}),
    "attention q, v": (nn.MultiheadAttention(4, 2), "in_proj_weight", (12, 4), {"attention": ("v", "q")}),
    "lstm": (nn.LSTM(3, 5), "weight_hh_l0", (20, 5), {}),
    "lstm projection": (nn.LSTM(3, 5, proj_size=2), "weight_hr_l0", (2, 5), {}),
    "gru": (nn.GRU(3, 5), "weight_ih_l0", (15, 3), {}),
    "gru cell": (nn.GRUCell(3, 5), "weight_ih", (15, 3), {}),
    "rnn": (nn.RNN(3, 5), "weight_ih_l0", (5, 3), {}),
    "raw": (nn.Module(), "any", (4, 5), {"parameter_layout": "out_in"}),
    "raw in_out": (nn.Module(), "any", (4, 5), {"parameter_layout": "in_out"}),
    "stack": (nn.Module(), "any", (3, 4, 5), {"parameter_layout": "out_in"}),
    "stack in_out": (nn.Module(), "any", (3, 4, 5), {"parameter_layout": "in_out"}),
}
SIZES = {  # blocks, rows, columns, outputs
    "linear": (None, 4, 5, 4),
    "conv": (None, 18, 4, 6),
    "conv out_as_h": (None, 6, 12, 6),
    "transposed conv": (None, 12, 9, 6),
    "embedding": (None, 7, 4, 4),
    "bilinear": (None, 4, 6, 4),
    "attention": (3, 4, 4, 12),
    "attention q, v": (2, 4, 4, 8),
    "lstm": (4, 5, 5, 20),
    "lstm projection": (None, 2, 5, 2),
    "gru": (3, 5, 3, 15),
    "gru cell": (3, 5, 3, 15),
    "rnn": (None, 5, 3, 5),
    "raw": (None, 4, 5, 4),
    "raw in_out": (None, 5, 4, 5),
    "stack": (3, 4, 5, 12),
    "stack in_out": (3, 5, 4, 15),
}


def layout(case: str) -> tuple[Layout, Tensor]:
    """The layout of a case, and a weight of its shape whose numbers all differ."""
    module, name, shape, keywords = CASES[case]
    return layout_of(module, name, shape, **keywords), torch.arange(1.0, 1 + torch.Size(shape).numel()).view(shape)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Each test draws the same numbers."""
    torch.manual_seed(0)


@pytest.mark.parametrize("case", CASES)
def test_sizes(case: str) -> None:
    """Blocks, rows, columns and outputs are those that the module's table states, and so are the shapes of A and B."""
    found, _ = layout(case)
    blocks, rows, columns = SIZES[case][:3]
    stack = () if blocks is None else (blocks,)

    assert (found.blocks, found.rows, found.columns, found.outputs) == SIZES[case]
    assert (found.shape_of_A(2), found.shape_of_B(2)) == ((*stack, 2, columns), (*stack, rows, 2))
    assert found.max_rank == min(rows, columns)


@pytest.mark.parametrize("case", CASES)
def test_reading_and_writing_are_inverse(case: str) -> None:
    """What is read as matrices and written back is the weight; what is not adapted stays, or is zero in an update."""
    found, weight = layout(case)
    matrices = found.matrices_of(weight)
    changed = found.weight_with(weight, -matrices)

    assert torch.equal(found.weight_with(weight, matrices), weight)
    assert torch.equal(found.matrices_of(changed), -matrices)
    assert torch.equal(changed, weight - 2 * found.as_weight(matrices))


@pytest.mark.parametrize("case", [case for case in CASES if "in_out" in case])
def test_in_out_is_transposed(case: str) -> None:
    """A weight that is applied as ``input @ weight`` is read as its transpose, each of a stack by itself."""
    found, weight = layout(case)

    assert torch.equal(found.matrices_of(weight), weight.transpose(-1, -2))


def test_gates_and_projections_are_blocks_of_rows() -> None:
    """A packed weight is split in the order in which torch packs it, and only what was chosen is read."""
    for case, blocks in {"attention": [0, 1, 2], "attention q, v": [0, 2], "lstm": [0, 1, 2, 3], "gru": [0, 1, 2]}.items():
        found, weight = layout(case)

        assert torch.equal(found.matrices_of(weight), torch.stack([weight[b * found.rows : (b + 1) * found.rows] for b in blocks]))


@pytest.mark.parametrize("case", CASES)
def test_norms_are_per_output(case: str) -> None:
    """Scaling each output scales its norm, and no other's: rescaled to norm one, all norms of the adapted part are one."""
    found, weight = layout(case)
    norms = found.output_norms(weight)
    rescaled = weight * found.along_outputs(1 / norms)
    one = found.along_outputs(torch.where(torch.arange(found.outputs) == 1, 2.0, 1.0))

    torch.testing.assert_close(found.output_norms(rescaled), torch.ones(found.outputs))
    torch.testing.assert_close(found.output_norms(weight * one) / norms, torch.where(torch.arange(found.outputs) == 1, 2.0, 1.0))
    unread = found.as_weight(torch.ones_like(found.matrices_of(weight))) == 0
    assert torch.equal(rescaled[unread], weight[unread])


def test_a_transposed_convolutions_outputs_are_its_channels() -> None:
    """With groups, output channel ``g * out / g + j`` is column j of the inputs of group g, as the layer itself computes."""
    layer, found = CASES["transposed conv"][0], layout("transposed conv")[0]
    x = torch.randn(1, 4, 5, 5)
    weight: Any = layer.weight
    gain = torch.arange(1.0, 7)
    wanted = nn.functional.conv_transpose2d(x, weight, groups=2) * gain.view(-1, 1, 1)

    torch.testing.assert_close(nn.functional.conv_transpose2d(x, weight * found.along_outputs(gain), groups=2), wanted)


@pytest.mark.parametrize("shape", [(), (4,), (0, 4), (4, 0)])
def test_what_is_no_matrix_is_refused(shape: tuple[int, ...]) -> None:
    """A parameter without a matrix in it is an error that names it and its shape."""
    with pytest.raises(SiteError, match="scale") as caught:
        layout_of(nn.Module(), "scale", shape)
    assert str(shape) in str(caught.value)


def test_a_raw_parameter_of_many_axes_is_refused() -> None:
    """A raw parameter is a matrix or a stack of them; more axes have no agreed reading."""
    with pytest.raises(SiteError, match="one matrix or a stack"):
        layout_of(nn.Module(), "kernel", (2, 3, 4, 5), parameter_layout="out_in")


def test_attention_parts_are_as_torch_packs_them() -> None:
    """The packed projection of torch holds query, key and value in this order."""
    attention = nn.MultiheadAttention(4, 1, bias=False)
    x = torch.randn(3, 1, 4)
    for at, part in enumerate(ATTENTION_PARTS[:3]):
        found = layout_of(attention, "in_proj_weight", (12, 4), attention=(part,))

        assert torch.equal(
            found.matrices_of(attention.in_proj_weight)[0] @ x[0, 0], (attention.in_proj_weight @ x[0, 0])[4 * at : 4 * at + 4]
        )
