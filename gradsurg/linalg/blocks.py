"""Walking over many tensors a cache-sized block at a time.

Gradients are read where autograd put them: large tensors in slices, without a copy; small ones packed together, so
that forty biases do not cost forty times the overhead of one call.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

import torch
from torch import Tensor

__all__ = [
    "BLOCK",
    "SMALL",
    "Block",
    "Pieces",
    "Rows",
    "block_for",
    "blocks",
    "cut",
    "evenly",
    "flat",
    "flat_column",
    "real_of",
]


# Small tensors are packed until there are so many numbers.
BLOCK = 32_768


# Large tensors are cut so that the blocks of all rows have TOGETHER numbers, 6 MiB in float64: the fewer calls, the
# better, until they leave the cache (32 MiB of L3 for several machines). CPU ns a number on one core of an EPYC for the
# Gramian of 10 M numbers in blocks of 16 384, 32 768, 65 536, 98 304, 131 072, 262 144: m = 1 1.6, 1.2, 0.9, 0.8, 0.8,
# 0.7; m = 4 1.2, 1.1, 1.0, 1.0, 1.0, 1.0; m = 8 1.5, 1.3, 1.2, 1.2, 1.3, 1.5; m = 16 2.0, 2.0, 1.9, 1.9, 2.3, 3.0;
# m = 32 2.8, 3.2, 3.6, 3.7, 3.7, 3.7.
TOGETHER, LEAST, LARGEST = 786_432, 16_384, 131_072


# Tensors below this are packed: copying 32 768 floats costs about as much as the Python calls it saves.
SMALL = 32_768


LINE = 16  # numbers of 32 bits in a line of cache, which no two parts share


Block = list["Tensor | None"]


Pieces = list[Tensor]


def real_of(tensor: Tensor) -> Tensor:
    """Return a complex tensor as pairs of real numbers, and any other as it is."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def flat_column(column: Sequence[Tensor | None]) -> Block:
    """Return 1-D views of the tensors of one parameter, all in the same order of elements.

    Tensors that are dense with equal strides (channels_last, transposed) are flattened in storage order, so that
    nothing is copied. Complex tensors appear as twice as many real numbers: Re⟨a, b⟩ is then the plain dot product.
    """
    present = [t for t in column if t is not None]
    if all(t.is_contiguous() and not t.is_complex() for t in present):
        return [None if t is None else t.view(-1) for t in column]
    column = [None if t is None else real_of(t) for t in column]
    strides = {t.stride() for t in column if t is not None}
    if len(strides) == 1:
        (stride,) = strides
        by_stride = sorted(range(len(stride)), key=lambda d: -stride[d])
        in_order = [None if t is None else t.permute(by_stride) for t in column]
        if all(t is None or t.is_contiguous() for t in in_order):
            return [None if t is None else t.view(-1) for t in in_order]
    return [None if t is None else t.reshape(-1) for t in column]


def blocks(
    lists: Sequence[Sequence[Tensor | None]], tags: Sequence[Hashable] | None = None, *, size: int = BLOCK
) -> Iterator[tuple[Hashable, list[Pieces]]]:
    """Yield the tensors of several parallel lists in blocks of about `size` elements.

    Args:
        lists: n lists of one tensor (or None) per parameter; lists[i][k] and lists[j][k] have equal shapes.
        tags: One value per parameter; parameters of different tags never share a block.
        size: What large tensors are cut into; small ones are packed until there are BLOCK.

    Yields:
        (tag, block): block[i] holds the 1-D pieces of list i, one of a large tensor or several small ones; it is empty
        where lists[i] has None there.
    """
    pending: dict[Hashable, list[int]] = {}  # positions of small parameters that can share a block
    sizes: dict[Hashable, int] = {}
    columns: list[Sequence[Tensor | None]] = list(zip(*lists, strict=True))
    for k, column in enumerate(columns):
        some, packable = None, True
        for t in column:
            if t is not None:
                some = t
                packable = packable and t.is_contiguous()
        if some is None:
            continue
        count = some.numel()
        if count == 0:
            continue
        if not packable or some.is_complex():
            columns[k] = column = flat_column(column)
            count = next(t.numel() for t in column if t is not None)
        tag = None if tags is None else tags[k]
        if count >= SMALL:
            views = [t.view(-1) for t in column if t is not None]
            for parts in cut(views, size):
                pieces = iter(parts)
                yield tag, [[] if t is None else [next(pieces)] for t in column]
            continue
        key: Hashable = (tag, some.device, *[None if t is None else t.dtype for t in column])
        if key not in pending:
            pending[key], sizes[key] = [], 0
        pending[key].append(k)
        sizes[key] += count
        if sizes[key] >= BLOCK:
            yield tag, _packed(columns, pending.pop(key))
    for key, positions in pending.items():
        assert isinstance(key, tuple)
        yield key[0], _packed(columns, positions)


def block_for(m: int) -> int:
    """Return the size of blocks that m rows are multiplied in."""
    return max(LEAST, min(TOGETHER // max(m, 1), LARGEST))


def cut(views: Sequence[Tensor], size: int) -> Iterator[Sequence[Tensor]]:
    """Yield 1-D tensors of equal length in equal parts of about `size` elements, at most half as many again.

    A short last part costs as many calls as a long one, and splitting one tensor into itself 5 µs.
    """
    count = views[0].numel()
    even = evenly(count, size)
    if even == count:
        yield views
        return
    yield from zip(*[view.split(even) for view in views], strict=True)


def evenly(count: int, size: int) -> int:
    """Return the length of equal parts of about `size` elements."""
    parts = round(count / size)
    if parts <= 1:
        return count
    even = -(-count // parts)
    return even + -even % LINE


def _packed(columns: Sequence[Sequence[Tensor | None]], positions: list[int]) -> list[Pieces]:
    # One key means one pattern of None, so a list that has none at the first of these parameters has none at any.
    return [[] if row[0] is None else list(row) for row in zip(*[columns[k] for k in positions], strict=True)]


def flat(pieces: Pieces) -> Tensor:
    """Return the pieces of a row as one 1-D tensor, a view where there is only one."""
    if len(pieces) == 1:
        return pieces[0] if pieces[0].ndim == 1 else pieces[0].view(-1)
    # What DDP fills its buckets with, in one call: forty views in Python take three times as long. It copies in the
    # pieces' dtype, because converting element by element while gathering is four times slower than copy_ is after.
    flattened: Tensor = torch._utils._flatten_dense_tensors(pieces)
    return flattened


Rows = Sequence[Sequence["Tensor | None"]]
