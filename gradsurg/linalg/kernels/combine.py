"""Σ w_i g_i, written to p.grad, added to it, or subtracted from the parameters: one pass, one rounding."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradsurg.linalg.blocks import Rows
from gradsurg.linalg.kernels.gramian import TRITON_DTYPES
from gradsurg.linalg.kernels.inner import layout_of
from gradsurg.linalg.kernels.table import Plan, constant, device_of, on_device, plan
from gradsurg.linalg.kernels.vectors import HOLD, LEAVE, WRITE, left_there, row_start

__all__ = ["TASKS", "combine", "combine_kernel", "correct", "registers_for", "write_back"]

WARPS = 4
# How many rows are loaded together. Further rows come in a loop that looks up their addresses again.
TASKS = (4, 8)


@triton.jit(do_not_specialize=["width", "m"])
def combine_kernel(
    pointers,  # int64 (parameters, m + 2): addresses of the rows, of out and of start; of inner.layout_of if METRIC
    items,  # int64 (programs, 6): see table.py
    weights,  # float64 (partitions, m)
    modes,  # int32 (partitions,); read if METRIC
    factors,  # float64 (parameters,): sign · M; read if METRIC
    flags,  # int32 (parameters,): which numbers stay, as vectors.py numbers it; read if METRIC
    width,
    m,
    METRIC: tl.constexpr,
    TASKS: tl.constexpr,
    MORE: tl.constexpr,  # whether m may exceed TASKS
    LANES: tl.constexpr,
    V: tl.constexpr,
    DTYPE: tl.constexpr,
    OUT: tl.constexpr,  # dtype of all but rows
    ALIGNED: tl.constexpr,
):
    """Out = start + Σ w_i g_i; if METRIC, after += sign · M Σ w_i g_i (WRITE), after = before (HOLD), or none (LEAVE).

    Added up in float64 and rounded once (16-bit results: to float32 first, as torch rounds float64). float64 is free:
    up to m = 8 the kernel waits for memory, even if float64 units run at 1/64 of the float32 rate (MODEL: a processor
    takes 4.5 clocks per parameter, and reading takes 11 at 1 TB/s). A row of weight 0 is not read.

    METRIC: numbers that were left in place stay. Only a parameter that has some is looked at for them.
    """
    BLOCK: tl.constexpr = LANES * V
    item = items + 6 * tl.program_id(0).to(tl.int64)
    parameter = tl.load(item)
    row = pointers + parameter * width
    first = tl.load(item + 1)
    partition = tl.load(item + 4)
    count = tl.load(item + 2).to(tl.int32)
    row_count = count
    sign = 1.0
    target = tl.load(row + m)
    source = tl.load(row + m + 1)
    if METRIC:
        before = target
        target = source
        mode = tl.load(modes + partition)
        source = tl.where(mode == HOLD, before, target)
        sign = tl.load(factors + parameter)
        count = tl.where((mode == LEAVE) | ((mode == WRITE) & (sign == 0.0)), 0, count)
        row_count = tl.where(mode == WRITE, count, 0)
        flag = tl.load(flags + parameter)
        looked_at = tl.where(flag != 0, row_count, 0)
        gradient = tl.load(row + m + 2)
        known = tl.where(gradient != 0, looked_at, 0)
        befores = row_start(before, first, OUT, ALIGNED)
        gradients = row_start(gradient, first, OUT, ALIGNED)
    whole = (count // V) * V
    out = row_start(target, first, OUT, ALIGNED)
    sources = row_start(source, first, OUT, ALIGNED)
    source_count = tl.where(source != 0, count, 0)
    starts = ()
    counts = ()
    weighted = ()
    for i in tl.static_range(TASKS):
        start, there, factor = _row(row, weights + partition * m, i, m, first, row_count, DTYPE, ALIGNED)
        starts = starts + (start,)
        counts = counts + (there,)
        weighted = weighted + (sign * factor,)
    for offset in range(0, whole, BLOCK):
        at = offset + tl.arange(0, BLOCK)
        loaded = ()
        for i in tl.static_range(TASKS):
            loaded = loaded + (tl.load(starts[i] + at, mask=at < (counts[i] // V) * V, other=0.0),)
        source_here = tl.load(sources + at, mask=at < (source_count // V) * V, other=0.0)
        total = source_here.to(tl.float64)
        for i in tl.static_range(TASKS):
            total += weighted[i] * loaded[i].to(tl.float64)
        if MORE:
            for task in range(TASKS, m, TASKS):
                for i in tl.static_range(TASKS):
                    start, there, factor = _row(
                        row, weights + partition * m, task + i, m, first, row_count, DTYPE, ALIGNED
                    )
                    g = tl.load(start + at, mask=at < (there // V) * V, other=0.0)
                    total += sign * factor * g.to(tl.float64)
        if METRIC:
            old = tl.load(befores + at, mask=at < (looked_at // V) * V, other=0.0)
            grad = tl.load(gradients + at, mask=at < (known // V) * V, other=1.0)
            total = tl.where(left_there(old, source_here, grad, flag), source_here.to(tl.float64), total)
        tl.store(out + at, _rounded(total, OUT), mask=at < whole)
    # The last elements of a tensor: fewer than V.
    if whole < count:
        tail = whole + tl.arange(0, V)
        source_tail = tl.load(sources + tail, mask=tail < source_count, other=0.0)
        total = source_tail.to(tl.float64)
        for task in range(0, m):
            start, there, factor = _row(row, weights + partition * m, task, m, first, row_count, DTYPE, ALIGNED)
            g = tl.load(start + tail, mask=tail < there, other=0.0)
            total += sign * factor * g.to(tl.float64)
        if METRIC:
            old_tail = tl.load(befores + tail, mask=tail < looked_at, other=0.0)
            grad_tail = tl.load(gradients + tail, mask=tail < known, other=1.0)
            stays = left_there(old_tail, source_tail, grad_tail, flag)
            total = tl.where(stays, source_tail.to(tl.float64), total)
        tl.store(out + tail, _rounded(total, OUT), mask=tail < count)


@triton.jit
def _row(row, weights, i, m, first, count, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return where task i's row starts, how many elements of it to read, and its weight."""
    factor = tl.load(weights + i, mask=i < m, other=0.0)
    address = tl.load(row + i, mask=i < m, other=0)
    there = tl.where(address != 0, count, 0)
    there = tl.where(factor != 0.0, there, 0)
    # The weight of a row that is not read must not matter: 0 * infinity would be NaN.
    factor = tl.where(there > 0, factor, 0.0)
    return row_start(address, first, DTYPE, ALIGNED), there, factor


