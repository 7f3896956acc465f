"""Sparse gradients, as embeddings give them. They stay sparse if all rows of the parameter are sparse."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradsurg.linalg.blocks import Rows

__all__ = ["added", "combine", "dot", "split"]


def added(a: Tensor | None, b: Tensor, *, in_place: bool = False) -> Tensor:
    """Return a + b of gradients that may be sparse; b itself if there is no a. `in_place` writes to a dense a."""
    if a is None:
        return b
    if a.is_sparse and b.is_sparse and a.dtype is torch.float16 and not a.is_cuda:
        # torch adds no sparse float16 tensors on the CPU.
        return (a.float() + b.float()).half()
    if a.is_sparse or b.is_sparse:
        # torch adds sparse to dense, but not dense to sparse.
        return b + a if a.is_sparse and not b.is_sparse else a + b
    return a.add_(b) if in_place else a + b


def split(rows: Rows) -> tuple[Rows, list[list[Tensor | None]]]:
    """Return the rows without the parameters that have a sparse gradient, and one column for each of these."""
    if not any(g is not None and g.is_sparse for row in rows for g in row):
        return rows, []
    columns = [list(column) for column in zip(*rows, strict=True)]
    is_sparse = [any(g is not None and g.is_sparse for g in column) for column in columns]
    dense = [[None if here else g for here, g in zip(is_sparse, row, strict=True)] for row in rows]
    # Parameters without a sparse gradient keep an empty column, so that positions stay the same.
    return dense, [column if here else [None] * len(rows) for here, column in zip(is_sparse, columns, strict=True)]


def dot(a: Tensor, b: Tensor) -> float:
    """Return ⟨a, b⟩ in float64; either may be sparse."""
    if a.is_sparse and b.is_sparse:
        return torch.sparse.sum(a.double().coalesce() * b.double().coalesce()).item()
    return (a.to_dense().double() * b.to_dense().double()).sum().item()


def combine(column: Sequence[Tensor], weights: Sequence[float], like: Tensor) -> Tensor:
    """Return Σ w_i g_i of one parameter's rows; zeros like `like` if there are none."""
    total: Tensor | None = None
    for g, weight in zip(column, weights, strict=True):
        total = added(total, g * weight)
    return torch.zeros_like(like) if total is None else total
