"""What one surgery needs to know, and what comes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradsurg.distributed.layout import ALONE, Layout
from gradsurg.gradients.recycle import Spare
from gradsurg.gradients.rows import Row, TaskRows
from gradsurg.guarantee.constraint import Judgement
from gradsurg.optimizer.options import Settings
from gradsurg.optimizer.report import LaterReport, Report
from gradsurg.solvers.problem import Problem, State
from gradsurg.surgery.pipeline import Direction
from gradsurg.surgery.pipeline_small import knows

__all__ = ["Outcome", "Patient", "plain_sum", "problem_of"]


@dataclass(frozen=True)
class Patient:
    """All that an operation needs to know.

    Attributes:
        rows: The task gradients; left as they are.
        parameters: What the optimizers train.
        groups: The same, by parameter group.
        losses: Name -> detached loss, of the tasks that had one.
        settings: The options of wrap().
        step: Number of optimizer steps done before this one.
        state: What normaliser and surgery remember of earlier steps.
        skipped: Tasks left out of this step because of NaN or infinity.
        names: id of a parameter -> what the report calls it, for granularity="tensor".
        layout: What of rows and parameters this rank holds.
        spare: Memory of the last direction.
    """

    rows: TaskRows
    parameters: list[Tensor]
    groups: list[list[Tensor]]
    losses: Mapping[str, Tensor]
    settings: Settings
    step: int
    state: State
    skipped: tuple[str, ...] = ()
    names: Mapping[int, str] = field(default_factory=dict)
    layout: Layout = ALONE
    spare: Spare = field(default_factory=Spare)


@dataclass(frozen=True)
class Outcome:
    """What came of it.

    Attributes:
        gradients: The new p.grad of every parameter that a task reached; of it what this rank holds.
        report: What was found and done.
        judgement: What the update must respect; None where there is nobody to protect.
        state: The next state of normaliser and surgery; None leaves it as it is.
    """

    gradients: Row
    report: Report | LaterReport
    judgement: Judgement | None = None
    state: State | None = None


def plain_sum(problem: Problem) -> Direction:
    """Return weights whose sum is as non-finite as its terms: GradScaler sees it and skips the step."""
    weights = problem.preferences.expand(problem.gramian.shape[:-1])
    per_block = weights.shape[:-1]
    return Direction(
        weights, torch.ones_like(weights), torch.zeros(per_block, dtype=torch.bool), torch.ones(per_block), {}
    )


def problem_of(patient: Patient, G: Tensor) -> Problem:
    """Return what the m x m part is asked, on the CPU."""
    tasks, settings = tuple(patient.rows), patient.settings
    losses = generator = None
    more = not knows(settings.pipeline.normalizer, settings.pipeline.surgery)
    if more:
        # Drawn from (seed, step): the same on every rank, and the same when accumulation redoes the step's surgery.
        generator = torch.Generator().manual_seed((settings.seed * 1_000_003 + patient.step) % 2**63)
    if more and all(name in patient.losses for name in tasks):
        losses = torch.tensor([float(patient.losses[name]) for name in tasks], dtype=torch.float64)
    return Problem(
        gramian=G,
        preferences=torch.tensor([settings.preferences.get(name, 1.0) for name in tasks], dtype=torch.float64),
        tasks=tasks,
        losses=losses,
        generator=generator,
    )
