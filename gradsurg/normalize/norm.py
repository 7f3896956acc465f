"""Gradient norms: every task pulls equally hard."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradsurg.normalize.base import Normalizer
from gradsurg.problem import Problem, State

__all__ = ["Norm"]


@dataclass(frozen=True)
class Norm(Normalizer):
    """s_i = (mean of the norms) / ‖g_i‖: the only choice unchanged by L_i → c·L_i and by L_i → L_i + b alike.

    A task with zero gradient gets scale 0. The mean runs over the others, so that a task that sleeps does not shorten
    everybody's step.

    When it fails: near a task's optimum its gradient is mostly noise, and here noise pulls as hard as signal.

    Source: Su Jianlin 2022, kexue.fm 8870.

    Example:
        >>> import torch, gradsurg
        >>> gradsurg.weights(torch.tensor([[1.0, 0.0], [0.0, 16.0]]), normalize="norm").tolist()
        [2.5, 0.625]
    """

    name: ClassVar[str] = "norm"
    paper: ClassVar[str] = "Su 2022"

    def scales(self, problem: Problem, state: State) -> tuple[Tensor, State]:  # noqa: D102
        norms = problem.norms
        alive = norms > 0
        mean = norms.sum(-1, keepdim=True) / alive.sum(-1, keepdim=True).clamp(min=1)
        # mean / norm and not mean * (1 / norm): with one live task the scale is 1 to the bit.
        return torch.where(alive, mean / norms.where(alive, torch.ones_like(norms)), 0), state
