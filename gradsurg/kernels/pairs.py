"""Gramian of few tasks: m rows are loaded once, every pair of them has a chain of multiply-adds of its own."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment, var-annotated"
# ruff: noqa: RUF005, SIM300
# Kernels are written in Triton's language: its types and idioms are not Python's.

import triton
import triton.language as tl

from gradsurg.kernels.vectors import lanes, row_start

__all__ = ["WARPS", "pair_places", "pairs_kernel", "registers_for"]

WARPS = 4


@triton.jit(do_not_specialize=["width", "m"])
def pairs_kernel(
    pointers,  # int64 (parameters, width): the rows' addresses first; 0 is no gradient
    items,  # int64 (programs, 6): see table.py
    partials,  # float64 (slots, M(M+1)/2)
    width,
    m,
    M: tl.constexpr,  # m rounded up: the rows beyond m are not read
    LANES: tl.constexpr,
    V: tl.constexpr,
    DTYPE: tl.constexpr,
    PRODUCT: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """partials[slot, k(i, j)] = Σ_p g_ip g_jp over one item's elements p, k counting the upper triangle by rows.

    Accumulated in float64. Products of float32 are formed there too (exact: 48 bits of 53). Products of 16-bit
    numbers are exact in float32 and are added up in it over the V = 8 elements that one thread loads at once, which
    spares converting every element: that sum is off by 7 roundings of 6e-8 at most.
    """
    BLOCK: tl.constexpr = LANES * V
    PAIRS: tl.constexpr = (M * (M + 1)) // 2
    item = items + 6 * tl.program_id(0).to(tl.int64)
    row = pointers + tl.load(item) * width
    first = tl.load(item + 1)
    count = tl.load(item + 2).to(tl.int32)
    slot = tl.load(item + 3)
    whole = (count // V) * V
    starts = ()
    counts = ()
    wholes = ()
    for i in tl.static_range(M):
        address = tl.load(row + i, mask=i < m, other=0)
        starts = starts + (row_start(address, first, DTYPE, ALIGNED),)
        counts = counts + (tl.where(address != 0, count, 0),)
        wholes = wholes + (tl.where(address != 0, whole, 0),)
    sums = ()
    for _ in tl.static_range(PAIRS):
        sums = sums + (tl.zeros([LANES], tl.float64),)
    for offset in range(0, whole, BLOCK):
        at = offset + tl.arange(0, BLOCK)
        loaded = ()
        for i in tl.static_range(M):
            loaded = loaded + (tl.load(starts[i] + at, mask=at < wholes[i], other=0.0),)
        x = ()
        for i in tl.static_range(M):
            x = x + lanes(loaded[i], LANES, V)
        if PRODUCT == tl.float64:
            chains = sums
        else:
            chains = ()
            for _ in tl.static_range(PAIRS):
                chains = chains + (tl.zeros([LANES], PRODUCT),)
        for v in tl.static_range(V):
            wide = ()
            for i in tl.static_range(M):
                wide = wide + (x[V * i + v].to(PRODUCT),)
            longer = ()
            for i in tl.static_range(M):
                for j in tl.static_range(i, M):
                    longer = longer + (chains[i * M - (i * (i - 1)) // 2 + j - i] + wide[i] * wide[j],)
            chains = longer
        if PRODUCT == tl.float64:
            sums = chains
        else:
            added = ()
            for k in tl.static_range(PAIRS):
                added = added + (sums[k] + chains[k].to(tl.float64),)
            sums = added
    if whole < count:  # the last elements of a tensor: fewer than V of them
        tail = whole + tl.arange(0, LANES)
        wide = ()
        for i in tl.static_range(M):
            wide = wide + (tl.load(starts[i] + tail, mask=tail < counts[i], other=0.0).to(PRODUCT),)
        added = ()
        for i in tl.static_range(M):
            for j in tl.static_range(i, M):
                added = added + (sums[i * M - (i * (i - 1)) // 2 + j - i] + (wide[i] * wide[j]).to(tl.float64),)
        sums = added
    for k in tl.static_range(PAIRS):
        tl.store(partials + slot * PAIRS + k, tl.sum(sums[k], axis=0))


def registers_for(M: int, itemsize: int) -> int | None:
    """Return how many registers ptxas may use; None leaves it to it.

    Left alone it stops at 64 for 4 tasks in bfloat16 on sm_90, and spills 3 times; told so it takes 80 to 88.
    """
    return 128 if (M, itemsize) == (4, 2) else None


def pair_places(M: int) -> list[tuple[int, int]]:
    """Return the pair of tasks of each of a slot's partial sums."""
    return [(i, j) for i in range(M) for j in range(i, M)]
