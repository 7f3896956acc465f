"""The direction of methods that combine gradients number by number, and its projection onto the dual cone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradsurg.linalg.blocks import Rows, real_of
from gradsurg.linalg.combine import combine
from gradsurg.linalg.measure import Measure
from gradsurg.solvers.nonnegative import nonnegative
from gradsurg.solvers.tolerances import ROUNDING_EXACT, STATIONARY

__all__ = ["ElementwiseDirection", "elementwise_direction"]

# (columns of shape (m', n), r of the m' rows, source of random numbers) -> n numbers of u.
Combine = Callable[[Tensor, Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class ElementwiseDirection:
    """The direction u of one partition; ⟨u, g_i⟩ and ‖u‖² in float64; whether only u = 0 satisfied the guarantee."""

    direction: list[Tensor]
    products: Tensor
    square: Tensor
    stationary: bool = False


def elementwise_direction(
    combine_columns: Combine,
    rows: Rows,
    like: Sequence[Tensor],
    scales: Sequence[float],
    preferences: Tensor,
    generators: Sequence[torch.Generator],
    *,
    guarantee: bool,
    allowed: Tensor | None = None,
    measure: Measure | None = None,
    least: Tensor | None = None,
) -> ElementwiseDirection:
    """Return the direction of one partition.

    Args:
        combine_columns: Makes one number out of the numbers of all tasks.
        rows: m lists of one gradient, or None, per parameter.
        like: The part of each parameter that this rank holds: u has these dtypes and shapes.
        scales: The factor of each row; 0 leaves the row out.
        preferences: r_i, shape (m,), on the CPU; 0 leaves the row out.
        generators: One source of random numbers per parameter.
        guarantee: Whether u is projected onto the dual cone of the rows: the least change that removes all conflicts.
        allowed: Which tasks the guarantee protects, bool (m,); None is all.
        measure: How inner products are added up over ranks; None is one process.
        least: The lower bound of ⟨u, g_i⟩ under the guarantee, shape (m,); None is 0.
    """
    measure = measure or Measure()
    anywhere = measure.nonzero(rows)
    alive = [i for i, (s, r) in enumerate(zip(scales, preferences.tolist(), strict=True)) if s and r and anywhere[i]]
    direction = []
    for k, (parameter, generator) in enumerate(zip(like, generators, strict=True)):
        present = [(i, g) for i in alive if (g := rows[i][k]) is not None]
        direction.append(_column(combine_columns, present, parameter, scales, preferences, generator))
    with_u = [*rows, direction]
    G = measure.gramian(with_u, exact=True)
    correction = torch.zeros(len(rows) + 1, dtype=torch.float64)
    correction[-1] = 1.0
    stationary = False
    if guarantee:
        correction[:-1] = nonnegative(
            G[:-1, :-1],
            G[-1, :-1] if least is None else G[-1, :-1] - least,
            allowed=allowed,
            rounding=ROUNDING_EXACT,
        )
        square = correction @ G @ correction
        lengths = correction.abs() @ G.diagonal().sqrt()
        stationary = bool(square <= STATIONARY * ROUNDING_EXACT * lengths.square())
        if stationary:
            correction.zero_()
        if stationary or bool(correction[:-1].any()):
            direction = combine(with_u, correction.tolist(), like, exact=True)
    products = G @ correction
    return ElementwiseDirection(direction, products[:-1], correction @ products, stationary)


def _column(
    combine_columns: Combine,
    present: Sequence[tuple[int, Tensor]],
    parameter: Tensor,
    scales: Sequence[float],
    preferences: Tensor,
    generator: torch.Generator,
) -> Tensor:
    if not present:
        return torch.zeros_like(parameter)
    flat = [scales[i] * real_of((g.to_dense() if g.is_sparse else g).detach()).reshape(-1) for i, g in present]
    columns = torch.stack([x.to(torch.promote_types(x.dtype, torch.float32)) for x in flat])
    pull = preferences[[i for i, _ in present]].to(columns)
    u = combine_columns(columns, pull, generator)
    if parameter.is_complex():
        return torch.view_as_complex(u.reshape(*parameter.shape, 2)).to(parameter.dtype)
    u = u.reshape(parameter.shape).to(parameter.dtype)
    # Sparse if all gradients are: SparseAdam accepts nothing else.
    sparse = [g.sparse_dim() for _, g in present if g.is_sparse]
    return u.to_sparse(sparse[0]) if len(sparse) == len(present) else u
