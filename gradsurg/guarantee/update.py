"""project_update: the real movement of the inner optimizer, projected onto the dual cone of the task gradients."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

import torch
from torch import Tensor

from gradsurg.guarantee.first_look import first_look
from gradsurg.guarantee.movement import Movement
from gradsurg.linalg.blocks import Rows
from gradsurg.linalg.combine import correct_
from gradsurg.linalg.measure import Measure
from gradsurg.solvers.nonnegative import nonnegative
from gradsurg.solvers.tolerances import (
    CANCELLATION_GRAMIAN,
    CANCELLATION_SUM,
    ROUNDING_EXACT,
    ROUNDING_QUICK,
    STATIONARY,
)

__all__ = ["project_update"]


# What rounding the parameters may do to cos(d, g_i). Parameters of 16 bits move by few units in the last place, so
# theirs is wider: half of bfloat16's last place is 2e-3 of a number.
TOLERANCE = 1e-4
TOLERANCE_16_BIT = 1e-2
# Attempts to push the rounded parameters back into the cone before the step of the shared parameters is taken back.
ATTEMPTS = 4


@torch.no_grad()
def project_update(
    rows: Rows,
    G: Tensor,
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    signs: Sequence[float],
    allowed: Tensor | None,
    measure: Measure | None = None,
    asked: Tensor | None = None,
) -> Movement:
    """Move the parameters so that ⟨d, g_i⟩ ≥ 0 for every protected task, changing d as little as possible.

    d ← d + Σ λ_i g_i, λ = argmin_{λ ≥ 0} ½ λᵀGλ + λᵀJd. This takes one pass over the gradients for Jd and, only if some
    task would get worse, one for the correction. Parameters are stored rounded, and the promise is about the stored
    numbers: if half a last place of ‖θ‖ is not small against 1e-4 of ‖d‖, the stored movement is measured and pushed
    back into the cone.

    Args:
        rows: m lists of gradients per parameter.
        G: Their Gramian, (m, m), float64, finite.
        before: The parameters before the step.
        after: The same parameters now; written.
        signs: +1 per parameter, −1 if the optimizer maximises.
        allowed: Which tasks are protected, bool (m,); None is all.
        measure: Measures lengths and inner products over all ranks; None is this process alone.
        asked: Margins, see gradsurg.surgery.margin: cosines a_i ≥ 0, shape (m,), that make the promise
            ⟨d, g_i⟩ ≥ a_i ‖g_i‖ ‖d_0‖, d_0 the movement of the inner optimizer. None is 0.

    Returns:
        The movement as it is stored.

    Source: Su Jianlin 2022, kexue.fm 8896, asks the property of the update and not of the gradient.
    """
    measure = Measure() if measure is None else measure
    if asked is None and measure.alone:
        norms = [max(square, 0.0) ** 0.5 for square in G.diagonal().tolist()]
        seen = first_look(rows, norms, before, after, signs)
        if seen is not None:
            return Movement(torch.tensor(seen[0], dtype=torch.float64), seen[1])
    inner, square = measure.inner_update(rows, before, after, signs)
    products = inner.tolist()
    if square == 0 or not all(map(isfinite, products)) or (asked is None and min(products) >= 0):
        return Movement(inner, square)
    least = _least(G, asked, square)
    coefficients = nonnegative(G, inner - least, allowed=allowed, scale=_length(square), rounding=ROUNDING_QUICK)
    if not coefficients.any():
        return Movement(inner, square)
    left, spread = _lengths(G, inner + least, square, coefficients)
    # If most of d is taken away, what is left needs every digit: the quick sums err by up to 4e-13 of ‖d‖ ‖g_i‖.
    if not left * CANCELLATION_GRAMIAN**2 > spread:
        G = measure.gramian(rows, exact=True)
        inner, square = measure.inner_update(rows, before, after, signs, exact=True)
        least = _least(G, asked, square)
        coefficients = nonnegative(G, inner - least, allowed=allowed, scale=_length(square), rounding=ROUNDING_EXACT)
        left, spread = _lengths(G, inner + least, square, coefficients)
    if left <= STATIONARY * ROUNDING_EXACT * spread:
        return _take_back(before, after, inner)
    correct_(rows, coefficients.tolist(), after, signs, exact=left * CANCELLATION_SUM**2 < spread)
    tolerance = TOLERANCE_16_BIT if any(p.element_size() <= 2 for p in after) else TOLERANCE
    half_place = max(torch.finfo(p.dtype).eps for p in after) / 2
    if half_place * measure.norm(after) <= 0.5 * tolerance * left**0.5:
        return Movement(inner + G @ coefficients, left, corrected=True)
    return _settle_rounding(rows, G, before, after, signs, allowed, tolerance, measure, least)


def _settle_rounding(
    rows: Rows,
    G: Tensor,
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    signs: Sequence[float],
    allowed: Tensor | None,
    tolerance: float,
    measure: Measure,
    least: Tensor,
) -> Movement:
    """Measure the stored movement; while it is outside the cone, aim further inside by what was missed."""
    norms = G.diagonal().sqrt()
    watched = norms > 0 if allowed is None else (norms > 0) & allowed
    margin = torch.zeros_like(norms)
    movement = Movement(norms, 0.0)
    for _ in range(ATTEMPTS):
        inner, square = measure.inner_update(rows, before, after, signs, exact=True)
        movement = Movement(inner, square, corrected=True)
        missing = least - inner
        slack = tolerance * norms * square**0.5 - missing
        if not (watched & (slack < 0)).any():
            return movement
        margin = margin + torch.where(watched, missing.clamp(min=0), 0)
        step = nonnegative(G, -missing - margin, allowed=allowed, scale=_length(square))
        # A longer step means that the cone has next to no inside: the tasks are opposed to within rounding.
        if float(step @ norms) > 2 * square**0.5:
            break
        correct_(rows, step.tolist(), after, signs, exact=True)
    return _take_back(before, after, movement.inner)


def _take_back(before: Sequence[Tensor], after: Sequence[Tensor], inner: Tensor) -> Movement:
    for old, new in zip(before, after, strict=True):
        new.copy_(old)
    return Movement(torch.zeros_like(inner), 0.0, corrected=True, held=True)


def _least(G: Tensor, asked: Tensor | None, square: float) -> Tensor:
    """Return the least ⟨d, g_i⟩ that is asked of every task."""
    return torch.zeros_like(G[0]) if asked is None else asked * G.diagonal().sqrt() * square**0.5


def _lengths(G: Tensor, both: Tensor, square: float, coefficients: Tensor) -> tuple[float, float]:
    """Return ‖d + Σ λ_i g_i‖², by complementary slackness, and (‖d‖ + Σ λ_i ‖g_i‖)²; both: ⟨d, g_i⟩ + its least."""
    total = square**0.5 + float(coefficients @ G.diagonal().sqrt())
    return square + float(coefficients @ both), total**2


def _length(square: float) -> Tensor:
    return torch.tensor(square, dtype=torch.float64).sqrt()
