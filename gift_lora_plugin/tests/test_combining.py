"""Combinations of low-rank updates, against formulas in plain tensors and against PEFT."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gift_lora_plugin.combining import (
    METHODS,
    Update,
    combine_cat,
    combine_dare,
    combine_linear,
    combine_parameters,
    combine_svd,
    combine_ties,
)

#: One rounding of a sum of a few products, relative to numbers of about one.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}


def updates(ranks: tuple[int, ...] = (2, 2), stack: tuple[int, ...] = (), dtype: torch.dtype = torch.float64) -> list[Update]:
    """Updates of a ``(7, 5)`` matrix, or of a stack of them, with scalings of 0.5, 1, 1.5, ..."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*stack, *shape, generator=generator, dtype=torch.float64).to(dtype)

    return [Update(draw(7, rank), draw(rank, 5), (at + 1) / 2) for at, rank in enumerate(ranks)]


def weighted_sum(parts: list[Update], weights: list[float]) -> Tensor:
    """What the combination stands for: the sum of the weighted updates, in double precision."""
    return sum(w * u.scaling * u.lora_B.double() @ u.lora_A.double() for u, w in zip(parts, weights, strict=True))  # type: ignore[return-value]


@pytest.mark.parametrize("stack", [(), (3,)])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_cat_is_the_exact_sum(stack: tuple[int, ...], dtype: torch.dtype) -> None:
    """Factors side by side give the weighted sum, at the sum of the ranks, for any ranks and signs of weights."""
    parts, weights = updates((2, 3, 1), stack, dtype), [0.7, -0.3, 2.0]
    lora_B, lora_A = combine_cat(parts, weights)

    assert (lora_B.shape[-1], lora_A.shape[-2], lora_B.dtype) == (6, 6, dtype)
    torch.testing.assert_close((lora_B @ lora_A).double(), weighted_sum(parts, weights), rtol=0, atol=10 * TOLERANCE[dtype])


@pytest.mark.parametrize("rank", [1, 3, 5, 8])
@pytest.mark.parametrize("stack", [(), (3,)])
def test_svd_is_the_best_approximation(rank: int, stack: tuple[int, ...]) -> None:
    """The result is the truncated decomposition of the sum; a rank beyond the sum's is filled with zeros."""
    parts, weights = updates((2, 4), stack), [0.7, -0.4]
    u, s, vh = torch.linalg.svd(weighted_sum(parts, weights), full_matrices=False)
    best = (u[..., :rank] * s[..., None, :rank]) @ vh[..., :rank, :]
    lora_B, lora_A = combine_svd(parts, weights, rank)

    assert (lora_B.shape[-1], lora_A.shape[-2]) == (rank, rank)
    torch.testing.assert_close(lora_B @ lora_A, best)


def test_svd_in_half_precision_keeps_the_dtype() -> None:
    """In bfloat16 the decomposition runs in float32 and comes back in bfloat16."""
    parts = updates((2, 2), dtype=torch.bfloat16)
    lora_B, lora_A = combine_svd(parts, [1.0, 1.0], 4)

    assert (lora_B.dtype, lora_A.dtype) == (torch.bfloat16, torch.bfloat16)
    torch.testing.assert_close((lora_B @ lora_A).double(), weighted_sum(parts, [1.0, 1.0]), rtol=0, atol=0.1)


def test_svd_is_not_rounded_by_autocast() -> None:
    """The products of the decomposition keep their precision, whatever is computed around them."""
    torch.manual_seed(0)
    given = [Update(torch.randn(16, 2), torch.randn(2, 12), 1.0) for _ in range(2)]
    expected = combine_svd(given, [1.0, 1.0], 4)

    with torch.autocast("cpu", torch.bfloat16):
        got = combine_svd(given, [1.0, 1.0], 4)

    assert all(map(torch.equal, got, expected))


def test_linear_is_its_formula() -> None:
    """Factors are summed with the square roots of weight times scaling; a negative sign goes to B."""
    parts = updates()
    lora_B, lora_A = combine_linear(parts, [0.7, -0.3])
    roots = [math.sqrt(0.7 * 0.5), math.sqrt(0.3 * 1.0)]

    torch.testing.assert_close(lora_B, roots[0] * parts[0].lora_B - roots[1] * parts[1].lora_B)
    torch.testing.assert_close(lora_A, roots[0] * parts[0].lora_A + roots[1] * parts[1].lora_A)


def test_one_adapter_is_itself() -> None:
    """Every method gives back a single update of weight 1, at density 1."""
    (part,) = updates((3,))
    for lora_B, lora_A in (
        combine_cat([part], [1.0]),
        combine_linear([part], [1.0]),
        combine_svd([part], [1.0], 3),
        combine_ties([part], [1.0], 1.0),
        combine_dare([part], [1.0], 1.0),
    ):
        torch.testing.assert_close(lora_B @ lora_A, part.scaling * part.lora_B @ part.lora_A)


