"""Turns the rows into p.grad: Gramian, m x m problem, combination. For engine.py and features=."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gradsurg.distributed.layout import ALONE
from gradsurg.errors import MultiTaskError
from gradsurg.gradients.recycle import Recycler
from gradsurg.gradients.rows import Row
from gradsurg.guarantee.constraint import UpdateConstraint
from gradsurg.linalg.blocks import Rows
from gradsurg.linalg.combine import combine
from gradsurg.linalg.elementwise import elementwise_direction
from gradsurg.linalg.gramian import gramian
from gradsurg.linalg.kernels.dispatch import cannot_run, path_of
from gradsurg.optimizer.inputs import Partitions, StepInputs, StepResult, plain_sum, problem_of
from gradsurg.optimizer.recording import block_names, later, report_of, unmeasured
from gradsurg.solvers.problem import Problem
from gradsurg.solvers.tolerances import CANCELLATION_GRAMIAN, CANCELLATION_SUM, ROUNDING_EXACT, ROUNDING_QUICK
from gradsurg.surgery.base import ElementwiseSurgery
from gradsurg.surgery.pipeline import Direction
from gradsurg.surgery.pipeline_small import all_finite

__all__ = ["compute_direction", "whole_direction_again"]


@torch.no_grad()
def compute_direction(inputs: StepInputs) -> StepResult:
    """Turn rows into gradients: surgery on the parameters that tasks share, the plain gradients of all others."""
    rows = inputs.rows
    if rows.overflowed or rows.dtype == torch.float16:
        _refuse_overflow(inputs)
    # A single task has no other to protect: to the bit what the plain optimizer gets.
    if len(rows) == 1:
        (name,) = rows
        preference = inputs.options.preferences.get(name, 1.0)
        own = Row((p, g if preference == 1 else g * preference) for p, g in rows[name].items())
        own.update(rows.untouched())
        own = own if rows.dtype is None else _widened(own, rows.dtype)
        return StepResult(own, unmeasured(inputs))
    shared, own = rows.split(inputs.parameters, inputs.options.shared)
    own = own if rows.dtype is None else _widened(own, rows.dtype)
    if not shared:
        return StepResult(own, unmeasured(inputs))
    partitions = _partitions(inputs, shared)
    if _path(inputs, shared) == "triton":
        from gradsurg.optimizer.direction_cuda import compute_direction_cuda

        result = compute_direction_cuda(inputs, partitions)
    else:
        result = _compute_on_host(inputs, partitions)
    result.gradients.update(own)
    return result


def _widened(own: Row, dtype: torch.dtype) -> Row:
    """Return gradients in their parameters' dtypes: some were narrowed before another task was left out of the step."""
    return Row((p, g.to(p.dtype) if g.dtype == dtype else g) for p, g in own.items())


def _refuse_overflow(inputs: StepInputs) -> None:
    layout, names = inputs.layout, [name for name in inputs.rows if name in inputs.rows.overflowed]
    if names := layout.on_any_rank(list(inputs.rows), names) if layout.several else names:
        raise MultiTaskError(
            f"row_dtype={inputs.rows.dtype}: a gradient of {', '.join(map(repr, names))} is finite, but does not fit "
            f"into numbers up to {torch.finfo(inputs.rows.dtype or torch.float32).max:.5g}. Parameters and p.grad are "
            "as before. row_dtype=torch.bfloat16 has the range of float32; or make the loss smaller."
        )


def whole_direction_again(inputs: StepInputs) -> Row:
    """Return once more, to the bit, the gradients of a surgery that was done, over all ranks."""
    gradients = compute_direction(replace(inputs, recycled=Recycler())).gradients
    return gradients if inputs.layout is ALONE else inputs.layout.whole(gradients)


def _path(inputs: StepInputs, shared: list[Tensor]) -> str:
    options = inputs.options
    # The usual case on the host, before path_of() looks at every gradient.
    if options.backend != "triton" and shared[0].device.type == "cpu" and "TRITON_INTERPRET" not in os.environ:
        return "torch"
    if isinstance(options.pipeline.surgery, ElementwiseSurgery) or options.pipeline.margin:
        return "torch"
    if inputs.layout is not ALONE:
        if options.backend == "triton":
            raise cannot_run("rows are reduced over several ranks, which the kernels do not do")
        return "torch"
    return path_of(options.backend, inputs.rows.table(shared), shared)


