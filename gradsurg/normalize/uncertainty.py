"""Uncertainty weighting: each task is trusted as much as the noise that is left in it allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp
from typing import Any

import torch
from torch import Tensor, nn

from gradsurg.normalize.adam import descended, unlearned
from gradsurg.normalize.base import Normalizer
from gradsurg.normalize.checks import check_number, losses_of, per_block
from gradsurg.solvers.problem import Problem, State

__all__ = ["LogVariances", "Uncertainty"]


@dataclass(frozen=True)
class Uncertainty(Normalizer):
    """s_i ∝ k_i exp(−v_i), v_i a learned log-variance: k_i = ½ for regression, 1 for classification.

    v_i descends on k_i exp(−v_i) L_i + ½ v_i, from 0, by a step of Adam of its own after each use; at its minimum
    exp(v_i) = 2 k_i L_i. The paper lets the model's optimizer train v along with the model. That form is not a function
    of (problem, state), and is what `LogVariances` is for; this one differs from it in the optimizer of v alone.

    Args:
        rate: Learning rate of v.
        classification: Names of the tasks whose loss is a cross-entropy; all others count as squared errors.

    When it fails: v moves by about `rate` a step, so losses far from 1 take |log L_i| / rate steps to be met. A task
    that is hard is taken for one that is noisy, and given up. At its minimum the scales are those of the current loss,
    averaged over time: unchanged by L_i → c·L_i there, but not on the way. Needs positive losses.

    Source: Kendall, Gal & Cipolla 2018, "Multi-task learning using uncertainty to weigh losses", eq. 7 and 10.

    Example:
        >>> import torch, gradsurg
        >>> G, losses = torch.eye(2), torch.tensor([1.0, 3.0])
        >>> gradsurg.weights(G, "sum", normalize="uncertainty", losses=losses).tolist()
        [1.0, 1.0]
    """

    name, paper = "uncertainty", "Kendall et al. 2018"

    rate: float = 0.01
    classification: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_number("Uncertainty(rate)", self.rate, above=0)
        object.__setattr__(self, "classification", _names("Uncertainty(classification)", self.classification))

    def scales(self, problem: Problem, state: State) -> tuple[Tensor, State]:  # noqa: D102
        losses = losses_of(problem, self.name, positive=True).tolist()
        next_state: dict[str, Any] = dict(state)
        precisions = []
        for task, loss in zip(problem.tasks, losses, strict=True):
            memory = state.get(task, unlearned(0.0))
            precision = _factor(task, self.classification) * exp(-memory["value"])
            precisions.append(precision)
            # The derivative of k exp(−v) L + ½ v.
            next_state[task] = descended(memory, 0.5 - precision * loss, rate=self.rate)
        return per_block(problem, precisions), next_state


class LogVariances(nn.Module):
    """Uncertainty weighting as published: log-variances that the model's own optimizer trains.

    Turns each loss into k_i exp(−v_i) L_i + ½ v_i. Each v_i is a parameter of its own, which only its task reaches, so
    surgery leaves it alone and it gets its own plain gradient. Use normalize="none" with it: the scales are in the
    losses already, and normalize="norm" would take them out again.

    Args:
        tasks: The names.
        classification: As for `Uncertainty`.

    Example:
        >>> import torch, gradsurg
        >>> model = torch.nn.Linear(3, 2)
        >>> variances = gradsurg.normalize.LogVariances(
        ...     ["size", "kind"], classification=["kind"]
        ... )
        >>> parameters = [*model.parameters(), *variances.parameters()]
        >>> optimizer = gradsurg.wrap(torch.optim.Adam(parameters), normalize="none")
        >>> y = model(torch.ones(4, 3))
        >>> losses = {"size": y[:, 0].square().mean(), "kind": y[:, 1].exp().mean()}
        >>> optimizer.total(variances(losses)).backward()
        >>> optimizer.step()
    """

    def __init__(self, tasks: Sequence[str], classification: Sequence[str] = ()) -> None:
        super().__init__()
        self.tasks = _names("LogVariances(tasks)", tasks)
        self.classification = _names("LogVariances(classification)", classification)
        for task in self.classification:
            if task not in self.tasks:
                raise ValueError(f"LogVariances(classification) names {task!r}, but the tasks are {list(self.tasks)}")
        # A list and not a ParameterDict: a task may be called "left.eye", which torch refuses as a parameter's name.
        self.values = nn.ParameterList([nn.Parameter(torch.zeros(())) for _ in self.tasks])

    def forward(self, losses: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
        """Return the weighted losses; one that is None stays None."""
        weighted: dict[str, Tensor | None] = {}
        for task, loss in losses.items():
            if task not in self.tasks:
                raise ValueError(f"losses names the task {task!r}, but the tasks are {list(self.tasks)}")
            value = self.values[self.tasks.index(task)]
            scale = _factor(task, self.classification) * torch.exp(-value)
            weighted[task] = None if loss is None else scale * loss + value / 2
        return weighted


def _factor(task: str, classification: tuple[str, ...]) -> float:
    return 1.0 if task in classification else 0.5


def _names(option: str, names: Sequence[str]) -> tuple[str, ...]:
    if isinstance(names, str) or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise ValueError(f"{option}={names!r}: pass different task names, as a list of strings")
    return tuple(names)