def test_ties_is_its_formula() -> None:
    """Each number of a factor is the mean over those that were kept and agree with the elected sign, as written in a loop."""
    parts, weights, density = updates((2, 2, 2)), [0.7, 0.3, 0.5], 0.5
    got = combine_ties(parts, weights, density)
    roots = [math.sqrt(w * u.scaling) for w, u in zip(weights, parts, strict=True)]
    for tensor, factors in zip(got, ([u.lora_B for u in parts], [u.lora_A for u in parts]), strict=True):
        limits = [f.abs().flatten().sort(descending=True).values[int(density * f.numel()) - 1] for f in factors]
        for at in range(tensor.numel()):
            kept = [float(f.flatten()[at]) if abs(f.flatten()[at]) >= limit else 0.0 for f, limit in zip(factors, limits, strict=True)]
            sign = 1 if sum(kept) >= 0 else -1
            agree = [(value, root) for value, root in zip(kept, roots, strict=True) if value * sign > 0]
            expected = sum(value * root for value, root in agree) / max(1, len(agree))

            assert float(tensor.flatten()[at]) == pytest.approx(expected)


def test_dare_drops_and_rescales() -> None:
    """A share of density is kept and divided by it, so that the mean stays; a generator makes it repeatable."""
    part = Update(torch.ones(200, 100), torch.ones(100, 200), 1.0)
    lora_B, lora_A = combine_dare([part], [1.0], 0.25, torch.Generator().manual_seed(3))
    again = combine_dare([part], [1.0], 0.25, torch.Generator().manual_seed(3))

    assert {float(value) for value in lora_B.unique()} == {0.0, 4.0}
    assert float(lora_B.mean()) == pytest.approx(1, abs=0.05) and float(lora_A.mean()) == pytest.approx(1, abs=0.05)
    assert torch.equal(lora_B, again[0]) and torch.equal(lora_A, again[1])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("method", METHODS)
def test_one_adapter_s_parameter_is_itself(method: str, dtype: torch.dtype) -> None:
    """With one adapter of weight 1 and nothing dropped, a parameter is that adapter's, to the bit."""
    base, tuned = torch.randn(40).to(dtype), torch.randn(40).to(dtype)

    assert torch.equal(combine_parameters(base, [tuned], [1.0], method, density=1), tuned)


def test_parameters_by_their_formulas() -> None:
    """Differences from the base are summed; ``ties`` takes the mean of those of the elected sign, ``dare`` what was not dropped."""
    base, weights = torch.tensor([1.0, 2.0, -1.0]), [0.5, 2.0, 1.0]
    tuned = [base + torch.tensor(moved) for moved in ([1.0, -2.0, 0.0], [3.0, 1.0, 0.5], [-1.0, -4.0, 0.25])]

    torch.testing.assert_close(
        combine_parameters(base, tuned, weights, "cat", density=1), base + torch.tensor([0.5 + 6 - 1, -1 + 2 - 4, 1 + 0.25])
    )
    # signs: +, -, +; the first and second, the first and third, the second and third agree
    elected = torch.tensor([(0.5 * 1 + 2 * 3) / 2, (0.5 * -2 + 1 * -4) / 2, (2 * 0.5 + 1 * 0.25) / 2])
    torch.testing.assert_close(combine_parameters(base, tuned, weights, "ties", density=1), base + elected)
    # a third of three is kept: the largest of each
    largest = torch.tensor([2.0 * 3, (0.5 * -2 + 1 * -4) / 2, 0.0])
    torch.testing.assert_close(combine_parameters(base, tuned, weights, "ties", density=0.34), base + largest)
    many, moved = torch.zeros(10_000), torch.ones(10_000)
    kept = combine_parameters(many, [moved], [1.0], "dare", density=0.25, generator=torch.Generator().manual_seed(0))

    assert set(kept.tolist()) == {0.0, 4.0} and float(kept.mean()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("method", ["linear", "cat", "svd", "ties"])
def test_the_update_is_that_of_peft(method: str) -> None:
    """PEFT's add_weighted_adapter gives the same update from the same factors."""
    peft = pytest.importorskip("peft")
    model = torch.nn.Sequential(torch.nn.Linear(5, 7)).double()
    parts, weights = updates((2, 2)), [0.7, 0.3]
    adapted = None
    for name, part in zip(("one", "two"), parts, strict=True):
        config = peft.LoraConfig(r=2, lora_alpha=2 * part.scaling, target_modules=["0"])
        if adapted is None:
            adapted = peft.get_peft_model(model, config, adapter_name=name)
        else:
            adapted.add_adapter(name, config)
        layer = adapted.base_model.model[0]
        with torch.no_grad():
            layer.lora_A[name].weight.copy_(part.lora_A)
            layer.lora_B[name].weight.copy_(part.lora_B)
    options = {"density": 0.5} if method == "ties" else {}
    adapted.add_weighted_adapter(["one", "two"], weights, "mix", combination_type=method, **options)
    ours = {"linear": combine_linear, "cat": combine_cat}.get(method)
    if ours is not None:
        lora_B, lora_A = ours(parts, weights)
    else:
        lora_B, lora_A = combine_svd(parts, weights, 2) if method == "svd" else combine_ties(parts, weights, 0.5)

    torch.testing.assert_close(layer.get_delta_weight("mix"), lora_B @ lora_A, rtol=1e-6, atol=1e-6)
