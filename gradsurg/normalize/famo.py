"""FAMO: scales that even out how fast the logarithms of the losses fall, learned without gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradsurg.normalize.adam import descended, unlearned
from gradsurg.normalize.base import Normalizer
from gradsurg.normalize.checks import check_number, losses_of, per_block
from gradsurg.solvers.problem import Problem, State

__all__ = ["FAMO"]


@dataclass(frozen=True)
class FAMO(Normalizer):
    """s_i ∝ z_i / L_i, z = softmax(ξ), ξ learned so that every log L_i falls at the same rate.

    ξ descends along ∂z/∂ξ · (log L(t−1) − log L(t)), plus decay · ξ, by a step of Adam: a task that improved more than
    the others loses weight. Only tasks that were there in both steps are moved; a new one starts at ξ = 0.

    The paper measures the fall on one batch, before and after its step, which costs another forward pass. Here the
    second loss is that of the next step's batch: the same in expectation, but noisier.

    Args:
        rate: Learning rate of ξ.
        decay: γ of the paper, which pulls ξ back to equal weights.

    When it fails: with small batches the differences are mostly noise; a smaller rate averages it. Unchanged by
    L_i → c·L_i, not by L_i → L_i + b. Needs positive losses.

    Source: Liu et al. 2023, "FAMO: fast adaptive multitask optimization", algorithm 1; rate and decay
    are those of the authors' code.

    Example:
        >>> import torch, gradsurg
        >>> G, losses = torch.eye(2), torch.tensor([1.0, 3.0])
        >>> gradsurg.weights(G, "sum", normalize="famo", losses=losses).tolist()
        [1.5, 0.5]
    """

    name, paper = "famo", "Liu et al. 2023"

    rate: float = 0.025
    decay: float = 1e-2

    def __post_init__(self) -> None:
        check_number("FAMO(rate)", self.rate, above=0)
        check_number("FAMO(decay)", self.decay, at_least=0)

    def scales(self, problem: Problem, state: State) -> tuple[Tensor, State]:  # noqa: D102
        logs = losses_of(problem, self.name, positive=True).log()
        now = dict(zip(problem.tasks, logs.tolist(), strict=True))
        before: dict[str, float] = state.get("logs", {})
        logits: dict[str, dict[str, Any]] = {task: unlearned(0.0) for task in problem.tasks} | state.get("logits", {})
        stayed = [task for task in problem.tasks if task in before]
        # A task that was absent in the last step has no fall to learn from.
        if stayed:
            z = torch.softmax(torch.tensor([logits[task]["value"] for task in stayed], dtype=torch.float64), 0)
            fall = torch.tensor([before[task] - now[task] for task in stayed], dtype=torch.float64)
            # The derivative of softmax(ξ) along ξ, applied to the fall.
            gradients = (z * (fall - z @ fall)).tolist()
            for task, gradient in zip(stayed, gradients, strict=True):
                logits[task] = descended(logits[task], gradient, rate=self.rate, decay=self.decay)
        values = torch.tensor([logits[task]["value"] for task in problem.tasks], dtype=torch.float64)
        # z / L as one softmax of differences: neither a tiny loss nor a large logit overflows.
        return per_block(problem, torch.softmax(values - logs.cpu(), 0)), {"logits": logits, "logs": now}
