"""Gramians and inner products over all ranks, for the layouts of distributed training."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gradsurg.linalg.blocks import Rows, real_of
from gradsurg.linalg.gramian import gramian
from gradsurg.linalg.moved import gramian_moved
from gradsurg.linalg.movement import inner_update

__all__ = ["Measure"]


class Measure:
    """Gramian and inner products of some parameters, over all ranks.

    `cuts` has, per parameter, the part of the flattened tensor that this rank counts if other ranks hold the same
    numbers (None: all of it). `total` adds up a small tensor over the ranks; it is None if there is only one.
    """

    def __init__(
        self,
        cuts: Sequence[slice | None] | None = None,
        total: Callable[[Tensor], Tensor] | None = None,
        gather: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._cuts, self._total, self._gather = cuts, total, gather

    @property
    def alone(self) -> bool:
        """Whether this process holds and counts every number."""
        return self._cuts is None and self._total is None

    def counted(self, rows: Rows) -> Rows:
        """Return the part of its rows that this rank counts."""
        return [self._counted(row) for row in rows] if self._cuts is not None else rows

    def gramian(self, rows: Rows, *, exact: bool = False) -> Tensor:
        """Return the Gramian of the whole rows; see gramian.gramian."""
        return self._sum(gramian(self.counted(rows), exact=exact))

    def inner_update(
        self,
        rows: Rows,
        before: Sequence[Tensor],
        after: Sequence[Tensor],
        signs: Sequence[float],
        *,
        exact: bool = False,
    ) -> tuple[Tensor, float]:
        """Return ⟨d, g_i⟩ and ‖d‖² of the whole rows and parameters; see movement.inner_update."""
        if self.alone:
            return inner_update(rows, before, after, signs, exact=exact)
        old, new = self._counted(before), self._counted(after)
        inner, square = inner_update(self.counted(rows), old, new, signs, exact=exact)  # type: ignore[arg-type]
        numbers = self._sum(torch.cat([inner, inner.new_tensor([square])]))
        return numbers[:-1], float(numbers[-1])

    def gramian_moved(
        self,
        rows: Rows,
        before: Sequence[Tensor],
        after: Sequence[Tensor],
        metric: Sequence[float],
        left: Sequence[Tensor | None],
    ) -> tuple[Tensor, float]:
        """Return the Gramian of the whole rows in a step's metric, and the step's length; see moved.gramian_moved."""
        old, new = self._counted(before), self._counted(after)
        G, square = gramian_moved(self.counted(rows), old, new, metric, self._counted(left))  # type: ignore[arg-type]
        numbers = self._sum(torch.cat([G.flatten(), G.new_tensor([square])]))
        return numbers[:-1].view_as(G), float(numbers[-1])

    def any_rank(self, here: bool) -> bool:
        """Return whether `here` is true on any rank."""
        return here if self._total is None else bool(self._total(torch.tensor([float(here)], dtype=torch.float64)))

    def highest(self, numbers: Tensor) -> Tensor:
        """Return the highest over all ranks, number by number."""
        return numbers if self._gather is None else self._gather(numbers).amax(0)

    def nonzero(self, rows: Rows) -> list[bool]:
        """Return, for each row, whether any rank has a number other than 0 in it."""
        here = [any(g is not None and bool(g.any()) for g in row) for row in rows]
        return [bool(count) for count in self._sum(torch.tensor(here, dtype=torch.float64))]

    def norm(self, tensors: Sequence[Tensor]) -> float:
        """Return the Euclidean length of the whole tensors, taken as one vector."""
        real = [real_of(t) for t in self._counted(tensors) if t is not None]
        square = torch.stack([n.double() for n in torch._foreach_norm(real)]).square().sum()
        return float(self._sum(square).sqrt())

    def _counted(self, tensors: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        if self._cuts is None:
            return tensors
        return [
            t if t is None or cut is None else t.detach().reshape(-1)[cut]
            for t, cut in zip(tensors, self._cuts, strict=True)
        ]

    def _sum(self, numbers: Tensor) -> Tensor:
        return numbers if self._total is None else self._total(numbers)
