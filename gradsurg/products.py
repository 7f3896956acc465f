"""The inner product of two vectors, quick or exact, and the buffers that everything of parameter size works in."""

from __future__ import annotations

import torch
from torch import Tensor

from gradsurg.blocks import Workspace

__all__ = ["MOVEMENT", "ROWS", "SUM", "WORKSPACE", "inner_product"]

WORKSPACE = Workspace()
ROWS, MOVEMENT, PRODUCT, SUM = range(4)  # slots of the workspace


def inner_product(a: Tensor, b: Tensor, exact: bool) -> float:
    """Return ⟨a, b⟩ of two float64 vectors of a block each.

    torch.dot is a running sum: over 131 072 float64, more than a block has, it is off by 1e-14 on Gaussian numbers and
    5e-14 on constant ones; the pairwise sum by 1e-16. In float32 these would be 3e-7 and 7e-5, which nearly opposite
    tasks amplify beyond the promise of 1e-4.
    """
    if not exact:
        return torch.dot(a, b).item()
    return torch.mul(a, b, out=WORKSPACE.buffer(PRODUCT, a.numel(), a.dtype, a.device)).sum().item()
