"""Where the factors start, as pure functions of tensors.

Nothing here knows modules, and nothing changes the weight: the two starts that are made of the weight's own content, `PiSSA` and
`OLoRA`, come with the promise that the update is counted from them, so that the base stays as it is (see `gift_lora_plugin.LoRA`).
A matrix may have leading axes, each entry of which is a matrix of its own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gift_core.errors import SiteError

#: The starts by name; the first is the default.
INITIALIZATIONS = ("kaiming", "orthogonal", "pissa", "olora")
#: The starts whose product is not zero: a part of the weight itself.
FROM_WEIGHT = ("pissa", "olora")


def check_initialization(init: str, rank: int, rows: int, columns: int, scaling: float) -> None:
    """Refuse what a start cannot give.

    Raises:
        SiteError: if a start from the weight is asked for more directions than the weight has, or for a scaling it cannot have.
    """
    if init not in FROM_WEIGHT:
        return
    if rank > min(rows, columns):
        raise SiteError(
            f"init={init!r} starts from the weight's own directions, of which a {rows} x {columns} matrix has {min(rows, columns)}, "
            f"and rank {rank} asks for more: lower the rank here, exclude it, or use init='kaiming'."
        )
    if scaling == 0 or (init == "pissa" and scaling < 0):
        allowed = "above zero" if init == "pissa" else "other than zero"
        raise SiteError(f"init={init!r} needs a scaling {allowed}, and alpha makes it {scaling:g}: set lora_alpha {allowed}.")


def kaiming_uniform(lora_A: Tensor) -> Tensor:
    r"""Fill ``(..., rank, columns)`` in place, uniformly within :math:`1 / \sqrt{columns}`, which is Kaiming's with a = sqrt(5).

    A complex number has two independent parts, each within :math:`1 / \sqrt{2\,columns}`, so that its expected squared magnitude
    is that of a real one.

    Source: He et al. 2015, arXiv:1502.01852, section 2.2; the complex variance as in Trabelsi et al. 2018, arXiv:1705.09792,
    section 3.6.
    """
    bound = 1 / math.sqrt(lora_A.shape[-1])
    if lora_A.is_complex():
        torch.view_as_real(lora_A).uniform_(-bound / math.sqrt(2), bound / math.sqrt(2))
        return lora_A
    return lora_A.uniform_(-bound, bound)


def orthogonal(lora_A: Tensor) -> Tensor:
    r"""Fill ``(..., rank, columns)`` in place with orthonormal rows, :math:`A A^H = I`, drawn uniformly among all such.

    With more rows than columns the columns are orthonormal instead.

    Source: Saxe et al. 2014, arXiv:1312.6120, section 3; for a low-rank A, Zhu et al. 2024, arXiv:2402.16842, section 4.
    """
    precise = torch.promote_types(lora_A.dtype, torch.float32)
    rank, columns = lora_A.shape[-2:]
    tall = (*lora_A.shape[:-2], max(rank, columns), min(rank, columns))
    Q, R = torch.linalg.qr(torch.randn(tall, dtype=precise, device=lora_A.device))
    # the signs of QR are the algorithm's choice, and would make some directions likelier than others
    Q = Q * R.diagonal(dim1=-2, dim2=-1).sgn().unsqueeze(-2)
    return lora_A.copy_(Q if rank > columns else Q.mH)


def pissa(matrix: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    r"""The principal part of a matrix as factors.

    With :math:`W = U S V^H`, :math:`B = U_r \sqrt{S_r / s}` and :math:`A = \sqrt{S_r / s}\, V_r^H`, so that :math:`s B A` is the best
    approximation of rank r. The singular value decomposition is exact, and draws no random number.

    Args:
        matrix: ``(..., rows, columns)``, float32 or wider.
        rank: r, at most the smaller side.
        scaling: s, above zero.

    Returns:
        B ``(..., rows, rank)`` and A ``(..., rank, columns)``.

    Source: Meng et al. 2024, arXiv:2404.02948, equations 2 and 3.
    """
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    root = (S[..., :rank] / scaling).sqrt()
    return U[..., :rank] * root.unsqueeze(-2), Vh[..., :rank, :] * root.unsqueeze(-1)


def olora(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The first columns of Q and the first rows of R in ``W = Q R``, so that B has orthonormal columns.

    Args:
        matrix: ``(..., rows, columns)``, float32 or wider.
        rank: at most the smaller side.

    Returns:
        B ``(..., rows, rank)`` and A ``(..., rank, columns)``.

    Source: Büyükakyüz 2024, arXiv:2406.01775, section 3.
    """
    Q, R = torch.linalg.qr(matrix)
    return Q[..., :rank], R[..., :rank, :]


def factors_of(init: str, matrix: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """B and A of a start from the weight, computed in float32 or wider.

    Raises:
        SiteError: if the matrix holds a NaN or an infinity.
    """
    precise = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    if not precise.isfinite().all():
        raise SiteError(f"init={init!r} decomposes the weight, which holds a NaN or an infinity: repair or exclude it.")
    return pissa(precise, rank, scaling) if init == "pissa" else olora(precise, rank)
