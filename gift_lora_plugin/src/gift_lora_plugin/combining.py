"""Combining several low-rank updates into one, as pure functions of their factors.

An update is ``s B A`` with ``B`` ``(..., rows, rank)`` and ``A`` ``(..., rank, columns)``; leading axes are a stack of matrices. Each
function takes updates and one weight for each, and gives the factors of the combination, whose scaling is 1; `combine_parameters` does
the same with whole parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gift_lora_plugin.lowrank import own_precision


class Update(NamedTuple):
    """One low-rank update: ``scaling * lora_B @ lora_A``."""

    lora_B: Tensor
    lora_A: Tensor
    scaling: float


#: The factors B and A of a combination.
Factors = tuple[Tensor, Tensor]


def combine_cat(updates: Sequence[Update], weights: Sequence[float]) -> Factors:
    r"""The exact weighted sum :math:`\sum_i w_i s_i B_i A_i`, at the sum of the ranks: factors side by side."""
    lora_B = torch.cat([update.lora_B * (weight * update.scaling) for update, weight in zip(updates, weights, strict=True)], -1)
    return lora_B, torch.cat([update.lora_A for update in updates], -2)


def combine_linear(updates: Sequence[Update], weights: Sequence[float]) -> Factors:
    r"""Weighted sums of the factors, with :math:`c_i = w_i s_i`: :math:`B = \sum_i \mathrm{sgn}(c_i) \sqrt{|c_i|} B_i`,
    :math:`A = \sum_i \sqrt{|c_i|} A_i`. It keeps the rank, which all must share, and is no sum of the updates: their products mix.
    """  # noqa: D205
    lora_B, lora_A = _scaled(updates, weights)
    return torch.stack(lora_B).sum(0), torch.stack(lora_A).sum(0)


def combine_svd(updates: Sequence[Update], weights: Sequence[float], rank: int) -> Factors:
    r"""The best approximation of the weighted sum of the updates by one of ``rank``, in the Frobenius norm.

    With the singular value decomposition :math:`U S V^T` of the sum: :math:`B = U \sqrt{S}`, :math:`A = \sqrt{S} V^T`, truncated.

    Source: Eckart and Young 1936, doi:10.1007/BF02288367.
    """
    with own_precision(updates[0].lora_B.device.type):
        return _truncated(*combine_cat(updates, weights), rank)


def _truncated(lora_B: Tensor, lora_A: Tensor, rank: int) -> Factors:
    wide = torch.promote_types(lora_B.dtype, torch.float32)
    # the product is never built: the decomposition of R_B R_A^T, small and square, is that of B A in the bases of both
    q_B, r_B = torch.linalg.qr(lora_B.to(wide))
    q_A, r_A = torch.linalg.qr(lora_A.to(wide).mH)
    u, s, vh = torch.linalg.svd(r_B @ r_A.mH, full_matrices=False)
    root = s[..., :rank].sqrt()
    new_B, new_A = q_B @ (u[..., :rank] * root.unsqueeze(-2)), (root.unsqueeze(-1) * vh[..., :rank, :]) @ q_A.mH
    missing = rank - root.shape[-1]
    if missing > 0:  # the sum has not so much to give
        new_B, new_A = torch.nn.functional.pad(new_B, (0, missing)), torch.nn.functional.pad(new_A, (0, 0, 0, missing))
    return new_B.to(lora_B.dtype), new_A.to(lora_A.dtype)


def combine_ties(updates: Sequence[Update], weights: Sequence[float], density: float) -> Factors:
    r"""TIES on the factors: trim, elect a sign, merge what agrees with it.

    Of each factor, which has to be real, the ``density`` share of largest magnitude is kept; the sign of each number is that of the sum
    over the adapters; the result is the mean of the kept numbers of that sign, each times :math:`\sqrt{|w_i s_i|}` (for B with the sign
    of :math:`w_i s_i`).

    Source: Yadav et al. 2023, arXiv:2306.01708, section 3.2, there on full task vectors; here on B and on A.
    """
    roots = _roots(updates, weights)
    return (
        _ties([update.lora_B for update in updates], [math.copysign(root, sign) for root, sign in roots], density),
        _ties([update.lora_A for update in updates], [root for root, _ in roots], density),
    )


def combine_dare(
    updates: Sequence[Update], weights: Sequence[float], density: float, generator: torch.Generator | None = None
) -> Factors:
    r"""DARE on the factors: drop each number with probability 1 - ``density``, divide the rest by ``density``, sum as `combine_linear`.

    Args:
        updates: of one rank.
        weights: one for each.
        density: the share that is kept, in (0, 1].
        generator: draws what is dropped, on the CPU; None is torch's own.

    Source: Yu et al. 2024, arXiv:2311.03099, equation 1 of section 3.1, there on full task vectors.
    """
    dropped = [
        Update(_drop(update.lora_B, density, generator), _drop(update.lora_A, density, generator), update.scaling) for update in updates
    ]
    return combine_linear(dropped, weights)


def combine_parameters(
    base: Tensor,
    tuned: Sequence[Tensor],
    weights: Sequence[float],
    method: str,
    *,
    density: float,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Combine what adapters made of one parameter of the base by its differences :math:`d_i` from the base.

    ``linear``, ``cat`` and ``svd`` give :math:`p + \sum_i w_i d_i`; ``ties`` and ``dare`` treat :math:`d_i` as their papers do, of
    which it is a part of the task vector: ``ties`` adds the mean of the kept numbers of the elected sign, each times :math:`w_i`,
    ``dare`` the weighted sum of what was kept, divided by ``density``.

    Args:
        base: the parameter without an adapter.
        tuned: its values under each.
        weights: one for each.
        method: a key of `METHODS`.
        density: as for ``ties`` and ``dare``.
        generator: as for ``dare``.
    """
    # in double precision, so that one adapter of weight 1 is itself
    wide = torch.promote_types(base.dtype, torch.float64)
    differences = [value.to(wide) - base.to(wide) for value in tuned]
    if method == "ties":
        return (base.to(wide) + _ties(differences, weights, density)).to(base.dtype)
    if method == "dare":
        differences = [_drop(difference, density, generator) for difference in differences]
    total = torch.stack([weight * difference for weight, difference in zip(weights, differences, strict=True)]).sum(0)
    return (base.to(wide) + total).to(base.dtype)


