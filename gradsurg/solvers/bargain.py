"""The fair-bargaining equations in Python floats: (A β)_i^α β_i = q_i with β > 0."""

from __future__ import annotations

from math import exp, log, sqrt
from operator import mul

from gradsurg.solvers.active_set import Matrix, Vector
from gradsurg.solvers.simplex import nearest, times
from gradsurg.solvers.tolerances import ROUNDING_EXACT, STATIONARY

__all__ = ["bargain"]

STEPS = 200


def bargain(gramian: Matrix, log_q: Vector, alpha: float) -> Vector:
    """Return β > 0 with log β_i + α log (A β)_i = log q_i, for a Gramian A of unit diagonal; 0 if there is none.

    It is the minimiser of the strictly convex ½ βᵀAβ − Σ_i ∫ (q_i / β_i)^(1/α) dβ_i, so it is unique; it exists unless
    some convex combination of the rows is zero. A primal-dual Newton method: v = Aβ is an unknown of its own, so that
    the other equation is solved in logarithms; steps stop 5 % short of where a number would turn negative.

    At most 200 steps. The tests hold instances with |log residual| ≤ 1e-9 to 20 steps for α = 1 and 40 for 0.5 ≤ α ≤ 2
    (random rows take 4). If rows are opposite to 1e-5 rad, v is known only to the rounding of Aβ, and no residual
    can be smaller. For α beyond [0.2, 5], and norms that spread over twelve orders of magnitude, 200 steps may not do:
    the minimum-norm point of the hull is returned, the answer for α → ∞ and equal norms; its A β is not negative.

    Source: for the equations, Navon et al. 2022 (α = 1) and Ban & Ji 2024; for the method, Nocedal & Wright 2006,
    chapter 19.

    Example:
        >>> bargain([[1.0, 0.0], [0.0, 1.0]], [0.0, 0.0], 1.0)
        [1.0, 1.0]
    """
    return _solve(gramian, log_q, alpha)[0]


def _solve(A: Matrix, log_q: Vector, alpha: float) -> tuple[Vector, int]:
    """Return β and the number of steps."""
    m = len(A)
    w, square = nearest(A)
    if square <= STATIONARY * ROUNDING_EXACT:
        return [0.0] * m, 0
    b = [exp(x / (1 + alpha)) for x in log_q]
    v = [max(x, 0.1 * y) for x, y in zip(times(A, b), b, strict=True)]
    # One factor for both is free: the one that makes the mean log residual zero.
    t = exp(sum(_log_residual(b, v, log_q, alpha)) / (m * (1 + alpha)))
    b, v = [t * x for x in b], [t * x for x in v]
    for step in range(STEPS):
        rho = _log_residual(b, v, log_q, alpha)
        gap = [x - y for x, y in zip(v, times(A, b), strict=True)]
        floor = m * ROUNDING_EXACT * sum(b)
        if max(map(abs, gap)) <= floor and all(
            abs(r) <= 1e-10 + 4 * alpha * floor / x for r, x in zip(rho, v, strict=True)
        ):
            return b, step
        curvature = [x / (alpha * y) for x, y in zip(v, b, strict=True)]
        db = _newton(A, curvature, [x * r / alpha + g for x, r, g in zip(v, rho, gap, strict=True)])
        dv = [x / alpha * (r - d / y) for x, r, d, y in zip(v, rho, db, b, strict=True)]
        t = min([1.0, *(-0.95 * x / d for x, d in zip(b + v, db + dv, strict=True) if d < -0.95 * x)])
        b = [x + t * d for x, d in zip(b, db, strict=True)]
        v = [x + t * d for x, d in zip(v, dv, strict=True)]
    return w, STEPS


def _log_residual(b: Vector, v: Vector, log_q: Vector, alpha: float) -> Vector:
    return [z - log(x) - alpha * log(y) for x, y, z in zip(b, v, log_q, strict=True)]


def _newton(A: Matrix, extra: Vector, right: Vector) -> Vector:
    """Solve (A + diag(extra)) x = right by Cholesky; a pivot lost to rounding is held at rounding."""
    factor: Matrix = []
    y: Vector = []
    for i, (row, more, b) in enumerate(zip(A, extra, right, strict=True)):
        new: Vector = []
        for j, other in enumerate(factor):
            new.append((row[j] - sum(map(mul, new, other))) / other[-1])
        pivot = row[i] + more - sum(map(mul, new, new))
        y.append((b - sum(map(mul, new, y))) / sqrt(max(pivot, ROUNDING_EXACT * (row[i] + more))))
        new.append(sqrt(max(pivot, ROUNDING_EXACT * (row[i] + more))))
        factor.append(new)
    x: Vector = []
    for row in reversed(factor):
        last = y.pop() / row[-1]
        x.append(last)
        y = [z - last * f for z, f in zip(y, row, strict=False)]
    x.reverse()
    return x
