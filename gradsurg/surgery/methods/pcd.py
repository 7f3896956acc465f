"""PCD: follow the primary task as closely as every other task's share of progress allows."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite, sqrt
from operator import mul

from torch import Tensor

from gradsurg.solvers.problem import Problem, State
from gradsurg.solvers.simplex import program, times
from gradsurg.solvers.tolerances import ROUNDING_EXACT, STATIONARY
from gradsurg.surgery.base import Surgery, check
from gradsurg.surgery.blockwise import Block, Memory, Vector, each_block

__all__ = ["PCD"]


@dataclass(frozen=True)
class PCD(Surgery):
    """u ∝ argmin_d ‖d − a_p‖² subject to ⟨d, a_j⟩ ≥ τ_j ‖a_j‖² for every other task j; ‖u‖ = ‖g_p‖.

    a_i = g_i / √v̂_i, with v̂_i the bias-corrected moving average of ‖g_i‖² (kept by task name), and τ_j = τ r_j / r_p.
    The program is the nonnegative one with right-hand side ⟨a_p, a_j⟩ − τ_j ‖a_j‖², solved exactly.

    When it fails: the primary is followed, not protected, so the others' share may turn u against it (opposite
    gradients turn it round altogether). Shares that cannot all be met are dropped, and u = g_p. A zero primary
    gradient makes u = 0. For a primary that is never hurt, use `primary=` and `auxiliary="help"` with any surgery.

    Args:
        primary: Name of the primary task (index of the row as a string in functional use); None is the first.
        tau: τ in [0, 1], the share of normalised progress that every other task gets.
        beta: Decay of the moving average, in [0, 1).
        eps: Added to v̂; the reference has 1e-8, which only matters for gradients that small.

    Raises:
        ValueError: `primary` is not among the tasks of the step.

    Source: "Not all objectives are born equal: priority-constrained descent" (TMLR 2026, arXiv 2606.29521).

    Example:
        >>> import torch, gradsurg
        >>> J = torch.tensor([[1.0, 0.0], [-1.0, 1.0]])
        >>> pcd = gradsurg.surgery.PCD(tau=0.0)
        >>> gradsurg.combine(J, surgery=pcd).tolist()      # ‖u‖ = ‖g_p‖, u ⊥ g_1
        [0.7071067690849304, 0.7071067690849304]
    """

    primary: str | None = None
    tau: float = 0.02
    beta: float = 0.999
    eps: float = 0.0
    name, paper = "pcd", "PCD 2026"
    promise = "a share τ of its own progress for every task but the primary, if all can have it"

    def __post_init__(self) -> None:
        check("tau", self.tau, 0 <= self.tau <= 1, "lie in [0, 1]")
        check("beta", self.beta, 0 <= self.beta < 1, "lie in [0, 1)")
        check("eps", self.eps, self.eps >= 0 and isfinite(self.eps), "be finite and not negative")

    def weights(self, problem: Problem, state: State) -> tuple[Tensor, State]:  # noqa: D102
        primary = problem.tasks[0] if self.primary is None else self.primary
        if primary not in problem.tasks:
            raise ValueError(f"primary={primary!r} is not a task of this step: those are {list(problem.tasks)}")
        return each_block(problem, state, lambda block: self._solve(primary, block))

    def _solve(self, primary: str, block: Block) -> tuple[Vector, Memory]:
        m, G = len(block.tasks), block.gramian
        memory = {name: dict(entry) for name, entry in block.memory.items()}
        scales = []
        for i, name in enumerate(block.tasks):
            old = memory.get(name, {"square": 0.0, "count": 0})
            square, count = self.beta * old["square"] + (1 - self.beta) * G[i][i], old["count"] + 1
            memory[name] = {"square": square, "count": count}
            scales.append(1 / sqrt(square / (1 - self.beta**count) + self.eps))
        if primary not in block.tasks:
            return [0.0] * m, memory
        p = block.tasks.index(primary)
        # The Gramian of the a_i, so that a share of ‖a_j‖² asks the same of loud and quiet tasks.
        A = [[x * s * t for x, t in zip(row, scales, strict=True)] for row, s in zip(G, scales, strict=True)]
        shares = [self.tau * r / block.preferences[p] for r in block.preferences]
        b = [A[p][j] - shares[j] * A[j][j] for j in range(m)]
        w = program(A, b, [j != p for j in range(m)])
        left = [x + y for x, y in zip(b, times(A, w), strict=True)]
        length = [sqrt(row[i]) for i, row in enumerate(A)]
        size = max(length[p], *(x * n for x, n in zip(shares, length, strict=True)))
        # A violation means that the program has no solution: not all tasks can have their share.
        if any(left[j] < -1e-7 * length[j] * size for j in range(m) if j != p):
            w = [0.0] * m
        w[p] = 1.0
        square = sum(map(mul, w, times(A, w)))
        if square <= STATIONARY * ROUNDING_EXACT * sum(map(mul, w, length)) ** 2:
            return [0.0] * m, memory
        return [x * s * sqrt(G[p][p] / square) for x, s in zip(w, scales, strict=True)], memory
