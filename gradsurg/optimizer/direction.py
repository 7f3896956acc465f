"""The operation itself: rows in, p.grad out, with the m x m problem solved in between."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gradsurg.distributed.layout import ALONE
from gradsurg.gradients.rows import Row, added
from gradsurg.guarantee.constraint import Judgement
from gradsurg.linalg.blocks import Rows
from gradsurg.linalg.combine import combine
from gradsurg.linalg.elementwise import blend
from gradsurg.linalg.gramian import gramian
from gradsurg.linalg.kernels.dispatch import is_interpreted, path_of
from gradsurg.optimizer.inputs import Outcome, Patient, plain_sum, problem_of
from gradsurg.optimizer.recording import block_names, later, report_of, unmeasured
from gradsurg.solvers.problem import Problem
from gradsurg.solvers.tolerances import CANCELLATION_GRAMIAN, CANCELLATION_SUM, ROUNDING_EXACT, ROUNDING_QUICK
from gradsurg.surgery.base import ElementwiseSurgery
from gradsurg.surgery.methods.excess_mtl import measured
from gradsurg.surgery.pipeline import Direction, scales_of
from gradsurg.surgery.pipeline_small import all_finite

__all__ = ["operate"]


@torch.no_grad()
def operate(patient: Patient) -> Outcome:
    """Turn rows into gradients: surgery on what tasks share, everybody's own gradient elsewhere."""
    rows = patient.rows
    shared = _shared(patient)
    members = set(map(id, shared))
    own = Row(
        (p, functools.reduce(added, gradients))
        for p in patient.parameters
        if id(p) not in members and (gradients := rows.of(p))
    )
    if rows.blank is not None:
        own.update(Row((p, zeros) for p, zeros in rows.blank.items() if not rows.of(p)))
    if not shared:
        return Outcome(own, unmeasured(patient))
    if len(rows) == 1:  # nobody to protect it from: bit for bit the plain optimizer
        (name,) = rows
        preference = patient.settings.preferences.get(name, 1.0)
        own.update(Row((p, g if preference == 1 else g * preference) for p, g in rows[name].items()))
        return Outcome(own, unmeasured(patient))
    blocks = _blocks(patient, shared)
    if _path(patient, shared) == "triton":
        from gradsurg.optimizer.direction_cuda import operate_onboard

        outcome = operate_onboard(patient, blocks)
    else:
        outcome = _operate_on(patient, blocks)
    outcome.gradients.update(own)
    return outcome


def _path(patient: Patient, shared: list[Tensor]) -> str:
    settings = patient.settings
    if settings.backend != "triton" and shared[0].device.type == "cpu" and not is_interpreted():
        return "torch"  # before anything is asked of every gradient
    surgery = settings.pipeline.surgery
    if isinstance(surgery, ElementwiseSurgery) or surgery.measures_excess or settings.pipeline.margin:
        return "torch"
    if patient.layout is not ALONE:
        if settings.backend == "triton":
            raise ValueError(
                "backend='triton' cannot run: rows are reduced over several ranks, which the kernels do not do. Use "
                "backend='auto' to fall back to torch."
            )
        return "torch"
    return path_of(settings.backend, patient.rows.table(shared), shared)


def _operate_on(patient: Patient, blocks: list[list[Tensor]]) -> Outcome:
    tables = [patient.rows.table(block) for block in blocks]
    problem = problem_of(patient, _gramians(patient, blocks, tables))
    finite = all_finite(problem.gramian)
    if finite and isinstance(patient.settings.pipeline.surgery, ElementwiseSurgery):
        return _blend(patient, blocks, tables, problem)
    if finite:
        problem, curvature = measured(patient, problem, blocks, tables)
        problem, direction = _direction(patient, problem, blocks, tables)
        direction = replace(direction, state={**direction.state, **curvature}) if curvature else direction
    else:
        direction = plain_sum(problem)
    gradients = Row()
    for block, table, weights, cancelled in zip(
        blocks, tables, direction.weights.tolist(), direction.cancellation.tolist(), strict=True
    ):
        u = combine(table, weights, block, exact=cancelled > CANCELLATION_SUM, into=patient.spare.take(block))
        gradients.update(Row(zip(block, u, strict=True)))
    if not patient.layout.several:  # else these are slices, of which nobody has a use
        patient.spare.keep(gradients.items())
    report = later(patient, blocks, problem, direction)
    if not finite:
        return Outcome(gradients, report)
    protected = patient.settings.pipeline.protected(problem)
    margin = patient.settings.pipeline.margin
    judgement = Judgement(patient.rows, blocks, problem.gramian, protected, patient.layout, margin, tables)
    return Outcome(gradients, report, judgement, direction.state)


