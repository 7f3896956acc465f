"""The direction of an element-wise surgery: one parameter at a time, and the gradient guarantee on top."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradsurg.distributed.layout import ALONE, Layout
from gradsurg.linalg.blocks import Rows, real_of
from gradsurg.linalg.combine import combine
from gradsurg.solvers.nonnegative import nonnegative
from gradsurg.solvers.tolerances import ROUNDING_EXACT, STATIONARY
from gradsurg.surgery.base import ElementwiseSurgery

__all__ = ["ElementwiseDirection", "elementwise_direction"]


@dataclass(frozen=True)
class ElementwiseDirection:
    """The direction of one block.

    Attributes:
        direction: u, one tensor per parameter.
        products: ⟨u, g_i⟩, shape (m,), float64.
        square: ‖u‖², float64.
        stationary: Whether only u = 0 satisfied the guarantee.
    """

    direction: list[Tensor]
    products: Tensor
    square: Tensor
    stationary: bool = False


def elementwise_direction(
    surgery: ElementwiseSurgery,
    rows: Rows,
    like: Sequence[Tensor],
    scales: Sequence[float],
    preferences: Tensor,
    generator: torch.Generator,
    guarantee: bool,
    allowed: Tensor | None = None,
    layout: Layout = ALONE,
    least: Tensor | None = None,
) -> ElementwiseDirection:
    """Return the direction of one block.

    Args:
        surgery: What makes one number out of m.
        rows: m lists of one gradient, or None, per parameter.
        like: The parameters: u has their dtypes, and the shapes of what this rank holds of them.
        scales: What to multiply each row by; 0 for one that wants nothing.
        preferences: r_i, shape (m,), on the CPU.
        generator: Source of random choices.
        guarantee: Project u onto the dual cone of the rows: the least change after which it conflicts with nobody.
        allowed: Which tasks that protects, bool (m,); None is all.
        layout: What of rows and parameters this rank holds.
        least: What ⟨u, g_i⟩ it holds to, shape (m,); None is 0.
    """
    measure, generators = layout.measure(like), layout.generators(like, generator)
    like = layout.held(like, like)
    anywhere = measure.nonzero(rows)
    alive = [i for i, s in enumerate(scales) if s != 0 and anywhere[i]]
    direction = []
    for k, (parameter, draws) in enumerate(zip(like, generators, strict=True)):
        present = [(i, g) for i in alive if (g := rows[i][k]) is not None]
        direction.append(_column(surgery, present, parameter, scales, preferences, draws))
    with_u = [*rows, direction]
    G = measure.gramian(with_u, exact=True).cpu()
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
    surgery: ElementwiseSurgery,
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
    u = surgery.combine(columns, pull, generator)
    if parameter.is_complex():
        return torch.view_as_complex(u.reshape(*parameter.shape, 2)).to(parameter.dtype)
    u = u.reshape(parameter.shape).to(parameter.dtype)
    sparse = [g.sparse_dim() for _, g in present if g.is_sparse]
    return u.to_sparse(sparse[0]) if len(sparse) == len(present) else u  # SparseAdam takes nothing else
