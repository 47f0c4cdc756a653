"""Where the factors start, against the papers' equations and against decompositions written out by other means."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gift_core.errors import SiteError
from gift_lora_plugin import initialization
from gift_lora_plugin.initialization import check_initialization, factors_of, kaiming_uniform, orthogonal

REAL = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
COMPLEX = [torch.complex64, torch.complex128]
#: Relative to the largest number compared; half precision is decomposed in single precision.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.complex128: 1e-12,
    torch.float32: 1e-5,
    torch.complex64: 1e-5,
    torch.float16: 1e-5,
    torch.bfloat16: 1e-5,
}
SHAPES = [(7, 5), (5, 7), (4, 4), (3, 6, 4)]


def matrix(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A seeded weight."""
    torch.manual_seed(0)
    return torch.randn(shape, dtype=torch.complex128 if dtype.is_complex else torch.float64).to(dtype)


def precise(tensor: Tensor) -> Tensor:
    """In double precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float64))


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Within ``tolerance`` of the largest number."""
    assert actual.shape == expected.shape
    assert (precise(actual) - precise(expected)).abs().max() <= tolerance * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("dtype", [*REAL, *COMPLEX], ids=str)
def test_kaiming_has_its_bound_and_variance(dtype: torch.dtype) -> None:
    """Numbers are spread evenly with the variance 1 / (3 columns), real or complex, and real ones keep within 1 / sqrt(columns)."""
    torch.manual_seed(0)
    A = kaiming_uniform(torch.empty(200, 50, dtype=dtype))
    squares = precise(A).abs().square()

    # five times the spread of the estimate is allowed; the kurtosis of a uniform distribution is 9 / 5
    assert abs(squares.mean() * 150 - 1) < 5 * math.sqrt(0.8 / A.numel())
    assert abs(precise(A).mean()) < 5 / math.sqrt(150 * A.numel())
    # a bound that the format cannot hold is rounded to one that it can
    assert dtype.is_complex or squares.max().sqrt() <= (1 / math.sqrt(50)) * (1 + torch.finfo(dtype).eps)


def test_kaiming_is_torchs() -> None:
    """The draw is the one that `torch.nn.init.kaiming_uniform_` with a = sqrt(5) makes from the same seed."""
    torch.manual_seed(3)
    ours = kaiming_uniform(torch.empty(4, 9))
    torch.manual_seed(3)
    theirs = torch.nn.init.kaiming_uniform_(torch.empty(4, 9), a=math.sqrt(5))

    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [*REAL, *COMPLEX], ids=str)
@pytest.mark.parametrize("shape", [(3, 8), (8, 8), (8, 3), (2, 3, 8)], ids=str)
def test_orthogonal_rows_are_orthonormal(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """A A^H is the identity, or A^H A where there are more rows than columns, in every precision and for every block."""
    torch.manual_seed(0)
    A = precise(orthogonal(torch.empty(shape, dtype=dtype)))
    gram = A @ A.mH if shape[-2] <= shape[-1] else A.mH @ A

    rounding = {torch.float16: 2e-3, torch.bfloat16: 2e-2}.get(dtype, TOLERANCE[dtype])
    assert_close(gram, torch.eye(gram.shape[-1], dtype=gram.dtype).expand_as(gram), rounding)


def test_orthogonal_directions_are_even() -> None:
    """Every direction is as likely as its opposite, and draws follow the seed."""
    torch.manual_seed(0)
    draws = torch.stack([orthogonal(torch.empty(2, 3)) for _ in range(2000)])

    # an entry of a random unit vector in three dimensions has the variance 1 / 3
    assert (draws.mean(0).abs() < 5 / math.sqrt(3 * 2000)).all()
    assert ((draws.square().mean(0) - 1 / 3).abs() < 5 * math.sqrt(4 / 45 / 2000)).all()


@pytest.mark.parametrize("scaling", [1.0, 0.25, 3.0])
@pytest.mark.parametrize("dtype", [*REAL, *COMPLEX], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rank", [1, 3])
def test_pissa_is_the_best_approximation(rank: int, shape: tuple[int, ...], dtype: torch.dtype, scaling: float) -> None:
    """The product is the weight's projection on its principal directions, and both factors share the singular values evenly."""
    W = matrix(shape, dtype)
    B, A = factors_of("pissa", W, rank, scaling)
    # the directions once more, as eigenvectors of W W^H
    values, vectors = torch.linalg.eigh(precise(W) @ precise(W).mH)
    principal = vectors[..., -rank:]
    expected = principal @ principal.mH @ precise(W)
    shared = values[..., -rank:].flip(-1).clamp_min(0).sqrt() / scaling

    assert_close(scaling * B @ A, expected, TOLERANCE[dtype] * 10)
    assert_close((B.mH @ B).diagonal(dim1=-2, dim2=-1).real, shared, TOLERANCE[dtype] * 10)
    assert_close((A @ A.mH).diagonal(dim1=-2, dim2=-1).real, shared, TOLERANCE[dtype] * 10)


@pytest.mark.parametrize("dtype", [*REAL, *COMPLEX], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_olora_is_the_first_part_of_qr(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """B is orthonormal and spans the weight's first columns, which B A gives back, and A is the head of a triangle."""
    W, rank = matrix(shape, dtype), 3
    B, A = factors_of("olora", W, rank, 2.0)
    rounding = TOLERANCE[dtype] * 10

    assert_close(B.mH @ B, torch.eye(rank, dtype=B.dtype).expand(*shape[:-2], rank, rank), rounding)
    assert_close((B @ A)[..., :rank], W[..., :rank], rounding)
    # what B cannot reach is orthogonal to it
    assert_close(B @ A, precise(B) @ precise(B).mH @ precise(W), rounding)
    assert not A.tril(-1).any()


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_from_the_weight_draws_nothing(init: str) -> None:
    """The random number generator is left as it was, and the weight too."""
    W, before = matrix((7, 5), torch.float32), torch.get_rng_state()
    copy = W.clone()

    factors_of(init, W, 2, 1.0)

    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(W, copy)


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(init: str, bad: float) -> None:
    """A decomposition of a NaN or an infinity is an error that says so."""
    W = matrix((7, 5), torch.float32)
    W[2, 3] = bad

    with pytest.raises(SiteError, match=f"init='{init}' decomposes the weight, which holds a NaN or an infinity"):
        factors_of(init, W, 2, 1.0)


@pytest.mark.parametrize(
    ("init", "rank", "scaling", "says"),
    [
        ("pissa", 6, 1.0, "7 x 5 matrix has 5, and rank 6"),
        ("olora", 6, 1.0, "7 x 5 matrix has 5, and rank 6"),
        ("pissa", 2, 0.0, "alpha makes it 0: set lora_alpha above zero"),
        ("pissa", 2, -1.5, "alpha makes it -1.5: set lora_alpha above zero"),
        ("olora", 2, 0.0, "alpha makes it 0: set lora_alpha other than zero"),
    ],
)
def test_what_a_start_cannot_give_is_refused(init: str, rank: int, scaling: float, says: str) -> None:
    """A rank or scaling that a start from the weight cannot have is an error with the numbers and the way out."""
    with pytest.raises(SiteError, match=says):
        check_initialization(init, rank, 7, 5, scaling)


@pytest.mark.parametrize("init", initialization.INITIALIZATIONS)
def test_what_a_start_can_give_is_taken(init: str) -> None:
    """Every start takes a rank up to the smaller side and a scaling above zero."""
    check_initialization(init, 5, 7, 5, 0.5)
