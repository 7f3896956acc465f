"""The plain float64 twins of gramian.py: what it means, in as few lines as possible. Tests compare the two."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["combine", "correct", "gramian", "inner_update", "matrix"]

Rows = Sequence[Sequence["Tensor | None"]]


def flat(tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensor:
    """Return the tensors as one float64 vector of real numbers, zeros for None."""
    dense = [torch.zeros_like(p) if t is None else t.detach().to_dense() for t, p in zip(tensors, like, strict=True)]
    real = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in dense]
    return torch.cat([t.double().reshape(-1) for t in real])


def matrix(rows: Rows, like: Sequence[Tensor]) -> Tensor:
    """Return J, (m, P)."""
    return torch.stack([flat(row, like) for row in rows])


def gramian(rows: Rows, like: Sequence[Tensor]) -> Tensor:
    """Return J Jᵀ."""
    J = matrix(rows, like)
    return J @ J.T


def combine(rows: Rows, weights: Sequence[float], like: Sequence[Tensor]) -> Tensor:
    """Return Jᵀ w as one vector."""
    return torch.tensor(weights, dtype=torch.float64) @ matrix(rows, like)


def inner_update(
    rows: Rows, before: Sequence[Tensor], after: Sequence[Tensor], signs: Sequence[float]
) -> tuple[Tensor, float]:
    """Return J d and ‖d‖² with d = sign · (before − after)."""
    movement = [sign * (b.detach() - a.detach()) for b, a, sign in zip(before, after, signs, strict=True)]
    d = flat(movement, before)
    return matrix(rows, before) @ d, float(d @ d)


def correct(
    rows: Rows, coefficients: Sequence[float], before: Sequence[Tensor], after: Sequence[Tensor], signs: Sequence[float]
) -> Tensor:
    """Return after − sign · Jᵀ λ as one vector."""
    per_number = flat([torch.full_like(p, s) if not p.is_complex() else torch.full_like(p, complex(s, s))
                       for p, s in zip(after, signs, strict=True)], after)
    return flat(after, before) - per_number * combine(rows, coefficients, before)
