"""CAGrad: in a ball around the mean gradient, the direction whose worst-off task gains the most."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite, sqrt
from operator import mul

from gradsurg.solvers.simplex import nearest, program, times
from gradsurg.solvers.tolerances import COARSER, ROUNDING_EXACT, STATIONARY
from gradsurg.surgery.base import check
from gradsurg.surgery.blockwise import Block, BlockwiseSurgery, Matrix, Memory, Vector

__all__ = ["CAGrad"]

STEPS = 100
# Up to this share of its square, the error of a length is left alone.
NOTICED = 1e-12


@dataclass(frozen=True)
class CAGrad(BlockwiseSurgery):
    """u = argmax_d min_i ⟨d, g_i⟩ subject to ‖d − g_0‖ ≤ c ‖g_0‖, where g_0 = Σ r_i g_i / Σ r_i.

    Solved exactly, in the primal: the point nearest to g_0 with ⟨d, g_i⟩ ≥ ν for all i is a nonnegative program, its
    distance h(ν) is convex and grows, and Newton's method finds h(ν) = c ‖g_0‖ from above, in a handful of programs.
    c = 0 is the mean. For c < 1 the only fixed points are those of the mean; for c ≥ 1 every Pareto stationary point is
    one. If several d are best (stationary points inside the ball), it is the one nearest to g_0.

    When it fails: a conflict too large for the ball stays. Gains are raw inner products, so the task with the smallest
    gradient is the worst-off: normalise first.

    Args:
        c: Radius of the ball, c ≥ 0, in ‖g_0‖.

    Source: Liu et al. 2021, "Conflict-averse gradient descent for multi-task learning", equation 3; its dual is
    algorithm 1.

    Example:
        >>> import torch, gradsurg
        >>> J = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> gradsurg.combine(J, surgery="cagrad").tolist()
        [0.75, 0.75]
    """

    c: float = 0.5
    name, paper = "cagrad", "Liu et al. 2021"
    promise = "the largest worst gain within c of the mean; the mean loss falls for c < 1"

    def __post_init__(self) -> None:
        check("c", self.c, self.c >= 0 and isfinite(self.c), "be finite and not negative")

    def solve(self, block: Block) -> tuple[Vector, Memory]:  # noqa: D102
        mean = block.shares
        if len(mean) == 1:
            return [1 + self.c], {}
        G = block.scaled(max(row[i] for i, row in enumerate(block.gramian)))
        norms = [sqrt(row[i]) for i, row in enumerate(G)]
        # ⟨g_0, g_i⟩.
        b = times(G, mean)
        square = sum(map(mul, mean, b))
        error = ROUNDING_EXACT * sum(map(mul, mean, norms)) ** 2
        # If g_0 is nothing but rounding, so is the ball.
        if square <= STATIONARY * error:
            return mean, {}
        if error > NOTICED * square:
            square -= error
        change = _change(G, norms, b, self.c * sqrt(square))
        return [x + y for x, y in zip(mean, change, strict=True)], {}


def _change(G: Matrix, norms: Vector, b: Vector, radius: float) -> Vector:
    """Return y of d = g_0 + Σ y_i g_i; all 0 if no other d is known to lie in the ball."""
    if radius == 0:
        return [0.0] * len(b)
    for rounding in (ROUNDING_EXACT, *COARSER):
        y = _inside(_best(G, norms, b, radius, rounding), G, norms, radius)
        if y is not None:
            return y
    return [0.0] * len(b)


def _best(G: Matrix, norms: Vector, b: Vector, radius: float, rounding: float) -> Vector:
    harmless, distance = _projected(G, b, 0.0, rounding)
    # The gain that the ball allows to the worst-off task alone.
    above = min(x + radius * n for x, n in zip(b, norms, strict=True))
    if distance > radius:
        return _at_radius(G, b, radius, min(above, 0.0), rounding)
    if above <= 0 or _stationary(G, norms):
        return harmless
    y = _at_radius(G, b, radius, above, rounding)
    # For rows opposite to 1e-5 rad, y is a million times as long as its sum, and rounding may make it the worse one.
    return y if _worst(G, b, y) >= _worst(G, b, harmless) else harmless


def _inside(y: Vector, G: Matrix, norms: Vector, radius: float) -> Vector | None:
    """Return y, shortened until Σ y_i g_i is no longer than the radius; None if it cannot be known to 1 %.

    If rows balance up to 1e-8, y_i reaches 1e8 and the square of the distance errs by ROUNDING_EXACT · (Σ y_i ‖g_i‖)².
    """
    error = ROUNDING_EXACT * sum(map(mul, y, norms)) ** 2
    square = sum(map(mul, y, times(G, y))) + error
    if error > 0.01 * radius * radius:
        return None
    if error <= NOTICED * radius * radius or square <= radius * radius:
        return y
    return [x * (radius / sqrt(square)) for x in y]


def _at_radius(G: Matrix, b: Vector, radius: float, nu: float, rounding: float) -> Vector:
    """Return y for the ν at which h(ν) is the radius, coming down from a ν that is too large."""
    y, distance = _projected(G, b, nu, rounding)
    for _ in range(STEPS):
        # Newton's step, by h h' = Σ y_i.
        total = sum(y)
        step = distance * (distance - radius) / total if total > 0 else 0.0
        if abs(distance - radius) <= 1e-14 * radius or nu - step >= nu:
            break
        nu -= step
        y, distance = _projected(G, b, nu, rounding)
    return [x * (radius / distance) for x in y] if distance > 0 else y


def _stationary(G: Matrix, norms: Vector) -> bool:
    if min(map(min, G)) >= 0:
        return False
    unit = [[x / (n * k) for x, k in zip(row, norms, strict=True)] for row, n in zip(G, norms, strict=True)]
    return nearest(unit)[1] <= STATIONARY * ROUNDING_EXACT


def _worst(G: Matrix, b: Vector, y: Vector) -> float:
    return min(x + z for x, z in zip(b, times(G, y), strict=True))


def _projected(G: Matrix, b: Vector, nu: float, rounding: float) -> tuple[Vector, float]:
    """Return y of the point nearest to g_0 at which every task gains at least ν, and its distance from g_0."""
    y = program(G, [x - nu for x in b], rounding=rounding)
    return y, sqrt(max(sum(map(mul, y, times(G, y))), 0.0))
