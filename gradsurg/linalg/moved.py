"""Which numbers a step left in place, and the Gramian of the others; for a guarantee that leaves them there too."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import torch
from torch import Tensor

from gradsurg.linalg.blocks import Rows, block_for, blocks, flat, real_of
from gradsurg.linalg.buffers import BUFFERS, ROWS
from gradsurg.linalg.gramian import GramianSum

__all__ = ["gramian_moved", "left_in_place", "pulled"]

# A number of size x that does not move may have moved by less than ε x / 2, which is rounded away. That is no reason
# if the largest movement of its tensor is FAR times ε x, and it is nobody's wish if few numbers of a tensor are left:
# late in training, Adam rounds away one movement in 1e4.
FAR, FEW = 64.0, 0.01


@torch.no_grad()
def left_in_place(
    before: Sequence[Tensor], after: Sequence[Tensor], gradients: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Return, per parameter, which numbers the optimizer wants where they are: bool, or None if there is none.

    Those that it left in place are to the bit what they were, and one of these holds: the whole tensor is; the number
    is 0; p.grad is 0 there; or more than one in a hundred stayed while the rest moved so far that rounding cannot be
    the reason. And those that it put at exactly 0, as a proximal or nonnegative optimizer does.

    Only a step that is corrected asks. It takes 4 to 19 % of that step on the CPU: benchmarks/jumps.py.

    Args:
        before: The parameters before the step.
        after: The parameters now.
        gradients: p.grad at the step, or None if it is unknown.
    """
    return [_left(old, new, g) for old, new, g in zip(before, after, gradients, strict=True)]


def _left(old: Tensor, new: Tensor, gradient: Tensor | None) -> Tensor | None:
    old, new = real_of(old), real_of(new)
    still = old == new
    # A third of the time of sum(), which widens every flag.
    count = int(still.count_nonzero())
    put_at_zero = (new == 0) & ~still
    if count == 0 or count == still.numel():
        return still if count else put_at_zero if put_at_zero.any() else None
    if count > FEW * still.numel():
        size = old.abs().masked_fill(~still, 0).max()
        if (new - old).abs().max() > FAR * torch.finfo(old.dtype).eps * size:
            return still | put_at_zero
    meant = old == 0
    if gradient is not None and not gradient.is_sparse:
        meant |= real_of(gradient.detach()) == 0
    meant = (meant & still) | put_at_zero
    return meant if meant.any() else None


def pulled(rows: Rows, left: Sequence[Tensor | None]) -> bool:
    """Tell whether some row would move a number that was left in place."""
    for k, still in enumerate(left):
        if still is not None:
            column = [g.to_dense() if g.is_sparse else g for row in rows if (g := row[k]) is not None]
            if any(torch.logical_and(real_of(g), still).any() for g in column):
                return True
    return False


@torch.no_grad()
def gramian_moved(
    rows: Rows,
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    metric: Sequence[float],
    left: Sequence[Tensor | None],
) -> tuple[Tensor, float]:
    """Return J M Jᵀ and Σ d²/M, summed exactly: the Gramian in the metric of a step, and the step's length in it.

    M is a parameter's number in `metric`, and 0 for numbers that were left in place. Where M = 0 nothing counts.

    Args:
        rows: m lists of gradients, J.
        before: The parameters before the step.
        after: The parameters now.
        metric: M ≥ 0 per parameter.
        left: The result of `left_in_place`.

    Returns:
        Shape (m, m), float64; and a number.
    """
    total = GramianSum(len(rows) + 1)
    dense = [[g.to_dense() if g is not None and g.is_sparse else g for g in row] for row in rows]
    for weight, (still, old, new, *gradients) in blocks(
        [left, before, after, *dense], tags=metric, size=block_for(len(rows) + 1)
    ):
        assert isinstance(weight, float)
        if weight == 0:
            continue
        # The movement becomes the last row of the matrix.
        matrix = BUFFERS.stack(ROWS, [*gradients, old])
        *present, d = matrix.rows
        d.sub_(flat(new))
        if still:
            for row in present:
                row.masked_fill_(flat(still), 0)
        if weight != 1:
            torch._foreach_mul_(present, sqrt(weight))
            d.div_(sqrt(weight))
        total.add([*(i for i, pieces in enumerate(gradients) if pieces), len(rows)], matrix, exact=True)
    products = total.result()
    return products[:-1, :-1], float(products[-1, -1])
