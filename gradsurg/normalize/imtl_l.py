"""IMTL-L: learned scales that bring every loss to the same size."""

from __future__ import annotations

from dataclasses import dataclass
from math import exp
from typing import Any

from torch import Tensor

from gradsurg.normalize.adam import descended, unlearned
from gradsurg.normalize.base import Normalizer
from gradsurg.normalize.checks import check_number, losses_of, per_block
from gradsurg.solvers.problem import Problem, State

__all__ = ["IMTLL"]


@dataclass(frozen=True)
class IMTLL(Normalizer):
    """s_i ∝ exp(a_i), a_i a learned log-scale: impartial multi-task learning, its loss balance.

    a_i descends on exp(a_i) L_i − a_i, from 0, by a step of Adam of its own after each use; at its minimum
    exp(a_i) L_i = 1 for every task. The paper lets the model's optimizer train a; here it has one of its own, so that
    the method is a function of (problem, state).

    Args:
        rate: Learning rate of a.

    When it fails: a moves by about `rate` a step, so losses far from 1 take |log L_i| / rate steps to be met. At its
    minimum the scales are those of the current loss, averaged over time: unchanged by L_i → c·L_i there, but not on
    the way. Needs positive losses.

    Source: Liu et al. 2021, "Towards impartial multi-task learning", section 3.2 (base e).

    Example:
        >>> import torch, gradsurg
        >>> G, losses = torch.eye(2), torch.tensor([1.0, 3.0])
        >>> gradsurg.weights(G, "sum", normalize="imtl_l", losses=losses).tolist()
        [1.0, 1.0]
    """

    name, paper = "imtl_l", "Liu et al. 2021"

    rate: float = 0.01

    def __post_init__(self) -> None:
        check_number("IMTLL(rate)", self.rate, above=0)

    def scales(self, problem: Problem, state: State) -> tuple[Tensor, State]:  # noqa: D102
        losses = losses_of(problem, self.name, positive=True).tolist()
        next_state: dict[str, Any] = dict(state)
        scales = []
        for task, loss in zip(problem.tasks, losses, strict=True):
            memory = state.get(task, unlearned(0.0))
            scales.append(exp(memory["value"]))
            # The derivative of exp(a) L − a.
            next_state[task] = descended(memory, scales[-1] * loss - 1, rate=self.rate)
        return per_block(problem, scales), next_state
