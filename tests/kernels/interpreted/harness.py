"""What tests of kernels in Triton's interpreter need: rows, guard pages, a log of what is read, rounding put right."""

import ctypes
import itertools
import mmap
from collections import Counter
from contextlib import contextmanager

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Odd, tiny and empty tensors; one vector of 16 bytes, one warp of 128 lanes, one block of 4 warps x 8 elements, less or
# more by one. The interpreter's time goes by operations, not elements: every size costs a program or two.
SIZES = [3, 0, 7, 8, 9, 129, 1023, 1025]


def make_rows(m, sizes, dtype=torch.float32, missing=0.0, seed=0):
    """Return m rows of gradients and tensors like the parameters; row i lacks some where `missing` says so."""
    generator = torch.Generator().manual_seed(seed)
    rows = [
        [
            None
            if torch.rand((), generator=generator) < missing
            else torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
            for size in sizes
        ]
        for _ in range(m)
    ]
    return rows, [torch.zeros(size, dtype=dtype) for size in sizes]


def round_bfloat16_to_nearest():
    """Make the interpreter round float32 to bfloat16 as the hardware does: it cuts off instead."""
    cast = interpreter.InterpreterBuilder.cast_impl

    def rounding(self, source, dtype):
        if source.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16:
            nearest = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.bfloat16)
            return interpreter.TensorHandle(nearest.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)
        return cast(self, source, dtype)

    interpreter.InterpreterBuilder.cast_impl = rounding


@contextmanager
def reads():
    """Collect how often each address is read by masked and plain loads, counting those that the mask lets through."""
    counts: Counter[int] = Counter()
    load = interpreter.InterpreterBuilder.create_masked_load

    def logging(self, pointers, mask, *rest):
        there = np.broadcast_to(pointers.data, mask.data.shape)[mask.data.astype(bool)]
        counts.update(there.ravel().tolist())
        return load(self, pointers, mask, *rest)

    interpreter.InterpreterBuilder.create_masked_load = logging
    try:
        yield counts
    finally:
        interpreter.InterpreterBuilder.create_masked_load = load


def times_read(counts, tensor):
    """Return the set of how often elements of a contiguous tensor were read."""
    start, step = tensor.data_ptr(), tensor.element_size()
    return {counts[start + i * step] for i in range(tensor.numel())}


_maps = []


def guarded(tensor):
    """Return a copy whose last byte is followed by a page that nobody may touch."""
    libc = ctypes.CDLL(None, use_errno=True)
    page = mmap.PAGESIZE
    size = tensor.numel() * tensor.element_size()
    length = -(-size // page) * page + page
    memory = mmap.mmap(-1, length)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(ctypes.c_void_p(base + length - page), page, 0) == 0
    _maps.append(memory)
    if size == 0:
        return tensor.clone()
    return torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=length - page - size).copy_(tensor)


def permuted(items, seed):
    """Return the rows of a table in another order."""
    return items[torch.randperm(len(items), generator=torch.Generator().manual_seed(seed))].contiguous()


def products(*choices):
    """Return all combinations, as a list for parametrize."""
    return list(itertools.product(*choices))


round_bfloat16_to_nearest()
