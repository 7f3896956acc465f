"""The plain mean: what training on the average loss does."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradsurg.solvers.problem import Problem, State
from gradsurg.surgery.base import Surgery

__all__ = ["Mean"]


@dataclass(frozen=True)
class Mean(Surgery):
    """u = Σ r_i g_i / Σ r_i, the sums running over the tasks whose gradient is not zero.

    When it fails: as the sum does. A task that comes or goes changes the length of the whole step.

    Source: the average of the losses in Kurin et al. 2022, "In defense of the unitary scalarization".

    Example:
        >>> import torch, gradsurg
        >>> gradsurg.weights(torch.eye(4), surgery="mean").tolist()
        [0.25, 0.25, 0.25, 0.25]
    """

    name, paper = "mean", "Kurin et al. 2022"
    promise = "nothing; it is the gradient of the weighted mean of the losses"
    linear = True
    reads = "zeros"
    waits = False

    def weights(self, problem: Problem, state: State) -> tuple[Tensor, State]:  # noqa: D102
        # A zero row may be a task that took no part in the step (a compiled model cannot say None). If the mean counted
        # it, the step of all tasks would become shorter.
        pull = problem.preferences * (problem.gramian.diagonal(dim1=-2, dim2=-1) != 0)
        total = pull.sum(-1, keepdim=True)
        return torch.where(total > 0, pull / total, 0), state
