"""FairGrad: progress is shared out so that no other direction is fairer, for one of a family of ideas of fair."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite, log, sqrt

from gradsurg.errors import choose
from gradsurg.solvers.bargain import bargain
from gradsurg.surgery.base import check
from gradsurg.surgery.blockwise import UNITS, Block, BlockwiseSurgery, Memory, Vector

__all__ = ["FairGrad", "fair_weights"]


@dataclass(frozen=True)
class FairGrad(BlockwiseSurgery):
    """u = Σ w_i g_i with w > 0 and (G w)_i = (r_i / w_i)^(1/α): maximises Σ r_i ⟨u, g_i⟩^(1−α) / (1 − α) on a sphere.

    α → 0 is the cone (the sum, if no task conflicts with it), 1 proportional fairness (Nash-MTL), 2 the least
    potential delay, α → ∞ the largest minimum (MGDA's direction). ⟨u, g_i⟩ = (r_i / w_i)^(1/α) > 0 for every task. At
    Pareto stationary points u = 0.

    The equation fixes the length of u whatever that of the gradients, at α = 1 to √Σ r_i. So gradients are measured in
    units of their root mean square norm, and u grows with them: orthogonal ones of equal norm give the plain sum.

    When it fails: small gradients get weights ∝ 1 / ‖g_i‖^(2α / (1 + α)), and near Pareto stationary points weights
    grow without bound (u does not). Beyond α in [0.2, 5], normalise first (see gradsurg.solvers.bargain).

    Args:
        alpha: α > 0.
        units: "relative", or "absolute" for the equation as it is printed.

    Source: Ban & Ji 2024, "Fair resource allocation in multi-task learning", equation 4 (r_i = 1 there).

    Example:
        >>> import torch, gradsurg
        >>> gradsurg.weights(torch.eye(2), surgery="fairgrad").tolist()
        [1.0, 1.0]
    """

    alpha: float = 2.0
    units: str = "relative"
    name, paper = "fairgrad", "Ban & Ji 2024"
    promise = "no conflict, and α-fair progress for every task"
    conflict_free = True

    def __post_init__(self) -> None:
        must = "be positive and finite; 0 is the plain sum, surgery='sum'"
        check("alpha", self.alpha, self.alpha > 0 and isfinite(self.alpha), must)
        choose("units", self.units, UNITS)

    def solve(self, block: Block) -> tuple[Vector, Memory]:  # noqa: D102
        return fair_weights(self.alpha, self.units, block), {}


def fair_weights(alpha: float, units: str, block: Block) -> Vector:
    """Return the weights of one block."""
    G, unit = block.gramian, block.unit(units)
    norms = [sqrt(row[i] / unit) for i, row in enumerate(G)]
    # The program of unit gradients is well scaled; their lengths go into its right-hand side.
    A = [[x / unit / (a * b) for x, b in zip(row, norms, strict=True)] for row, a in zip(G, norms, strict=True)]
    log_q = [log(r) + (1 - alpha) * log(n) for r, n in zip(block.preferences, norms, strict=True)]
    return [b / n for b, n in zip(bargain(A, log_q, alpha), norms, strict=True)]
