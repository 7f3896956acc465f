"""Second stage of every sum over parameters: partial sums of items, added up in float64 in a fixed order."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment, var-annotated"
# Kernels are written in Triton's language: its types and idioms are not Python's.

import triton
import triton.language as tl

__all__ = ["PLANES", "SLOTS", "WARPS", "reduce_kernel"]

# A program adds up 4 numbers of every slot, 32 bytes being the least that memory gives; 256 slots at a time, so that
# the 1526 slots of 25 M parameters take 6 turns (of some 600 clocks, MODEL).
PLANES, SLOTS, WARPS = 4, 256, 4


@triton.jit(do_not_specialize=["planes", "stride"])
def reduce_kernel(
    partials,  # float64 (slots, planes)
    bounds,  # int64 (blocks + 1,): the slots of each block
    places,  # int64 (planes, 2): where in its block's part of `out` a sum goes; -1 is nowhere
    out,  # float64 (blocks, stride)
    planes,
    stride,
    PLANES: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """out[block, places[k]] = Σ partials[slot, k] over the block's slots, always in the same order."""
    block = tl.program_id(1).to(tl.int64)
    k = tl.program_id(0) * PLANES + tl.arange(0, PLANES)
    first = tl.load(bounds + block)
    end = tl.load(bounds + block + 1)
    sums = tl.zeros([SLOTS, PLANES], tl.float64)
    for start in range(first, end, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        there = (slot < end)[:, None] & (k < planes)[None, :]
        sums += tl.load(partials + slot[:, None] * planes + k[None, :], mask=there, other=0.0)
    total = tl.sum(sums, axis=0)
    for side in tl.static_range(2):
        place = tl.load(places + 2 * k + side, mask=k < planes, other=-1)
        tl.store(out + block * stride + place, total, mask=place >= 0)
