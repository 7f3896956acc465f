"""Walks over many tensors one cache-sized block at a time; for all of linalg.

Large tensors are read in slices where autograd put them, without a copy. Small ones are packed together, so that forty
biases don't cost forty times the overhead of one call.
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

# m lists of one gradient per parameter; None if the task did not reach it.
Rows = Sequence[Sequence["Tensor | None"]]
# One 1-D tensor per row; and the tensors that make up one row of a block.
Block = list["Tensor | None"]
Pieces = list[Tensor]

# Small tensors are packed until a block has this many numbers.
BLOCK = 32_768
# Smaller tensors are packed: copying 32 768 floats costs about as much as the Python calls it saves.
SMALL = 32_768
# Large tensors are cut so that the blocks of all rows have TOGETHER numbers, 6 MiB in float64. Larger blocks need fewer
# calls, until they leave the cache (32 MiB of L3 for several machines). Time of a Gramian of 10 M numbers on one core
# of an EPYC, in ns per number:
#   block   16 384  32 768  65 536  98 304  131 072  262 144
#   m = 1      1.6     1.2     0.9     0.8      0.8      0.7
#   m = 8      1.5     1.3     1.2     1.2      1.3      1.5
#   m = 32     2.8     3.2     3.6     3.7      3.7      3.7
TOGETHER, LEAST, LARGEST = 786_432, 16_384, 131_072
# Numbers of 32 bits in one cache line, which no two parts share.
LINE = 16


def block_for(m: int) -> int:
    """Return the size of the blocks in which m rows are multiplied."""
    return max(LEAST, min(TOGETHER // max(m, 1), LARGEST))


def blocks(
    lists: Sequence[Sequence[Tensor | None]], tags: Sequence[Hashable] | None = None, *, size: int = BLOCK
) -> Iterator[tuple[Hashable, list[Pieces]]]:
    """Yield the tensors of several parallel lists in blocks of about `size` elements.

    Args:
        lists: n lists of one tensor (or None) per parameter; lists[i][k] and lists[j][k] have equal shapes.
        tags: One value per parameter; parameters of different tags never share a block.
        size: Large tensors are cut into parts of this size; small ones are packed until there are BLOCK numbers.

    Yields:
        (tag, block): block[i] holds the 1-D pieces of list i: one of a large tensor, or several small ones. It is empty
        if lists[i] has None there.
    """
    # Positions of small parameters that may share a block, and how many numbers they have.
    pending: dict[Hashable, list[int]] = {}
    sizes: dict[Hashable, int] = {}
    columns: list[Sequence[Tensor | None]] = list(zip(*lists, strict=True))
    for k, column in enumerate(columns):
        some, packable = None, True
        for t in column:
            if t is not None:
                some = t
                packable = packable and t.is_contiguous()
        if some is None or (count := some.numel()) == 0:
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


def _packed(columns: Sequence[Sequence[Tensor | None]], positions: list[int]) -> list[Pieces]:
    # One key means one pattern of None: a list without the first of these parameters has none of them.
    return [[] if row[0] is None else list(row) for row in zip(*[columns[k] for k in positions], strict=True)]


def cut(views: Sequence[Tensor], size: int) -> Iterator[Sequence[Tensor]]:
    """Yield 1-D tensors of equal length in equal parts of about `size` elements, at most half as many again.

    A short last part costs as many calls as a long one, and splitting a tensor into one part costs 5 µs.
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


def flat(pieces: Pieces) -> Tensor:
    """Return the pieces of a row as one 1-D tensor; a view if there is only one."""
    if len(pieces) == 1:
        return pieces[0] if pieces[0].ndim == 1 else pieces[0].view(-1)
    # DDP fills its buckets by this one call; forty views in Python take three times as long. The copy keeps the pieces'
    # dtype, because converting each element while gathering is four times slower than copy_ afterwards.
    flattened: Tensor = torch._utils._flatten_dense_tensors(pieces)
    return flattened


def flat_column(column: Sequence[Tensor | None]) -> Block:
    """Return 1-D views of the tensors of one parameter, all in the same order of elements.

    Tensors that are dense with equal strides (channels_last, transposed) are flattened in storage order, so that
    nothing is copied. Complex tensors become twice as many real numbers, so that Re⟨a, b⟩ is the plain dot product.
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


def real_of(tensor: Tensor) -> Tensor:
    """Return a complex tensor as pairs of real numbers, and any other tensor unchanged."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
