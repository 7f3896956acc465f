"""The update's promise on a device: guarantee.py's decisions, made there block by block, without the host knowing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradsurg.gradients.param_groups import signs_of
from gradsurg.guarantee.constraint import UpdateConstraint
from gradsurg.guarantee.copies import ParameterCopies
from gradsurg.guarantee.movement import DeferredMovement, stream_of
from gradsurg.guarantee.update import ATTEMPTS, TOLERANCE, TOLERANCE_16_BIT
from gradsurg.linalg.blocks import Rows, real_of
from gradsurg.linalg.kernels.table import constant
from gradsurg.solvers.tolerances import STATIONARY

__all__ = ["ROUNDING", "UpdateConstraintCUDA", "project_update"]

# Relative error of the kernels' Gramian: see kernels/gramian.py.
ROUNDING = 1e-13


@dataclass(frozen=True, kw_only=True)
class UpdateConstraintCUDA(UpdateConstraint):
    """What every update until the next surgery has to respect, on the device.

    Attributes:
        finite: Bool, shape (): whether the Gramian is finite, without which there is nothing to judge by.
    """

    finite: Tensor

    @torch.no_grad()
    def enforce(self, optimizer: Optimizer, before: ParameterCopies) -> DeferredMovement | None:
        """Move the optimizer's shared parameters so that their step from `before` hurts no protected task."""
        from gradsurg.linalg.kernels.gramian import gramian

        sign = signs_of(optimizer)
        ours = before.ids().intersection(sign)
        mine = [[p for p in block if id(p) in ours] for block in self.blocks]
        chosen = [p for block in mine for p in block]
        if not chosen:
            return None
        # Numbered anew: a block of which this optimizer trains nothing is not there.
        there = [b for b, block in enumerate(mine) if block]
        blocks = [number for number, b in enumerate(there) for _ in mine[b]]
        table = self.rows.table(chosen)
        G = self.gramians
        if len(there) < len(mine):
            G = torch.stack([G[b] for b in there])
        if any(len(mine[b]) < len(self.blocks[b]) for b in there):  # the rest belongs to another optimizer
            G = gramian(table, blocks=blocks)
        return project_update(
            table,
            G,
            [before[p] for p in chosen],
            [p.detach() for p in chosen],
            [sign[id(p)] for p in chosen],
            blocks,
            self.allowed,
            self.finite,
        )


