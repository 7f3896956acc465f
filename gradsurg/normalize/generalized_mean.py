"""The generalised mean of the losses in place of their sum."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gradsurg.normalize.base import Normalizer
from gradsurg.normalize.checks import check_number, losses_of, per_block
from gradsurg.solvers.problem import Problem, State

__all__ = ["GeneralizedMean"]


@dataclass(frozen=True)
class GeneralizedMean(Normalizer):
    """s_i ∝ L_i^(γ−1): the gradient of (1/m Σ L_i^γ)^(1/γ).

    γ = 1 is the plain mean, γ → 0 the geometric mean (taken at 0), γ = −1 the harmonic one; γ → ∞ and −∞ train the
    largest and the smallest loss alone. Unchanged by L_i → c·L_i only at γ = 0, by L_i → L_i + b only at γ = 1.

    Args:
        gamma: γ. The default lies half way between the plain mean and the geometric one.

    When it fails: below γ = 0 a task that is nearly solved takes all, so that hard tasks starve. Needs positive
    losses, except at γ = 1, which reads none.

    Source: Su Jianlin 2022, kexue.fm 8870.

    Example:
        >>> import torch, gradsurg
        >>> G, losses = torch.eye(2), torch.tensor([1.0, 3.0])
        >>> harmonic = gradsurg.normalize.GeneralizedMean(gamma=-1)
        >>> gradsurg.weights(G, "sum", normalize=harmonic, losses=losses).tolist()      # 9 : 1
        [1.7999999523162842, 0.20000000298023224]
    """

    name, paper = "generalized_mean", "Su 2022"

    gamma: float = 0.5

    def __post_init__(self) -> None:
        check_number("GeneralizedMean(gamma)", self.gamma)

    def scales(self, problem: Problem, state: State) -> tuple[Tensor, State]:  # noqa: D102
        if self.gamma == 1:
            return per_block(problem, [1.0] * len(problem.tasks)), state
        exponents = (self.gamma - 1) * losses_of(problem, self.name, positive=True).log()
        # Largest exponent 0: a power of a loss can overflow, a ratio of two powers needs not.
        return per_block(problem, (exponents - exponents.max()).exp()), state
