"""Inner products of a step's movement with every row, for the guarantee."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradsurg.linalg import sparse
from gradsurg.linalg.blocks import Rows, block_for, blocks, flat, real_of
from gradsurg.linalg.buffers import BUFFERS, ROWS, products_with_last
from gradsurg.linalg.packing import packed

__all__ = ["inner_update"]


@torch.no_grad()
def inner_update(
    rows: Rows,
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    signs: Sequence[float],
    *,
    exact: bool = False,
) -> tuple[Tensor, float]:
    """Return ⟨d, g_i⟩ for every row, and ‖d‖², of the parameters' movement d = sign · (before − after).

    The sign of a parameter is −1 if the optimizer maximises; `rows` and `exact` are those of `gramian`. The products
    have shape (m,), float64, on the CPU.
    """
    m = len(rows)
    inner, square = [0.0] * m, 0.0
    small = packed(rows)
    if small is not None:
        inner, square = small.inner(before, after, signs, exact)
        rows = small.rest
        before, after = ([tensors[k] for k in small.others] for tensors in (before, after))
        signs = [signs[k] for k in small.others]
    rows, columns = sparse.split(rows)
    for sign, block in blocks([before, after, *rows], tags=signs, size=block_for(m + 1)):
        assert isinstance(sign, float)
        old, new, *gradients = block
        # The movement becomes the last row of the matrix.
        matrix = BUFFERS.stack(ROWS, [*gradients, old])
        matrix.rows[-1].sub_(flat(new))
        *products, length = products_with_last(matrix, exact)
        square += length
        present = [i for i, pieces in enumerate(gradients) if pieces]
        for i, product in zip(present, products, strict=True):
            inner[i] += sign * product
    for k, column in enumerate(columns):
        if any(g is not None for g in column):
            d = real_of((before[k].detach() - after[k].detach()).double()) * signs[k]
            for i, g in enumerate(column):
                if g is not None:
                    inner[i] += torch.dot(d.reshape(-1), real_of(g.to_dense().double()).reshape(-1)).item()
    return torch.tensor(inner, dtype=torch.float64), square
