"""Buffers that numbers are brought into to be multiplied, kept from step to step."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from gradsurg.linalg.blocks import BLOCK, SMALL, Pieces, flat

__all__ = ["BUFFERS", "LANE", "ROWS", "SUM", "Buffers", "Matrix", "inner_product", "products_with_last"]


# A product sums one number after the other, so the shorter its rows, the less is rounded away. The worst of 60 pairs of
# constant rows, as a share of the product: 1 024 numbers 1.4e-14, 2 048 2.8e-14, 4 096 5.7e-14, 16 384 2.3e-13. To the
# time of a stack of such products the length makes no difference from 1 024 to 16 384.
LANE = 4_096


# Lanes have a multiple of so many numbers, eight lines of cache, so that the last part of a tensor, which is a little
# shorter than the others, fits the same ones.
STEP = 64


class Buffers(threading.local):
    """One set of buffers a thread.

    Memory that malloc hands out anew is touched for the first time in every step: 83 200 parameters in 40 tensors and
    four tasks took 3.2 ms for a Gramian with fresh buffers and 0.7 ms with warm ones.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}
        self._latest: dict[int, tuple[object, Matrix]] = {}  # the last matrix of a slot

    def buffer(self, slot: int, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a 1-D buffer; its content is whatever the last user of the slot left."""
        key = (slot, dtype, device)
        have = self._buffers.get(key)
        if have is None or have.numel() < size:
            have = self._buffers[key] = torch.empty(max(size, BLOCK + SMALL), dtype=dtype, device=device)
        return have[:size]

    def matrix(self, slot: int, rows: int, size: int, device: torch.device) -> Matrix:
        """Return a buffer as a matrix for `size` numbers a row, to be written to `numbers` or `rows`.

        Blocks of about one size come one after the other, and steps do: for these it is the same matrix. A slot that
        has matrices must have nothing else.
        """
        count = -(-size // LANE)
        each = -(-size // count)
        each += -each % STEP
        key = rows, count, each, device
        latest = self._latest.get(slot)
        if latest is None or latest[0] != key:
            buffer = self.buffer(slot, rows * count * each, torch.float64, device)
            latest = self._latest[slot] = key, Matrix(buffer.view(rows, -1), count)
        latest[1].resize(size)
        return latest[1]

    def stack(self, slot: int, block: Sequence[Pieces]) -> Matrix:
        """Return a block as a matrix, one row for each list that has pieces."""
        present = [flat(pieces) for pieces in block if pieces]
        matrix = self.matrix(slot, len(present), present[0].numel(), present[0].device)
        torch._foreach_copy_(matrix.rows, present)
        return matrix


class Matrix:
    """Float64 numbers of several rows to be multiplied, and views of them: five take as long as to convert 30 000.

    Attributes:
        numbers: The numbers, shape (rows, size).
        rows: The numbers of each row.
        lanes: With zeros beyond them, as a stack of narrower matrices, shape (lanes, rows, numbers).
    """

    def __init__(self, whole: Tensor, count: int) -> None:
        self._whole, self._size = whole, -1
        self.lanes = whole.view(len(whole), count, -1).transpose(0, 1)
        self._strips: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def resize(self, size: int) -> None:
        """Have so many numbers a row, those that are there, and zeros beyond them."""
        if size != self._size:
            self._size = size
            self.numbers = self._whole[:, :size]
            self.rows = self.numbers.unbind(0)
            self._whole[:, size:].zero_()

    def strips(self, step: int) -> list[tuple[Tensor, Tensor]]:
        """Return lanes of `step` rows at a time, and of all rows up to there, transposed."""
        strips = self._strips.get(step)
        if strips is None:
            starts, lanes = range(0, len(self.rows), step), self.lanes
            strips = self._strips[step] = [(lanes[:, i : i + step], lanes[:, : i + step].mT) for i in starts]
        return strips


BUFFERS = Buffers()


ROWS, PRODUCT, SUM = range(3)  # slots of the workspace


def inner_product(a: Tensor, b: Tensor) -> float:
    """Return ⟨a, b⟩ of two float64 vectors of a block each, summed pairwise: off by 1e-16.

    In float32 quick sums would be off by 7e-5 on constant numbers, which nearly opposite tasks amplify beyond the
    promise of 1e-4.
    """
    return torch.mul(a, b, out=BUFFERS.buffer(PRODUCT, a.numel(), a.dtype, a.device)).sum().item()


def products_with_last(matrix: Matrix, exact: bool) -> list[float]:
    """Return ⟨row, last row⟩ for each row of a matrix, its own square as the last."""
    if exact:
        return [inner_product(row, matrix.rows[-1]) for row in matrix.rows]
    lanes = matrix.lanes
    # 98 304 numbers, m = 2 and the movement: 0.08 ms, as products of a matrix and a vector 0.15; m = 8 0.15 and 0.22.
    return torch.bmm(lanes[:, -1:], lanes.mT).sum(0).flatten().tolist()
