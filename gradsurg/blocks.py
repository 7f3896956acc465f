"""Walking over many tensors a cache-sized block at a time.

Gradients are read where autograd put them: large tensors in slices, without a copy; small ones packed together, so
that forty biases do not cost forty times the overhead of one call.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator, Sequence

import torch
from torch import Tensor

__all__ = ["BLOCK", "SMALL", "Block", "Pieces", "Workspace", "block_for", "blocks", "flat", "flat_column", "real_of"]

# CPU time on one core of an EPYC (512 KiB of L2), 4.2 M float32 a row, ms to convert + to multiply m rows in blocks of
# 4 096, 16 384, 32 768, 131 072: m = 4 24, 17, 18, 18; m = 8 63, 53, 50, 59.
BLOCK = 32_768
# With few tasks the calls count more than the cache, until the blocks of all rows have so many numbers: 20 M numbers a
# row, against the time of reading the rows twice and writing u once, in blocks of 32 768, 65 536, 131 072, 262 144:
# m = 2 1.9, 1.6, 1.6, 1.4; m = 4 2.1, 2.0, 1.8, 2.0; m = 8 3.1, 3.7, 4.1, 4.3.
TOGETHER, LARGEST = 262_144, 131_072
# Tensors below this are packed: copying 32 768 floats costs about as much as the Python calls it saves.
SMALL = 32_768

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
    """Yield the tensors of several parallel lists in blocks of at most about `size` elements.

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
            yield from ((tag, block) for block in _split(column, size, -(-count // size)))
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
    return max(BLOCK, min(TOGETHER // max(m, 1), LARGEST))


def _split(column: Sequence[Tensor | None], size: int, count: int) -> Iterator[list[Pieces]]:
    views = [None if t is None else t.view(-1).split(size) for t in column]
    for part in range(count):
        yield [[] if view is None else [view[part]] for view in views]


def _packed(columns: Sequence[Sequence[Tensor | None]], positions: list[int]) -> list[Pieces]:
    # One key means one pattern of None, so a list that has none at the first of these parameters has none at any.
    return [[] if row[0] is None else list(row) for row in zip(*[columns[k] for k in positions], strict=True)]


class Workspace(threading.local):
    """Buffers that blocks are brought into, kept from step to step, one set a thread.

    Memory that malloc hands out anew is touched for the first time in every step: 83 200 parameters in 40 tensors and
    four tasks took 3.2 ms for a Gramian with fresh buffers and 0.7 ms with warm ones.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}

    def buffer(self, slot: int, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a 1-D buffer; its content is whatever the last user of the slot left."""
        key = (slot, dtype, device)
        have = self._buffers.get(key)
        if have is None or have.numel() < size:
            have = self._buffers[key] = torch.empty(max(size, BLOCK + SMALL), dtype=dtype, device=device)
        return have[:size]

    def stack(self, slot: int, block: Sequence[Pieces], dtype: torch.dtype) -> Tensor:
        """Return a block as a matrix of `dtype`, one row for each list that has pieces."""
        present = [pieces for pieces in block if pieces]
        size, some = sum(piece.numel() for piece in present[0]), present[0][0]
        matrix = self.buffer(slot, len(present) * size, dtype, some.device).view(len(present), size)
        for row, pieces in zip(matrix.unbind(0), present, strict=True):
            row.copy_(flat(pieces))
        return matrix


def flat(pieces: Pieces) -> Tensor:
    """Return the pieces of a row as one 1-D tensor, a view where there is only one."""
    if len(pieces) == 1:
        return pieces[0].view(-1)
    # What DDP fills its buckets with, in one call: forty views in Python take three times as long. It copies in the
    # pieces' dtype, because converting element by element while gathering is four times slower than copy_ is after.
    flattened: Tensor = torch._utils._flatten_dense_tensors(pieces)
    return flattened