def _gramians(patient: Patient, blocks: list[list[Tensor]], tables: Sequence[Rows], *, exact: bool = False) -> Tensor:
    """Return one Gramian a block, over all ranks, in one message."""
    measures = map(patient.layout.measure, blocks)
    here = [gramian(measure.counted(rows), exact=exact) for measure, rows in zip(measures, tables, strict=True)]
    return patient.layout.total(torch.stack(here) if len(here) > 1 else here[0].unsqueeze(0))


def _direction(
    patient: Patient, problem: Problem, blocks: list[list[Tensor]], tables: Sequence[Rows]
) -> tuple[Problem, Direction]:
    """Solve on the quick Gramian; where its rounding could reach the promise, solve again on the exact one."""
    pipeline = patient.settings.pipeline
    direction = pipeline.direction(problem, patient.state, rounding=ROUNDING_QUICK)
    delicate = pipeline.conflict_free and any(
        stationary or not cancelled <= CANCELLATION_GRAMIAN
        for stationary, cancelled in zip(direction.stationary.tolist(), direction.cancellation.tolist(), strict=True)
    )
    if delicate:
        exact = problem_of(patient, _gramians(patient, blocks, tables, exact=True))
        problem = replace(exact, excess=problem.excess)
        direction = pipeline.direction(problem, patient.state, rounding=ROUNDING_EXACT)
    return problem, direction


def _blend(patient: Patient, blocks: list[list[Tensor]], tables: Sequence[Rows], problem: Problem) -> Outcome:
    """Operate number by number, where there are no weights: the report has NaN for them."""
    pipeline = patient.settings.pipeline
    scales, state = scales_of(pipeline, problem, patient.state)
    surgery, generator = pipeline.surgery, problem.generator
    assert isinstance(surgery, ElementwiseSurgery)
    assert generator is not None
    allowed, protect = pipeline.protected(problem), pipeline.guarantee == "gradient" or bool(pipeline.margin)
    least: Sequence[Tensor | None] = [None] * len(blocks)
    kept = None
    if pipeline.margin:
        scaled = replace(problem, gramian=problem.gramian * scales.unsqueeze(-1) * scales.unsqueeze(-2))
        asked, kept = pipeline.margins(scaled, allowed, ROUNDING_QUICK)
        least = list(torch.where(scales > 0, asked / scales, 0))
    blends = [
        blend(surgery, table, block, each, problem.preferences, generator, protect, allowed, patient.layout, at_least)
        for table, block, each, at_least in zip(tables, blocks, scales.tolist(), least, strict=True)
    ]
    gradients = Row()
    for block, each in zip(blocks, blends, strict=True):
        gradients.update(Row(zip(block, each.direction, strict=True)))
    unknown = torch.full_like(scales, float("nan"))
    stationary = torch.tensor([each.stationary for each in blends])
    direction = Direction(unknown, scales, stationary, unknown[..., 0], state, kept)
    report = replace(
        report_of(patient.step, patient.losses, patient.skipped, block_names(patient, blocks), problem, direction),
        products=torch.stack([each.products for each in blends]).sum(0),
        square=torch.stack([each.square for each in blends]).sum(),
    )
    judgement = Judgement(patient.rows, blocks, problem.gramian, allowed, patient.layout, pipeline.margin)
    return Outcome(gradients, report, judgement, state)


def _shared(patient: Patient) -> list[Tensor]:
    rows, declared = patient.rows, patient.settings.shared
    if declared is not None:
        members = set(map(id, declared))
        return [p for p in patient.parameters if id(p) in members and rows.of(p)]
    if len(rows) == 1:
        return [p for p in patient.parameters if rows.of(p)]
    return rows.shared(patient.parameters)


def _blocks(patient: Patient, shared: list[Tensor]) -> list[list[Tensor]]:
    granularity = patient.settings.granularity
    if granularity == "model":
        return [shared]
    if granularity == "tensor":
        return [[p] for p in shared]
    members = set(map(id, shared))
    return [block for block in ([p for p in group if id(p) in members] for group in patient.groups) if block]
