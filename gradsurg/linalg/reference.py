"""Plain float64 twins of gramian, combine and movement: their meaning in a few lines, for tests to compare with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradsurg.linalg.blocks import Rows, real_of

__all__ = ["combine", "correct", "gramian", "inner_update", "matrix"]


def flat(tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensor:
    """Return the tensors as one float64 vector of real numbers, zeros for None."""
    dense = [torch.zeros_like(p) if t is None else t.detach().to_dense() for t, p in zip(tensors, like, strict=True)]
    return torch.cat([real_of(t).double().reshape(-1) for t in dense])


def matrix(rows: Rows, like: Sequence[Tensor]) -> Tensor:
    """Return J, (m, P)."""
    return torch.stack([flat(row, like) for row in rows])


def gramian(rows: Rows, like: Sequence[Tensor]) -> Tensor:
    """Return J Jᵀ."""
    J = matrix(rows, like)
    # Pairwise sums: a matrix product is good to 1e-13 only.
    return torch.stack([(J * row).sum(1) for row in J])


def combine(rows: Rows, weights: Sequence[float], like: Sequence[Tensor]) -> Tensor:
    """Return Jᵀ w as one vector."""
    J = matrix(rows, like)
    return torch.tensor(weights, dtype=torch.float64, device=J.device) @ J


def inner_update(
    rows: Rows, before: Sequence[Tensor], after: Sequence[Tensor], signs: Sequence[float]
) -> tuple[Tensor, float]:
    """Return J d and ‖d‖² with d = sign · (before − after)."""
    d = flat(before, before) - flat(after, before)
    return (matrix(_signed(rows, signs), before) * d).sum(1), float((d * d).sum())


def correct(rows: Rows, coefficients: Sequence[float], after: Sequence[Tensor], signs: Sequence[float]) -> Tensor:
    """Return after − sign · Jᵀ λ as one vector."""
    return flat(after, after) - combine(_signed(rows, signs), coefficients, after)


def _signed(rows: Rows, signs: Sequence[float]) -> Rows:
    return [[None if g is None else sign * g for g, sign in zip(row, signs, strict=True)] for row in rows]
