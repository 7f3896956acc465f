"""Random loss weighting: new random weights in every step, as a litmus test for everything else."""

from __future__ import annotations

import functools
from array import array
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from gradsurg.solvers.problem import Problem, State
from gradsurg.surgery.base import Surgery
from gradsurg.surgery.shortcut import vector

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
        G = problem.gramian
        drawn = _drawn(G.shape[-1], problem.generator or torch.Generator().manual_seed(0))
        alive = G.diagonal(dim1=-2, dim2=-1) != 0
        pull = torch.where(alive, drawn.to(G.device) + problem.preferences.log(), -torch.inf)
        return torch.where(alive, pull.softmax(-1), 0), state

    def shortcut(self, gramian: Tensor, generator: Generator | None) -> Tensor | None:  # noqa: D102
        squares = gramian.diagonal().tolist()
        if 0.0 in squares:
            return None
        if generator is None:
            return vector(_drawn_first(len(squares)), gramian)
        shares = _drawn(len(squares), generator).softmax(0)
        return shares if gramian.dtype is torch.float64 else shares.to(gramian.dtype)


def _drawn(m: int, generator: Generator) -> Tensor:
    """Return z_i."""
    return torch.randn(m, generator=generator, dtype=torch.float64)


@functools.lru_cache(maxsize=64)
def _drawn_first(m: int) -> array[float]:
    """Return what a fresh generator draws for m tasks."""
    return array("d", _drawn(m, torch.Generator().manual_seed(0)).softmax(0).tolist())
