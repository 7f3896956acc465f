"""What an operation found and did, as a report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradsurg.optimizer.report import DeferredReport, Report
from gradsurg.solvers.problem import Problem
from gradsurg.surgery.pipeline import Direction

if TYPE_CHECKING:
    from gradsurg.optimizer.inputs import StepInputs

__all__ = ["block_names", "later", "report_of", "unmeasured"]


def block_names(inputs: StepInputs, blocks: list[list[Tensor]]) -> tuple[str, ...]:
    """Return what the report calls each block."""
    granularity = inputs.options.granularity
    if granularity == "model":
        return ("model",)
    if granularity == "tensor":
        return tuple(inputs.names.get(id(p), "parameter") for (p,) in blocks)
    group = {id(p): f"group {k}" for k, group in enumerate(inputs.groups) for p in group}
    return tuple(group[id(block[0])] for block in blocks)


def later(
    inputs: StepInputs,
    blocks: list[list[Tensor]],
    problem: Problem,
    direction: Direction,
    *,
    path: str = "torch",
    fetch: Callable[[Problem, Direction], tuple[Problem, Direction]] | None = None,
) -> DeferredReport:
    """Return a report that is made when it is read: few are, and ten operations on m x m numbers take 0.1 ms.

    What it remembers has neither rows nor parameters in it, nor a state, which may be as large. `fetch` brings the
    numbers to the host, where they are on a device.
    """
    told = inputs.step, dict(inputs.losses), inputs.skipped, block_names(inputs, blocks)
    if any(direction.state.values()):
        direction = replace(direction, state={})

    def make() -> Report:
        there = (problem, direction) if fetch is None else fetch(problem, direction)
        return replace(report_of(*told, *there), path=path)

    return DeferredReport(inputs.step, make)


def report_of(
    step: int,
    losses: Mapping[str, Tensor],
    skipped: tuple[str, ...],
    blocks: tuple[str, ...],
    problem: Problem,
    direction: Direction,
) -> Report:
    """Return what was found and done; the arguments are a Patient's, but for the names of the blocks."""
    G, w = problem.gramian, direction.weights
    products = (G @ w.unsqueeze(-1)).squeeze(-1)
    finite = torch.isfinite(G.diagonal(dim1=-2, dim2=-1)).all(0).tolist()
    return Report(
        step=step,
        tasks=problem.tasks,
        losses=dict(losses),
        gramian=G.sum(0),
        scales=direction.scales,
        weights=w,
        products=products.sum(0),
        square=(products * w).sum(),
        stationary=bool(direction.stationary.all()),
        margin_kept=direction.margin_kept,
        nonfinite=skipped + tuple(name for name, ok in zip(problem.tasks, finite, strict=True) if not ok),
        preferences=problem.preferences,
        gramians=G,
        blocks=blocks,
    )


def unmeasured(inputs: StepInputs) -> Report:
    """Return the report of a step in which no two tasks share a parameter: there is nothing to compare."""
    m = len(inputs.rows)
    unknown = torch.full((m,), float("nan"), dtype=torch.float64)
    return Report(
        step=inputs.step,
        tasks=tuple(inputs.rows),
        losses=dict(inputs.losses),
        gramian=torch.diag_embed(unknown),
        scales=torch.ones(1, m, dtype=torch.float64),
        weights=torch.ones(1, m, dtype=torch.float64),
        products=unknown,
        square=torch.tensor(float("nan"), dtype=torch.float64),
        nonfinite=inputs.skipped,
    )
