"""Gramian of more tasks: tiles of 16 rows, multiplied on the float64 tensor cores."""

import triton
import triton.language as tl

from gradsurg.linalg.kernels.vectors import row_start

__all__ = ["TILE", "block_for", "dot_places", "dots_kernel", "registers_for"]

TILE = 16
# One warp per program. Each of four warps would convert the same numbers to float64: 64 conversions per thread for 128
# columns instead of 16 (read from SASS). A processor converts 16 numbers per clock (MODEL: 8 clocks per column at
# m = 32, while reading 32 float32 from memory takes 9).
WARPS = 1


@triton.jit(do_not_specialize=["width", "m"])
def dots_kernel(
    pointers,  # int64 (parameters, width): the rows' addresses first; 0 is no gradient
    items,  # int64 (programs, 6): see table.py
    partials,  # float64 (slots, TILES(TILES+1)/2 * 256)
    width,
    m,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
    V: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """partials[slot, t(a, b), i, j] = Σ_p g_(16a+i)p g_(16b+j)p over one item's elements p, for tiles a ≤ b.

    Products and sums in float64: exact products for every narrower dtype. Each element is loaded once, into a tile
    of 16 rows that all pairs of tiles share through shared memory.
    """
    item = items + 6 * tl.program_id(0).to(tl.int64)
    row = pointers + tl.load(item) * width
    first = tl.load(item + 1)
    count = tl.load(item + 2).to(tl.int32)
    slot = tl.load(item + 3)
    whole = (count // V) * V
    i = tl.arange(0, 16)
    starts = ()
    counts = ()
    sums = ()
    for a in tl.static_range(TILES):
        address = tl.load(row + 16 * a + i, mask=16 * a + i < m, other=0)
        starts = starts + (row_start(address, first, DTYPE, ALIGNED),)
        counts = counts + (tl.where(address != 0, count, 0),)
        for _ in tl.static_range(a, TILES):
            sums = sums + (tl.zeros([16, 16], tl.float64),)
    for offset in range(0, whole, BLOCK):
        at = (offset + tl.arange(0, BLOCK))[None, :]
        x = ()
        for a in tl.static_range(TILES):
            inside = at < ((counts[a] // V) * V)[:, None]
            x = x + (_wide(tl.load(starts[a][:, None] + at, mask=inside, other=0.0)),)
        sums = _add_products(x, sums, TILES)
    # The last elements of a tensor: fewer than V, so at most 7.
    if whole < count:
        tail = (whole + tl.arange(0, 16))[None, :]
        x = ()
        for a in tl.static_range(TILES):
            x = x + (_wide(tl.load(starts[a][:, None] + tail, mask=tail < counts[a][:, None], other=0.0)),)
        sums = _add_products(x, sums, TILES)
    out = partials + slot * (TILES * (TILES + 1) // 2) * 256 + 16 * i[:, None] + i[None, :]
    for t in tl.static_range(TILES * (TILES + 1) // 2):
        tl.store(out + 256 * t, sums[t])


@triton.jit
def _wide(x):
    """Return x in float64; 16-bit numbers go through a sum over one element each, in which nothing moves.

    Triton chooses the layout of a product's tiles by the width in which they were loaded. For 16 bits, its versions 3.5
    to 3.8 choose a layout that float64 tensor cores do not have, and the compiler fails. It can't see through a sum.
    """
    if x.dtype.primitive_bitwidth == 16:
        return tl.sum(x.to(tl.float32)[:, :, None], axis=2).to(tl.float64)
    else:
        return x.to(tl.float64)


@triton.jit
def _add_products(x, sums, TILES: tl.constexpr):
    added = ()
    for a in tl.static_range(TILES):
        for b in tl.static_range(a, TILES):
            total = sums[a * TILES - (a * (a - 1)) // 2 + b - a]
            added = added + (tl.dot(x[a], tl.trans(x[b]), total, out_dtype=tl.float64),)
    return added


def block_for(tiles: int, itemsize: int) -> int:
    """Return how many columns are multiplied at once: 64 of one tile, 32 of two.

    Two tiles of float64 take 16 columns: 32 spill on sm_100, whose float64 tensor cores differ from the others'.
    """
    return 64 // tiles // (2 if tiles > 1 and itemsize == 8 else 1)


def registers_for(tiles: int, itemsize: int, aligned: bool) -> int | None:
    """Return how many registers ptxas may use; None lets it choose.

    It would choose 168 for one tile of narrowly loaded float32 on sm_90, and spill 22 times; with this limit it takes
    190.
    """
    return 224 if tiles == 1 and itemsize == 4 and not aligned else None


def dot_places(tiles: int) -> list[tuple[int, int]]:
    """Return the pair of tasks of each of a slot's partial sums."""
    return [
        (TILE * a + i, TILE * b + j)
        for a in range(tiles)
        for b in range(a, tiles)
        for i in range(TILE)
        for j in range(TILE)
    ]
