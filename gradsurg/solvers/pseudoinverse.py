"""Least squares with a Gramian of unit rows that may be singular."""

from __future__ import annotations

from math import sqrt
from operator import mul

import torch
from torch import Tensor

from gradsurg.solvers.active_set import Matrix, Vector

__all__ = ["RANK", "equal_pull", "least_squares", "unit_rows"]

# Eigenvalues below this share of the largest are rounding: the quick Gramian is good to 4e-13 an entry (gramian.py),
# so its eigenvalues to a few 1e-12. Rows are then dependent if one is within 3e-6 of the span of the others.
RANK = 1e-11
# A row whose part orthogonal to those before it has less than this share of its square goes to the eigenvectors.
REGULAR = 1e-3


def unit_rows(gramian: Tensor) -> tuple[Tensor, Tensor]:
    """Return the Gramian of g_i / ‖g_i‖ and 1 / ‖g_i‖; a zero row stays zero, with 0 for its inverse norm."""
    squares = gramian.diagonal(dim1=-2, dim2=-1)
    inverse = torch.where(squares > 0, squares.rsqrt(), 0)
    return gramian * inverse.unsqueeze(-1) * inverse.unsqueeze(-2), inverse


def least_squares(gramian: Tensor, right: Tensor) -> Tensor:
    """Return v = A⁺ b: u = Σ v_i a_i is the shortest vector whose inner products with the rows are nearest to b.

    Args:
        gramian: A = U Uᵀ of rows a_i, shape (..., m, m), float64, symmetric positive semidefinite.
        right: b, shape (m,) or (..., m).

    Returns:
        v, shape (..., m). Exactly 0 where b has no part in the range of A, and not noise divided by noise. A zero row
        gets 0. NaN throughout a block that is not finite.

    Source: the pseudoinverse by its eigenvectors, Golub & Van Loan 2013, section 5.5.2.

    Example:
        >>> import torch
        >>> A = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)  # opposite rows
        >>> least_squares(A, torch.tensor([1.0, 1.0], dtype=torch.float64)).tolist()
        [0.0, 0.0]
    """
    try:
        values, vectors = torch.linalg.eigh(gramian)
    except RuntimeError:  # its answer to a NaN; looking for one beforehand takes four calls
        finite = torch.isfinite(gramian).all(-1).all(-1)
        safe = torch.where(finite[..., None, None], gramian, 0)
        return least_squares(safe, right).masked_fill(~finite.unsqueeze(-1), torch.nan)
    parts = (vectors.mT @ right.unsqueeze(-1)).squeeze(-1)
    heard = parts.abs() > 8 * gramian.shape[-1] * 2.0**-53 * torch.linalg.vector_norm(right, dim=-1, keepdim=True)
    keep = heard & (values > RANK * values[..., -1:])
    answer: Tensor = (vectors @ torch.where(keep, parts / values, 0).unsqueeze(-1)).squeeze(-1)
    return answer


def equal_pull(gramian: Matrix) -> tuple[Vector, Vector] | None:
    """Return y with (G y)_i = ‖g_i‖, and the norms, by Cholesky in Python floats; None unless G is clearly regular.

    Σ y_i g_i has the same inner product, 1, with every unit gradient: y_i = v_i / ‖g_i‖ with v = A⁺ 1 of
    `least_squares` and `unit_rows`.

    Example:
        >>> equal_pull([[4.0, 0.0], [0.0, 1.0]])
        ([0.5, 1.0], [2.0, 1.0])
        >>> equal_pull([[1.0, -1.0], [-1.0, 1.0]]) is None
        True
    """
    factor: Matrix = []
    half: Vector = []
    norms: Vector = []
    for i, row in enumerate(gramian):
        new: Vector = []
        for x, other in zip(row, factor, strict=False):
            new.append((x - sum(map(mul, new, other))) / other[-1])
        square = row[i]
        pivot = square - sum(map(mul, new, new))
        if not pivot > REGULAR * square:  # so for a zero row, and for a NaN
            return None
        root = sqrt(pivot)
        norms.append(sqrt(square))
        half.append((norms[-1] - sum(map(mul, new, half))) / root)
        new.append(root)
        factor.append(new)
    answer: Vector = []
    while factor:
        row = factor.pop()
        last = half.pop() / row[-1]
        answer.append(last)
        half = [x - last * y for x, y in zip(half, row, strict=False)]
    answer.reverse()
    return answer, norms
