"""No normalisation: rows as they come."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradsurg.normalize.base import Normalizer
from gradsurg.solvers.problem import Problem, State

__all__ = ["Unscaled"]


@dataclass(frozen=True)
class Unscaled(Normalizer):
    """s_i = 1.

    When it fails: a task whose loss is measured in millimetres instead of metres counts a thousand times as much.

    Example:
        >>> import torch, gradsurg
        >>> G = torch.tensor([[1.0, 0.0], [0.0, 100.0]])
        >>> gradsurg.weights(G, normalize="none").tolist()
        [1.0, 1.0]
    """

    name, paper = "none", "-"
    waits = False

    def scales(self, problem: Problem, state: State) -> tuple[Tensor, State]:  # noqa: D102
        return problem.gramian.new_ones(problem.gramian.shape[:-1], dtype=torch.float64), state
