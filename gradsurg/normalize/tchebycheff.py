"""Tchebycheff scalarisation: train the loss that is worst off, exactly or smoothly."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradsurg.normalize.base import Normalizer
from gradsurg.normalize.checks import check_number, checked_values, losses_of, per_block
from gradsurg.solvers.problem import Problem, State

__all__ = ["STCH", "Tchebycheff"]


@dataclass(frozen=True)
class Tchebycheff(Normalizer):
    """s_i = 1 if r_i (L_i − z_i) is the largest, else nothing: a subgradient of max_i r_i (L_i − z_i).

    Tasks that tie share. r are the preferences, which surgery multiplies in as well, so that r_i s_i is the published
    weight; z is the ideal point. "Nothing" is 1e-30 and not 0, so that surgery and guarantee still see the directions
    of the tasks that are not trained in this step, and protect them.

    Args:
        ideal: Task name -> z_i, the least value its loss can take; 0 for the tasks not named.

    When it fails: it jumps from task to task, and converges slowly for that reason; the smooth form is `STCH`. With
    mgda, which lets the shortest row lead, it makes no sense. Neither L_i → c·L_i nor L_i → L_i + b leaves the
    direction alone.

    Source: Lin et al. 2024, "Smooth Tchebycheff scalarization for multi-objective optimization", eq. 3.

    Example:
        >>> import torch, gradsurg
        >>> G, losses = torch.eye(2), torch.tensor([1.0, 3.0])
        >>> weights = gradsurg.weights(G, "sum", normalize="tchebycheff", losses=losses)
        >>> weights.round().tolist()
        [0.0, 2.0]
    """

    name, paper = "tchebycheff", "Lin et al. 2024"

    ideal: dict[str, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ideal", checked_values("Tchebycheff(ideal)", self.ideal))

    def scales(self, problem: Problem, state: State) -> tuple[Tensor, State]:  # noqa: D102
        distances = _distances(problem, self.name, self.ideal)
        # max() returns one of the numbers as it is, so == finds it, and all that tie with it.
        return per_block(problem, (distances == distances.max()).double()), state


@dataclass(frozen=True)
class STCH(Normalizer):
    """s = softmax(r (L − z) / μ): the gradient of μ log Σ exp(r_i (L_i − z_i) / μ), without its factor r_i.

    That factor comes from the preferences in surgery. μ → 0 is Tchebycheff, μ → ∞ the plain sum.

    Args:
        mu: μ > 0, in units of the losses.
        ideal: As for `Tchebycheff`.

    When it fails: μ must suit the losses: a difference of 10 μ leaves the smaller one e^-10. Neither L_i → c·L_i nor
    L_i → L_i + b leaves the direction alone.

    Source: Lin et al. 2024, "Smooth Tchebycheff scalarization for multi-objective optimization", eq. 5.

    Example:
        >>> import torch, gradsurg
        >>> losses = torch.tensor([1.0, 1.0 + 0.1 * torch.log(torch.tensor(3.0))])
        >>> weights = gradsurg.weights(torch.eye(2), "sum", normalize="stch", losses=losses)
        >>> [round(w, 3) for w in weights.tolist()]
        [0.5, 1.5]
    """

    name, paper = "stch", "Lin et al. 2024"

    mu: float = 0.1
    ideal: dict[str, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        check_number("STCH(mu)", self.mu, above=0)
        object.__setattr__(self, "ideal", checked_values("STCH(ideal)", self.ideal))

    def scales(self, problem: Problem, state: State) -> tuple[Tensor, State]:  # noqa: D102
        return per_block(problem, torch.softmax(_distances(problem, self.name, self.ideal) / self.mu, 0)), state


def _distances(problem: Problem, method: str, ideal: dict[str, float]) -> Tensor:
    losses = losses_of(problem, method)
    point = torch.tensor([ideal.get(task, 0.0) for task in problem.tasks], dtype=torch.float64)
    return problem.preferences * (losses - point.to(losses.device))
