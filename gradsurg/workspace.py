"""Buffers that numbers are brought into to be multiplied, kept from step to step."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from gradsurg.blocks import BLOCK, SMALL, Pieces, flat

__all__ = ["LANE", "Workspace", "lanes"]

# A product sums one number after the other, so the shorter its rows, the less is rounded away. The worst of 60 pairs of
# constant rows, as a share of the product: 1 024 numbers 1.4e-14, 2 048 2.8e-14, 4 096 5.7e-14, 16 384 2.3e-13. To the
# time of a stack of such products the length makes no difference from 1 024 to 16 384.
LANE = 4_096
# Lanes have a multiple of so many numbers, eight lines of cache: parts of a tensor, the last of which is a little
# shorter than the others, are then matrices of one shape.
STEP = 64


class Workspace(threading.local):
    """One set of buffers a thread.

    Memory that malloc hands out anew is touched for the first time in every step: 83 200 parameters in 40 tensors and
    four tasks took 3.2 ms for a Gramian with fresh buffers and 0.7 ms with warm ones.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}
        self._latest: dict[int, tuple[object, Tensor, tuple[Tensor, ...]]] = {}  # a slot's last matrix and its rows

    def buffer(self, slot: int, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a 1-D buffer; its content is whatever the last user of the slot left."""
        key = (slot, dtype, device)
        have = self._buffers.get(key)
        if have is None or have.numel() < size:
            have = self._buffers[key] = torch.empty(max(size, BLOCK + SMALL), dtype=dtype, device=device)
        return have[:size]

    def matrix(self, slot: int, rows: int, size: int, device: torch.device) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return a float64 buffer as a matrix for `lanes` and its rows, `size` numbers each; beyond them it is zero.

        Blocks of one size come one after the other, and five views take as long as to convert 30 000 numbers: as long
        as the same is asked for, these are the same tensors. A slot that has matrices must have nothing else.
        """
        key = rows, size, device
        latest = self._latest.get(slot)
        if latest is None or latest[0] != key:
            count = _lanes_in(size)
            each = -(-size // count)
            width = count * (each + -each % STEP)
            matrix = self.buffer(slot, rows * width, torch.float64, device).view(rows, width)
            matrix[:, size:].zero_()
            latest = self._latest[slot] = key, matrix, matrix[:, :size].unbind(0)
        return latest[1], latest[2]

    def stack(self, slot: int, block: Sequence[Pieces]) -> Tensor:
        """Return a block as a float64 matrix for `lanes`, one row for each list that has pieces."""
        present = [flat(pieces) for pieces in block if pieces]
        matrix, rows = self.matrix(slot, len(present), present[0].numel(), present[0].device)
        torch._foreach_copy_(rows, present)
        return matrix


def lanes(matrix: Tensor) -> Tensor:
    """Return a matrix of a workspace as a stack of narrower ones, shape (lanes, rows, numbers), without a copy."""
    rows, width = matrix.shape
    count = _lanes_in(width)
    return matrix.view(rows, count, width // count).transpose(0, 1)


def _lanes_in(size: int) -> int:
    return max(-(-size // LANE), 1)
