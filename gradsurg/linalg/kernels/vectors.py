"""What the kernels that read gradients share: where a row starts, and the elements that one thread holds.

Each thread loads 16 bytes of a row at once. What Triton needs to see for that (read from SASS, one at a time): the
divisibility on the pointer, after the cast from the address; and a mask that is constant over the 16 bytes, that is a
bound written as (n // V) * V, taken last.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment, var-annotated"
# ruff: noqa: RET505
# Kernels are written in Triton's language: its types and idioms are not Python's.

import triton
import triton.language as tl

__all__ = ["HOLD", "LEAVE", "WRITE", "lanes", "row_start"]

# What happens to a block of parameters, decided on the device: nothing; out = start + Σ w_i g_i; out = before.
LEAVE = tl.constexpr(0)
WRITE = tl.constexpr(1)
HOLD = tl.constexpr(2)


@triton.jit
def row_start(address, first, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return a pointer to element `first` (int64) of the tensor at `address`."""
    start = address.to(tl.pointer_type(DTYPE)) + first
    if ALIGNED:
        start = tl.multiple_of(start, 16)
    return start


@triton.jit
def lanes(x, LANES: tl.constexpr, V: tl.constexpr):
    """Return V tensors of LANES elements, the v-th holding every thread's v-th element: no data moves.

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
