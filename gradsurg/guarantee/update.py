"""project_update: the real movement of the inner optimizer, projected onto the dual cone of the task gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf, isfinite

import torch
from torch import Tensor

from gradsurg.guarantee.copies import Part
from gradsurg.guarantee.metric import (
    Update,
    least_of,
    length_of,
    lengths,
    metric_matters,
    project_in_metric,
    take_back,
    tolerance_of,
)
from gradsurg.guarantee.movement import Movement
from gradsurg.linalg.blocks import BLOCK, Rows, cut, flat
from gradsurg.linalg.buffers import BUFFERS, SUM
from gradsurg.linalg.combine import correct_
from gradsurg.linalg.measure import Measure
from gradsurg.linalg.moved import left_in_place, pulled
from gradsurg.linalg.packing import DTYPE, GradientTable
from gradsurg.solvers.nonnegative import nonnegative
from gradsurg.solvers.tolerances import (
    CANCELLATION_GRAMIAN,
    CANCELLATION_SUM,
    ROUNDING_EXACT,
    ROUNDING_QUICK,
    STATIONARY,
)

__all__ = ["CLEAR", "first_look", "project_update"]


# Numbers of a large tensor in one float32 sum; a last piece may be half as long again.
LOOKED_AT = 65_536
# A float32 sum of n products errs by at most n · 6e-8 of ‖d‖ ‖g‖, in any order: by 6e-3 for one piece. So a cosine of
# at least CLEAR is positive, whatever rounding did.
CLEAR = 1e-2
# Products below 1e-38 are lost in float32: n of them are at most n · 1e-38, a hundredth of n · LEAST.
LEAST = 1e-36


@torch.no_grad()
def project_update(
    rows: Rows,
    G: Tensor,
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    signs: Sequence[float],
    allowed: Tensor | None,
    measure: Measure | None = None,
    asked: Callable[[Tensor], Tensor] | None = None,
    meant: Callable[[], tuple[Sequence[float], Sequence[Tensor | None]]] | None = None,
) -> Movement:
    """Move the parameters so that ⟨d, g_i⟩ ≥ 0 for every protected task, changing d as little as possible.

    d ← d + M Σ λ_i g_i, λ = argmin_{λ ≥ 0} ½ λᵀ J M Jᵀ λ + λᵀJd, which is the least Σ (change of d)² / M. M is each
    number's learning rate, and 0 for numbers that the optimizer left in place: they stay, to the bit. With one rate for
    all, M drops out. This takes one pass over the gradients for Jd and, only if some task would get worse, one for the
    correction. Parameters are stored rounded, and the promise is about the stored numbers: if half a last place of ‖θ‖
    is not small against 1e-4 of ‖d‖, the stored movement is measured and pushed back into the cone.

    Args:
        rows: m lists of gradients per parameter.
        G: Their Gramian, (m, m), float64, finite.
        before: The parameters before the step.
        after: The same parameters now; written.
        signs: +1 per parameter, −1 if the optimizer maximises.
        allowed: Which tasks are protected, bool (m,); None is all.
        measure: Measures lengths and inner products over all ranks; None is this process alone.
        asked: Margins, see gradsurg.surgery.margin: takes a Gramian and returns cosines a_i ≥ 0, shape (m,), that make
            the promise ⟨d, g_i⟩ ≥ a_i ‖g_i‖ ‖d_0‖, d_0 the movement of the inner optimizer. None is 0.
        meant: Returns the learning rate and p.grad of each parameter, and is called if a task would get worse; None is
            one rate for all, and p.grad unknown.

    Returns:
        The movement as it is stored.

    Source: Su Jianlin 2022, kexue.fm 8896, asks the property of the update and not of the gradient.
    """
    measure = Measure() if measure is None else measure
    if asked is None and measure.alone:
        # Most steps hurt no task by far, and float32 can tell that.
        norms = [max(square, 0.0) ** 0.5 for square in G.diagonal().tolist()]
        seen = first_look(rows, norms, before, after, signs)
        if seen is not None:
            return Movement(torch.tensor(seen[0], dtype=torch.float64), seen[1])
    inner, square = measure.inner_update(rows, before, after, signs)
    products = inner.tolist()
    if square == 0 or not all(map(isfinite, products)) or (asked is None and min(products) >= 0):
        return Movement(inner, square)
    cosines = None if asked is None else asked(G)
    least = least_of(G, cosines, square)
    coefficients = nonnegative(G, inner - least, allowed=allowed, scale=length_of(square), rounding=ROUNDING_QUICK)
    # Only tasks that the guarantee does not protect got worse.
    if not coefficients.any():
        return Movement(inner, square)
    # From here on the step is changed. Its own meaning comes first: what it left in place, and its rates.
    update = Update(rows, before, after, signs, allowed, measure, G.diagonal().sqrt(), G)
    rates, gradients = ([1.0] * len(after), [None] * len(after)) if meant is None else meant()
    in_place = left_in_place(before, after, gradients)
    if metric_matters(rates) or measure.any_rank(pulled(rows, in_place)):
        return project_in_metric(update, asked, rates, in_place)
    rest, spread = lengths(G, inner + least, square, coefficients)
    # If most of d is taken away, what is left needs every digit: the quick sums err by up to 4e-13 of ‖d‖ ‖g_i‖.
    if not rest * CANCELLATION_GRAMIAN**2 > spread:
        G = measure.gramian(rows, exact=True)
        inner, square = measure.inner_update(rows, before, after, signs, exact=True)
        least = least_of(G, cosines, square)
        coefficients = nonnegative(G, inner - least, allowed=allowed, scale=length_of(square), rounding=ROUNDING_EXACT)
        rest, spread = lengths(G, inner + least, square, coefficients)
    if rest <= STATIONARY * ROUNDING_EXACT * spread:
        return take_back(before, after, inner)
    correct_(rows, coefficients.tolist(), after, signs, exact=rest * CANCELLATION_SUM**2 < spread)
    tolerance = tolerance_of(after)
    half_place = max(torch.finfo(p.dtype).eps for p in after) / 2
    if half_place * measure.norm(after) <= 0.5 * tolerance * rest**0.5:
        return Movement(inner + G @ coefficients, rest, corrected=True)
    return update.settle_rounding(least)


def first_look(
    rows: Sequence[Sequence[Tensor | None]],
    norms: Sequence[float],
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    signs: Sequence[float],
) -> tuple[list[float], float] | None:
    """Return ⟨d, g_i⟩ and ‖d‖² of d = sign · (before − after), if cos(d, g_i) ≥ 0.01 for every task.

    The margin of 0.01 is so wide that rounding cannot change the verdict; otherwise the caller uses the float64 twin,
    linalg.movement.inner_update, which takes three times as long. The difference of two float32 numbers is rounded by
    6e-8 of itself, so the products err by their sums alone, typically by 1e-7 of ‖d‖ ‖g_i‖.

    Args:
        rows: m lists of gradients; for anything but a GradientTable of float32 on the CPU the result is None.
        norms: ‖g_i‖.
        before: The parameters before the step.
        after: The parameters now.
        signs: +1 per parameter, −1 if the optimizer maximises.

    Returns:
        m numbers and a number; None if a cosine is lower, or float32 cannot tell.
    """
    if not isinstance(rows, GradientTable) or not rows.plain:
        return None
    small = rows.packed()
    others = range(len(signs)) if small is None else small.others
    vector = before.before.vector_of(small) if isinstance(before, Part) else None
    old = before if vector is None else [vector, *(before[k] for k in others)]
    if set(map(DTYPE, (*rows[0], *old, *after))) != {torch.float32}:
        return None
    if not all(map(Tensor.is_contiguous, (*old, *after))):
        return None
    inner, square = [0.0] * len(rows), 0.0
    if small is not None:
        sign = small.per_number(signs)
        if isinstance(sign, Tensor):
            return None
        # flat() copies several tensors, and the copy may be overwritten; of a single tensor it is a view.
        new = flat(small.at(after))
        d = torch.sub(
            flat(small.at(before)) if vector is None else vector, new, out=new if len(small.places) > 1 else None
        )
        for part, block in zip(d.split(BLOCK), small.matrix.split(BLOCK, dim=1), strict=True):
            square += torch.dot(part, part).item()
            inner = [x + sign * y for x, y in zip(inner, torch.mv(block, part).tolist(), strict=True)]
    for k in others:
        columns = [row[k] for row in rows]
        if not all(g is not None and g.is_contiguous() for g in columns):
            return None
        for was, now, *parts in cut([t.view(-1) for t in (before[k], after[k], *columns) if t is not None], LOOKED_AT):
            d = torch.sub(was, now, out=BUFFERS.buffer(SUM, was.numel(), torch.float32, was.device))
            square += torch.dot(d, d).item()
            inner = [x + signs[k] * torch.dot(d, g).item() for x, g in zip(inner, parts, strict=True)]
    enough, least = CLEAR * square**0.5, LEAST * sum(map(Tensor.numel, after))
    clear = least <= square < inf and all(
        max(enough * norm, least) <= x < inf or norm == 0 for x, norm in zip(inner, norms, strict=True)
    )
    return (inner, square) if clear else None
