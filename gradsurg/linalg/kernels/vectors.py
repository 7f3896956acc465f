"""Shared by the kernels that read gradients: where a row starts, and the elements that one thread holds.

Each thread loads 16 bytes of a row at once. For that, Triton must see two things (read from SASS, one at a time): the
pointer's divisibility, stated after the cast from the address; and a mask that is constant over the 16 bytes, i.e. the
bound (n // V) * V as the last operand.
"""

import triton
import triton.language as tl

__all__ = ["EVERY", "HOLD", "LEAVE", "MEANT", "WRITE", "lanes", "left_there", "row_start", "wide"]

# Modes of a partition of parameters, decided on the device: nothing; out = start + Σ w_i g_i; out = before.
LEAVE = tl.constexpr(0)
WRITE = tl.constexpr(1)
HOLD = tl.constexpr(2)
# Which of a parameter's numbers the step wants where they are, also decided on the device: of those that stayed, the
# ones that are 0 or have a p.grad of 0; or every one. With both, those that it put at exactly 0. 0 is none.
MEANT = tl.constexpr(1)
EVERY = tl.constexpr(2)


@triton.jit
def row_start(address, first, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return a pointer to element `first` (int64) of the tensor at `address`."""
    start = address.to(tl.pointer_type(DTYPE)) + first
    if ALIGNED:
        start = tl.multiple_of(start, 16)
    return start


@triton.jit
def lanes(x, LANES: tl.constexpr, V: tl.constexpr):
    """Return V tensors of LANES elements; the v-th one holds every thread's v-th element, so no data moves.

    A sum over [LANES * V] needs V accumulators a thread, and spills for 36 sums; V steps into [LANES] need one.
    """
    if V == 1:
        return (tl.reshape(x, [LANES]),)
    elif V == 2:
        return tl.split(tl.reshape(x, [LANES, 2]))
    elif V == 4:
        even, odd = tl.split(tl.reshape(x, [LANES, 2, 2]))
        return tl.split(even) + tl.split(odd)
    else:
        even, odd = tl.split(tl.reshape(x, [LANES, 2, 2, 2]))
        even_even, even_odd = tl.split(even)
        odd_even, odd_odd = tl.split(odd)
        return tl.split(even_even) + tl.split(even_odd) + tl.split(odd_even) + tl.split(odd_odd)


@triton.jit
def wide(x):
    """Return x in float64 if it is, else in float32, in which every narrower number can be compared."""
    if x.dtype == tl.float64:
        return x
    else:
        return x.to(tl.float32)


@triton.jit
def left_there(old, new, gradient, flag):
    """Tell which numbers the step wants where they are, given the parameter's flag and p.grad (1 if unknown)."""
    old, new = wide(old), wide(new)
    meant = (old == 0.0) | (wide(gradient) == 0.0)
    stays = (old == new) & ((flag == EVERY) | ((flag == MEANT) & meant))
    return stays | ((flag != 0) & (new == 0.0) & (old != 0.0))
