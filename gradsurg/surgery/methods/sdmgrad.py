"""SDMGrad: MGDA, held near a direction that the user prefers."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

from gradsurg.solvers.simplex import onto_simplex, program, times
from gradsurg.surgery.base import check
from gradsurg.surgery.blockwise import Block, BlockwiseSurgery, Matrix, Memory, Vector, resumed

__all__ = ["SDMGrad"]


@dataclass(frozen=True)
class SDMGrad(BlockwiseSurgery):
    """u = Σ (w_i + λ r̃_i) g_i / (1 + λ), w = argmin over the simplex of ½ ‖Σ (w_i + λ r̃_i) g_i‖², r̃ = r / Σ r.

    λ = 0 is MGDA, λ → ∞ the mean. `iterations` steps of projected gradient descent with momentum from the w of the
    last step (kept by task name) approach w, on gradients measured in their mean norm, as the authors' code does;
    0 solves for it exactly.

    When it fails: the authors draw the two factors of G from independent batches, so that the estimate of the gradient
    in w is unbiased; here there is one batch, and G is biased upwards on the diagonal by the noise. With steps of
    `lr` = 10 the iteration may walk along the edge of the simplex for ever: λ > 0 still holds u near the mean.

    Args:
        pull: λ ≥ 0, the strength of the preferred direction.
        iterations: Number of inner steps; 0 for the exact minimum.
        lr: Their step size.
        momentum: Their momentum, in [0, 1).

    Source: Xiao et al. 2023, "Direction-oriented multi-objective learning", equation 4 and algorithm 1.

    Example:
        >>> import torch, gradsurg
        >>> gradsurg.weights(torch.eye(2), surgery="sdmgrad").tolist()
        [0.5, 0.5]
    """

    pull: float = 0.3
    iterations: int = 20
    lr: float = 10.0
    momentum: float = 0.5
    name, paper = "sdmgrad", "Xiao et al. 2023"
    promise = "nothing for one step; towards MGDA's direction, held near the mean"

    def __post_init__(self) -> None:
        check("pull", self.pull, self.pull >= 0, "not be negative")
        check("iterations", self.iterations, self.iterations >= 0, "not be negative; 0 solves exactly")
        check("lr", self.lr, self.lr > 0, "be positive")
        check("momentum", self.momentum, 0 <= self.momentum < 1, "lie in [0, 1)")

    def solve(self, block: Block) -> tuple[Vector, Memory]:  # noqa: D102
        preferred = [self.pull * x for x in block.shares]
        if self.iterations == 0:
            w, memory = _exact(block.gramian, preferred), {}
        else:
            w = self._descend(block, preferred)
            memory = {**block.memory, **dict(zip(block.tasks, w, strict=True))}
        return [(x + y) / (1 + self.pull) for x, y in zip(w, preferred, strict=True)], memory

    def _descend(self, block: Block, preferred: Vector) -> Vector:
        mean = sum(sqrt(row[i]) for i, row in enumerate(block.gramian)) / len(block.rows)
        G = block.scaled(mean * mean)
        w, velocity = resumed(block), [0.0] * len(G)
        for _ in range(self.iterations):
            gradient = times(G, [x + y for x, y in zip(w, preferred, strict=True)])
            velocity = [self.momentum * v + g for v, g in zip(velocity, gradient, strict=True)]
            w = onto_simplex([x - self.lr * v for x, v in zip(w, velocity, strict=True)])
        return w


def _exact(G: Matrix, preferred: Vector) -> Vector:
    """Return the minimum: that of the hull of g_i + Σ_j λ r̃_j g_j, because Σ w_i = 1."""
    b = times(G, preferred)
    q = sum(x * y for x, y in zip(preferred, b, strict=True))
    shifted = [[g + x + y + q for g, y in zip(row, b, strict=True)] for row, x in zip(G, b, strict=True)]
    at_origin = [float(row[i] <= 0) for i, row in enumerate(shifted)]
    if any(at_origin):
        return [x / sum(at_origin) for x in at_origin]
    # See gradsurg.solvers.simplex for this program.
    c = min(row[i] for i, row in enumerate(shifted))
    lam = program([[x + c for x in row] for row in shifted], [-c] * len(G))
    return [x / sum(lam) for x in lam]
