"""The Gramian while it is summed up, block by block."""

from __future__ import annotations

import torch
from torch import Tensor

from gradsurg.blocks import BLOCK
from gradsurg.products import DOT_RUN, RUN, inner_product

__all__ = ["MANY_FROM", "MATMUL_FROM", "Long", "Symmetric", "strip_for"]

# From here on a matrix product of a block beats m(m+1)/2 dot products: CPU ms on one core of an EPYC, 4.2 M numbers in
# float64, dots against product, m = 2 3.7 : 4.0, m = 4 15 : 11, m = 8 52 : 37.
MATMUL_FROM = 4
# A product's lower half is computed in strips of so many rows: few; a few more, for fewer calls, in short blocks; many
# where there are many. ns a number, in strips of 2, 4, 12 and 24 rows and whole, for blocks of 50 000: m = 8 0.81, 0.80
# (whole 1.03); m = 16 1.40, 1.37, 1.47 (1.69); m = 32 3.2, 3.2, 2.5, 2.8 (3.2); m = 64 6.3, 7.8, 5.3, 3.9 (4.4). With
# the conversion to float64 in between, in strips of 2 and 4: m = 4 0.91, 1.00; m = 8 1.11, 1.16.
FEW, SHORT, MANY = 2, 4, 24
MANY_FROM = 21


class Symmetric:
    """The lower half of a symmetric m x m float64 matrix: dot products in Python floats, matrix products in tensors."""

    def __init__(self, m: int) -> None:
        self.m = m
        self.entries = [[0.0] * m for _ in range(m)]
        self.lost = [[0.0] * m for _ in range(m)]  # what the entries' additions rounded away
        self.mixed = False  # whether there is anything in the entries
        self.squares: dict[tuple[int, ...], Long] = {}  # the products of the tasks that blocks have together
        self._prepared: tuple[object, list[tuple[Tensor, Tensor, Tensor]]] = (None, [])

    def add(self, present: list[int], stacked: Tensor, exact: bool) -> None:
        """Add the inner products of the rows of a float64 matrix, which belong to these tasks."""
        if not exact and _use_matmul(len(present), stacked.device):
            tasks = tuple(present)
            for sums, strip, before in self._strips(tasks, stacked):
                sums.addmm_(strip, before)
            self.squares[tasks].added()
            return
        # Cut here and not once a pair: three pairs of rows of 131 072 take 40 µs to cut, and 80 to multiply.
        for part in [stacked] if exact or stacked.shape[1] <= DOT_RUN else stacked.split(DOT_RUN, dim=1):
            rows = part.unbind(0)
            for a, i in enumerate(present):
                for b, j in enumerate(present[: a + 1]):
                    self.put(i, j, inner_product(rows[a], rows[b], exact))

    def put(self, i: int, j: int, value: float) -> None:
        """Add to one entry, i ≥ j; thousands of blocks are summed as exactly as one."""
        self.mixed = True
        old = self.entries[i][j]
        self.entries[i][j] = new = old + value
        kept = new - old
        self.lost[i][j] += (old - (new - kept)) + (value - kept)

    def _strips(self, tasks: tuple[int, ...], stacked: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return strips of the sums, of the rows, and the rows up to there, of which they are the product.

        Blocks of one size come one after the other in one buffer, and views of it cost more than a product's call: the
        last ones are kept, and with them the memory, so that the address stands for it.
        """
        key = tasks, stacked.shape, stacked.data_ptr()
        if key != self._prepared[0]:
            m, size = stacked.shape
            if tasks not in self.squares:
                self.squares[tasks] = Long(m, stacked.device)
            square, step = self.squares[tasks].running, strip_for(m, size)
            runs = -(-size // RUN) if stacked.device.type == "cpu" else 1
            strips = [
                (square[i : i + step, : i + step], part[i : i + step], part[: i + step].T)
                for part in (stacked.split(-(-size // runs), dim=1) if runs > 1 else [stacked])
                for i in range(0, m, step)
            ]
            self._prepared = key, strips
        return self._prepared[1]

    def result(self) -> Tensor:
        """Return the whole matrix, exactly symmetric."""
        squares = {tasks: square.total() for tasks, square in self.squares.items()}
        lower = squares.pop(tuple(range(self.m)), None)
        if lower is None or self.mixed:
            sums, lost = torch.tensor([self.entries, self.lost], dtype=torch.float64).view(2, self.m, self.m)
            entries = sums.add_(lost.nan_to_num_(0))  # of an infinite entry nothing is lost
            lower = entries if lower is None else lower + entries.to(lower.device)
        for tasks, square in squares.items():
            index = torch.tensor(tasks, device=square.device)
            lower = lower.to(square.device)
            lower[index[:, None], index] += square
        return lower.tril() + lower.tril(-1).T


class Long:
    """A long sum of m x m float64 matrices: short running sums, added pairwise at the end.

    One running sum of the 6 000 products of 100 M numbers may be off by 6e-13, and these by 2e-14.
    """

    SHORT, MOST = 16, 64  # blocks in a running sum; sums kept

    def __init__(self, m: int, device: torch.device) -> None:
        self.running = torch.zeros(m, m, dtype=torch.float64, device=device)
        self._count = 0
        self._done: list[Tensor] = []

    def added(self) -> None:
        """Say that a block was added to what is running."""
        self._count += 1
        if self._count == self.SHORT:
            self._done.append(self.running.clone())
            self.running.zero_()
            self._count = 0
            if len(self._done) == self.MOST:
                self._done = [torch.stack(self._done).sum(0)]

    def total(self) -> Tensor:
        """Return the sum of all."""
        return torch.stack([*self._done, self.running]).sum(0) if self._done else self.running


def strip_for(m: int, size: int) -> int:
    """Return how many rows of an m x size block are multiplied at a time."""
    return MANY if m >= MANY_FROM else FEW if size >= BLOCK else SHORT


def _use_matmul(m: int, device: torch.device) -> bool:
    return device.type != "cpu" or m >= MATMUL_FROM
