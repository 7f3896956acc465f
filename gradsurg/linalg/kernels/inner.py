"""The effect of an update on every task: ⟨d, g_i⟩ and ‖d‖² of the movement d, in one pass. Twin of movement.py."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradsurg.linalg.blocks import Rows
from gradsurg.linalg.kernels.gramian import TRITON_DTYPES, sum_partials
from gradsurg.linalg.kernels.table import Plan, device_of, on_device, plan
from gradsurg.linalg.kernels.vectors import LEAVE, lanes, row_start

__all__ = ["TASKS", "inner", "inner_kernel", "layout_of", "registers_for"]

WARPS = 4
# How many tasks a program takes at once. Further programs take the other tasks, and each reads the movement again: at
# m = 16, 20 tensors are read instead of 18. Sixteen tasks at once spill (254 registers and 4 spills read from SASS,
# float32 rows of 16-bit parameters).
TASKS = (4, 8)


@triton.jit(do_not_specialize=["width", "m"])
def inner_kernel(
    pointers,  # int64 (parameters, m + 3): addresses of the rows, of before, after and p.grad; 0 is none
    items,  # int64 (programs, 6): see table.py
    modes,  # int32 (partitions,): if LEAVE, nothing is read and the sums are 0
    partials,  # float64 (slots, tiles * (TASKS + 1))
    width,
    m,
    TASKS: tl.constexpr,
    LANES: tl.constexpr,
    V: tl.constexpr,
    DTYPE: tl.constexpr,
    MOVED: tl.constexpr,  # dtype of before and after
    ALIGNED: tl.constexpr,
):
    """partials[slot, tile] = ⟨d, g_i⟩ for TASKS tasks, and ‖d‖², over one item; d = sign · (before − after).

    In float64, in which the difference of two float32 is exact.
    """
    BLOCK: tl.constexpr = LANES * V
    item = items + 6 * tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    row = pointers + tl.load(item) * width
    first = tl.load(item + 1)
    mode = tl.load(modes + tl.load(item + 4))
    count = tl.where(mode == LEAVE, 0, tl.load(item + 2).to(tl.int32))
    slot = tl.load(item + 3)
    sign = tl.load(item + 5).to(tl.float64)
    whole = (count // V) * V
    before = tl.load(row + m)
    after = tl.load(row + m + 1)
    befores = row_start(before, first, MOVED, ALIGNED)
    afters = row_start(after, first, MOVED, ALIGNED)
    # Without `after`, d is the vector `before`.
    after_count = tl.where(after != 0, count, 0)
    after_whole = tl.where(after != 0, whole, 0)
    starts = ()
    counts = ()
    sums = ()
    for i in tl.static_range(TASKS):
        address = tl.load(row + tile * TASKS + i, mask=tile * TASKS + i < m, other=0)
        starts = starts + (row_start(address, first, DTYPE, ALIGNED),)
        counts = counts + (tl.where(address != 0, count, 0),)
        sums = sums + (tl.zeros([LANES], tl.float64),)
    square = tl.zeros([LANES], tl.float64)
    for offset in range(0, whole, BLOCK):
        at = offset + tl.arange(0, BLOCK)
        old = lanes(tl.load(befores + at, mask=at < whole, other=0.0), LANES, V)
        new = lanes(tl.load(afters + at, mask=at < after_whole, other=0.0), LANES, V)
        d = ()
        for v in tl.static_range(V):
            d = d + (old[v].to(tl.float64) - new[v].to(tl.float64),)
            square += d[v] * d[v]
        longer = ()
        for i in tl.static_range(TASKS):
            g = lanes(tl.load(starts[i] + at, mask=at < (counts[i] // V) * V, other=0.0), LANES, V)
            total = sums[i]
            for v in tl.static_range(V):
                total += d[v] * g[v].to(tl.float64)
            longer = longer + (total,)
        sums = longer
    # The last elements of a tensor: fewer than V.
    if whole < count:
        tail = whole + tl.arange(0, LANES)
        old_tail = tl.load(befores + tail, mask=tail < count, other=0.0).to(tl.float64)
        d_tail = old_tail - tl.load(afters + tail, mask=tail < after_count, other=0.0).to(tl.float64)
        square += d_tail * d_tail
        longer = ()
        for i in tl.static_range(TASKS):
            g_tail = tl.load(starts[i] + tail, mask=tail < counts[i], other=0.0).to(tl.float64)
            longer = longer + (sums[i] + d_tail * g_tail,)
        sums = longer
    out = partials + (slot * tl.num_programs(1) + tile) * (TASKS + 1)
    for i in tl.static_range(TASKS):
        tl.store(out + i, sign * tl.sum(sums[i], axis=0))
    tl.store(out + TASKS, tl.sum(square, axis=0))


def inner(
    rows: Rows,
    before: Sequence[Tensor],
    after: Sequence[Tensor] | None = None,
    *,
    signs: Sequence[float] | None = None,
    partitions: Sequence[int] | None = None,
    modes: Tensor | None = None,
    layout: Plan | None = None,
) -> tuple[Tensor, Tensor]:
    """Return ⟨d, g_i⟩ for every row and ‖d‖² of the movement d = sign · (before − after), in float64.

    Args:
        rows: m lists of one gradient per parameter or None, as for `gramian`.
        before: The parameters before the step; or any vector, if `after` is None.
        after: The parameters now.
        signs: +1 per parameter, −1 if the optimizer maximises; None is +1.
        partitions: As for `gramian`.
        modes: int32 (partitions,), on the device: a partition of mode LEAVE is not read, and its results are 0. None
            reads all.
        layout: The result of `layout_of` for the same tensors, so that they are not laid out again.

    Returns:
        Shapes (m,) and (), or (partitions, m) and (partitions,) if partitions are given; float64, on the device.
    """
    m, device = len(rows), device_of([before])
    if layout is None:
        layout = layout_of(rows, before, after, signs=signs, partitions=partitions)
    tasks = TASKS[0] if m <= TASKS[0] else TASKS[1]
    tiles = triton.cdiv(m, tasks)
    partials = torch.empty(max(layout.slots, 1), tiles * (tasks + 1), dtype=torch.float64, device=device)
    if modes is None:
        modes = torch.ones(layout.partitions, dtype=torch.int32, device=device)
    with on_device(device):
        for launch in layout.launches:
            row_dtype, moved_dtype = launch.dtypes
            inner_kernel[(len(launch.items), tiles)](
                layout.pointers,
                launch.items,
                modes,
                partials,
                layout.width,
                m,
                TASKS=tasks,
                LANES=32 * WARPS,
                V=launch.vector,
                DTYPE=TRITON_DTYPES[row_dtype],
                MOVED=TRITON_DTYPES[moved_dtype],
                ALIGNED=launch.aligned,
                num_warps=WARPS,
                maxnreg=registers_for(tasks, launch.aligned),
                enable_fp_fusion=True,
            )
    out = torch.empty(layout.partitions, m + 1, dtype=torch.float64, device=device)
    sum_partials(partials, layout, inner_places(m, tasks), out)
    products, square = out[:, :m], out[:, m]
    return (products[0], square[0]) if partitions is None else (products, square)


def layout_of(
    rows: Rows,
    before: Sequence[Tensor | None],
    after: Sequence[Tensor] | None,
    gradients: Sequence[Tensor | None] | None = None,
    *,
    signs: Sequence[float] | None = None,
    partitions: Sequence[int] | None = None,
) -> Plan:
    """Return the tables of `inner`, and of all passes that correct an update: rows, before, after and p.grad.

    If `after` had to be copied to be read, kernels write to the copy first, so the tables stay true.
    """
    none: Sequence[Tensor | None] = [None] * len(before)
    lists = [*rows, before, after or none, gradients or none]
    return plan(lists, roles=[0] * len(rows) + [1] * 3, partitions=partitions, signs=signs)


def registers_for(tasks: int, aligned: bool) -> int | None:
    """Return how many registers ptxas may use; None lets it choose.

    It would choose 32 for 4 tasks and narrow loads on sm_80, and spill 6 times.
    """
    return 64 if tasks == TASKS[0] and not aligned else None


def inner_places(m: int, tasks: int) -> list[tuple[int, int]]:
    """Return the places of a slot's partial sums: products go to 0 … m − 1, ‖d‖² (of the first tile) to m."""
    places = []
    for tile in range(triton.cdiv(m, tasks)):
        places += [(i if i < m else -1, -1) for i in range(tile * tasks, (tile + 1) * tasks)]
        places.append((m if tile == 0 else -1, -1))
    return places
