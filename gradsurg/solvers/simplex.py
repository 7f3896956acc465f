"""The simplex program: the minimum-norm point of the convex hull of the gradients."""

from __future__ import annotations

from operator import mul

import torch
from torch import Tensor

from gradsurg.solvers.active_set import Matrix, Vector, solve_small
from gradsurg.solvers.nonnegative import nonnegative
from gradsurg.solvers.tolerances import ROUNDING_EXACT

__all__ = ["nearest", "onto_simplex", "program", "simplex", "times"]


def simplex(gramian: Tensor, *, allowed: Tensor | None = None) -> Tensor:
    """Return α = argmin_{α ≥ 0, Σα = 1} αᵀGα.

    It is the nonnegative program of G + c·11ᵀ and b = −c·1, divided by its sum, for any c > 0: with λ = σα, Σα = 1,
    the program's value ½σ²‖Σα_i g_i‖² + ½c(σ − 1)² − ½c is least over σ at ½ c‖·‖² / (c + ‖·‖²) − ½c, which grows
    with ‖Σα_i g_i‖, so the same α minimises both. c is the smallest squared norm, of the size of the answer's.

    Args:
        gramian: G, shape (..., m, m), symmetric positive semidefinite; solved in float64. May be singular.
        allowed: Bool, shape (..., m): if False, α_i = 0. None is all.

    Returns:
        α, shape (..., m), float64, on G's device. u = Σ α_i g_i is unique, and α too if the hull's face is a simplex.
        Zero rows share all the mass equally. Zeros if no task is allowed.

    Source: Désidéri 2012 for the use; Wolfe 1976, "Finding the nearest point in a polytope", for the program.

    Example:
        >>> import torch
        >>> simplex(torch.tensor([[1.0, 0.0], [0.0, 3.0]])).round(decimals=9).tolist()
        [0.75, 0.25]
    """
    G = gramian.detach().double()
    diagonal = G.diagonal(dim1=-2, dim2=-1)
    inside = torch.ones_like(diagonal, dtype=torch.bool) if allowed is None else allowed.expand(diagonal.shape)
    at_origin = inside & (diagonal <= 0)
    smallest = torch.where(inside & (diagonal > 0), diagonal, torch.inf).amin(-1)
    c = torch.where(torch.isfinite(smallest), smallest, 1)
    lam = nonnegative(G + c[..., None, None], -c[..., None].expand(diagonal.shape), allowed=inside)
    mass = torch.where(at_origin.any(-1, keepdim=True), at_origin.double(), lam)
    total = mass.sum(-1, keepdim=True)
    return torch.where(total == 0, 0, mass / torch.where(total == 0, 1, total))


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


def program(
    gramian: Matrix, linear: Vector, allowed: list[bool] | None = None, *, rounding: float = ROUNDING_EXACT
) -> Vector:
    """Return λ = argmin_{λ ≥ 0} ½ λᵀGλ + λᵀb: `nonnegative` for one program in lists, whatever the number of tasks."""
    answers, _ = solve_small(gramian, [linear], None if allowed is None else [allowed], None, rounding)
    return answers[0]


def times(gramian: Matrix, vector: Vector) -> Vector:
    """Return the matrix times the vector."""
    return [sum(map(mul, row, vector)) for row in gramian]


def onto_simplex(point: Vector) -> Vector:
    """Return the nearest point with entries ≥ 0 that add up to 1.

    Source: Held, Wolfe & Crowder 1974; the threshold is found by sorting.

    Example:
        >>> onto_simplex([0.5, 1.0, -1.0])
        [0.25, 0.75, 0.0]
    """
    highest = max(point)  # taken off first: a 1 would be lost beside numbers of 1e16
    threshold, total = 0.0, 0.0
    for k, x in enumerate(sorted((x - highest for x in point), reverse=True), start=1):
        total += x
        if x * k <= total - 1:
            break
        threshold = (total - 1) / k
    return [max(x - highest - threshold, 0.0) for x in point]
