"""Scales that divide by a loss: the current one, the first ones, or that of the best constant prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradsurg.normalize.base import Normalizer
from gradsurg.normalize.checks import check_number, checked_values, inverse, losses_of, per_block
from gradsurg.solvers.problem import Problem, State

__all__ = ["CurrentLoss", "InitialLoss", "PriorLoss", "class_entropy", "target_variance"]


@dataclass(frozen=True)
class CurrentLoss(Normalizer):
    """s_i ∝ 1 / L_i: the gradient of Σ log L_i, that is, of the geometric mean of the losses.

    Unchanged by L_i → c·L_i, not by L_i → L_i + b.

    When it fails: a loss near zero gets an unbounded share, and a loss whose lower bound is not zero gets too little
    of it at the end. Needs positive losses.

    Source: Su Jianlin 2022, kexue.fm 8870; the geometric loss strategy of Chennupati et al. 2019, "MultiNet++",
    eq. 4.

    Example:
        >>> import torch, gradsurg
        >>> G, losses = torch.eye(2), torch.tensor([1.0, 3.0])
        >>> gradsurg.weights(G, "sum", normalize="loss", losses=losses).tolist()
        [1.5, 0.5]
    """

    name, paper = "loss", "Chennupati et al. 2019"

    def scales(self, problem: Problem, state: State) -> tuple[Tensor, State]:  # noqa: D102
        return per_block(problem, inverse(losses_of(problem, self.name, positive=True))), state


@dataclass(frozen=True)
class InitialLoss(Normalizer):
    """s_i ∝ 1 / (mean of the first k losses of task i); of those there are so far, until there are k.

    Unchanged by L_i → c·L_i, not by L_i → L_i + b. A task that comes later is measured by its own first k steps. Once
    every task present is measured, losses are no longer read.

    Args:
        steps: k ≥ 1.

    When it fails: the first loss tells of the initialisation as much as of the task: pretrained parts that start near
    their optimum make a task loud for the whole run. Needs positive losses.

    Source: Su Jianlin 2022, kexue.fm 8870.

    Example:
        >>> import torch, gradsurg
        >>> G, losses = torch.eye(2), torch.tensor([1.0, 3.0])
        >>> gradsurg.weights(G, "sum", normalize="initial_loss", losses=losses).tolist()
        [1.5, 0.5]
    """

    name, paper = "initial_loss", "Su 2022"

    steps: int = 1

    def __post_init__(self) -> None:
        check_number("InitialLoss(steps)", self.steps, at_least=1, whole=True)

    def scales(self, problem: Problem, state: State) -> tuple[Tensor, State]:  # noqa: D102
        next_state: dict[str, Any] = dict(state)
        # Once all are measured, losses are not read, so they need not be there nor be positive.
        if any(state.get(task, {}).get("count", 0) < self.steps for task in problem.tasks):
            losses = losses_of(problem, self.name, positive=True).tolist()
            for task, loss in zip(problem.tasks, losses, strict=True):
                memory = state.get(task, {"sum": 0.0, "count": 0})
                if memory["count"] < self.steps:
                    next_state[task] = {"sum": memory["sum"] + loss, "count": memory["count"] + 1}
        means = [next_state[task]["sum"] / next_state[task]["count"] for task in problem.tasks]
        return per_block(problem, inverse(torch.tensor(means, dtype=torch.float64))), next_state


@dataclass(frozen=True)
class PriorLoss(Normalizer):
    """s_i ∝ 1 / (loss of the best constant prediction of task i), given by the user.

    For cross-entropy that is the entropy of the class frequencies (`class_entropy`; log K if K classes are equally
    frequent), for squared error the variance of the targets (`target_variance`). If the value follows the loss, as
    these do, the scales are unchanged by L_i → c·L_i, but not by L_i → L_i + b.

    Args:
        values: Task name -> that loss, positive; in `gradsurg.weights` the names are "0", "1", ….

    When it fails: it weighs tasks once and for all, by what they are before anything is learned.

    Source: Su Jianlin 2022, kexue.fm 8870.

    Example:
        >>> import torch, gradsurg
        >>> from gradsurg.normalize import PriorLoss, class_entropy, target_variance
        >>> targets = torch.tensor([-2.0, 2.0])
        >>> values = {"0": class_entropy([0.5, 0.5]), "1": target_variance(targets)}
        >>> scales = gradsurg.weights(torch.eye(2), "sum", normalize=PriorLoss(values))
        >>> round(float(scales[0] / scales[1]), 3)      # 4 / log 2
        5.771
    """

    name, paper = "prior_loss", "Su 2022"

    # A dict cannot be hashed, and pipelines are looked up by their options.
    values: dict[str, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", checked_values("PriorLoss(values)", self.values, above=0))

    def scales(self, problem: Problem, state: State) -> tuple[Tensor, State]:  # noqa: D102
        for task in problem.tasks:
            if task not in self.values:
                raise ValueError(
                    f"normalize='prior_loss' has no value for task {task!r} (given: {list(self.values)}): pass "
                    f"PriorLoss({{{task!r}: loss of its best constant prediction, …}}); class_entropy and "
                    "target_variance compute it"
                )
        values = torch.tensor([self.values[task] for task in problem.tasks], dtype=torch.float64)
        return per_block(problem, inverse(values)), state


def class_entropy(frequencies: Tensor | Sequence[float]) -> float:
    """Return −Σ p_c log p_c, the cross-entropy of the best constant prediction, in nats.

    Args:
        frequencies: How often each class occurs, counts or shares, shape (classes,); a class that never occurs adds
            nothing.

    Raises:
        ValueError: A negative or non-finite entry, or fewer than two classes that occur (the entropy would be 0).

    Example:
        >>> round(class_entropy([25, 25, 25, 25]), 4)      # log 4
        1.3863
    """
    counts = torch.as_tensor(frequencies, dtype=torch.float64)
    if counts.ndim != 1 or not bool(((counts >= 0) & counts.isfinite()).all()) or int((counts > 0).sum()) < 2:
        raise ValueError(f"frequencies={frequencies!r}: pass nonnegative numbers, one per class, two of them positive")
    shares = counts / counts.sum()
    return float(-torch.xlogy(shares, shares).sum())


def target_variance(targets: Tensor) -> float:
    """Return the mean squared error of the best constant prediction: the variance of each output, averaged.

    Args:
        targets: Shape (samples, ...), real; every position after the first dimension is one output.

    Raises:
        ValueError: No samples, or targets that do not vary or are not finite.

    Example:
        >>> import torch
        >>> target_variance(torch.tensor([[1.0, 10.0], [3.0, 10.0]]))
        0.5
    """
    values = torch.as_tensor(targets, dtype=torch.float64)
    variance = 0.0 if values.ndim == 0 or values.numel() == 0 else float((values - values.mean(0)).square().mean())
    if not 0 < variance < float("inf"):
        raise ValueError(
            f"targets of shape {tuple(values.shape)} have variance {variance!r}: they must vary, and be finite"
        )
    return variance
