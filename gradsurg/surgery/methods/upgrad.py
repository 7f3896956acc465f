"""UPGrad: every task's gradient is freed of conflicts by itself, then they are summed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradsurg.solvers.problem import Problem, State
from gradsurg.surgery.base import Surgery

__all__ = ["UPGrad"]


@dataclass(frozen=True)
class UPGrad(Surgery):
    """u = Σ r_i Π(g_i), where Π projects onto the dual cone {u : ⟨u, g_i⟩ ≥ 0 for all i}.

    Π(g_i) = g_i + Σ_j Λ_ij g_j with row Λ_i = argmin_{λ ≥ 0} ½ λᵀGλ + λᵀG_i: m programs with one G. A sum of
    elements of a cone lies in the cone, so u conflicts with no task.

    When it fails: as for the cone, only u = 0 is left at Pareto stationary points.

    Source: Quinton & Rey 2024, "Jacobian descent for multi-objective optimization", definition 1 (there with r_i =
    1/m; here the sum, so that learning rates keep their meaning).

    Example:
        >>> import torch, gradsurg
        >>> G = torch.tensor([[1.0, -0.5], [-0.5, 1.0]])
        >>> gradsurg.weights(G, surgery="upgrad").tolist()
        [1.5, 1.5]
    """

    name, paper = "upgrad", "Quinton & Rey 2024"
    promise = "no conflict; every task's own gradient has its share, however large the others are"
    linear = True
    conflict_free = True
    waits = False

    def weights(self, problem: Problem, state: State) -> tuple[Tensor, State]:  # noqa: D102
        gramian, preferences = problem.gramian, problem.preferences
        # Shape (..., program, task); u needs only their sum, weighted by r.
        multipliers = problem.solvers.project_rows(gramian)
        if multipliers.ndim == 2:
            return torch.addmv(preferences, multipliers.T, preferences), state
        return preferences + preferences @ multipliers, state
