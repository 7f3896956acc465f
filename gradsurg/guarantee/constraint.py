"""The rows by which the inner optimizer's next update is judged, and the judging of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor
from torch.optim import Optimizer

from gradsurg.distributed.layout import ALONE, Layout
from gradsurg.gradients.param_groups import signs_of
from gradsurg.gradients.rows import TaskRows
from gradsurg.guarantee.copies import ParameterCopies, Part
from gradsurg.guarantee.movement import Movement, joined
from gradsurg.guarantee.update import project_update
from gradsurg.linalg.packing import GradientTable, PackedRows
from gradsurg.solvers.tolerances import ROUNDING_QUICK
from gradsurg.surgery.margin import Margin, attainable

if TYPE_CHECKING:
    from gradsurg.guarantee.movement import DeferredMovement

__all__ = ["UpdateConstraint"]


@dataclass(frozen=True)
class UpdateConstraint:
    """What every update until the next surgery has to respect.

    Attributes:
        rows: The task gradients.
        blocks: The shared parameters, in blocks that are treated apart.
        gramians: One Gramian per block, shape (blocks, m, m).
        allowed: Which tasks are protected, bool (m,); None is all.
        layout: What of rows and parameters this rank holds.
        margin: What is asked beyond no conflict.
        tables: The rows of each block, as surgery read them; None makes them anew.
    """

    rows: TaskRows
    blocks: list[list[Tensor]]
    gramians: Tensor
    allowed: Tensor | None
    layout: Layout = ALONE
    margin: Margin = 0.0
    tables: Sequence[GradientTable] | None = None

    def among(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Return those of some parameters that tasks share."""
        shared = set().union(*(map(id, block) for block in self.blocks))
        return [p for p in parameters if id(p) in shared]

    def packs(self) -> list[tuple[PackedRows, list[Tensor]]]:
        """Return what is packed of the rows of each block, with the block; nothing where ranks hold parts of them."""
        if self.tables is None or self.layout is not ALONE:
            return []
        pairs = ((table.packed(), block) for table, block in zip(self.tables, self.blocks, strict=True))
        return [(small, block) for small, block in pairs if small is not None]

    def enforce(self, optimizer: Optimizer, before: ParameterCopies) -> Movement | DeferredMovement | None:
        """Move the optimizer's shared parameters so that their step from `before` hurts no protected task."""
        sign = signs_of(optimizer)
        ours = before.ids().intersection(sign)
        movements = []
        for k, (block, G) in enumerate(zip(self.blocks, self.gramians, strict=True)):
            mine = [p for p in block if id(p) in ours]
            if not mine:
                continue
            whole = self.tables is not None and len(mine) == len(block)
            table = self.tables[k] if self.tables is not None and whole else self.rows.table(mine)
            measure = self.layout.measure(mine)
            if len(mine) < len(block):  # several optimizers share the rows: each is judged by its own part
                G = measure.gramian(table, exact=True)
            old: Sequence[Tensor] = Part(before, mine)
            new = mine
            if self.layout is not ALONE:
                old = self.layout.held(mine, [before[p] for p in mine])
                new = self.layout.held(mine, [p.detach() for p in mine])
            asked = None
            if self.margin:
                asked, _ = attainable(G, self.margin, tuple(self.rows), self.allowed, ROUNDING_QUICK)
            movement = project_update(table, G, old, new, [sign[id(p)] for p in mine], self.allowed, measure, asked)
            if movement.corrected:
                self.layout.put_back(mine, new)
            movements.append(movement)
        return joined(movements)
