"""Gramian of few tasks: each row is loaded once, and each pair of rows has its own chain of multiply-adds."""

import triton
import triton.language as tl

from gradsurg.linalg.kernels.vectors import lanes, row_start

__all__ = ["WARPS", "pair_places", "pairs_kernel"]

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
    ALIGNED: tl.constexpr,
):
    """partials[slot, k(i, j)] = Σ_p g_ip g_jp over one item's elements p, k counting the upper triangle by rows.

    Multiplied and accumulated in float64: products of float32 and narrower numbers are exact there (48 bits of 53).
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
        for v in tl.static_range(V):
            wide = ()
            for i in tl.static_range(M):
                wide = wide + (x[V * i + v].to(tl.float64),)
            longer = ()
            for i in tl.static_range(M):
                for j in tl.static_range(i, M):
                    longer = longer + (sums[i * M - (i * (i - 1)) // 2 + j - i] + wide[i] * wide[j],)
            sums = longer
    # The last elements of a tensor: fewer than V.
    if whole < count:
        tail = whole + tl.arange(0, LANES)
        wide = ()
        for i in tl.static_range(M):
            wide = wide + (tl.load(starts[i] + tail, mask=tail < counts[i], other=0.0).to(tl.float64),)
        longer = ()
        for i in tl.static_range(M):
            for j in tl.static_range(i, M):
                longer = longer + (sums[i * M - (i * (i - 1)) // 2 + j - i] + wide[i] * wide[j],)
        sums = longer
    for k in tl.static_range(PAIRS):
        tl.store(partials + slot * PAIRS + k, tl.sum(sums[k], axis=0))


def pair_places(M: int) -> list[tuple[int, int]]:
    """Return the pair of tasks of each of a slot's partial sums."""
    return [(i, j) for i in range(M) for j in range(i, M)]
