"""RLW: random scales, drawn anew in every step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradsurg.normalize.base import Normalizer
from gradsurg.normalize.checks import per_block
from gradsurg.solvers.problem import Problem, State

__all__ = ["RandomWeights"]


@dataclass(frozen=True)
class RandomWeights(Normalizer):
    """s = softmax(z), z_i ~ N(0, 1) independently: random loss weighting.

    The draws depend on seed, step and the tasks' names, not on the order in which they are handed in, so a resumed run
    goes on as if it had not stopped.

    When it fails: in expectation it is the plain sum with more noise; a baseline that other weightings have to beat.
    Unchanged by L_i → L_i + b, not by L_i → c·L_i.

    Source: Lin et al. 2022, "Reasonable effectiveness of random weighting", section 3.1 (normal distribution).

    Example:
        >>> import torch, gradsurg
        >>> generator = torch.Generator().manual_seed(1)
        >>> w = gradsurg.weights(torch.eye(2), "sum", normalize="random", generator=generator)
        >>> round(float(w.sum()), 6)
        2.0
    """

    name, paper = "random", "Lin et al. 2022"

    def scales(self, problem: Problem, state: State) -> tuple[Tensor, State]:  # noqa: D102
        generator = problem.generator or torch.Generator().manual_seed(0)
        draws = torch.randn(len(problem.tasks), generator=generator, dtype=torch.float64, device=generator.device)
        # Names in sorted order get the draws in turn, so that the order of the losses does not matter.
        rank = {task: i for i, task in enumerate(sorted(problem.tasks))}
        in_order = draws[[rank[task] for task in problem.tasks]]
        return per_block(problem, torch.softmax(in_order, 0)), state
