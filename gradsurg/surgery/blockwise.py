"""One Gramian at a time in Python floats, without its zero rows: for surgeries that loop over tasks.

A torch call takes 2 µs whatever its size, and a loop over pairs of tasks would make hundreds of them.
"""

from __future__ import annotations

from abc import abstractmethod
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite, nan
from typing import Any

import torch
from torch import Tensor

from gradsurg.solvers.active_set import Matrix, Vector
from gradsurg.solvers.problem import Problem, State
from gradsurg.surgery.base import Surgery

__all__ = ["UNITS", "Block", "BlockwiseSurgery", "Matrix", "Memory", "Vector", "each_block", "resumed"]

# The unit of the gradients, for a method whose answer does not scale with them by itself: their root mean square norm,
# or 1 as in the published equation.
UNITS = {name: name for name in ("relative", "absolute")}

Memory = dict[str, Any]


@dataclass(frozen=True)
class Block:
    """One partition of the parameters, and the m' tasks whose gradient is not zero there.

    `rows` are their places among all the tasks; `memory` is what the last step returned for this partition, {} at
    first, and must not be modified.
    """

    gramian: Matrix
    preferences: Vector
    tasks: tuple[str, ...]
    rows: list[int]
    memory: Memory

    @property
    def shares(self) -> Vector:
        """Return r_i / Σ r_j."""
        total = sum(self.preferences)
        return [r / total for r in self.preferences]

    def unit(self, units: str) -> float:
        """Return the square of one of UNITS: mean of ‖g_i‖², or 1."""
        return sum(row[i] for i, row in enumerate(self.gramian)) / len(self.rows) if units == "relative" else 1.0

    def scaled(self, unit: float) -> Matrix:
        """Return the Gramian divided by `unit`."""
        return [[x / unit for x in row] for row in self.gramian]


class BlockwiseSurgery(Surgery):
    """A surgery that is a function of one block, without random numbers."""

    @abstractmethod
    def solve(self, block: Block) -> tuple[Vector, Memory]:
        """Return the weights of the block's tasks, and what to remember for its next step."""

    def weights(self, problem: Problem, state: State) -> tuple[Tensor, State]:  # noqa: D102
        return each_block(problem, state, self.solve)


def each_block(
    problem: Problem, state: State, solve: Callable[[Block], tuple[Vector, Memory]]
) -> tuple[Tensor, dict[str, Any]]:
    """Return the weights of every block, and the state that holds what every block wants to remember.

    A zero row gets weight 0. A block without a gradient, or one that is not finite, keeps its memory. If the number of
    blocks has changed, their memories fit no longer, and all blocks start afresh.
    """
    G = problem.gramian.detach()
    m = G.shape[-1]
    blocks: list[Matrix] = [G.tolist()] if G.ndim == 2 else G.reshape(-1, m, m).tolist()
    preferences: Vector = problem.preferences.tolist()
    old = state.get("blocks", [])
    memories: list[Memory] = old if len(old) == len(blocks) else [{} for _ in blocks]
    answers: Matrix = []
    new: list[Memory] = []
    for gramian, memory in zip(blocks, memories, strict=True):
        weights = [0.0] * m
        if not isfinite(sum(map(sum, gramian))):
            weights = [nan] * m
        elif rows := [i for i in range(m) if gramian[i][i] > 0]:
            # Published methods divide by the length of a row.
            if len(rows) < m:
                gramian = [[gramian[i][j] for j in rows] for i in rows]
            tasks = tuple(problem.tasks[i] for i in rows)
            found, memory = solve(Block(gramian, [preferences[i] for i in rows], tasks, rows, memory))
            for i, w in zip(rows, found, strict=True):
                weights[i] = w
        answers.append(weights)
        new.append(memory)
    if G.ndim == 2 and G.is_cpu:
        # 1.3 µs; torch.tensor(list) takes 4 to 9.
        result = torch.frombuffer(array("d", answers[0]), dtype=torch.float64)
    else:
        result = torch.tensor(answers, dtype=torch.float64).reshape(G.shape[:-1]).to(G.device)
    return result, {"blocks": new} if any(new) else {}


def resumed(block: Block) -> Vector:
    """Return the weights of the last step, made to add up to 1; a task that was absent then has their mean.

    At first they are r_i / Σ r_j.
    """
    known = [block.memory[name] for name in block.tasks if name in block.memory]
    if not known:
        return block.shares
    # A mean, and not 1: weights of the others may have shrunk by orders of magnitude since they began.
    typical = sum(known) / len(known)
    found = [block.memory.get(name, typical) for name in block.tasks]
    total = sum(found)
    return [x / total for x in found] if total > 0 else block.shares
