"""The Gramian of the numbers that a step moved, in the metric of the step. Twin of linalg.moved.gramian_moved."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradsurg.linalg.kernels.dispatch import vector
from gradsurg.linalg.kernels.gramian import TRITON_DTYPES, sum_partials
from gradsurg.linalg.kernels.table import Plan, constant, on_device
from gradsurg.linalg.kernels.vectors import LEAVE, MEANT, lanes, left_there, row_start, wide

__all__ = ["TASKS", "WARPS", "gramian_moved", "moved_kernel", "moved_places", "vector_for"]

WARPS = 4
# Tasks whose pairs one program multiplies: two tiles of half as many. More tasks are taken in all unions of two tiles,
# so that m = 32 reads each gradient 7 times; this pass reads nothing unless a step conflicts and needs a metric.
TASKS = (4, 8)


@triton.jit(do_not_specialize=["width", "m"])
def moved_kernel(
    pointers,  # int64 (parameters, m + 3): see inner.py
    items,  # int64 (programs, 6): see table.py
    modes,  # int32 (partitions,): if LEAVE, nothing is read and the results are 0
    flags,  # int32 (parameters,), of left_kernel
    metric,  # float64 (parameters,): M
    unions,  # int64 (unions, 2): the two tiles of tasks
    partials,  # float64 (slots, unions * (M(M+1)/2 + 2))
    width,
    m,
    M: tl.constexpr,  # tasks of two tiles
    LANES: tl.constexpr,
    V: tl.constexpr,
    DTYPE: tl.constexpr,
    MOVED: tl.constexpr,  # dtype of before and after
    ALIGNED: tl.constexpr,
):
    """partials[slot, union] = M Σ g_i g_j over the moved numbers of an item, as pairs.py; Σ d²/M; whether a row pulls.

    A row pulls if it has another number than 0 where one stays.
    """
    BLOCK: tl.constexpr = LANES * V
    PAIRS: tl.constexpr = (M * (M + 1)) // 2
    HALF: tl.constexpr = M // 2
    item = items + 6 * tl.program_id(0).to(tl.int64)
    union = tl.program_id(1)
    parameter = tl.load(item)
    row = pointers + parameter * width
    first = tl.load(item + 1)
    mode = tl.load(modes + tl.load(item + 4))
    factor = tl.load(metric + parameter)
    flag = tl.load(flags + parameter)
    count = tl.where((mode == LEAVE) | (factor == 0.0), 0, tl.load(item + 2).to(tl.int32))
    slot = tl.load(item + 3)
    whole = (count // V) * V
    news = row_start(tl.load(row + m + 1), first, MOVED, ALIGNED)
    olds = row_start(tl.load(row + m), first, MOVED, ALIGNED)
    gradient = tl.load(row + m + 2)
    grads = row_start(gradient, first, MOVED, ALIGNED)
    known = tl.where((gradient != 0) & (flag == MEANT), count, 0)
    starts = ()
    counts = ()
    for i in tl.static_range(M):
        task = tl.load(unions + 2 * union + i // HALF) * HALF + i % HALF
        address = tl.load(row + task, mask=task < m, other=0)
        starts = starts + (row_start(address, first, DTYPE, ALIGNED),)
        counts = counts + (tl.where(address != 0, count, 0),)
    sums = ()
    for _ in tl.static_range(PAIRS):
        sums = sums + (tl.zeros([LANES], tl.float64),)
    square = tl.zeros([LANES], tl.float64)
    pulls = tl.zeros([BLOCK], tl.int32)
    for offset in range(0, whole, BLOCK):
        at = offset + tl.arange(0, BLOCK)
        old = tl.load(olds + at, mask=at < whole, other=0.0)
        new = tl.load(news + at, mask=at < whole, other=0.0)
        grad = tl.load(grads + at, mask=at < (known // V) * V, other=1.0)
        stays = left_there(old, new, grad, flag)
        olds_here = lanes(old, LANES, V)
        news_here = lanes(new, LANES, V)
        for v in tl.static_range(V):
            d = olds_here[v].to(tl.float64) - news_here[v].to(tl.float64)
            square += d * d
        x = ()
        for i in tl.static_range(M):
            g = tl.load(starts[i] + at, mask=at < (counts[i] // V) * V, other=0.0)
            pulls |= (stays & (wide(g) != 0.0)).to(tl.int32)
            x = x + lanes(tl.where(stays, tl.zeros_like(g), g), LANES, V)
        for v in tl.static_range(V):
            moved = ()
            for i in tl.static_range(M):
                moved = moved + (x[V * i + v].to(tl.float64),)
            sums = _add_pairs(sums, moved, M)
    # The last elements of a tensor: fewer than V.
    pulls_tail = tl.zeros([LANES], tl.int32)
    if whole < count:
        tail = whole + tl.arange(0, LANES)
        old_tail = tl.load(olds + tail, mask=tail < count, other=0.0)
        new_tail = tl.load(news + tail, mask=tail < count, other=0.0)
        grad_tail = tl.load(grads + tail, mask=tail < known, other=1.0)
        stays_tail = left_there(old_tail, new_tail, grad_tail, flag)
        d_tail = old_tail.to(tl.float64) - new_tail.to(tl.float64)
        square += d_tail * d_tail
        moved = ()
        for i in tl.static_range(M):
            g_tail = tl.load(starts[i] + tail, mask=tail < counts[i], other=0.0).to(tl.float64)
            pulls_tail |= (stays_tail & (g_tail != 0.0)).to(tl.int32)
            moved = moved + (tl.where(stays_tail, 0.0, g_tail),)
        sums = _add_pairs(sums, moved, M)
    out = partials + (slot * tl.num_programs(1) + union) * (PAIRS + 2)
    for k in tl.static_range(PAIRS):
        tl.store(out + k, factor * tl.sum(sums[k], axis=0))
    length = tl.sum(square, axis=0)
    tl.store(out + PAIRS, length / tl.where(factor > 0.0, factor, 1.0))
    pulled = tl.max(pulls, axis=0) + tl.max(pulls_tail, axis=0)
    tl.store(out + PAIRS + 1, pulled.to(tl.float64))


@triton.jit
def _add_pairs(sums, x, M: tl.constexpr):
    longer = ()
    for i in tl.static_range(M):
        for j in tl.static_range(i, M):
            longer = longer + (sums[i * M - (i * (i - 1)) // 2 + j - i] + x[i] * x[j],)
    return longer


def gramian_moved(layout: Plan, m: int, metric: Tensor, flags: Tensor, modes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return J M Jᵀ and Σ d²/M of the numbers that moved, and whether some row would move one that stays.

    Args:
        layout: The tables of inner.layout_of, with p.grad.
        m: The number of rows in them.
        metric: M ≥ 0 per parameter, float64, on the device; where it is 0, nothing counts.
        flags: Which numbers of each parameter stay, int32, from left.left_in_place.
        modes: int32 (partitions,), on the device: a partition of mode LEAVE is not read, and its results are 0.

    Returns:
        Shapes (partitions, m, m) and (partitions,), float64; and bool (partitions,).
    """
    tasks = TASKS[0] if m <= TASKS[0] else TASKS[1]
    unions = list(combinations(range(max(2, triton.cdiv(m, tasks // 2))), 2))
    places = moved_places(m, tasks, unions)
    partials = torch.empty(max(layout.slots, 1), len(places), dtype=torch.float64, device=modes.device)
    numbered = constant([tile for union in unions for tile in union], modes.device, torch.int64)
    with on_device(modes.device):
        for launch in layout.launches:
            row_dtype, moved_dtype = launch.dtypes
            moved_kernel[(len(launch.items), len(unions))](
                layout.pointers,
                launch.items,
                modes,
                flags,
                metric,
                numbered,
                partials,
                layout.width,
                m,
                M=tasks,
                LANES=32 * WARPS,
                V=vector_for(launch.dtypes, launch.aligned),
                DTYPE=TRITON_DTYPES[row_dtype],
                MOVED=TRITON_DTYPES[moved_dtype],
                ALIGNED=launch.aligned,
                num_warps=WARPS,
                maxnreg=registers_for(tasks, row_dtype.itemsize, moved_dtype.itemsize),
                enable_fp_fusion=True,
            )
    out = torch.empty(layout.partitions, m * m + 1 + len(unions), dtype=torch.float64, device=modes.device)
    sum_partials(partials, layout, places, out)
    return out[:, : m * m].unflatten(1, (m, m)), out[:, m * m], (out[:, m * m + 1 :] != 0).any(-1)


def vector_for(dtypes: Sequence[torch.dtype], aligned: bool) -> int:
    """Return how many elements one thread loads at once: 16 bytes of the widest dtype.

    Sixteen of the narrowest, as other kernels load, would spill 13 times for eight float32 rows of 16-bit parameters.
    """
    return vector([max(dtypes, key=lambda dtype: dtype.itemsize)], aligned)


def registers_for(tasks: int, row: int, moved: int) -> int | None:
    """Return how many registers ptxas may use, by the bytes of rows and of parameters; None lets it choose.

    On sm_80 it would choose 168 for 8 tasks with 16-bit rows of float32 parameters, and spill 9 times; in 200, 3 times.
    """
    return 240 if (tasks, row, moved) == (TASKS[1], 2, 4) else None


def moved_places(m: int, tasks: int, unions: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the places of a slot's partial sums: pairs of tasks go to 0 … m² − 1, Σ d²/M to m², pulls behind it."""
    half, seen, places = tasks // 2, set[tuple[int, int]](), []
    for number, union in enumerate(unions):
        members = [tile * half + i for tile in union for i in range(half)]
        for a, i in enumerate(members):
            for j in members[a:]:
                # Pairs within one tile come in every union of it, and are taken once.
                places.append((i * m + j, j * m + i) if j < m and (i, j) not in seen else (-1, -1))
                seen.add((i, j))
        places += [(m * m if number == 0 else -1, -1), (m * m + 1 + number, -1)]
    return places
