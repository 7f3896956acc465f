"""Projecting every gradient by itself: m nonnegative programs that share one Gramian, as UPGrad needs them."""

from __future__ import annotations

from array import array
from math import inf, isfinite, sqrt

import torch
from torch import Tensor

from gradsurg.solvers.active_set import Matrix, Vector
from gradsurg.solvers.nonnegative import nonnegative

__all__ = ["project_lists", "project_rows"]

# Longest row of the inverse (of the Gramian with unit diagonal) that is trusted: its residuals are then below 1e-12.
LARGEST_INVERSE = 1e4
# More tasks than this seldom leave only two outside.
MOST_TASKS = 16
# Share of all pairs that conflict from which on the inverse pays: 60 against 105 µs for 8 tasks; at half of them, most
# programs would have to be solved again.
MOSTLY = 0.75


def project_rows(gramian: Tensor, *, rounding: float = 4e-16) -> Tensor:
    """Return Λ, row i of which is argmin_{λ ≥ 0} ½ λᵀGλ + λᵀG_i: g_i + Σ_j Λ_ij g_j conflicts with no task.

    The same as nonnegative(G[..., None, :, :], G), faster for one Gramian of few tasks: if a gradient conflicts
    with most others, its passive set is nearly all tasks, and the few outside it, C, are the smaller problem. With
    N = G⁻¹ the weights are w = N_{·C} v, N_CC v = e_i, optimal iff w ≥ 0 and v ≥ 0.

    Args:
        gramian: G, shape (..., m, m), symmetric positive semidefinite; solved in float64. May be singular.
        rounding: Relative error of G's entries, as for `nonnegative`.

    Returns:
        Λ, shape (..., m, m), float64, on G's device.

    Source: Quinton & Rey 2024, definition 1, for the use; block inversion for the second form.

    Example:
        >>> import torch
        >>> project_rows(torch.tensor([[1.0, -0.5], [-0.5, 1.0]])).tolist()
        [[0.0, 0.5], [0.5, 0.0]]
    """
    G = gramian.detach().double().cpu()
    if G.ndim == 2 and len(G) <= MOST_TASKS and isfinite(sum(map(sum, rows := G.tolist()))):
        return torch.tensor(project_lists(rows, G, rounding), dtype=torch.float64, device=gramian.device)
    return nonnegative(gramian.unsqueeze(-3), gramian, rounding=rounding)


def project_lists(rows: Matrix, G: Tensor, rounding: float = 4e-16) -> Matrix:
    """Do the same for one finite Gramian given twice: as lists, and as a float64 tensor on the CPU."""
    m = len(rows)
    conflicts = sum(x < 0 for row in rows for x in row)
    if not conflicts:
        return [[0.0] * m for _ in rows]
    inverse, s = _inverse(rows, G) if conflicts >= MOSTLY * m * (m - 1) else (None, [])
    answers = [[] if inverse is None else _from_outside(inverse, s, i) or [] for i in range(m)]
    left = [i for i, answer in enumerate(answers) if not answer]
    if left:
        others: Matrix = nonnegative(G, G if len(left) == m else G[left], rounding=rounding).tolist()
        for i, answer in zip(left, others, strict=True):
            answers[i] = answer
    return answers


def _inverse(rows: Matrix, G: Tensor) -> tuple[Matrix | None, Vector]:
    """Return the inverse of G with its rows scaled to unit length, or None if it is not to be trusted."""
    s = [1 / sqrt(row[i]) if row[i] > 0 else inf for i, row in enumerate(rows)]
    if inf in s:  # a zero row
        return None, []
    scale = torch.frombuffer(array("d", s), dtype=torch.float64)
    # Not Cholesky: its inverse is shared among threads, and waits 20 ms for one on a machine that is busy.
    N: Matrix = torch.linalg.inv_ex(G * scale * scale.unsqueeze(-1))[0].tolist()  # NaN or large for a singular one
    return (N, s) if all(0 < row[i] < LARGEST_INVERSE for i, row in enumerate(N)) else (None, [])


def _from_outside(N: Matrix, s: Vector, i: int) -> Vector | None:
    """Return λ of program i from the tasks outside its passive set, at most two, or None if there are more."""
    own = N[i]
    # All other tasks are passive.
    weights = [x / own[i] for x in own]
    lowest = min(weights)
    if lowest < 0:
        j = weights.index(lowest)  # all but i and j passive: N_CC is 2 x 2, and v_j ≥ 0 because N_ij < 0
        other = N[j]
        determinant = own[i] * other[j] - own[j] * other[i]
        if determinant <= 0:
            return None
        a, b = other[j] / determinant, -own[j] / determinant
        weights = [a * x + b * y for x, y in zip(own, other, strict=True)]
        weights[j] = 0.0
        if min(weights) < 0:
            return None
    weights[i] = 0.0
    return [x * y / s[i] for x, y in zip(weights, s, strict=True)] if s[i] else None
