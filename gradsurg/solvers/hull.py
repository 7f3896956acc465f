"""The minimum-norm point of the hull in Python floats, and with it whether a point is Pareto stationary."""

from __future__ import annotations

from operator import mul
from typing import Any

from gradsurg.solvers.active_set import Matrix, Vector, solve_small

__all__ = ["STATIONARY", "nearest", "program", "times"]

# ‖Σ w_i a_i‖² read off a float64 Gramian of unit rows errs by 4e-16: below 16 times that the point is 0.
STATIONARY = 16 * 4e-16


def nearest(gramian: Matrix) -> tuple[Vector, float]:
    """Return w = argmin_{w ≥ 0, Σw = 1} ‖Σ w_i a_i‖² and that least square, for a Gramian of unit diagonal.

    The plain-float twin of `simplex`, which says why the nonnegative program of A + 11ᵀ and b = −1 has it.

    Example:
        >>> nearest([[1.0, -1.0], [-1.0, 1.0]])
        ([0.5, 0.5], 0.0)
    """
    shifted = [[x + 1 for x in row] for row in gramian]
    lam = program(shifted, [-1.0] * len(gramian))
    total = sum(lam)
    w = [x / total for x in lam]
    return w, max(sum(map(mul, w, times(gramian, w))), 0.0)


def program(gramian: Matrix, linear: Vector, allowed: list[bool] | None = None) -> Vector:
    """Return λ = argmin_{λ ≥ 0} ½ λᵀGλ + λᵀb: `nonnegative` for one program in lists, whatever the number of tasks."""
    found: Any = solve_small(gramian, [linear], None if allowed is None else [allowed], None, 4e-16)
    answers: Matrix = found[0] if isinstance(found, tuple) else found  # it may count its steps as well
    return answers[0]


def times(gramian: Matrix, vector: Vector) -> Vector:
    """Return the matrix times the vector."""
    return [sum(map(mul, row, vector)) for row in gramian]
