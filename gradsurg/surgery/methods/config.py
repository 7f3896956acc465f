"""ConFIG: the direction that has the same angle with every task gradient."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gradsurg.solvers.problem import Problem, State
from gradsurg.solvers.pseudoinverse import least_squares, unit_rows
from gradsurg.surgery.base import Surgery

__all__ = ["ConFIG"]


@dataclass(frozen=True)
class ConFIG(Surgery):
    """u = (Σ_i ⟨g_i, ĝ⟩) ĝ with ĝ the unit vector of U⁺ r, where U holds the unit gradients.

    With independent gradients U U⁺ = 1, so cos(u, g_i) ∝ r_i > 0 for every task; the length is what the gradients
    project onto the direction. In Gramian form the weights of U⁺ r are v = A⁺ r, with A = U Uᵀ.

    When it fails: dependent gradients (more tasks than parameters; duplicates with different r; opposite rows) leave
    only the least squares answer, which may conflict. Nearly opposite gradients have a u that is mostly noise.

    Source: Liu et al. 2024, "ConFIG: towards conflict-free training of physics informed neural networks", equation 2,
    with the weights of equation 4.

    Example:
        >>> import torch, gradsurg
        >>> J = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
        >>> gradsurg.combine(J, surgery="config").tolist()
        [2.0, 2.0]
    """

    name, paper = "config", "Liu et al. 2024"
    promise = "no conflict and equal cosines with all tasks, if the gradients are independent"

    def weights(self, problem: Problem, state: State) -> tuple[Tensor, State]:  # noqa: D102
        units, inverse = unit_rows(problem.gramian)
        v = least_squares(units, problem.preferences)
        inner = (units @ v.unsqueeze(-1)).squeeze(-1)
        square = (v * inner).sum(-1, keepdim=True)
        projected = (problem.norms * inner).sum(-1, keepdim=True)
        # Opposite gradients have no common direction: 0 / 0 would be NaN.
        return (projected / square).masked_fill_(square <= 0, 0) * v * inverse, state
