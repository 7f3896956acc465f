"""MGDA: the direction whose worst-off task gains the most."""

from __future__ import annotations

from dataclasses import dataclass
from operator import mul

from torch import Tensor

from gradsurg.solvers.problem import Problem, State
from gradsurg.solvers.simplex import times
from gradsurg.surgery.base import Surgery, check
from gradsurg.surgery.blockwise import Block, Memory, Vector, each_block

__all__ = ["MGDA"]


@dataclass(frozen=True)
class MGDA(Surgery):
    """The minimum-norm point of the convex hull of the gradients: max_u min_i ⟨u, g_i⟩ − ½‖u‖².

    u = Σ α_i g_i with α = argmin_{α ≥ 0, Σα = 1} ‖Σ α_i g_i‖², found exactly. Then ⟨u, g_i⟩ ≥ ‖u‖² for every task.
    With preferences the hull is that of g_i / r_i, so that ⟨u, g_i⟩ ≥ r_i ‖u‖²: a task with twice the preference is
    promised twice the progress. A task whose gradient is zero wants nothing and is left out of the hull (with it, the
    answer would be 0 for all).

    When it fails: the shortest gradient dominates the minimum, so it needs normalised rows; the weights add up to 1,
    so steps are about m times shorter than those of a sum.

    Args:
        frank_wolfe: Number of steps of Frank–Wolfe, the classic iteration, from equal weights; 0 solves exactly. With
            any other number nothing is promised: it nears the minimum like 1 / steps.

    Raises:
        ValueError: `frank_wolfe` is negative.

    Source: Désidéri 2012, "Multiple-gradient descent algorithm"; Sener & Koltun 2018, algorithm 2,
    for Frank–Wolfe.

    Example:
        >>> import torch, gradsurg
        >>> G = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
        >>> gradsurg.weights(G, surgery="mgda").tolist()
        [0.75, 0.25]
    """

    frank_wolfe: int = 0
    name, paper = "mgda", "Désidéri 2012"
    promise = "no conflict, and the same progress for every task that limits it"
    conflict_free = True
    waits = False

    def __post_init__(self) -> None:
        check("frank_wolfe", self.frank_wolfe, self.frank_wolfe >= 0, "not be negative; 0 solves exactly")
        # If the answer is not the minimum, the gradient guarantee must not be skipped.
        if self.frank_wolfe:
            object.__setattr__(self, "conflict_free", False)
            object.__setattr__(self, "waits", True)

    def weights(self, problem: Problem, state: State) -> tuple[Tensor, State]:  # noqa: D102
        if self.frank_wolfe:
            return each_block(problem, state, self._iterate)
        inverse = problem.preferences.reciprocal()
        gramian = problem.gramian * inverse[:, None] * inverse
        wants_something = gramian.diagonal(dim1=-2, dim2=-1) > 0
        return problem.solvers.simplex(gramian, allowed=wants_something) * inverse, state

    def _iterate(self, block: Block) -> tuple[Vector, Memory]:
        r = block.preferences
        G = [[x / (a * b) for x, b in zip(row, r, strict=True)] for row, a in zip(block.gramian, r, strict=True)]
        w = [1 / len(r)] * len(r)
        for _ in range(self.frank_wolfe):
            slope = times(G, w)
            t = slope.index(min(slope))
            here, across, there = sum(map(mul, w, slope)), slope[t], G[t][t]
            if here <= across:
                break
            step = min((here - across) / (here - 2 * across + there), 1.0)
            w = [(1 - step) * x + step * (i == t) for i, x in enumerate(w)]
        return [x / a for x, a in zip(w, r, strict=True)], {}