@triton.jit
def _rounded(x, DTYPE: tl.constexpr):
    if DTYPE == tl.float64:
        return x
    else:
        return x.to(tl.float32).to(DTYPE)


def combine(
    rows: Rows,
    weights: Tensor,
    out: Sequence[Tensor],
    *,
    accumulate: bool = False,
    partitions: Sequence[int] | None = None,
) -> None:
    """Write u = Σ w_i g_i into `out`, one tensor per parameter, or add it there; rounded once.

    Args:
        rows: As for `gramian`. A row of weight 0 is not read, so a row of NaN with weight 0 is harmless.
        weights: w, float64, (m,) or (partitions, m), on the device.
        out: 0 (or unchanged) if no row has a gradient.
        accumulate: out ← out + u instead of out ← u.
        partitions: The row of `weights` that each parameter takes, ascending from 0; None is one for all.
    """
    start: Sequence[Tensor | None] = out if accumulate else [None] * len(out)
    layout = plan([*rows, out, start], roles=[0] * len(rows) + [1] * 2, partitions=partitions)
    _launch(rows, weights, out, layout, len(rows))


def correct(
    rows: Rows,
    coefficients: Tensor,
    after: Sequence[Tensor],
    *,
    before: Sequence[Tensor] | None = None,
    signs: Sequence[float] | None = None,
    partitions: Sequence[int] | None = None,
    modes: Tensor | None = None,
    layout: Plan | None = None,
    factors: Tensor | None = None,
    flags: Tensor | None = None,
) -> None:
    """Correct an update in place: after ← before − ((before − after) + sign · M Σ λ_i g_i), each number rounded once.

    Args:
        rows: As for `gramian`.
        coefficients: λ, float64, (m,) or (partitions, m), on the device; a row with 0 is not read.
        after: The parameters; written. `before` cancels in the formula, and is read only if a mode is HOLD, or if
            numbers may stay.
        before: The parameters before the step; needed if a mode may be HOLD.
        signs: +1 per parameter, −1 if the optimizer maximises; None is +1. Not needed beside `factors`.
        partitions: The row of `coefficients` that each parameter takes, ascending from 0; None is one for all.
        modes: int32 (partitions,), on the device, from vectors.py: WRITE corrects, HOLD takes back the update (after ←
            before, to the bit), LEAVE touches nothing. None is WRITE.
        layout: The result of inner.layout_of for the same tensors, so that they are not laid out again.
        factors: sign · M of each parameter, float64, on the device; None is its sign.
        flags: Which numbers of each parameter stay, int32, from left.left_in_place; None is none.
    """
    device, m = device_of([after]), len(rows)
    if layout is None:
        layout = layout_of(rows, before or [None] * len(after), after, partitions=partitions)
    if modes is None:
        modes = torch.full((layout.partitions,), WRITE.value, dtype=torch.int32, device=device)
    if factors is None:
        factors = constant([1.0] * len(after) if signs is None else signs, device)
    if flags is None:
        flags = torch.zeros(len(after), dtype=torch.int32, device=device)
    _launch(rows, -coefficients, after, layout, m + 1, (modes, factors, flags))


