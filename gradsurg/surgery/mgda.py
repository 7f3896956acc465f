"""MGDA: the direction whose worst-off task gains the most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gradsurg.problem import Problem, State
from gradsurg.solvers import simplex
from gradsurg.surgery.base import Surgery

__all__ = ["MGDA"]


@dataclass(frozen=True)
class MGDA(Surgery):
    """The minimum-norm point of the convex hull of the gradients: max_u min_i ⟨u, g_i⟩ − ½‖u‖².

    u = Σ α_i g_i with α = argmin_{α ≥ 0, Σα = 1} ‖Σ α_i g_i‖², found exactly. Then ⟨u, g_i⟩ ≥ ‖u‖² for every task.
    With preferences the hull is that of g_i / r_i, so that ⟨u, g_i⟩ ≥ r_i ‖u‖²: a task with twice the preference is
    promised twice the progress. A task whose gradient is zero wants nothing and is left out of the hull (with it, the
    answer would be 0 for everybody).

    When it fails: the shortest gradient dominates the minimum, so it needs normalised rows; the weights add up to 1,
    so steps are about m times shorter than those of a sum.

    Source: Désidéri 2012, "Multiple-gradient descent algorithm"; Sener & Koltun 2018.

    Example:
        >>> import torch, gradsurg
        >>> gradsurg.weights(torch.tensor([[1.0, 0.0], [0.0, 3.0]]), surgery="mgda").tolist()
        [0.75, 0.25]
    """

    name: ClassVar[str] = "mgda"
    paper: ClassVar[str] = "Désidéri 2012"
    promise: ClassVar[str] = "no conflict, and the same progress for every task that limits it"
    conflict_free: ClassVar[bool] = True

    def weights(self, problem: Problem, state: State) -> tuple[Tensor, State]:  # noqa: D102
        inverse = problem.preferences.reciprocal()
        gramian = problem.gramian * inverse[:, None] * inverse
        wants_something = gramian.diagonal(dim1=-2, dim2=-1) > 0
        return simplex(gramian, allowed=wants_something) * inverse, state
