"""MoDo: one step of descent on MGDA's weights for every step of training."""

from __future__ import annotations

from dataclasses import dataclass

from gradsurg.errors import choose
from gradsurg.solvers.simplex import onto_simplex, times
from gradsurg.surgery.base import check
from gradsurg.surgery.blockwise import UNITS, Block, BlockwiseSurgery, Memory, Vector, resumed

__all__ = ["MoDo"]


@dataclass(frozen=True)
class MoDo(BlockwiseSurgery):
    """u = Σ λ_i g_i with λ ← Π(λ − γ (G λ + ρ λ)), Π the projection onto the simplex, λ kept by task name.

    It starts at r / Σ r, and on average over steps it follows the minimum-norm weights (ρ = 0) or weights between
    these and equal ones.

    When it fails: the authors draw the two factors of G from independent batches; here there is one batch, and G is
    biased upwards on the diagonal by the noise. λ lags behind, so a sudden conflict stays for about 1 / γ steps.
    Gradients are measured in their root mean square norm; "absolute" takes the step of the paper, whose length then
    depends on their squares.

    Args:
        gamma: γ > 0, the step size.
        rho: ρ ≥ 0, the pull towards equal weights.
        units: "relative", or "absolute" for the equation as it is printed.

    Source: Chen et al. 2023, "Three-way trade-off in multi-objective learning", equation 6 and algorithm 1.

    Example:
        >>> import torch, gradsurg
        >>> gradsurg.weights(torch.eye(2), surgery="modo").tolist()
        [0.5, 0.5]
    """

    gamma: float = 0.1
    rho: float = 0.1
    units: str = "relative"
    name, paper = "modo", "Chen et al. 2023"
    promise = "nothing for one step; MGDA's weights on average over many"

    def __post_init__(self) -> None:
        check("gamma", self.gamma, self.gamma > 0, "be positive")
        check("rho", self.rho, self.rho >= 0, "not be negative")
        choose("units", self.units, UNITS)

    def solve(self, block: Block) -> tuple[Vector, Memory]:  # noqa: D102
        old = resumed(block)
        slope = times(block.scaled(block.unit(self.units)), old)
        new = onto_simplex([x - self.gamma * (g + self.rho * x) for x, g in zip(old, slope, strict=True)])
        return new, {**block.memory, **dict(zip(block.tasks, new, strict=True))}
