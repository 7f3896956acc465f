"""The plain weighted sum: what training on Σ r_i L_i does."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gradsurg.solvers.problem import Problem, State
from gradsurg.surgery.base import Surgery

__all__ = ["Sum"]


@dataclass(frozen=True)
class Sum(Surgery):
    """u = Σ r_i g_i, no surgery at all: the baseline, and a bed for normalisers and guarantees.

    When it fails: as soon as one task's gradient outweighs another that it conflicts with, the other gets worse.

    Source: the linear scalarisation of Kurin et al. 2022, "In defense of the unitary scalarization".

    Example:
        >>> import torch, gradsurg
        >>> gradsurg.weights(torch.eye(2), surgery="sum").tolist()
        [1.0, 1.0]
    """

    name, paper = "sum", "Kurin et al. 2022"
    promise = "nothing; it is the gradient of the weighted sum of the losses"
    linear = True
    reads = "nothing"
    waits = False

    def weights(self, problem: Problem, state: State) -> tuple[Tensor, State]:  # noqa: D102
        return problem.preferences.expand(problem.gramian.shape[:-1]).clone(), state
