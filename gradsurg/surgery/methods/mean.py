"""The plain mean: what training on the average loss does."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gradsurg.solvers.problem import Problem, State
from gradsurg.surgery.base import Surgery, shares

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
    reads = "zeros"
    waits = False

    def weights(self, problem: Problem, state: State) -> tuple[Tensor, State]:  # noqa: D102
        return shares(problem), state