def _compute_on_host(inputs: StepInputs, partitions: Partitions) -> StepResult:
    tables = [inputs.rows.table(partition) for partition in partitions]
    problem = problem_of(inputs, _gramians(inputs, partitions, tables))
    finite = all_finite(problem.gramian)
    if finite and isinstance(inputs.options.pipeline.surgery, ElementwiseSurgery):
        return _elementwise(inputs, partitions, tables, problem)
    if finite:
        problem, direction = _direction(inputs, problem, partitions, tables)
    else:
        direction = plain_sum(problem)
    gradients = Row()
    for partition, table, weights, cancelled in zip(
        partitions, tables, direction.weights.tolist(), direction.cancellation.tolist(), strict=True
    ):
        u = combine(table, weights, partition, exact=cancelled > CANCELLATION_SUM, into=inputs.recycled.take(partition))
        gradients.update(Row(zip(partition, u, strict=True)))
    # Over several ranks these are slices, which never stand in p.grad.
    if not inputs.layout.several:
        inputs.recycled.keep(gradients.items())
    report = later(inputs, partitions, problem, direction)
    if not finite:
        return StepResult(gradients, report)
    protected, margin = inputs.options.pipeline.protected(problem), inputs.options.pipeline.margin
    constraint = UpdateConstraint(inputs.rows, partitions, problem.gramian, protected, inputs.layout, margin, tables)
    return StepResult(gradients, report, constraint, direction.state)


def _gramians(inputs: StepInputs, partitions: Partitions, tables: Sequence[Rows], *, exact: bool = False) -> Tensor:
    """Return one Gramian per partition, over all ranks, in one message."""
    if inputs.layout is ALONE:
        return torch.stack([gramian(rows, exact=exact) for rows in tables])
    measures = map(inputs.layout.measure, partitions)
    here = [gramian(measure.counted(rows), exact=exact) for measure, rows in zip(measures, tables, strict=True)]
    return inputs.layout.total(torch.stack(here))


def _direction(
    inputs: StepInputs, problem: Problem, partitions: Partitions, tables: Sequence[Rows]
) -> tuple[Problem, Direction]:
    """Solve on the quick Gramian; if its rounding could break the promise, solve again on the exact one."""
    pipeline = inputs.options.pipeline
    direction = pipeline.direction(problem, inputs.state, rounding=ROUNDING_QUICK)
    delicate = pipeline.conflict_free and any(
        stationary or not cancelled <= CANCELLATION_GRAMIAN
        for stationary, cancelled in zip(direction.stationary.tolist(), direction.cancellation.tolist(), strict=True)
    )
    if delicate:
        problem = problem_of(inputs, _gramians(inputs, partitions, tables, exact=True))
        direction = pipeline.direction(problem, inputs.state, rounding=ROUNDING_EXACT)
    return problem, direction


def _elementwise(inputs: StepInputs, partitions: Partitions, tables: Sequence[Rows], problem: Problem) -> StepResult:
    """Do the surgery number by number. There are no weights, so the report has NaN for them."""
    pipeline = inputs.options.pipeline
    scales, state = pipeline.scales(problem, inputs.state)
    surgery, generator = pipeline.surgery, problem.generator
    assert isinstance(surgery, ElementwiseSurgery)
    assert generator is not None
    allowed, protect = pipeline.protected(problem), pipeline.guarantee == "gradient" or bool(pipeline.margin)
    least: Sequence[Tensor | None] = [None] * len(partitions)
    kept = None
    if pipeline.margin:
        scaled = replace(problem, gramian=problem.gramian * scales.unsqueeze(-1) * scales.unsqueeze(-2))
        asked, kept = pipeline.margins(scaled, allowed, ROUNDING_QUICK)
        least = list(torch.where(scales > 0, asked / scales, 0))
    layout = inputs.layout
    blends = [
        elementwise_direction(
            surgery.combine,
            table,
            layout.held(partition, partition),
            each,
            problem.preferences,
            layout.generators(partition, generator),
            guarantee=protect,
            allowed=allowed,
            measure=layout.measure(partition),
            least=at_least,
        )
        for table, partition, each, at_least in zip(tables, partitions, scales.tolist(), least, strict=True)
    ]
    gradients = Row()
    for partition, each in zip(partitions, blends, strict=True):
        gradients.update(Row(zip(partition, each.direction, strict=True)))
    unknown = torch.full_like(scales, float("nan"))
    stationary = torch.tensor([each.stationary for each in blends])
    direction = Direction(unknown, scales, stationary, unknown[..., 0], state, kept)
    report = replace(
        report_of(inputs.step, inputs.losses, inputs.skipped, block_names(inputs, partitions), problem, direction),
        products=torch.stack([each.products for each in blends]).sum(0),
        square=torch.stack([each.square for each in blends]).sum(),
    )
    constraint = UpdateConstraint(inputs.rows, partitions, problem.gramian, allowed, inputs.layout, pipeline.margin)
    return StepResult(gradients, report, constraint, state)


def _partitions(inputs: StepInputs, shared: list[Tensor]) -> Partitions:
    if inputs.options.granularity == "model":
        return [shared]
    if inputs.options.granularity == "tensor":
        return [[p] for p in shared]
    members = set(map(id, shared))
    return [partition for partition in ([p for p in group if id(p) in members] for group in inputs.groups) if partition]
