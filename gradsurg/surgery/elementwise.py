"""Surgeries that look at every number of the gradients by itself, and so cannot be had from inner products."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from gradsurg.solvers.problem import Problem, State
from gradsurg.surgery.base import Surgery

__all__ = ["ElementwiseSurgery"]


class ElementwiseSurgery(Surgery):
    """Turns every column of the gradient matrix into one number of u, without looking at the other columns.

    Not invariant to a rotation of parameter space, and without weights: wrap() and combine() call `combine`, one
    parameter at a time. Normalisation before it and guarantees after it work as for any surgery; levels of priority,
    which weigh whole gradients, do not.
    """

    # Whether `combine` draws from its generator.
    draws: ClassVar[bool] = True

    @abstractmethod
    def combine(self, columns: Tensor, preferences: Tensor | None, generator: torch.Generator) -> Tensor:
        """Return u, shape (n,).

        Args:
            columns: n numbers of every task's (scaled) gradient, shape (m', n), of the tasks that have a gradient for
                them; float32 or float64. Not to be written to.
            preferences: Their r_i, shape (m',), of the same dtype and device; None for 1 each.
            generator: Source of all random choices, on the CPU.
        """

    def weights(self, problem: Problem, state: State) -> tuple[Tensor, State]:
        """Refuse: there are none.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            f"surgery={self.name!r} treats every number of the gradients by itself, so it has no weights and needs the "
            "rows: use gradsurg.combine(J, ...) or gradsurg.wrap(...), without primary="
        )
