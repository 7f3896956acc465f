"""GradVac: pairs of gradients are turned towards each other until they are as similar as they usually are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import sqrt
from operator import mul

import torch
from torch import Tensor

from gradsurg.solvers.problem import Problem, State
from gradsurg.surgery.base import Surgery, check
from gradsurg.surgery.blockwise import Block, Memory, Vector, each_block

__all__ = ["GradVac"]

# A goal of 1 would ask for a gradient turned exactly onto another, at infinite length: 2.6° is near enough.
LARGEST_GOAL = 0.999


@dataclass(frozen=True)
class GradVac(Surgery):
    """u = Σ r_i g_i', where g_i' is g_i turned towards every other g_j that it is less similar to than usual.

    For the other tasks j in random order, with φ = cos(g_i', g_j) and the usual φ̂_ij: if φ < φ̂,
    g_i' ← g_i' + ‖g_i'‖ (φ̂ √(1 − φ²) − φ √(1 − φ̂²)) / (‖g_j‖ √(1 − φ̂²)) · g_j, after which cos(g_i', g_j) = φ̂.
    Then φ̂ ← (1 − β) φ̂ + β φ. All of it happens to coefficients, as in PCGrad, which is β = 0: φ̂ starts at 0.

    When it fails: as PCGrad does, for three tasks and more; and φ̂ < 0 lets conflicts stand that are usual. The answer
    depends on the order drawn. φ̂ is kept per ordered pair of task names, and waits for a task that is away.

    Args:
        beta: β in [0, 1], how fast the usual similarity follows.

    Source: Wang et al. 2021, "Gradient vaccine", equations 2 and 3, algorithm 1.

    Example:
        >>> import torch, gradsurg
        >>> G = torch.tensor([[1.0, -0.5], [-0.5, 1.0]])
        >>> gradsurg.weights(G, surgery="gradvac").tolist()
        [1.5, 1.5]
    """

    beta: float = 0.01
    name, paper = "gradvac", "Wang et al. 2021"
    promise = "no conflict for two tasks that usually have none; nothing for more"
    linear = True

    def __post_init__(self) -> None:
        check("beta", self.beta, 0 <= self.beta <= 1, "lie in [0, 1]")

    def weights(self, problem: Problem, state: State) -> tuple[Tensor, State]:  # noqa: D102
        m = problem.gramian.shape[-1]
        generator = problem.generator or torch.Generator().manual_seed(0)
        # The same orders for all blocks.
        orders = [torch.randperm(m, generator=generator).tolist() for _ in range(m)]
        return each_block(problem, state, partial(self._solve, orders))

    def _solve(self, orders: list[list[int]], block: Block) -> tuple[Vector, Memory]:
        G, place = block.gramian, {row: i for i, row in enumerate(block.rows)}
        norms = [sqrt(row[i]) for i, row in enumerate(G)]
        usual = {name: dict(others) for name, others in block.memory.items()}
        total = [0.0] * len(G)
        for i, row in enumerate(block.rows):
            goals = usual.setdefault(block.tasks[i], {})
            coefficients = [0.0] * len(G)
            coefficients[i] = 1.0
            # ⟨g_i', g_k⟩ for all k, and ‖g_i'‖².
            inner, square = list(G[i]), G[i][i]
            for j in (place[other] for other in orders[row] if other in place and other != row):
                length = sqrt(max(square, 0.0))
                # Nothing is left of the gradient, so there is no direction to compare.
                if length == 0:
                    break
                phi = max(-1.0, min(1.0, inner[j] / (length * norms[j])))
                goal = min(goals.get(block.tasks[j], 0.0), LARGEST_GOAL)
                if phi < goal:
                    across = sqrt(1 - goal * goal)
                    step = length * (goal * sqrt(1 - phi * phi) - phi * across) / (norms[j] * across)
                    coefficients[j] += step
                    inner = [x + step * y for x, y in zip(inner, G[j], strict=True)]
                    square = sum(map(mul, coefficients, inner))
                    # Below this only rounding is left.
                    if square < 1e-15 * sum(abs(c) * n for c, n in zip(coefficients, norms, strict=True)) ** 2:
                        square = 0.0
                goals[block.tasks[j]] = (1 - self.beta) * goals.get(block.tasks[j], 0.0) + self.beta * phi
            total = [x + block.preferences[i] * c for x, c in zip(total, coefficients, strict=True)]
        return total, usual
