"""Random loss weighting: new random weights in every step, as a litmus test for everything else."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradsurg.solvers.problem import Problem, State
from gradsurg.surgery.base import Surgery

__all__ = ["Random"]


@dataclass(frozen=True)
class Random(Surgery):
    """u = Σ w_i g_i with w_i ∝ r_i exp(z_i), Σ w_i = 1, z_i drawn from N(0, 1) in every step.

    One draw for all blocks. A task whose gradient is zero gets weight 0.

    When it fails: it looks at no gradient, so it promises nothing of any single step.

    Source: Lin et al. 2022, "Reasonable effectiveness of random weighting", algorithm 2 (RGW).

    Example:
        >>> import torch, gradsurg
        >>> round(float(gradsurg.weights(torch.eye(4), surgery="random").sum()), 6)
        1.0
    """

    name, paper = "random", "Lin et al. 2022"
    promise = "nothing; every task has the same weight on average"
    reads = "zeros"

    def weights(self, problem: Problem, state: State) -> tuple[Tensor, State]:  # noqa: D102
        G, generator = problem.gramian, problem.generator or torch.Generator().manual_seed(0)
        # On the CPU, so that every device draws the same weights.
        drawn = torch.randn(G.shape[-1], generator=generator, dtype=torch.float64)
        alive = G.diagonal(dim1=-2, dim2=-1) != 0
        pull = torch.where(alive, drawn.to(G.device) + problem.preferences.log(), -torch.inf)
        return torch.where(alive, pull.softmax(-1), 0), state
