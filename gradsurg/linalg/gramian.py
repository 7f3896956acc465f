"""The Gramian of the rows: the first pass over the gradients.

Its plain float64 twin is in reference.py. On a device other than the CPU the same code runs, block by block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradsurg.linalg import sparse
from gradsurg.linalg.blocks import Rows, block_for, blocks
from gradsurg.linalg.buffers import BUFFERS, ROWS, Matrix, inner_product
from gradsurg.linalg.packing import packed

__all__ = ["MANY_FROM", "GramianSum", "PairwiseSum", "gramian"]

# The lower half of a product is computed in strips of FEW rows, or of MANY from MANY_FROM tasks on. Time on one core of
# an EPYC, in ns per number:
#   strips of     2     4     8    24
#   m = 8       6.4   7.0   8.5
#   m = 16       24    29    27    31
#   m = 24       51    61    50    47
#   m = 64      342   419   286   229
FEW, MANY = 2, 24
MANY_FROM = 21


@torch.no_grad()
def gramian(rows: Rows, *, exact: bool = False) -> Tensor:
    """Return G_ij = ⟨g_i, g_j⟩ over all parameters.

    Args:
        rows: m lists of one gradient per parameter (dense or sparse, real or complex, any floating dtype) or None.
        exact: Sum pairwise: good to a few units of 1e-16 of ‖g_i‖ ‖g_j‖, at twice the time. Otherwise up to 4 096
            numbers at a time are summed one after the other: 6e-14 at worst, on constant rows.

    Returns:
        Shape (m, m), float64, symmetric, on the CPU, as everything of m numbers outside of the kernels is.
    """
    m = len(rows)
    total = GramianSum(m)
    small = packed(rows)
    if small is not None:
        for matrix in small.wide():
            total.add(list(range(m)), matrix, exact)
        if not small.others:
            return total.result()
        rows = small.rest
    rows, columns = sparse.split(rows)
    for _, block in blocks(rows, size=block_for(m)):
        present = [i for i, pieces in enumerate(block) if pieces]
        total.add(present, BUFFERS.stack(ROWS, block), exact)
    for column in columns:
        for i, a in enumerate(column):
            for j, b in enumerate(column[: i + 1]):
                if a is not None and b is not None:
                    total.put(i, j, sparse.dot(a, b))
    return total.result()


class GramianSum:
    """The lower half of a symmetric m x m float64 matrix, as a sum over blocks.

    Quick products are summed as tensors, one sum per set of tasks and number of lanes; exact ones as single numbers.
    """

    def __init__(self, m: int) -> None:
        self.m = m
        # Single numbers, if there are any, and what their additions rounded away.
        self.entries: list[list[float]] | None = None
        self.lost: list[list[float]] = []
        self.strips: dict[tuple[tuple[int, ...], int], list[PairwiseSum]] = {}

    def add(self, present: list[int], matrix: Matrix, exact: bool) -> None:
        """Add the inner products of a matrix's rows, which belong to the tasks `present`."""
        if exact:
            for a, i in enumerate(present):
                for b, j in enumerate(present[: a + 1]):
                    self.put(i, j, inner_product(matrix.rows[a], matrix.rows[b]))
            return
        strips = matrix.strips(MANY if len(present) >= MANY_FROM else FEW)
        key = tuple(present), len(matrix.lanes)
        if key not in self.strips:
            self.strips[key] = [PairwiseSum() for _ in strips]
        for long, (strip, before) in zip(self.strips[key], strips, strict=True):
            long.add(strip, before)

    def put(self, i: int, j: int, value: float) -> None:
        """Add to one entry, i ≥ j, with compensation: thousands of blocks are summed as exactly as one."""
        if self.entries is None:
            self.entries, self.lost = ([[0.0] * self.m for _ in range(self.m)] for _ in range(2))
        old = self.entries[i][j]
        self.entries[i][j] = new = old + value
        kept = new - old
        self.lost[i][j] += (old - (new - kept)) + (value - kept)

    def result(self) -> Tensor:
        """Return the whole matrix, exactly symmetric, on the CPU."""
        parts = [(tasks, _joined([strip.total() for strip in strips])) for (tasks, _), strips in self.strips.items()]
        if len(parts) == 1 and len(parts[0][0]) == self.m and self.entries is None:
            lower = parts[0][1]
        else:
            lower = torch.zeros(self.m, self.m, dtype=torch.float64, device=parts[0][1].device if parts else None)
            for tasks, square in parts:
                index = torch.tensor(tasks, device=lower.device)
                lower[index[:, None], index] += square.to(lower.device)
            if self.entries is not None:
                sums, lost = torch.tensor([self.entries, self.lost], dtype=torch.float64).to(lower.device)
                # The loss of an infinite entry is NaN, and counts as 0.
                lower += sums.add_(lost.nan_to_num_(0))
        return lower.tril().add_(lower.tril(-1).T).cpu()


class PairwiseSum:
    """A long sum of float64 matrices: short running sums of lanes, added pairwise at the end.

    One running sum of the 6 000 products of 100 M numbers may be off by 6e-13; these are off by 2e-14.
    """

    # Blocks in one running sum, and the number of running sums that are kept before they are added up.
    SHORT, MOST = 16, 64

    def __init__(self) -> None:
        self._running: Tensor | None = None
        self._count = 0
        self._done: list[Tensor] = []

    def add(self, a: Tensor, b: Tensor) -> None:
        """Add the products of two stacks of matrices."""
        self._running = torch.bmm(a, b) if self._running is None else self._running.baddbmm_(a, b)
        self._count += 1
        if self._count == self.SHORT:
            self._done.append(self._running.sum(0))
            self._running, self._count = None, 0
            if len(self._done) == self.MOST:
                self._done = [torch.stack(self._done).sum(0)]

    def total(self) -> Tensor:
        """Return the sum; something must have been added."""
        sums = self._done if self._running is None else [*self._done, self._running.sum(0)]
        return sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)


def _joined(strips: list[Tensor]) -> Tensor:
    """Return strips of the lower half, each wider than the one before, as one square matrix."""
    if len(strips) == 1:
        return strips[0]
    m = strips[-1].shape[1]
    return torch.cat([torch.nn.functional.pad(strip, (0, m - strip.shape[1])) for strip in strips])
