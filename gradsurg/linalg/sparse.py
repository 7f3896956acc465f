"""Sparse gradients, as embeddings give them: kept sparse where all of a parameter's rows are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["combine", "dot", "split"]

Rows = Sequence[Sequence["Tensor | None"]]


def split(rows: Rows) -> tuple[Rows, list[list[Tensor | None]]]:
    """Return the rows with sparse parameters blanked out, and one column per parameter holding only those."""
    if not any(g is not None and g.is_sparse for row in rows for g in row):
        return rows, []
    count = len(rows[0])
    is_sparse = [any(row[k] is not None and row[k].is_sparse for row in rows) for k in range(count)]  # type: ignore[union-attr]
    dense = [[None if is_sparse[k] else g for k, g in enumerate(row)] for row in rows]
    columns = [[row[k] if is_sparse[k] else None for row in rows] for k in range(count)]
    return dense, columns


def dot(a: Tensor, b: Tensor) -> float:
    """Return ⟨a, b⟩ in float64, of which either may be sparse."""
    if a.is_sparse and b.is_sparse:
        product = a.double().coalesce() * b.double().coalesce()
        return float(torch.sparse.sum(product).item())
    return float((a.to_dense().double() * b.to_dense().double()).sum().item())


def combine(column: list[Tensor | None], weights: list[float], like: Tensor) -> Tensor:
    """Return Σ w_i g_i of one parameter's rows, or zeros like `like` where there are none."""
    total: Tensor | None = None
    for g, weight in zip(column, weights, strict=True):
        assert g is not None
        term = g * weight
        if total is None:
            total = term
        elif total.is_sparse == term.is_sparse:
            total = total + term
        else:
            total = total.to_dense() + term.to_dense()
    return torch.zeros_like(like) if total is None else total
