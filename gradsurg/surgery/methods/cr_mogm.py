"""CR-MOGM: another surgery's weights, smoothed over steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradsurg.solvers.problem import Problem, State
from gradsurg.surgery.base import Surgery, check
from gradsurg.surgery.methods.mgda import MGDA

__all__ = ["CRMOGM"]


@dataclass(frozen=True)
class CRMOGM(Surgery):
    """u = Σ λ_i g_i with λ ← α λ + (1 − α) λ̂, where λ̂ are the weights of the inner surgery on this step.

    λ is kept by task name, per block; a task seen for the first time takes its λ̂ as it is. Smoothing takes the noise
    of the batch out of the weights, so that weights and gradients are less correlated: the property behind the
    convergence proof.

    When it fails: λ lags behind by about 1 / (1 − α) steps, and so does whatever the inner surgery promises.

    Args:
        inner: A Surgery of Gramians.
        alpha: α in [0, 1]; the paper lets it grow towards 1 as the learning rate falls.

    Source: Zhou et al. 2022, "On the convergence of stochastic multi-objective gradient manipulation and beyond",
    algorithm 1.

    Example:
        >>> import torch, gradsurg
        >>> gradsurg.weights(torch.eye(2), surgery="cr_mogm").tolist()
        [0.5, 0.5]
    """

    inner: Surgery = field(default_factory=MGDA)
    alpha: float = 0.9
    name, paper = "cr_mogm", "Zhou et al. 2022"
    promise = "what the inner surgery promises, on average over steps"

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Surgery):
            raise ValueError(f"inner={self.inner!r}: pass a Surgery, such as gradsurg.surgery.CAGrad()")
        check("alpha", self.alpha, 0 <= self.alpha <= 1, "lie in [0, 1]")

    @property
    def label(self) -> str:  # noqa: D102
        return f"{super().label} of {self.inner.label}"

    def weights(self, problem: Problem, state: State) -> tuple[Tensor, State]:  # noqa: D102
        new, inner = self.inner.weights(problem, state.get("inner", {}))
        old: dict[str, Tensor] = state.get("weights", {})
        smooth = []
        for name, fresh in zip(problem.tasks, new.unbind(-1), strict=True):
            last = old.get(name)
            # If the number of blocks has changed, start afresh.
            if last is not None and last.shape == fresh.shape:
                fresh = self.alpha * last.to(fresh.device) + (1 - self.alpha) * fresh
            smooth.append(fresh)
        kept: dict[str, Any] = {**old, **dict(zip(problem.tasks, smooth, strict=True))}
        return torch.stack(smooth, dim=-1), {"inner": inner, "weights": kept}
