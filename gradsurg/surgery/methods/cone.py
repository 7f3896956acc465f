"""Cone: the least change to the plain sum after which no task conflicts with it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gradsurg.solvers.problem import Problem, State
from gradsurg.surgery.base import Surgery

__all__ = ["Cone"]


@dataclass(frozen=True)
class Cone(Surgery):
    """Projection of t = Σ r_i g_i onto the dual cone {u : ⟨u, g_i⟩ ≥ 0 for all i}.

    u = t + Σ λ_i g_i with λ = argmin_{λ ≥ 0} ½ λᵀGλ + λᵀGr, one quadratic program in m variables, solved exactly.
    If the plain sum conflicts with no task, it is returned unchanged, to the bit.

    When it fails: if the gradients surround the origin, the cone holds only u = 0 (a Pareto stationary point), and
    training stops there. It weighs tasks by their gradient norms: normalise first.

    Source: the program of GEM (Lopez-Paz & Ranzato 2017, eq. 11) with the sum in place of the current task's
    gradient; DualProj in Quinton & Rey 2024, section 4.

    Example:
        >>> import torch, gradsurg
        >>> J = torch.tensor([[2.0, 0.0], [-1.0, 1.0]])
        >>> gradsurg.combine(J, surgery="cone").tolist()      # (1, 1) conflicts with no task
        [1.0, 1.0]
    """

    name, paper = "cone", "Lopez-Paz & Ranzato 2017"
    promise = "no conflict, and the direction nearest to the plain sum among those"
    linear = True
    conflict_free = True
    waits = False

    def weights(self, problem: Problem, state: State) -> tuple[Tensor, State]:  # noqa: D102
        target = problem.preferences
        return target + problem.solvers.nonnegative(problem.gramian, problem.gramian @ target), state
