"""ExcessMTL: weight goes to the tasks that are furthest from their own optimum."""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, log, sqrt
from typing import Any

from gradsurg.surgery.base import check
from gradsurg.surgery.blockwise import Block, BlockwiseSurgery, Memory, Vector

__all__ = ["ExcessMTL"]


@dataclass(frozen=True)
class ExcessMTL(BlockwiseSurgery):
    """u = Σ w_i g_i, w_i ∝ r_i a_i, Σ w_i = 1, with a_i ← a_i exp(η E_i / E_i0), all kept by task name.

    E_i = g_iᵀ H_i⁻¹ g_i estimates how far the loss is above its minimum, and E_i0 is its mean over the task's first
    `warmup` steps (its first step for 0, 1), in which the weights stay as they are.

    What differs: the paper takes for H_i a diagonal matrix, the root of the accumulated squares of every parameter's
    gradient. Here H_i is one number, the root of the accumulated ‖g_i‖², so that only the Gramian is needed:
    E_i = ‖g_i‖² / √(Σ ‖g_i‖²), the sum over the steps so far. For one parameter the two agree. For many, one number
    does not see that some parameters' gradients are always larger. Noise in a loss still does not raise a task's
    weight for ever, which is the point of the method. In a first step, which is all that weights() and combine() know,
    every task has the same weight.

    When it fails: a converged task's E_i falls only like 1 / √steps, so weights move slowly late in training.

    Args:
        step_size: η > 0 of the exponentiated gradient step.
        warmup: Number of steps over which E_i0 is the mean; the paper has three epochs of them.

    Source: He et al. 2024, "Robust multi-task learning with excess risks", equations 6, 7 and 9, algorithm 1.

    Example:
        >>> import torch, gradsurg
        >>> gradsurg.weights(torch.eye(2), surgery="excess_mtl").tolist()
        [0.5, 0.5]
    """

    step_size: float = 1.0
    warmup: int = 0
    name, paper = "excess_mtl", "He et al. 2024"
    promise = "nothing for one step; noise in a loss does not raise its weight for ever"

    def __post_init__(self) -> None:
        check("step_size", self.step_size, self.step_size > 0, "be positive")
        check("warmup", self.warmup, self.warmup >= 0, "not be negative")

    def solve(self, block: Block) -> tuple[Vector, Memory]:  # noqa: D102
        memory: dict[str, dict[str, Any]] = {name: dict(entry) for name, entry in block.memory.items()}
        pulls = []
        for i, name in enumerate(block.tasks):
            # A new task starts with the mean of the log weights that are there.
            typical = sum(entry["log"] for entry in memory.values()) / len(memory) if memory else 0.0
            fresh = {"squares": 0.0, "baseline": 0.0, "count": 0, "log": typical}
            entry = memory.setdefault(name, fresh)
            square = block.gramian[i][i]
            entry["squares"] += square
            excess = square / sqrt(entry["squares"])
            entry["count"] += 1
            if entry["count"] <= max(self.warmup, 1):
                entry["baseline"] += (excess - entry["baseline"]) / entry["count"]
            else:
                entry["log"] += self.step_size * excess / entry["baseline"]
            pulls.append(entry["log"] + log(block.preferences[i]))
        # Only differences count. The highest is taken off, or the logarithms would grow for ever and lose their digits.
        highest = max(entry["log"] for entry in memory.values())
        for entry in memory.values():
            entry["log"] -= highest
        top = max(pulls)
        weights = [exp(x - top) for x in pulls]
        total = sum(weights)
        return [w / total for w in weights], memory
