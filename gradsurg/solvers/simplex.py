"""The simplex program: the minimum-norm point of the convex hull of the gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from gradsurg.solvers.nonnegative import nonnegative

__all__ = ["simplex"]


def simplex(gramian: Tensor, *, allowed: Tensor | None = None) -> Tensor:
    """Return α = argmin_{α ≥ 0, Σα = 1} αᵀGα.

    It is the nonnegative program of G + c·11ᵀ and b = −c·1, divided by its sum, for any c > 0: with λ = σα, Σα = 1,
    the program's value ½σ²‖Σα_i g_i‖² + ½c(σ − 1)² − ½c is least over σ at ½ c‖·‖² / (c + ‖·‖²) − ½c, which grows
    with ‖Σα_i g_i‖, so the same α minimises both. c is the smallest squared norm, of the size of the answer's.

    Args:
        gramian: G, shape (..., m, m), symmetric positive semidefinite; solved in float64. May be singular.
        allowed: Bool, shape (..., m): where False, α_i = 0. None is all.

    Returns:
        α, shape (..., m), float64, on G's device. u = Σ α_i g_i is unique, α where the hull's face is a simplex. Zero
        rows share all the mass equally. Where nobody is allowed, zeros.

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
