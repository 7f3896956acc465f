"""Preferences as shares of 1 among the tasks that want something."""

from __future__ import annotations

import torch
from torch import Tensor

from gradsurg.solvers.problem import Problem

__all__ = ["shares"]


def shares(problem: Problem) -> Tensor:
    """Return r_i / Σ r_j, shape (..., m), both over the tasks whose gradient is not zero; the others have 0.

    A zero row may be a task that took no part in the step (a compiled model cannot say None), and a mean over it
    would shorten everybody's step.
    """
    pull = problem.preferences * (problem.gramian.diagonal(dim1=-2, dim2=-1) != 0)
    total = pull.sum(-1, keepdim=True)
    return torch.where(total > 0, pull / total, 0)
