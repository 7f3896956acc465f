"""The second stage of every sum over parameters: adds up partial sums of items in float64, in a fixed order."""

import triton
import triton.language as tl

__all__ = ["PLANES", "SLOTS", "WARPS", "reduce_kernel"]

# A program adds up 4 numbers of every slot, because memory gives at least 32 bytes. It takes 256 slots at a time, so
# that the 1526 slots of 25 M parameters take 6 turns (of some 600 clocks, MODEL).
PLANES, SLOTS, WARPS = 4, 256, 4


@triton.jit(do_not_specialize=["planes", "stride"])
def reduce_kernel(
    partials,  # float64 (slots, planes)
    bounds,  # int64 (partitions + 1,): the slots of each partition
    places,  # int64 (planes, 2): two places of a sum in its partition's part of `out`; -1 is none
    out,  # float64 (partitions, stride)
    planes,
    stride,
    PLANES: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """out[partition, places[k]] = Σ partials[slot, k] over the partition's slots, always in the same order."""
    partition = tl.program_id(1).to(tl.int64)
    k = tl.program_id(0) * PLANES + tl.arange(0, PLANES)
    first = tl.load(bounds + partition)
    end = tl.load(bounds + partition + 1)
    sums = tl.zeros([SLOTS, PLANES], tl.float64)
    for start in range(first, end, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        there = (slot < end)[:, None] & (k < planes)[None, :]
        sums += tl.load(partials + slot[:, None] * planes + k[None, :], mask=there, other=0.0)
    total = tl.sum(sums, axis=0)
    for side in tl.static_range(2):
        place = tl.load(places + 2 * k + side, mask=k < planes, other=-1)
        tl.store(out + partition * stride + place, total, mask=place >= 0)
