"""Which numbers a step left in place, how far the others went, and the shortening of a step. Twin of linalg/moved.py.

All launchers take the tables of inner.layout_of with p.grad.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple, TypedDict

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradsurg.linalg.kernels.combine import write_back
from gradsurg.linalg.kernels.dispatch import vector
from gradsurg.linalg.kernels.gramian import TRITON_DTYPES
from gradsurg.linalg.kernels.table import Launch, Plan, chunk_for, constant, on_device
from gradsurg.linalg.kernels.vectors import EVERY, LEAVE, MEANT, row_start, wide
from gradsurg.linalg.moved import FAR, FEW

__all__ = [
    "SLOTS",
    "WARPS",
    "Left",
    "left_in_place",
    "left_kernel",
    "registers_for",
    "shorten",
    "shorten_kernel",
    "still_kernel",
]

WARPS = 4
# How many items of a parameter `left_kernel` looks at in one turn.
SLOTS = 256


class Left(NamedTuple):
    """Which numbers a step left in place by intent, on the device.

    Attributes:
        flags: Which numbers of each parameter, as vectors.py numbers it, int32 (parameters,).
        some: The highest flag in each partition, int32 (partitions,): above 0 if some number was left.
        farthest: The largest movement of a number of each parameter, float64 (parameters,).
    """

    flags: Tensor
    some: Tensor
    farthest: Tensor


@triton.jit(do_not_specialize=["width", "m"])
def still_kernel(
    pointers,  # int64 (parameters, m + 3): see inner.py
    items,  # int64 (programs, 6): see table.py
    modes,  # int32 (partitions,): if LEAVE, nothing is read and the results are 0
    partials,  # float64 (slots, 4)
    width,
    m,
    LANES: tl.constexpr,
    V: tl.constexpr,
    MOVED: tl.constexpr,  # dtype of before and after
    ALIGNED: tl.constexpr,
):
    """partials[slot] = how many numbers of an item stayed; how many are there by intent; max |d|; max |x| of the first.

    p.grad is read only where a number stayed.
    """
    BLOCK: tl.constexpr = LANES * V
    item = items + 6 * tl.program_id(0).to(tl.int64)
    row = pointers + tl.load(item) * width
    first = tl.load(item + 1)
    mode = tl.load(modes + tl.load(item + 4))
    count = tl.where(mode == LEAVE, 0, tl.load(item + 2).to(tl.int32))
    slot = tl.load(item + 3)
    whole = (count // V) * V
    news = row_start(tl.load(row + m + 1), first, MOVED, ALIGNED)
    olds = row_start(tl.load(row + m), first, MOVED, ALIGNED)
    gradient = tl.load(row + m + 2)
    grads = row_start(gradient, first, MOVED, ALIGNED)
    known = tl.where(gradient != 0, count, 0)
    stayed = tl.zeros([BLOCK], tl.int32)
    meant = tl.zeros([BLOCK], tl.int32)
    farthest = tl.zeros([BLOCK], tl.float64)
    largest = tl.zeros([BLOCK], tl.float64)
    for offset in range(0, whole, BLOCK):
        at = offset + tl.arange(0, BLOCK)
        stayed, meant, farthest, largest = _tally(news, olds, grads, at, whole, known, stayed, meant, farthest, largest)
    # The last elements of a tensor: fewer than V.
    if whole < count:
        at = whole + tl.arange(0, BLOCK)
        stayed, meant, farthest, largest = _tally(news, olds, grads, at, count, known, stayed, meant, farthest, largest)
    out = partials + slot * 4
    tl.store(out, tl.sum(stayed, axis=0).to(tl.float64))
    tl.store(out + 1, tl.sum(meant, axis=0).to(tl.float64))
    tl.store(out + 2, tl.max(farthest, axis=0))
    tl.store(out + 3, tl.max(largest, axis=0))


@triton.jit
def _tally(news, olds, grads, at, end, known, stayed, meant, farthest, largest):
    old = tl.load(olds + at, mask=at < end, other=0.0)
    new = tl.load(news + at, mask=at < end, other=0.0)
    stays = (wide(old) == wide(new)) & (at < end)
    grad = tl.load(grads + at, mask=stays & (at < known), other=1.0)
    stayed += stays.to(tl.int32)
    by_intent = stays & ((wide(old) == 0.0) | (wide(grad) == 0.0))
    put_at_zero = (wide(new) == 0.0) & (wide(old) != 0.0)  # beyond the end, both are 0
    meant += (by_intent | put_at_zero).to(tl.int32)
    farthest = tl.maximum(farthest, tl.abs(new.to(tl.float64) - old.to(tl.float64)))
    largest = tl.maximum(largest, tl.where(stays, tl.abs(old.to(tl.float64)), 0.0))
    return stayed, meant, farthest, largest


@triton.jit
def left_kernel(
    partials,  # float64 (slots, 4), of still_kernel
    bounds,  # int64 (parameters + 1,): the slots of each parameter
    limits,  # float64 (parameters, 2): from how many numbers on they are not FEW, and FAR times the dtype's ε
    sizes,  # int64 (parameters, 2): number of elements, and partition
    flags,  # int32 (parameters,): written
    farthest,  # float64 (parameters,): written
    some,  # int32 (partitions,): zeros; raised to the highest flag of the partition
    SLOTS: tl.constexpr,
):
    """flags[k] = which numbers of parameter k stay, by the rules of linalg.moved; farthest[k] = max |d|."""
    k = tl.program_id(0).to(tl.int64)
    first = tl.load(bounds + k)
    end = tl.load(bounds + k + 1)
    stayed = tl.zeros([SLOTS], tl.float64)
    meant = tl.zeros([SLOTS], tl.float64)
    far = tl.zeros([SLOTS], tl.float64)
    size = tl.zeros([SLOTS], tl.float64)
    for start in range(first, end, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        there = slot < end
        stayed += tl.load(partials + 4 * slot, mask=there, other=0.0)
        meant += tl.load(partials + 4 * slot + 1, mask=there, other=0.0)
        far = tl.maximum(far, tl.load(partials + 4 * slot + 2, mask=there, other=0.0))
        size = tl.maximum(size, tl.load(partials + 4 * slot + 3, mask=there, other=0.0))
    count = tl.sum(stayed, axis=0)
    moved = tl.max(far, axis=0)
    whole = count == tl.load(sizes + 2 * k).to(tl.float64)
    beyond_rounding = moved > tl.load(limits + 2 * k + 1) * tl.max(size, axis=0)
    every = (count > 0.0) & (whole | ((count > tl.load(limits + 2 * k)) & beyond_rounding))
    flag = tl.where(every, EVERY, tl.where(tl.sum(meant, axis=0) > 0.0, MEANT, 0))
    tl.store(flags + k, flag)
    tl.store(farthest + k, moved)
    tl.atomic_max(some + tl.load(sizes + 2 * k + 1), flag)


@triton.jit(do_not_specialize=["width", "m"])
def shorten_kernel(
    pointers,  # int64 (parameters, m + 3): see inner.py
    items,  # int64 (programs, 6): see table.py
    shares,  # float64 (partitions,): from 1 on, nothing is read
    width,
    m,
    LANES: tl.constexpr,
    V: tl.constexpr,
    MOVED: tl.constexpr,  # dtype of before and after
    ALIGNED: tl.constexpr,
):
    """After = before + share · (after − before), in float64; numbers that stayed stay to the bit."""
    BLOCK: tl.constexpr = LANES * V
    item = items + 6 * tl.program_id(0).to(tl.int64)
    row = pointers + tl.load(item) * width
    first = tl.load(item + 1)
    share = tl.load(shares + tl.load(item + 4))
    count = tl.where(share < 1.0, tl.load(item + 2).to(tl.int32), 0)
    news = row_start(tl.load(row + m + 1), first, MOVED, ALIGNED)
    olds = row_start(tl.load(row + m), first, MOVED, ALIGNED)
    whole = (count // V) * V
    for offset in range(0, whole, BLOCK):
        _shorten_there(news, olds, offset + tl.arange(0, BLOCK), whole, share, MOVED)
    # The last elements of a tensor: fewer than V.
    if whole < count:
        _shorten_there(news, olds, whole + tl.arange(0, BLOCK), count, share, MOVED)


@triton.jit
def _shorten_there(news, olds, at, end, share, MOVED: tl.constexpr):
    new = tl.load(news + at, mask=at < end, other=0.0)
    old = tl.load(olds + at, mask=at < end, other=0.0)
    start = old.to(tl.float64)
    short = start + share * (new.to(tl.float64) - start)
    if MOVED != tl.float64:
        short = short.to(tl.float32).to(MOVED)
    tl.store(news + at, tl.where(wide(new) == wide(old), old, short), mask=at < end)


def left_in_place(layout: Plan, m: int, partitions: Sequence[int], modes: Tensor) -> Left:
    """Return what linalg.moved.left_in_place finds, in two launches for each kind of tensor and one for all.

    Args:
        layout: The tables.
        m: The number of rows in them.
        partitions: The partition of each parameter, ascending from 0.
        modes: int32 (partitions,), on the device: a partition of mode LEAVE is not read, and has nothing left in place.
    """
    tensors = [column[m + 1] for column in layout.keep]
    sizes = [0 if t is None else t.numel() for t in tensors]
    limits = [[FEW * t.numel(), FAR * torch.finfo(t.dtype).eps] for t in tensors if t is not None]
    chunk = chunk_for(sum(sizes))
    device, count = modes.device, len(sizes)
    partials = torch.empty(max(layout.slots, 1), 4, dtype=torch.float64, device=device)
    flags = torch.empty(count, dtype=torch.int32, device=device)
    farthest = torch.empty(count, dtype=torch.float64, device=device)
    some = torch.zeros(layout.partitions, dtype=torch.int32, device=device)
    with on_device(device):
        for launch in layout.launches:
            still_kernel[(len(launch.items),)](
                layout.pointers, launch.items, modes, partials, layout.width, m, **_constants(launch)
            )
        left_kernel[(count,)](
            partials,
            constant([0, *accumulate(-(-size // chunk) for size in sizes)], device, torch.int64),
            constant([limit for both in limits for limit in both], device),
            constant([number for both in zip(sizes, partitions, strict=True) for number in both], device, torch.int64),
            flags,
            farthest,
            some,
            SLOTS=SLOTS,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
    return Left(flags, some, farthest)


def shorten(layout: Plan, m: int, shares: Tensor, after: Sequence[Tensor]) -> None:
    """Let each partition keep this share of its movement, after ← before − share · (before − after), if it is below 1.

    Args:
        layout: The tables.
        m: The number of rows in them.
        shares: float64 (partitions,), on the device.
        after: The parameters; written.
    """
    with on_device(shares.device):
        for launch in layout.launches:
            shorten_kernel[(len(launch.items),)](
                layout.pointers, launch.items, shares, layout.width, m, **_constants(launch)
            )
    write_back(layout, m + 1, after)


def registers_for(aligned: bool) -> int | None:
    """Return how many registers ptxas may use; None lets it choose.

    It would choose 31 for narrow loads of float32 on sm_100, and spill twice.
    """
    return None if aligned else 64


class _Constants(TypedDict):
    LANES: int
    V: int
    MOVED: tl.dtype
    ALIGNED: bool
    num_warps: int
    maxnreg: int | None
    enable_fp_fusion: bool


def _constants(launch: Launch) -> _Constants:
    """Return what both kernels that read no row are compiled for."""
    moved = launch.dtypes[1]
    return {
        "LANES": 32 * WARPS,
        "V": vector([moved], launch.aligned),
        "MOVED": TRITON_DTYPES[moved],
        "ALIGNED": launch.aligned,
        "num_warps": WARPS,
        "maxnreg": registers_for(launch.aligned),
        "enable_fp_fusion": True,
    }
