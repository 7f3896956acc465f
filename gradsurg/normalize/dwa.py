"""DWA: tasks whose loss falls more slowly than the others' get more weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradsurg.normalize.base import Normalizer
from gradsurg.normalize.checks import check_number, losses_of, per_block
from gradsurg.solvers.problem import Problem, State

__all__ = ["DWA"]


@dataclass(frozen=True)
class DWA(Normalizer):
    """s_i ∝ exp(w_i / T), w_i = L_i(t−1) / L_i(t−2): dynamic weight average.

    L_i(t) is the mean loss of task i over epoch t, an epoch being `period` steps in which the task is present; w_i = 1
    until there are two. The losses of the epoch in progress have no say in its own scales.

    Args:
        temperature: T > 0; the larger, the more equal the scales.
        period: Steps in an epoch. The paper averages over a whole pass through the data.

    When it fails: with period = 1 the ratio of two mini-batches is mostly noise: set it to len(loader). It knows how
    fast losses fall, not how large they are: neither L_i → c·L_i nor L_i → L_i + b leaves the direction alone. Needs
    positive losses.

    Source: Liu, Johns & Davison 2019, "End-to-end multi-task learning with attention", eq. 7 and the text below it.

    Example:
        >>> import torch, gradsurg
        >>> G, losses = torch.eye(2), torch.tensor([1.0, 3.0])
        >>> gradsurg.weights(G, "sum", normalize="dwa", losses=losses).tolist()
        [1.0, 1.0]
    """

    name, paper = "dwa", "Liu et al. 2019"

    temperature: float = 2.0
    period: int = 1

    def __post_init__(self) -> None:
        check_number("DWA(temperature)", self.temperature, above=0)
        check_number("DWA(period)", self.period, at_least=1, whole=True)

    def scales(self, problem: Problem, state: State) -> tuple[Tensor, State]:  # noqa: D102
        losses = losses_of(problem, self.name, positive=True).tolist()
        next_state: dict[str, Any] = dict(state)
        ratios = []
        for task, loss in zip(problem.tasks, losses, strict=True):
            memory = state.get(task, {"sum": 0.0, "count": 0, "means": []})
            means = memory["means"]
            # Read before this step's loss enters: the epoch in progress has no say in its own scales.
            ratios.append(means[1] / means[0] if len(means) == 2 else 1.0)
            total, count = memory["sum"] + loss, memory["count"] + 1
            # The epoch is over. Only the last two means are ever read.
            if count == self.period:
                total, count, means = 0.0, 0, [*means, total / count][-2:]
            next_state[task] = {"sum": total, "count": count, "means": means}
        scales = torch.softmax(torch.tensor(ratios, dtype=torch.float64) / self.temperature, 0)
        return per_block(problem, scales), next_state
