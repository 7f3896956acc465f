"""Inner products of float64 blocks, quick or exact, and the buffers that everything of parameter size works in."""

from __future__ import annotations

import torch
from torch import Tensor

from gradsurg.blocks import Workspace

__all__ = ["DOT_RUN", "MOVEMENT", "ROWS", "RUN", "SUM", "WORKSPACE", "inner_product", "inner_products"]

WORKSPACE = Workspace()
ROWS, MOVEMENT, PRODUCT, SUM = range(4)  # slots of the workspace

# The sums in a matrix product and in torch.dot are running ones. The worst of 60 random pairs of constant rows, as a
# share of the product: matrices, 8 192 numbers 1.1e-13, 16 384 2.3e-13, 32 768 4.5e-13, 131 072 1.8e-12; torch.dot,
# 32 768 1.1e-13, 65 536 2.3e-13, 131 072 4.5e-13. The pipeline counts on 4e-13.
RUN, DOT_RUN = 16_384, 65_536


def inner_product(a: Tensor, b: Tensor, exact: bool) -> float:
    """Return ⟨a, b⟩ of two float64 vectors of a block each.

    Exact sums are pairwise, off by 1e-16. In float32 the quick ones would be off by 7e-5 on constant numbers, which
    nearly opposite tasks amplify beyond the promise of 1e-4.
    """
    if exact:
        return torch.mul(a, b, out=WORKSPACE.buffer(PRODUCT, a.numel(), a.dtype, a.device)).sum().item()
    if a.numel() <= DOT_RUN:
        return torch.dot(a, b).item()
    return sum(torch.dot(x, y).item() for x, y in zip(a.split(DOT_RUN), b.split(DOT_RUN), strict=True))


def inner_products(rows: Tensor, vector: Tensor, exact: bool) -> list[float]:
    """Return ⟨row, vector⟩ for each row of a float64 matrix of one block."""
    if exact:
        return [inner_product(vector, row, exact) for row in rows.unbind(0)]
    size = vector.numel()
    products = torch.mv(rows[:, :RUN], vector[:RUN])
    for start in range(RUN, size, RUN):
        products.addmv_(rows[:, start : start + RUN], vector[start : start + RUN])
    return products.tolist()