#: Methods that keep the rank and so need one rank for all.
SAME_RANK: dict[str, Callable[..., Factors]] = {"linear": combine_linear, "ties": combine_ties, "dare": combine_dare}

#: Methods that ask for the sign of a number, which a complex one does not have.
REAL_ONLY = frozenset({"ties"})

#: Every method by its name.
METHODS: dict[str, Callable[..., Factors]] = {**SAME_RANK, "cat": combine_cat, "svd": combine_svd}


def _roots(updates: Sequence[Update], weights: Sequence[float]) -> list[tuple[float, float]]:
    products = [weight * update.scaling for update, weight in zip(updates, weights, strict=True)]
    return [(math.sqrt(abs(product)), product) for product in products]


def _scaled(updates: Sequence[Update], weights: Sequence[float]) -> tuple[list[Tensor], list[Tensor]]:
    roots = _roots(updates, weights)
    lora_B = [update.lora_B * math.copysign(root, sign) for update, (root, sign) in zip(updates, roots, strict=True)]
    return lora_B, [update.lora_A * root for update, (root, _) in zip(updates, roots, strict=True)]


def _ties(tensors: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    trimmed = torch.stack([_trim(tensor, density) for tensor in tensors])
    elected = torch.where(trimmed.sum(0) >= 0, 1, -1)
    agrees = trimmed.sign() == elected
    factors = trimmed.new_tensor(weights).view(-1, *[1] * tensors[0].dim())
    return (trimmed * factors * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def _trim(tensor: Tensor, density: float) -> Tensor:
    flat = tensor.flatten()
    kept = flat.abs().topk(max(1, int(density * flat.numel()))).indices  # of a short bias at least one
    return torch.zeros_like(flat).index_copy(0, kept, flat[kept]).view(tensor.shape)


def _drop(tensor: Tensor, density: float, generator: torch.Generator | None) -> Tensor:
    kept = torch.rand(tensor.shape, generator=generator).to(tensor.device) < density
    return tensor * kept / density
