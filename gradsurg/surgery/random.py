"""Random loss weighting: new random weights in every step, as a litmus test for everything else."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradsurg.problem import Problem, State
from gradsurg.surgery.base import Surgery
from gradsurg.surgery.shortcut import alive, vector

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

    name: ClassVar[str] = "random"
    paper: ClassVar[str] = "Lin et al. 2022"
    promise: ClassVar[str] = "nothing; every task has the same weight on average"

    def weights(self, problem: Problem, state: State) -> tuple[Tensor, State]:  # noqa: D102
        generator = problem.generator or torch.Generator().manual_seed(0)
        drawn = torch.randn(problem.gramian.shape[-1], generator=generator, dtype=torch.float64).exp()
        alive = problem.gramian.diagonal(dim1=-2, dim2=-1) != 0
        pull = drawn.to(problem.gramian.device) * problem.preferences * alive
        total = pull.sum(-1, keepdim=True)
        return torch.where(total > 0, pull / total, 0), state

    def shortcut(self, gramian: Tensor) -> Tensor | None:  # noqa: D102
        return vector(_drawn(len(gramian)), gramian) if alive(gramian) else None


@functools.lru_cache(maxsize=64)
def _drawn(m: int) -> list[float]:
    """Return what a fresh generator draws for m tasks."""
    drawn = torch.randn(m, generator=torch.Generator().manual_seed(0), dtype=torch.float64).exp()
    shares: list[float] = (drawn / drawn.sum()).tolist()
    return shares