def registers_for(tasks: int, row: int, out: int, metric: bool = False) -> int | None:
    """Return how many registers ptxas may use, given the bytes of a row's number and of out's; None lets it choose.

    On sm_80 it would choose 72 for 8 tasks in float64 and spill 7 times; and 64 for 4 tasks in float32 with a 16-bit
    result, and spill 5 times; and 128 for 8 such tasks, and spill twice. In a metric, 4 tasks with a 16-bit result
    spill 6 times in the 80 that it would choose.
    """
    if row == 8:
        return 128
    if out == 2 and tasks == TASKS[0] and (metric or row == 4):
        return 128 if metric else 96
    return 144 if out == 2 and row == 4 and not metric else None


def _launch(
    rows: Rows,
    weights: Tensor,
    out: Sequence[Tensor],
    layout: Plan,
    place: int,
    metric: tuple[Tensor, Tensor, Tensor] | None = None,
) -> None:
    m, device = len(rows), device_of([out])
    weights = weights.expand(layout.partitions, m).contiguous()
    if weights.dtype != torch.float64:
        raise ValueError(f"weights are {weights.dtype}: they must be float64")
    few = m <= TASKS[0]
    tasks = TASKS[0] if few else TASKS[1]
    with on_device(device):
        for launch in layout.launches:
            row_dtype, out_dtype = launch.dtypes
            combine_kernel[(len(launch.items),)](
                layout.pointers,
                launch.items,
                weights,
                *((weights,) * 3 if metric is None else metric),  # without a metric, none of the three is read
                layout.width,
                m,
                METRIC=metric is not None,
                TASKS=tasks,
                MORE=not few,
                LANES=32 * WARPS,
                V=launch.vector,
                DTYPE=TRITON_DTYPES[row_dtype],
                OUT=TRITON_DTYPES[out_dtype],
                ALIGNED=launch.aligned,
                num_warps=WARPS,
                maxnreg=registers_for(tasks, row_dtype.itemsize, out_dtype.itemsize, metric is not None),
                enable_fp_fusion=True,
            )
    write_back(layout, place, out)


def write_back(layout: Plan, place: int, out: Sequence[Tensor]) -> None:
    """Bring what a kernel wrote, to the tensors at this place of the table, to where it belongs."""
    in_place = []
    for target, column in zip(out, layout.keep, strict=True):
        written = column[place]
        assert written is not None
        if written.data_ptr() != target.data_ptr():
            # `out` is not dense, so flattening had to copy it.
            shaped = written.view(*target.shape, 2) if target.is_complex() else written.view(target.shape)
            target.copy_(torch.view_as_complex(shaped) if target.is_complex() else shaped)
        else:
            in_place.append(target)
    # Autograd does not see that the kernel writes.
    torch.autograd.graph.increment_version(in_place)
