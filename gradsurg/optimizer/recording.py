"""What a step found and did, as a Report: for surgery, for a step that needs none, and for one with earlier weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gradsurg.optimizer.inputs import StepInputs
from gradsurg.optimizer.report import DeferredReport, Report
from gradsurg.solvers.problem import Problem
from gradsurg.surgery.pipeline import Direction

__all__ = ["REUSED", "block_names", "later", "of_reused_weights", "report_of", "unmeasured"]

# The level of a report whose step used the weights of an earlier one.
REUSED = "reused weights"


def block_names(inputs: StepInputs, partitions: list[list[Tensor]]) -> tuple[str, ...]:
    """Return the name of each partition in the report, where it is called a block."""
    granularity = inputs.options.granularity
    if granularity == "model":
        return ("model",)
    if granularity == "tensor":
        return tuple(inputs.names.get(id(p), "parameter") for (p,) in partitions)
    group = {id(p): f"group {k}" for k, group in enumerate(inputs.groups) for p in group}
    return tuple(group[id(partition[0])] for partition in partitions)


def later(
    inputs: StepInputs,
    partitions: list[list[Tensor]],
    problem: Problem,
    direction: Direction,
    *,
    path: str = "torch",
    fetch: Callable[[Problem, Direction], tuple[Problem, Direction]] | None = None,
) -> DeferredReport:
    """Return a report that is made when it is read: few are, and ten operations on m x m numbers take 0.1 ms.

    It keeps neither rows nor parameters alive, nor a state, which may be as large. `fetch` brings the numbers from a
    device to the host.
    """
    # Names and losses are taken now: they are of this step, and `inputs` is gone by the time of reading.
    told = inputs.step, dict(inputs.losses), inputs.skipped, block_names(inputs, partitions)
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
    """Return the report of a surgery; the first three arguments are those of StepInputs."""
    G, tasks = problem.gramian, problem.tasks
    # One bad number in a row makes its diagonal entry NaN or infinite.
    finite = torch.isfinite(G.diagonal(dim1=-2, dim2=-1)).all(0).tolist()
    return _report(
        step,
        losses,
        tasks,
        G,
        direction.scales,
        direction.weights,
        stationary=bool(direction.stationary.all()),
        margin_kept=direction.margin_kept,
        nonfinite=skipped + tuple(name for name, ok in zip(tasks, finite, strict=True) if not ok),
        preferences=problem.preferences,
        gramians=G,
        blocks=blocks,
    )


def unmeasured(inputs: StepInputs) -> Report:
    """Return the report of a step in which no two tasks share a parameter: there is nothing to compare."""
    # Every gradient goes to its own parameters as it is, which is a weight of 1.
    ones = torch.ones(1, len(inputs.rows), dtype=torch.float64)
    unknown = torch.diag_embed(ones * float("nan"))
    return _report(inputs.step, inputs.losses, tuple(inputs.rows), unknown, ones, ones, nonfinite=inputs.skipped)


def of_reused_weights(step: int, losses: Mapping[str, Tensor], weights: Mapping[str, float]) -> Report:
    """Return the report of a step without surgery, of which only the weights are known."""
    given = torch.tensor([[weights[name] for name in losses]], dtype=torch.float64)
    unknown = torch.full_like(given, float("nan"))
    G = unknown.unsqueeze(-1).expand(1, len(losses), len(losses))
    return _report(step, losses, tuple(losses), G, unknown, given, level=REUSED, fresh=())


def _report(
    step: int, losses: Mapping[str, Tensor], tasks: tuple[str, ...], G: Tensor, scales: Tensor, w: Tensor, **more: Any
) -> Report:
    """Return a report, with what follows from G and w: ⟨u, g_i⟩ and ‖u‖² of u = Σ w_i g_i over all partitions."""
    products = (G @ w.unsqueeze(-1)).squeeze(-1)
    return Report(
        step=step,
        tasks=tasks,
        losses=dict(losses),
        gramian=G.sum(0),
        scales=scales,
        weights=w,
        products=products.sum(0),
        square=(products * w).sum(),
        **more,
    )
