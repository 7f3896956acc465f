"""Least squares with a Gramian of unit rows that may be singular."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["RANK", "equal_pull", "least_squares", "unit_rows"]

# Eigenvalues below this share of the largest are rounding: the quick Gramian is good to 4e-13 an entry (gramian.py),
# so its eigenvalues to a few 1e-12. Rows are then dependent if one is within 3e-6 of the span of the others.
RANK = 1e-11
# A single matrix is solved by Cholesky, in 17 µs for 8 tasks, if the part of each row orthogonal to those before it is
# longer than this share of the row; else by its eigenvectors, in 60 µs.
REGULAR = 0.03


def unit_rows(gramian: Tensor) -> tuple[Tensor, Tensor]:
    """Return the Gramian of g_i / ‖g_i‖ and 1 / ‖g_i‖; a zero row stays zero, with 0 for its inverse norm."""
    squares = gramian.diagonal(dim1=-2, dim2=-1)
    inverse = squares.rsqrt().nan_to_num_(nan=0.0, posinf=0.0)
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
    if gramian.ndim == 2 and (found := _regular(gramian, right, gramian.diagonal().sqrt())) is not None:
        return found
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


def equal_pull(gramian: Tensor, preferences: Tensor) -> Tensor:
    """Return y of the shortest u = Σ y_i g_i whose inner products with the unit gradients are nearest to r_i.

    Example:
        >>> import torch
        >>> G = torch.tensor([[4.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
        >>> equal_pull(G, torch.ones(2, dtype=torch.float64)).tolist()
        [0.5, 1.0]
    """
    if gramian.ndim == 2:
        norms = gramian.diagonal().sqrt()
        if (found := _regular(gramian, preferences * norms, norms)) is not None:
            return found
    units, inverse = unit_rows(gramian)
    return least_squares(units, preferences) * inverse


def _regular(gramian: Tensor, right: Tensor, norms: Tensor) -> Tensor | None:
    """Solve G y = b by Cholesky for one matrix; None unless it is clearly regular."""
    factor, _ = torch.linalg.cholesky_ex(gramian)
    # Not so for a NaN, nor for the pivot at which the factorisation stopped.
    if all(x > REGULAR * n for x, n in zip(factor.diagonal().tolist(), norms.tolist(), strict=True)):
        return torch.cholesky_solve(right.unsqueeze(-1), factor).squeeze(-1)
    return None