def project_update(
    rows: Rows,
    G: Tensor,
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    signs: Sequence[float],
    blocks: Sequence[int],
    allowed: Tensor | None,
    finite: Tensor,
) -> DeferredMovement:
    """Do what guarantee.guard does, for all blocks at once.

    What the host would decide becomes a mode per block that the kernels read: correct it, take it back, or leave it.
    Every launch is made; one that finds nothing to do reads no parameter.

    Args:
        rows: m lists of gradients per parameter.
        G: Their Gramians, (blocks, m, m), float64.
        before: The parameters before the step.
        after: The same parameters now; written.
        signs: +1 per parameter, −1 where the optimizer maximises.
        blocks: Which block each parameter belongs to, ascending from 0.
        allowed: Which tasks are protected, bool (m,); None is all.
        finite: Bool (): where False, nothing is done.
    """
    from gradsurg.linalg.kernels.combine import correct
    from gradsurg.linalg.kernels.cone import nonnegative
    from gradsurg.linalg.kernels.inner import inner, layout_of

    norms = G.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    reading = layout_of(rows, before, after, signs=signs, blocks=blocks)
    products, square = inner(rows, before, after, signs=signs, blocks=blocks, layout=reading)
    live = finite & (square > 0) & torch.isfinite(square) & torch.isfinite(products).all(-1)
    coefficients = nonnegative(G, products, allowed=allowed, scale=square.sqrt(), rounding=ROUNDING)
    coefficients = torch.where(live.unsqueeze(-1), coefficients, 0)
    corrected = (coefficients != 0).any(-1)
    left, spread = _lengths(norms, products, square, coefficients)
    held = corrected & (left <= STATIONARY * ROUNDING * spread)
    write = partial(correct, rows, after=after, before=before, signs=signs, blocks=blocks)
    writing = write(coefficients, modes=_modes(corrected & ~held, held))
    # Where numbers had to be copied to be read, the tables speak of the copies, and these are out of date now.
    reading_again = reading if _in_place(reading.keep, after, place=len(rows) + 1) else None
    write = partial(write, layout=writing if _in_place(writing.keep, after, place=len(rows)) else None)
    tolerance, half_place = _precision(after, blocks)
    moved = torch.where(corrected.unsqueeze(-1), products + (G @ coefficients.unsqueeze(-1)).squeeze(-1), products)
    movement = DeferredMovement(moved, torch.where(corrected, left, square), corrected, held)
    small = half_place * _norms(after, blocks) <= 0.5 * tolerance * left.clamp(min=0).sqrt()
    unsure = corrected & ~held & ~small
    watched = norms > 0 if allowed is None else (norms > 0) & allowed
    margin = torch.zeros_like(norms)
    for _ in range(ATTEMPTS):
        found, length = inner(
            rows, before, after, signs=signs, blocks=blocks, modes=_modes(unsure), layout=reading_again
        )
        movement = replace(
            movement,
            inner=torch.where(unsure.unsqueeze(-1), found, movement.inner),
            square=torch.where(unsure, length, movement.square),
        )
        slack = found + (tolerance * length.sqrt()).unsqueeze(-1) * norms
        unsure = unsure & (watched & (slack < 0)).any(-1)
        margin = margin + torch.where(unsure.unsqueeze(-1) & watched, (-found).clamp(min=0), 0)
        step = nonnegative(G, found - margin, allowed=allowed, scale=length.sqrt(), rounding=ROUNDING)
        step = torch.where(unsure.unsqueeze(-1), step, 0)
        # The cone has no inside worth the name: tasks are opposed to within rounding.
        hopeless = unsure & ~((step * norms).sum(-1) <= 2 * length.sqrt())
        held, unsure = held | hopeless, unsure & ~hopeless
        write(step, modes=_modes(unsure, hopeless))
    write(coefficients, modes=_modes(torch.zeros_like(unsure), unsure))
    held = held | unsure
    return replace(
        movement,
        inner=torch.where(held.unsqueeze(-1), 0, movement.inner),
        square=torch.where(held, 0, movement.square),
        held=held,
        stream=stream_of(held.device),
    )


def _modes(write: Tensor, enforce: Tensor | None = None) -> Tensor:
    """Return LEAVE, WRITE or HOLD per block, as kernels/vectors.py numbers them, int32."""
    modes = write.to(torch.int32)
    return modes if enforce is None else modes + 2 * enforce.to(torch.int32)


def _lengths(norms: Tensor, products: Tensor, square: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """Return ‖d + Σ λ_i g_i‖², by complementary slackness, and (‖d‖ + Σ λ_i ‖g_i‖)², shape (blocks,)."""
    total = square.sqrt() + (coefficients * norms).sum(-1)
    return square + (coefficients * products).sum(-1), total.square()


def _precision(after: Sequence[Tensor], blocks: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the tolerance of cosines and half a last place of a number, per block."""
    count = blocks[-1] + 1
    tolerance, half_place = [TOLERANCE] * count, [0.0] * count
    for p, b in zip(after, blocks, strict=True):
        half_place[b] = max(half_place[b], torch.finfo(p.dtype).eps / 2)
        if p.element_size() <= 2:
            tolerance[b] = TOLERANCE_16_BIT
    return constant(tolerance, after[0].device), constant(half_place, after[0].device)


def _norms(parameters: Sequence[Tensor], blocks: Sequence[int]) -> Tensor:
    """Return ‖θ‖ of every block, float64."""
    squares = torch.stack([norm.double() for norm in torch._foreach_norm(list(map(real_of, parameters)))]).square()
    place = constant(blocks, squares.device, torch.int64)
    return torch.zeros(blocks[-1] + 1, dtype=torch.float64, device=squares.device).index_add(0, place, squares).sqrt()


def _in_place(keep: Sequence[Sequence[Tensor | None]], after: Sequence[Tensor], place: int) -> bool:
    """Whether the tables' addresses are those of the parameters themselves."""
    return all(
        column[place] is not None and column[place].data_ptr() == p.data_ptr()  # type: ignore[union-attr]
        for column, p in zip(keep, after, strict=True)
    )
