"""Float64 buffers in which rows are multiplied, kept from step to step; for the passes over the gradients."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from gradsurg.linalg.blocks import BLOCK, SMALL, Pieces, flat

__all__ = ["BUFFERS", "LANE", "ROWS", "SUM", "Buffers", "Matrix", "inner_product", "may_be_kept", "products_with_last"]

# A matrix product sums one number after the other, so shorter rows round less. The worst error of 60 pairs of constant
# rows, as a share of the product: 1 024 numbers 1.4e-14, 4 096 numbers 5.7e-14, 16 384 numbers 2.3e-13. The time of a
# stack of such products does not depend on the length between 1 024 and 16 384.
LANE = 4_096
# A lane has a multiple of this many numbers, eight cache lines. The last part of a tensor, which is a little shorter
# than the others, then fits the same lanes.
STEP = 64
# Slots: what a buffer is used for. No two uses at the same time may share one.
ROWS, PRODUCT, SUM = range(3)


class Matrix:
    """Float64 numbers of several rows, and views of them. Five views take as long as converting 30 000 numbers.

    Attributes:
        numbers: The numbers, shape (rows, size).
        rows: The numbers of each row.
        lanes: The numbers and zeros after them, as a stack of narrower matrices, shape (lanes, rows, numbers).
    """

    def __init__(self, whole: Tensor, count: int) -> None:
        self._whole, self._size = whole, -1
        self.lanes = whole.view(len(whole), count, -1).transpose(0, 1)
        self._strips: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def resize(self, size: int) -> None:
        """Set the number of columns; what lies beyond becomes zero."""
        if size != self._size:
            self._size = size
            self.numbers = self._whole[:, :size]
            self.rows = self.numbers.unbind(0)
            self._whole[:, size:].zero_()

    def strips(self, step: int) -> list[tuple[Tensor, Tensor]]:
        """Return, for each `step` rows, their lanes and the transposed lanes of all rows up to the last of them."""
        strips = self._strips.get(step)
        if strips is None:
            starts, lanes = range(0, len(self.rows), step), self.lanes
            strips = self._strips[step] = [(lanes[:, i : i + step], lanes[:, : i + step].mT) for i in starts]
        return strips


class Buffers(threading.local):
    """One set of buffers per thread.

    The system maps fresh memory on its first touch. A Gramian of 83 200 parameters in 40 tensors and four tasks took
    3.2 ms with fresh buffers and 0.7 ms with kept ones.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}
        # The last matrix of each slot and its shape.
        self._latest: dict[int, tuple[object, Matrix]] = {}

    def buffer(self, slot: int, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a 1-D buffer; it holds whatever the last user of the slot left there."""
        key = (slot, dtype, device)
        have = self._buffers.get(key)
        if have is None or have.numel() < size:
            have = torch.empty(max(size, BLOCK + SMALL), dtype=dtype, device=device)
            if may_be_kept(have):
                self._buffers[key] = have
        return have[:size]

    def matrix(self, slot: int, rows: int, size: int, device: torch.device) -> Matrix:
        """Return a buffer as a matrix of `size` numbers per row; write to its `numbers` or `rows`.

        A slot that has matrices must have nothing else.
        """
        count = -(-size // LANE)
        each = -(-size // count)
        each += -each % STEP
        # Blocks of about one size follow each other, and so do steps: all of these reuse one matrix and its views.
        key = rows, count, each, device
        latest = self._latest.get(slot)
        if latest is None or latest[0] != key:
            buffer = self.buffer(slot, rows * count * each, torch.float64, device)
            latest = key, Matrix(buffer.view(rows, -1), count)
            if may_be_kept(buffer):
                self._latest[slot] = latest
        latest[1].resize(size)
        return latest[1]

    def stack(self, slot: int, block: Sequence[Pieces]) -> Matrix:
        """Return a block as a matrix, one row for each list that has pieces."""
        present = [flat(pieces) for pieces in block if pieces]
        matrix = self.matrix(slot, len(present), present[0].numel(), present[0].device)
        torch._foreach_copy_(matrix.rows, present)
        return matrix


BUFFERS = Buffers()


def may_be_kept(tensor: Tensor) -> bool:
    """Whether a tensor works outside the mode that it was made in, unlike in inference_mode or FakeTensorMode."""
    return type(tensor) is Tensor and not tensor.is_inference()


def inner_product(a: Tensor, b: Tensor) -> float:
    """Return ⟨a, b⟩ of two float64 vectors of one block each, summed pairwise: relative error 1e-16.

    In float32, a running sum of constant numbers would be off by 7e-5. Nearly opposite tasks amplify that beyond the
    promised 1e-4.
    """
    return torch.mul(a, b, out=BUFFERS.buffer(PRODUCT, a.numel(), a.dtype, a.device)).sum().item()


def products_with_last(matrix: Matrix, exact: bool) -> list[float]:
    """Return ⟨row, last row⟩ for each row of a matrix; the last one is its square."""
    if exact:
        return [inner_product(row, matrix.rows[-1]) for row in matrix.rows]
    # 98 304 numbers take 0.08 ms at m = 2 and 0.15 ms at m = 8; as matrix-vector products 0.15 and 0.22 ms.
    lanes = matrix.lanes
    return torch.bmm(lanes[:, -1:], lanes.mT).sum(0).flatten().tolist()
