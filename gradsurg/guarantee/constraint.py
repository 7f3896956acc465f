"""UpdateConstraint: the rows that the next update must not conflict with, kept from surgery to the step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradsurg.distributed.layout import ALONE, Layout
from gradsurg.gradients.param_groups import rates_of, signs_of
from gradsurg.gradients.rows import TaskRows
from gradsurg.guarantee.copies import ParameterCopies, Part
from gradsurg.guarantee.foreign import is_foreign
from gradsurg.guarantee.movement import DeferredMovement, Movement, joined
from gradsurg.guarantee.update import project_update
from gradsurg.linalg.measure import Measure
from gradsurg.linalg.packing import GradientTable, PackedRows
from gradsurg.solvers.tolerances import ROUNDING_QUICK
from gradsurg.surgery.margin import Margin, attainable

__all__ = ["UpdateConstraint", "UpdateConstraintCUDA"]


@dataclass(frozen=True)
class UpdateConstraint:
    """What every update until the next surgery has to satisfy.

    Attributes:
        rows: The task gradients.
        partitions: The shared parameters, in the parts that surgery treats apart.
        gramians: One Gramian per partition, shape (partitions, m, m).
        allowed: Which tasks are protected, bool (m,); None is all.
        layout: Which part of rows and parameters this rank holds.
        margin: How much more than no conflict is asked.
        tables: The rows of each partition, as surgery read them; None makes them anew.
    """

    rows: TaskRows
    partitions: list[list[Tensor]]
    gramians: Tensor
    allowed: Tensor | None
    layout: Layout = ALONE
    margin: Margin = 0.0
    tables: Sequence[GradientTable] | None = None

    def among(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Return those of some parameters that tasks share."""
        shared = {id(p) for partition in self.partitions for p in partition}
        return [p for p in parameters if id(p) in shared]

    def packs(self) -> list[tuple[PackedRows, list[Tensor]]]:
        """Return the packed rows of each partition, with the partition; empty if ranks hold parts of the rows."""
        if self.tables is None or self.layout is not ALONE:
            return []
        pairs = ((table.packed(), each) for table, each in zip(self.tables, self.partitions, strict=True))
        return [(small, each) for small, each in pairs if small is not None]

    def enforce(self, optimizer: Optimizer, before: ParameterCopies) -> Movement | DeferredMovement | None:
        """Move the optimizer's shared parameters so that their step from `before` hurts no protected task."""
        sign = signs_of(optimizer)
        ours = before.ids().intersection(sign)
        movements = []
        for k, (partition, G) in enumerate(zip(self.partitions, self.gramians, strict=True)):
            mine = [p for p in partition if id(p) in ours]
            if not mine:
                continue
            all_mine = len(mine) == len(partition)
            table = self.tables[k] if self.tables is not None and all_mine else self.rows.table(mine)
            measure = Measure() if self.layout is ALONE else self.layout.measure(mine)
            if not all_mine:  # several optimizers share the rows: each is held to its own part
                G = measure.gramian(table, exact=True)
            # The copies are cut apart only if the first look at them is not enough.
            old: Sequence[Tensor] = Part(before, mine)
            new: Sequence[Tensor] = mine
            if self.layout is not ALONE:
                old = self.layout.held(mine, [before[p] for p in mine])
                new = self.layout.held(mine, [p.detach() for p in mine])
            movement = project_update(
                table,
                G,
                old,
                new,
                [sign[id(p)] for p in mine],
                self.allowed,
                measure,
                self._asked if self.margin else None,
                partial(self._meant, optimizer, mine),
            )
            # Under DDP each rank corrected its own slices.
            if movement.corrected:
                self.layout.put_back(mine, new)
            movements.append(movement)
        return joined(movements)

    def _meant(self, optimizer: Optimizer, mine: Sequence[Tensor]) -> tuple[list[float], list[Tensor]]:
        """Return the learning rate and p.grad of each parameter; p itself if it has none."""
        rates = rates_of(optimizer)
        gradients = self.layout.held(mine, [p if p.grad is None else p.grad for p in mine])
        return [0.0 if is_foreign(p) else rates[id(p)] for p in mine], gradients

    def _asked(self, G: Tensor) -> Tensor:
        """Return the cosines that the margin asks for, as far as these gradients leave them within reach."""
        return attainable(G, self.margin, tuple(self.rows), self.allowed, ROUNDING_QUICK)[0]


@dataclass(frozen=True, kw_only=True)
class UpdateConstraintCUDA(UpdateConstraint):
    """The twin of UpdateConstraint for rows on a CUDA device, where nothing is read back.

    Attributes:
        finite: Bool, shape (): whether the Gramian is finite; if not, the update is left alone.
    """

    finite: Tensor

    def enforce(self, optimizer: Optimizer, before: ParameterCopies) -> DeferredMovement | None:
        """Move the optimizer's shared parameters so that their step from `before` hurts no protected task."""
        from gradsurg.guarantee.update_cuda import project_update_cuda
        from gradsurg.linalg.kernels.gramian import gramian

        sign = signs_of(optimizer)
        ours = before.ids().intersection(sign)
        mine = [[p for p in partition if id(p) in ours] for partition in self.partitions]
        chosen = [p for each in mine for p in each]
        if not chosen:
            return None
        # Partitions of which this optimizer trains nothing are left out, and the others numbered anew.
        there = [k for k, each in enumerate(mine) if each]
        numbers = [number for number, k in enumerate(there) for _ in mine[k]]
        table = self.rows.table(chosen)
        G = self.gramians
        if len(there) < len(mine):
            G = torch.stack([G[k] for k in there])
        if any(len(mine[k]) < len(self.partitions[k]) for k in there):  # the rest belongs to another optimizer
            G = gramian(table, partitions=numbers)
        rates, gradients = self._meant(optimizer, chosen)
        return project_update_cuda(
            table,
            G,
            [before[p] for p in chosen],
            [p.detach() for p in chosen],
            [sign[id(p)] for p in chosen],
            numbers,
            self.allowed,
            self.finite,
            rates,
            [None if g.is_sparse else g.to(p.dtype) for g, p in zip(gradients, chosen, strict=True)],
        )
