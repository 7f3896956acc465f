"""GradNorm: learned scales under which tasks that train slowly have the longer gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradsurg.normalize.adam import descended, unlearned
from gradsurg.normalize.base import Normalizer
from gradsurg.normalize.checks import check_number, losses_of, per_block
from gradsurg.solvers.problem import Problem, State

__all__ = ["GradNorm"]

# The paper does not say what a weight below zero would mean; Adam gets there from 1 in 1 / rate steps.
LEAST = 1e-3


@dataclass(frozen=True)
class GradNorm(Normalizer):
    """s_i = w_i, learned so that w_i ‖g_i‖ approaches G ρ_i^α, G the mean of the w_j ‖g_j‖.

    ρ_i = (L_i / L_i(0)) / mean_j (L_j / L_j(0)) says how far behind a task is. After each use w descends on
    Σ |w_i ‖g_i‖ − G ρ_i^α|, the targets held fixed, by a step of Adam of its own; then the tasks present are rescaled
    to Σ w_i = m. With several blocks ‖g_i‖ is over all of them, and the scale is the same in each.

    The paper takes the norms in the last shared layer only; here they are those of all shared parameters, which the
    Gramian holds anyway. A weight that falls below 1e-3 is held there.

    Args:
        alpha: α; 0 asks for equal norms, more for a stronger pull on tasks that are behind.
        rate: Learning rate of w.

    When it fails: it follows the norms at the speed of `rate`; normalize="norm" has at once what α = 0 learns. The
    first loss of each task, a single batch, is its yardstick for ever. Neither L_i → c·L_i nor L_i → L_i + b leaves
    the direction alone. Needs positive losses.

    Source: Chen et al. 2018, "GradNorm", eq. 2 and algorithm 1.

    Example:
        >>> import torch, gradsurg
        >>> G, losses = torch.eye(2), torch.tensor([1.0, 3.0])
        >>> gradsurg.weights(G, "sum", normalize="gradnorm", losses=losses).tolist()
        [1.0, 1.0]
    """

    name, paper = "gradnorm", "Chen et al. 2018"

    alpha: float = 1.5
    rate: float = 0.025

    def __post_init__(self) -> None:
        check_number("GradNorm(alpha)", self.alpha, at_least=0)
        check_number("GradNorm(rate)", self.rate, above=0)

    def scales(self, problem: Problem, state: State) -> tuple[Tensor, State]:  # noqa: D102
        losses = losses_of(problem, self.name, positive=True)
        fresh = [{"initial": loss, **unlearned(1.0)} for loss in losses.tolist()]
        memories = [state.get(task, new) for task, new in zip(problem.tasks, fresh, strict=True)]
        weights = torch.tensor([memory["value"] for memory in memories], dtype=torch.float64, device=losses.device)
        initial = torch.tensor([memory["initial"] for memory in memories], dtype=torch.float64, device=losses.device)
        # Over all partitions of the parameters: each task learns one scale.
        norms = problem.norms.reshape(-1, len(problem.tasks)).square().sum(0).sqrt()
        # How far each task is behind the mean, by the share of its first loss that is left.
        behind = losses / initial / (losses / initial).mean()
        scaled = weights * norms
        gradients = torch.sign(scaled - scaled.mean() * behind**self.alpha) * norms
        moved = [descended(memory, g, rate=self.rate) for memory, g in zip(memories, gradients.tolist(), strict=True)]
        next_weights = [max(memory["value"], LEAST) for memory in moved]
        # Only the tasks of this step are rescaled; the others keep their weight until they come back.
        factor = len(next_weights) / sum(next_weights)
        next_state: dict[str, Any] = dict(state)
        for task, old, new, weight in zip(problem.tasks, memories, moved, next_weights, strict=True):
            next_state[task] = {**new, "initial": old["initial"], "value": weight * factor}
        return per_block(problem, weights), next_state
