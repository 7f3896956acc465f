"""What one surgery is given and what it returns, for direction.py and its CUDA twin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradsurg.distributed.layout import ALONE, Layout
from gradsurg.gradients.recycle import Recycler
from gradsurg.gradients.rows import Row, TaskRows
from gradsurg.guarantee.constraint import UpdateConstraint
from gradsurg.optimizer.options import Options
from gradsurg.optimizer.report import DeferredReport, Report
from gradsurg.solvers.problem import Problem, State
from gradsurg.surgery.pipeline import Direction
from gradsurg.surgery.pipeline_small import knows

__all__ = ["Partitions", "StepInputs", "StepResult", "plain_sum", "problem_of"]

# The shared parameters, in the parts that surgery treats apart; granularity= says which, reports call them blocks.
Partitions = list[list[Tensor]]


@dataclass(frozen=True)
class StepInputs:
    """All that one surgery needs to know. It writes to neither the rows nor the state.

    Attributes:
        parameters: What the optimizers train, and in `groups` the same by parameter group.
        losses: Name -> detached loss of the tasks that had one.
        step: Number of optimizer steps done before this one.
        state: What normaliser and surgery remember of earlier steps.
        skipped: Tasks left out of this step because of NaN or infinity.
        names: id of a parameter -> its name in the report, for granularity="tensor".
        recycled: Memory of the last direction.
    """

    rows: TaskRows
    parameters: list[Tensor]
    groups: list[list[Tensor]]
    losses: Mapping[str, Tensor]
    options: Options
    step: int
    state: State
    skipped: tuple[str, ...] = ()
    names: Mapping[int, str] = field(default_factory=dict)
    layout: Layout = ALONE
    recycled: Recycler = field(default_factory=Recycler)


@dataclass(frozen=True)
class StepResult:
    """What one surgery found: the new p.grad of every parameter that a task reached, as far as this rank holds it.

    `constraint` is what the update must respect, None if there is no task to protect. If `state` is None, normaliser
    and surgery remember what they did.
    """

    gradients: Row
    report: Report | DeferredReport
    constraint: UpdateConstraint | None = None
    state: State | None = None


def plain_sum(problem: Problem) -> Direction:
    """Return weights whose sum is as non-finite as its terms: GradScaler sees it and skips the step."""
    weights = problem.preferences.expand(problem.gramian.shape[:-1])
    ones = torch.ones_like(weights)
    return Direction(weights, ones, torch.zeros(ones.shape[:-1], dtype=torch.bool), torch.ones(ones.shape[:-1]), {})


def problem_of(inputs: StepInputs, G: Tensor) -> Problem:
    """Return the m x m problem, on the CPU."""
    tasks, options = tuple(inputs.rows), inputs.options
    losses = generator = None
    more = not knows(options.pipeline.normalizer, options.pipeline.surgery)
    if more:
        # Drawn from (seed, step): the same on every rank, and the same when accumulation redoes the step's surgery.
        generator = torch.Generator().manual_seed((options.seed * 1_000_003 + inputs.step) % 2**63)
    if more and all(name in inputs.losses for name in tasks):
        losses = torch.tensor([float(inputs.losses[name]) for name in tasks], dtype=torch.float64)
    preferences = [options.preferences.get(name, 1.0) for name in tasks]
    return Problem(
        gramian=G,
        preferences=torch.tensor(preferences, dtype=torch.float64),
        tasks=tasks,
        losses=losses,
        generator=generator,
        unwanted=tuple(i for i, r in enumerate(preferences) if r == 0),
    )
