"""The CUDA twin of direction.py: launches Gramian, m x m problem and combination, and reads nothing back."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from gradsurg.gradients.rows import Row
from gradsurg.guarantee.constraint import UpdateConstraint, UpdateConstraintCUDA
from gradsurg.guarantee.foreign import is_foreign
from gradsurg.guarantee.movement import catch_up, stream_of
from gradsurg.linalg.blocks import Rows
from gradsurg.linalg.kernels.dispatch import PROGRAM_UP_TO
from gradsurg.linalg.kernels.table import constant
from gradsurg.optimizer.inputs import Partitions, StepInputs, StepResult, plain_sum, problem_of
from gradsurg.optimizer.recording import later
from gradsurg.solvers.problem import Problem, Solvers, State
from gradsurg.solvers.tolerances import ROUNDING_CUDA
from gradsurg.surgery.pipeline import Direction
from gradsurg.surgery.pipeline_small import all_finite

__all__ = ["compute_direction_cuda"]


def compute_direction_cuda(inputs: StepInputs, partitions: Partitions) -> StepResult:
    """Turn the rows of shared parameters into gradients, on the device that they are on.

    Nothing is read back, so nothing waits, unless the method finds its weights on the host (Surgery.waits).
    """
    from gradsurg.linalg.kernels.combine import combine
    from gradsurg.linalg.kernels.gramian import gramian

    pipeline = inputs.options.pipeline
    parameters = [p for partition in partitions for p in partition]
    partition_of = [k for k, partition in enumerate(partitions) for _ in partition]
    table: Rows = inputs.rows.table(parameters)
    G = gramian(table, partitions=partition_of)
    finite = torch.isfinite(G).all()
    state: State | None
    if pipeline.waits(len(table)):
        problem, direction, state = _on_the_host(inputs, G)
        weights = direction.weights.to(G.device)
    else:
        problem = _problem(inputs, G)
        direction = pipeline.direction(problem, inputs.state, ROUNDING_CUDA)
        # As on the host: if a gradient is not finite, neither is the plain sum, and a scaler sees it.
        weights, state = torch.where(finite, direction.weights, problem.preferences), direction.state
    firsts = [next(g for g in column if g is not None) for column in zip(*table, strict=True)]
    gradients = [torch.empty_like(g, dtype=p.dtype) for g, p in zip(firsts, parameters, strict=True)]
    combine(table, weights, gradients, partitions=partition_of)
    return StepResult(
        gradients=Row(zip(parameters, gradients, strict=True)),
        report=later(
            inputs, partitions, problem, direction, path="triton", fetch=partial(_fetched, stream_of(G.device))
        ),
        constraint=_constraint(inputs, partitions, problem, G, finite),
        state=state,
    )


def _constraint(
    inputs: StepInputs, partitions: Partitions, problem: Problem, G: Tensor, finite: Tensor
) -> UpdateConstraint | None:
    """Return what the next update must satisfy; it is enforced on the device, unless it has to be on the host.

    The host's twin knows foreign tensor classes, which only their own operations may read, and more tasks than the
    device's programs do.
    """
    protected, update = inputs.options.pipeline.protected, inputs.options.guarantee == "update"
    if update and (len(inputs.rows) > PROGRAM_UP_TO or any(is_foreign(p) for each in partitions for p in each)):
        return _constraint_on_the_host(inputs, partitions, problem, G)
    return UpdateConstraintCUDA(inputs.rows, partitions, G, protected(replace(problem, gramian=G)), finite=finite)


def _constraint_on_the_host(
    inputs: StepInputs, partitions: Partitions, problem: Problem, G: Tensor
) -> UpdateConstraint | None:
    problem = replace(problem, gramian=G.cpu(), preferences=problem.preferences.cpu())
    if not all_finite(problem.gramian):
        return None
    return UpdateConstraint(inputs.rows, partitions, problem.gramian, inputs.options.pipeline.protected(problem))


def _problem(inputs: StepInputs, G: Tensor) -> Problem:
    """Return the problem on the device; methods that do not wait ask for neither losses nor random numbers."""
    from gradsurg.linalg.kernels import cone

    tasks = tuple(inputs.rows)
    preferences = [inputs.options.preferences.get(name, 1.0) for name in tasks]
    return Problem(
        gramian=G,
        preferences=constant(preferences, G.device),
        tasks=tasks,
        solvers=Solvers(cone.nonnegative, cone.simplex, cone.project_rows),
        unwanted=tuple(i for i, r in enumerate(preferences) if r == 0),
    )


def _fetched(stream: torch.cuda.Stream | None, problem: Problem, direction: Direction) -> tuple[Problem, Direction]:
    """Return both on the host, after waiting for the stream that made them."""
    catch_up(stream)
    problem = replace(problem, gramian=problem.gramian.cpu(), preferences=problem.preferences.cpu())
    if not all_finite(problem.gramian):
        return problem, plain_sum(problem)
    return problem, replace(
        direction,
        weights=direction.weights.cpu(),
        scales=direction.scales.cpu(),
        stationary=direction.stationary.cpu(),
        margin_kept=None if direction.margin_kept is None else direction.margin_kept.cpu(),
    )


def _on_the_host(inputs: StepInputs, G: Tensor) -> tuple[Problem, Direction, State | None]:
    """Wait for the Gramian and find the weights there, for methods that read numbers."""
    problem = problem_of(inputs, G.cpu())
    if not all_finite(problem.gramian):
        return problem, plain_sum(problem), None
    direction = inputs.options.pipeline.direction(problem, inputs.state, ROUNDING_CUDA)
    return problem, direction, direction.state
