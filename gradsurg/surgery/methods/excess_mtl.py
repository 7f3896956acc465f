"""ExcessMTL: weight goes to the tasks that are furthest from their own optimum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp, isfinite, log, sqrt
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Generator, Tensor

from gradsurg.errors import choose
from gradsurg.linalg.blocks import Rows, real_of
from gradsurg.solvers.problem import Problem, State
from gradsurg.surgery.base import Surgery
from gradsurg.surgery.blockwise import Block, Memory, Vector, each_block

if TYPE_CHECKING:
    from gradsurg.optimizer.inputs import StepInputs

__all__ = ["ExcessMTL", "excess_of", "measured"]


CURVATURES = {name: name for name in ("task", "parameter")}


@dataclass(frozen=True)
class ExcessMTL(Surgery):
    """u = Σ w_i g_i, w_i ∝ r_i a_i, Σ w_i = 1, with a_i ← a_i exp(η E_i / E_i0), all kept by task name.

    E_i = g_iᵀ H_i⁻¹ g_i estimates how far the loss is above its minimum, and E_i0 is its mean over the task's first
    `warmup` steps (its first step for 0, 1), in which the weights stay as they are.

    What differs: only the default. The paper takes for H_i a diagonal matrix, the root of the accumulated squares of
    every parameter's gradient, and with curvature="parameter" so does wrap(): E_i = Σ_p g_ip² / √(Σ g_ip²), the inner
    sum over the steps so far. That takes the rows, and m·P numbers more to keep, in the state dict as well. The default
    "task" keeps one number a task, the root of the accumulated ‖g_i‖², so that all of it is a function of the Gramian:
    E_i = ‖g_i‖² / √(Σ ‖g_i‖²). For one parameter the two agree; for many, the latter does not see that some parameters'
    gradients are always larger. Noise in a loss still does not raise a task's weight for ever, which is the point of
    the method. In a first step, which is all that weights() and combine() know, both give every task the same.

    When it fails: a converged task's E_i falls only like 1 / √steps, so weights move slowly late in training.

    Args:
        step_size: η > 0 of the exponentiated gradient step.
        warmup: Number of steps over which E_i0 is the mean; the paper has three epochs of them.
        curvature: "task" or "parameter": what H_i has one number for. "parameter" needs whole rows in one process, and
            parameters that stay the same: not over several ranks, not with features=.

    Source: He et al. 2024, "Robust multi-task learning with excess risks", equations 6, 7 and 9, algorithm 1.

    Example:
        >>> import torch, gradsurg
        >>> gradsurg.weights(torch.eye(2), surgery="excess_mtl").tolist()
        [0.5, 0.5]
    """

    step_size: float = 1.0
    warmup: int = 0
    curvature: str = "task"
    name: ClassVar[str] = "excess_mtl"
    paper: ClassVar[str] = "He et al. 2024"
    promise: ClassVar[str] = "nothing for one step; noise in a loss does not raise its weight for ever"

    def __post_init__(self) -> None:
        if not self.step_size > 0:
            raise ValueError(f"step_size={self.step_size!r}: must be positive")
        if self.warmup < 0:
            raise ValueError(f"warmup={self.warmup!r}: must not be negative")
        choose("curvature", self.curvature, CURVATURES)

    @property
    def measures_excess(self) -> bool:  # noqa: D102
        return self.curvature == "parameter"

    def weights(self, problem: Problem, state: State) -> tuple[Tensor, State]:  # noqa: D102
        return each_block(problem, state, self._solve)

    def shortcut(self, gramian: Tensor, generator: Generator | None) -> Tensor | None:  # noqa: D102
        # The first step sets every task's baseline and moves no weight.
        m, squares = gramian.shape[-1], gramian.diagonal().tolist()
        return gramian.new_full((m,), 1 / m) if isfinite(sum(squares)) and min(squares) > 0 else None

    def _solve(self, block: Block) -> tuple[Vector, Memory]:
        memory: dict[str, dict[str, Any]] = {name: dict(entry) for name, entry in block.memory.items()}
        pulls = []
        for i, name in enumerate(block.tasks):
            fresh = {"squares": 0.0, "baseline": 0.0, "count": 0, "log": _typical(memory)}
            entry = memory.setdefault(name, fresh)
            if block.excess is None:
                square = block.gramian[i][i]
                entry["squares"] += square
                excess = square / sqrt(entry["squares"])
            else:
                excess = block.excess[i]
            entry["count"] += 1
            if entry["count"] <= max(self.warmup, 1):
                entry["baseline"] += (excess - entry["baseline"]) / entry["count"]
            else:
                entry["log"] += self.step_size * excess / entry["baseline"]
            pulls.append(entry["log"] + log(block.preferences[i]))
        # Only differences count: without this the logarithms would grow for ever and lose their digits.
        highest = max(entry["log"] for entry in memory.values())
        for entry in memory.values():
            entry["log"] -= highest
        top = max(pulls)
        weights = [exp(x - top) for x in pulls]
        total = sum(weights)
        return [w / total for w in weights], memory


def _typical(memory: dict[str, dict[str, Any]]) -> float:
    """Return the log weight that a task starts with: the mean of those that are there."""
    return sum(entry["log"] for entry in memory.values()) / len(memory) if memory else 0.0


Roots = Mapping[int, Tensor]  # position of a parameter -> root of the accumulated squares of one task's gradient


def measured(
    inputs: StepInputs, problem: Problem, blocks: list[list[Tensor]], tables: Sequence[Rows]
) -> tuple[Problem, dict[str, Any]]:
    """Put into the problem what the surgery asks of the rows; also what the state has to keep of it, {} for nothing."""
    pipeline = inputs.options.pipeline
    if not pipeline.surgery.measures_excess:
        return problem, {}
    place = {id(p): k for k, p in enumerate(inputs.parameters)}
    roots, found = inputs.state.get("curvature", {}), []
    for block, table, scales in zip(blocks, tables, pipeline.scales(problem, inputs.state)[0].tolist(), strict=True):
        excess, roots = excess_of(table, scales, problem.tasks, [place[id(p)] for p in block], roots)
        found.append(excess)
    return replace(problem, excess=torch.tensor(found, dtype=torch.float64)), {"curvature": roots}


@torch.no_grad()
def excess_of(
    rows: Rows, scales: Sequence[float], tasks: Sequence[str], positions: Sequence[int], state: State
) -> tuple[list[float], dict[str, dict[int, Tensor]]]:
    """Return E_i = Σ_p g_ip² / h_ip, with h_ip = √(Σ g_ip²) over this step and those before, and the next state.

    Args:
        rows: m lists of one gradient, or None, per parameter; each is multiplied by its scale first.
        scales: One number a row.
        tasks: The names of the rows.
        positions: What the state calls each parameter.
        state: Task name -> position -> h; of the dtype of the gradients, float32 at least. Left as it is, as are the
            tensors in it: a state dict in somebody's hand keeps its numbers.

    Returns:
        The m sums, formed in float64, and the state with the roots of these rows in place of the old ones.
    """
    found, new = [], {name: dict(roots) for name, roots in state.items()}
    for row, scale, name in zip(rows, scales, tasks, strict=True):
        roots = new.setdefault(name, {})
        excess = 0.0
        for g, position in zip(row, positions, strict=True):
            if g is None:
                continue
            scaled = scale * _real(g)
            old = roots.get(position)
            # hypot, and a quotient before the product: squares of gradients of 1e-23 would be 0 in single precision.
            root = scaled.abs() if old is None else torch.hypot(old.to(scaled), scaled)
            roots[position] = root
            excess += float((scaled * (scaled / root).nan_to_num(0.0)).sum(dtype=torch.float64))
        found.append(excess)
    return found, new


def _real(gradient: Tensor) -> Tensor:
    """Return real numbers in one piece, of float32 at least."""
    dense = gradient.detach().to_dense() if gradient.is_sparse else gradient.detach()
    real = real_of(dense)
    return real.to(torch.promote_types(real.dtype, torch.float32))
