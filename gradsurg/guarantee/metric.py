"""Projection in the metric of a step: by learning rates, and without the numbers that the optimizer left in place."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradsurg.guarantee.movement import Movement
from gradsurg.linalg.blocks import Rows
from gradsurg.linalg.combine import correct_
from gradsurg.linalg.measure import Measure
from gradsurg.solvers.nonnegative import nonnegative

__all__ = [
    "ATTEMPTS",
    "LARGEST",
    "TOLERANCE",
    "TOLERANCE_16_BIT",
    "Update",
    "least_of",
    "length_of",
    "lengths",
    "metric_matters",
    "project_in_metric",
    "take_back",
    "tolerance_of",
]

# What rounding the parameters may do to cos(d, g_i). Parameters of 16 bits move by few units in the last place, so
# theirs is wider: half of bfloat16's last place is 2e-3 of a number.
TOLERANCE = 1e-4
TOLERANCE_16_BIT = 1e-2
# Attempts to push the rounded parameters back into the cone before the step of the shared parameters is taken back.
ATTEMPTS = 4
# If learning rates differ, no number moves more than this times the largest plain step of a number with its rate.
# Without the limit an MLP of 7 layers, rates falling by 0.3 a layer and SGD with momentum, had one of 3.6 times:
# benchmarks/jumps.py.
LARGEST = 2.0


@dataclass(frozen=True)
class Update:
    """A movement that has to be projected.

    Attributes:
        rows: m lists of gradients, J.
        before: The parameters before the step.
        after: The same parameters now; written.
        signs: +1 per parameter, −1 if the optimizer maximises.
        allowed: Which tasks are protected, bool (m,); None is all.
        measure: Measures lengths and inner products over all ranks.
        norms: ‖g_i‖.
        gramian: J M Jᵀ.
        metric: M per parameter; None is 1.
        left: Which numbers stay where they are, per parameter; None is none.
    """

    rows: Rows
    before: Sequence[Tensor]
    after: Sequence[Tensor]
    signs: Sequence[float]
    allowed: Tensor | None
    measure: Measure
    norms: Tensor
    gramian: Tensor
    metric: Sequence[float] | None = None
    left: Sequence[Tensor | None] | None = None

    def movement(self) -> tuple[Tensor, float]:
        """Return ⟨d, g_i⟩ and ‖d‖² of what is stored, summed exactly."""
        return self.measure.inner_update(self.rows, self.before, self.after, self.signs, exact=True)

    def correct(self, coefficients: Tensor) -> None:
        """Do d ← d + M Σ λ_i g_i, summed exactly."""
        factors = self.signs
        if self.metric is not None:
            factors = [sign * factor for sign, factor in zip(factors, self.metric, strict=True)]
        correct_(self.rows, coefficients.tolist(), self.after, factors, exact=True, left=self.left)

    def settle_rounding(self, least: Tensor) -> Movement:
        """Measure the stored movement; while it is outside the cone, aim further inside by what was missed."""
        watched = self.norms > 0 if self.allowed is None else (self.norms > 0) & self.allowed
        margin = torch.zeros_like(self.norms)
        movement = Movement(self.norms, 0.0)
        for _ in range(ATTEMPTS):
            inner, square = self.movement()
            movement = Movement(inner, square, corrected=True, held=square == 0)
            missing = least - inner
            slack = tolerance_of(self.after) * self.norms * square**0.5 - missing
            if not (watched & (slack < 0)).any():
                return movement
            margin = margin + torch.where(watched, missing.clamp(min=0), 0)
            step = nonnegative(self.gramian, -missing - margin, allowed=self.allowed, scale=length_of(square))
            # A longer step means that the cone has next to no inside: the tasks are opposed to within rounding.
            if float(step @ self.gramian.diagonal().sqrt()) > 2 * square**0.5:
                break
            self.correct(step)
        return take_back(self.before, self.after, movement.inner)


def project_in_metric(
    update: Update,
    asked: Callable[[Tensor], Tensor] | None,
    rates: Sequence[float],
    left: Sequence[Tensor | None],
) -> Movement:
    """Project a movement if learning rates differ or numbers were left in place; everything is summed exactly.

    Args:
        update: The update, in no metric yet.
        asked: As for `project_update`.
        rates: The learning rate of each parameter; a parameter with 0 is left as it is.
        left: The result of `left_in_place`.
    """
    # Only ratios of rates count.
    highest = max(rates)
    metric = [rate / highest if highest > 0 else 0.0 for rate in rates]
    tensors = update.rows, update.before, update.after
    inner, square = update.movement()
    gramian, length = update.measure.gramian_moved(*tensors, metric, left)
    least = torch.zeros_like(inner)
    if asked is not None:
        # A margin is asked of what may move: of the rest no direction can give anything.
        moving, _ = update.measure.gramian_moved(*tensors, [float(factor > 0) for factor in metric], left)
        least = least_of(moving, asked(moving), square)
    update = replace(update, gramian=gramian, metric=metric, left=left)
    limited = asked is None and len(set(rates)) > 1
    plain = _largest_steps(update, rates) if limited else None
    # J M Jᵀ is a Gramian too, of the rows times √M, so the same program solves it.
    update.correct(nonnegative(gramian, inner - least, allowed=update.allowed, scale=length_of(length)))
    if plain is not None:
        # A shorter step in the same direction is in the cone too.
        share = float((LARGEST * plain / _largest_steps(update, rates)).nan_to_num(nan=1.0).min())
        if share < 1:
            for old, new in zip(update.before, update.after, strict=True):
                new.copy_(torch.where(new == old, old, torch.lerp(_wide(old), _wide(new), share)))
    return update.settle_rounding(least)


def metric_matters(rates: Collection[float]) -> bool:
    """Tell whether rates differ, or numbers with rate 0 may not be corrected; otherwise M drops out."""
    return len(set(rates)) > 1 or 0.0 in rates


def _largest_steps(update: Update, rates: Sequence[float]) -> Tensor:
    """Return the largest |d| of a number, for each rate, over all ranks."""
    largest = dict.fromkeys(sorted(set(rates)), 0.0)
    for old, new, rate in zip(update.before, update.after, rates, strict=True):
        if old.numel():
            largest[rate] = max(largest[rate], float((old - new).abs().max()))
    return update.measure.highest(torch.tensor(list(largest.values()), dtype=torch.float64))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float64))


def tolerance_of(parameters: Sequence[Tensor]) -> float:
    """Return what rounding the parameters may do to a cosine."""
    return TOLERANCE_16_BIT if any(p.element_size() <= 2 for p in parameters) else TOLERANCE


def take_back(before: Sequence[Tensor], after: Sequence[Tensor], inner: Tensor) -> Movement:
    """Set d to 0: every parameter is what it was before the step."""
    for old, new in zip(before, after, strict=True):
        new.copy_(old)
    return Movement(torch.zeros_like(inner), 0.0, corrected=True, held=True)


def least_of(G: Tensor, asked: Tensor | None, square: float) -> Tensor:
    """Return the least ⟨d, g_i⟩ that is asked of every task."""
    return torch.zeros_like(G[0]) if asked is None else asked * G.diagonal().sqrt() * square**0.5


def lengths(G: Tensor, both: Tensor, square: float, coefficients: Tensor) -> tuple[float, float]:
    """Return ‖d + Σ λ_i g_i‖², by complementary slackness, and (‖d‖ + Σ λ_i ‖g_i‖)²; both: ⟨d, g_i⟩ + its least."""
    total = square**0.5 + float(coefficients @ G.diagonal().sqrt())
    return square + float(coefficients @ both), total**2


def length_of(square: float) -> Tensor:
    """Return ‖d‖ as a tensor, which the solver measures violations against."""
    return torch.tensor(square, dtype=torch.float64).sqrt()
