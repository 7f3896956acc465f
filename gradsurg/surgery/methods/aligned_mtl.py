"""Aligned-MTL: gradients are replaced by orthogonal ones of equal length, as near to them as possible."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradsurg.errors import choose
from gradsurg.solvers.problem import Problem, State
from gradsurg.solvers.pseudoinverse import RANK
from gradsurg.surgery.base import Surgery

__all__ = ["AlignedMTL"]

LENGTHS = {name: name for name in ("min", "median", "rmse")}


@dataclass(frozen=True)
class AlignedMTL(Surgery):
    """u = Jᵀ B r with B = σ V Λ^(-1/2) Vᵀ, where G = V Λ Vᵀ: all nonzero singular values of J become the same σ.

    Aligned gradients neither conflict with nor dominate one another; their weighted sum is u.

    When it fails: ⟨u, g_i⟩ = σ (G^(1/2) r)_i may be negative for the *original* gradients. With length "min", σ is the
    smallest singular value that is not rounding (see gradsurg.solvers.pseudoinverse.RANK), so nearly dependent
    gradients stop training, and exactly dependent ones do not: "median" and "rmse" are steadier. A task whose norm is
    below 3e-6 of the largest is taken for rounding: normalise first.

    Args:
        length: σ² is the "min", the (lower) "median" or the mean ("rmse") of the nonzero eigenvalues of G.

    Source: Senushkin et al. 2023, "Independent component alignment for multi-task learning", algorithm 1 (there with
    r_i = 1/m; here the sum, so that learning rates keep their meaning).

    Example:
        >>> import torch, gradsurg
        >>> G = torch.tensor([[1.0, 0.0], [0.0, 4.0]])
        >>> gradsurg.weights(G, surgery="aligned_mtl").tolist()
        [1.0, 0.5]
    """

    length: str = "min"
    name, paper = "aligned_mtl", "Senushkin et al. 2023"
    promise = "the sum of orthogonal stand-ins for the gradients; nothing about the gradients themselves"
    linear = True

    def __post_init__(self) -> None:
        choose("length", self.length, LENGTHS)

    def weights(self, problem: Problem, state: State) -> tuple[Tensor, State]:  # noqa: D102
        G = problem.gramian
        finite = torch.isfinite(G.sum((-2, -1), keepdim=True))
        values, vectors = torch.linalg.eigh(G if bool(finite.all()) else torch.where(finite, G, 0))
        keep = values > (RANK * values[..., -1:]).clamp(min=0)
        rank = keep.sum(-1, keepdim=True)
        if self.length == "rmse":
            square = torch.where(keep, values, 0).sum(-1, keepdim=True) / rank.clamp(min=1)
        else:
            # Eigenvalues ascend: the nonzero ones are the last `rank`.
            place = G.shape[-1] - rank + ((rank - 1) // 2 if self.length == "median" else 0)
            square = values.gather(-1, place.clamp(max=G.shape[-1] - 1))
        stretch = torch.where(keep, (square / values).sqrt(), 0)
        parts = (vectors.mT @ problem.preferences.unsqueeze(-1)).squeeze(-1)
        weights = (vectors @ (stretch * parts).unsqueeze(-1)).squeeze(-1)
        return weights.masked_fill(~finite[..., 0], torch.nan), state
