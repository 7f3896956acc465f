"""Gradient norms: every task pulls equally hard."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradsurg.normalize.base import Normalizer
from gradsurg.normalize.checks import check_number
from gradsurg.solvers.problem import Problem, State

__all__ = ["Norm"]


@dataclass(frozen=True)
class Norm(Normalizer):
    """s_i = (mean of the norms) / ‖g_i‖: the only choice unchanged by L_i → c·L_i and by L_i → L_i + b alike.

    A task with zero gradient gets scale 0. The mean runs over the others, so that an absent task does not shorten the
    step.

    With `smoothing` β the norm in the denominator is its exponential moving average with bias correction,
    n_i = v_i / w_i, v_i ← β v_i + (1 − β) ‖g_i‖, w_i ← β w_i + (1 − β), both from 0: a single loud batch then counts
    as loud. A step in which the task is absent, or its gradient zero, leaves its average alone. The average is kept
    per block, known by its position; if the number of blocks changes, it starts afresh. The invariances hold for
    changes made before the first step.

    Args:
        smoothing: β in [0, 1); 0 takes the norm of this step.

    When it fails: near a task's optimum its gradient is mostly noise, and here noise pulls as hard as signal. With
    smoothing, a GradScaler that doubles its scale is seen as gradients that grew.

    Source: Su Jianlin 2022, kexue.fm 8870. The bias correction is that of Kingma & Ba 2015, section 3.

    Example:
        >>> import torch, gradsurg
        >>> G = torch.tensor([[1.0, 0.0], [0.0, 9.0]]).double()
        >>> gradsurg.weights(G, normalize="norm").tolist()
        [2.0, 0.6666666666666666]
    """

    name, paper = "norm", "Su 2022"
    waits = False

    smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_number("Norm(smoothing)", self.smoothing, at_least=0, below=1)
        # Averages are kept as plain numbers, for which a device is waited for.
        if self.smoothing:
            object.__setattr__(self, "waits", True)

    def scales(self, problem: Problem, state: State) -> tuple[Tensor, State]:  # noqa: D102
        norms = problem.norms
        alive = norms > 0
        mean = norms.sum(-1, keepdim=True) / alive.sum(-1, keepdim=True).clamp(min=1)
        if self.smoothing:
            norms, state = self._smoothed(problem, state)
        # mean / norm and not mean * (1 / norm): with one live task the scale is 1 to the bit.
        return torch.where(alive, mean / norms.where(alive, torch.ones_like(norms)), 0), state

    def _smoothed(self, problem: Problem, state: State) -> tuple[Tensor, State]:
        keep, norms = self.smoothing, problem.norms
        next_state: dict[str, Any] = dict(state)
        columns = []
        for task, column in zip(problem.tasks, norms.reshape(-1, len(problem.tasks)).unbind(1), strict=True):
            now = column.tolist()
            memory = state.get(task, {})
            # Another number of blocks: averages are known by position, so they fit no longer.
            if len(memory.get("average", ())) != len(now):
                memory = {"average": [0.0] * len(now), "weight": [0.0] * len(now)}
            # A norm of 0 is an absent task, whose average stays.
            average = [keep * v + (1 - keep) * n if n else v for v, n in zip(memory["average"], now, strict=True)]
            weight = [keep * w + (1 - keep) if n else w for w, n in zip(memory["weight"], now, strict=True)]
            next_state[task] = {"average": average, "weight": weight}
            columns.append([v / w if w else 0.0 for v, w in zip(average, weight, strict=True)])
        smoothed = torch.tensor(columns, dtype=torch.float64, device=norms.device).T
        return smoothed.reshape(norms.shape), next_state
