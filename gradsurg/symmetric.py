"""The Gramian while it is summed up, block by block."""

from __future__ import annotations

import torch
from torch import Tensor

from gradsurg.products import inner_product

__all__ = ["MATMUL_FROM", "Symmetric"]

# From here on a matrix product of a block beats m(m+1)/2 dot products: CPU ms on one core of an EPYC, 4.2 M numbers in
# float64, dots against product, m = 2 3.7 : 4.0, m = 4 15 : 11, m = 8 52 : 37.
MATMUL_FROM = 4
# A product's lower half is computed in strips of so many rows, few up to 12 tasks: ms for 164 000 numbers, in strips of
# 4, 8, 16 rows and whole: m = 8 1.33, 1.69 (whole); m = 16 5.0, 4.7, 4.7 (whole); m = 64 66, 47, 40, 47 (whole).
FEW, MANY = 4, 16


class Symmetric:
    """The lower half of a symmetric m x m float64 matrix: dot products in Python floats, matrix products in one."""

    def __init__(self, m: int) -> None:
        self.m = m
        self.entries = [[0.0] * m for _ in range(m)]
        self.tensor: Tensor | None = None
        self.mixed = False  # whether there is anything in the entries

    def add(self, present: list[int], stacked: Tensor, exact: bool) -> None:
        """Add the inner products of the rows of a float64 matrix, which belong to these tasks."""
        if not exact and _use_matmul(len(present), stacked.device):
            self._add_square(present, stacked)
            return
        self.mixed = True
        rows = stacked.unbind(0)
        for a, i in enumerate(present):
            for b, j in enumerate(present[: a + 1]):
                self.entries[i][j] += inner_product(rows[a], rows[b], exact)

    def _add_square(self, present: list[int], stacked: Tensor) -> None:
        if self.tensor is None:
            self.tensor = torch.zeros(self.m, self.m, dtype=torch.float64, device=stacked.device)
        if len(present) == self.m:
            step = FEW if self.m <= 3 * FEW else MANY
            for i in range(0, self.m, step):
                self.tensor[i : i + step, : i + step].addmm_(stacked[i : i + step], stacked[: i + step].T)
        else:
            index = torch.tensor(present, device=stacked.device)
            self.tensor[index[:, None], index] += stacked @ stacked.T

    def result(self) -> Tensor:
        """Return the whole matrix, exactly symmetric."""
        lower = self.tensor
        if lower is None or self.mixed:
            entries = torch.tensor(self.entries, dtype=torch.float64).reshape(self.m, self.m)
            lower = entries if lower is None else lower + entries.to(lower.device)
        return lower.tril() + lower.tril(-1).T


def _use_matmul(m: int, device: torch.device) -> bool:
    return device.type != "cpu" or m >= MATMUL_FROM
