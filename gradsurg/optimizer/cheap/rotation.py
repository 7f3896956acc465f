"""rotate=k: the backward passes of k tasks a step; the other tasks' rows are moving averages of their earlier ones.

A step then costs k backward passes whatever the number of tasks. The idea is that of M-ConFIG (Liu, Chu, Thuerey 2024,
"ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks", section 3.2), where each step computes one
loss's gradient and the surgery works on the momenta of all. Here the tasks that are due take part with the gradient of
this step itself, so what is promised holds for them to the letter, and for the others of their average.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradsurg.gradients.rows import Row, TaskRows
from gradsurg.guarantee.constraint import UpdateConstraint
from gradsurg.optimizer.checkpoint import Checkpoint
from gradsurg.optimizer.report import DeferredReport, Report, settled

__all__ = ["Rotation"]


# Keys of the checkpoint's entry.
KEY, ROWS = "rotate", "rows"


DECAY = 0.9  # of the averages, as β_1 in the paper; the first n gradients of a task weigh (1 - β) / (1 - β^n)


class Rotation:
    """Which tasks are due, and the averages of all.

    When each task was last due is kept in the checkpoint's first group, like everything in Memory; the averages, m · P
    numbers, are part of the state dict too (see `pack`), so that a resumed run is bit-equal to an uninterrupted one.
    """

    def __init__(self, count: int | None, checkpoint: Checkpoint, row_dtype: torch.dtype | None) -> None:
        self.count = count
        self.checkpoint = checkpoint
        self.row_dtype = row_dtype
        self._averages: dict[str, Row] = {}
        self._arrived: list[tuple[Optimizer, Mapping[str, Sequence[Tensor | None]]]] = []
        self._present: dict[str, bool] = {}  # the tasks of this step, in order: whether they are due
        self._unit: Tensor | None = None  # what autograd scaled this step's losses by

    def choose(self, names: Sequence[str], gradient: Tensor | None) -> list[str]:
        """Return the tasks whose backward pass is to run: those that waited longest, and those without an average."""
        if self.count is None:
            return list(names)
        self._unpack()
        last: Mapping[str, int] = self.checkpoint.recall(KEY).get("last", {})
        new = [name for name in names if name not in self._averages]
        waiting = sorted((name for name in names if name in self._averages), key=lambda name: last.get(name, -1))
        due = {*new, *waiting[: max(self.count - len(new), 0)]}
        self._present.update((name, name in due or self._present.get(name, False)) for name in names)
        # Read before the first backward pass, where a device has little to wait for; it saves copies of all averages.
        self._unit = None if gradient is None or float(gradient) == 1 else gradient
        return [name for name in names if name in due]

    def completed(self, rows: TaskRows) -> TaskRows:
        """Return the rows of the tasks that were due and, for the others of this step, their averages."""
        if all(self._present.values()):
            return rows
        complete = TaskRows(self.row_dtype)
        for name, due in self._present.items():
            if name in rows:
                complete.add(name, rows[name].copy())
            elif not due:
                complete.add(name, Row((p, self._scaled(average)) for p, average in self._averages[name].items()))
        return complete

    def reported(self, report: Report | DeferredReport) -> Report | DeferredReport:
        """Return the report with what of it is about averages."""
        if all(self._present.values()):
            return report
        report = settled(report)
        return replace(
            report, level="moving averages", fresh=tuple(name for name in report.tasks if self._present.get(name))
        )

    @torch.no_grad()
    def end_step(self, constraint: UpdateConstraint | None) -> None:
        """Let the gradients of the step into the averages: of what tasks share, and only where they are finite."""
        if self.count is None or not self._present:
            return
        due = [name for name, is_due in self._present.items() if is_due]
        kept = self.checkpoint.recall(KEY)
        last = {**kept.get("last", {}), **dict.fromkeys(due, self.checkpoint.step)}
        counts = dict(kept.get("counts", {}))
        if constraint is not None:  # else nothing is shared, or something was not finite
            shared = [p for partition in constraint.partitions for p in partition]
            for name in due:
                if name in constraint.rows:
                    counts[name] = counts.get(name, 0) + 1 if name in self._averages else 1
                    self._learn(name, constraint.rows[name], shared, (1 - DECAY) / (1 - DECAY ** counts[name]))
        self.checkpoint.keep(KEY, last=last, counts=counts)
        self.forget()

    def forget(self) -> None:
        """Forget this step; the averages stay."""
        self._present, self._unit = {}, None

    # -- the averages in a checkpoint ---------------------------------------------------------------------------

    def pack(self, optimizer: Optimizer) -> dict[str, list[Tensor | None]]:
        """Return the averages over an optimizer's parameters, by position; empty where there are none."""
        self._unpack()
        parameters = _held(optimizer)
        return {name: [average.get(p) for p in parameters] for name, average in self._averages.items()}

    def set_rows(self, optimizer: Optimizer, packed: Mapping[str, Sequence[Tensor | None]]) -> None:
        """Take averages from a checkpoint, at their first use: the optimizer may not hold its parameters yet."""
        self._arrived.append((optimizer, packed))

    def packed(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return what a state dict keeps in one piece (see memory.sealed): the averages, in the host's memory.

        Distributed checkpoints pickle that piece, and read it without asking whether the device of a tensor is there.
        """
        if self.count is None:
            return {}
        averages = self.pack(optimizer).items()
        return {ROWS: {name: [None if t is None else t.cpu() for t in tensors] for name, tensors in averages}}

    def unpack_from(self, optimizer: Optimizer, state_dict: dict[str, Any], key: str) -> dict[str, Any]:
        """Take the averages out of a state dict and return it without them; the one given is left as it is."""
        groups = state_dict.get("param_groups") or [{}]
        entry = groups[0].get(key)
        self._forget_averages(optimizer)
        self._arrived = [(other, packed) for other, packed in self._arrived if other is not optimizer]
        if not isinstance(entry, dict) or ROWS not in entry:
            return state_dict
        if self.count is not None:
            self.set_rows(optimizer, entry[ROWS])
        rest = {k: v for k, v in entry.items() if k != ROWS}
        first = {**groups[0], key: rest}
        if not rest:
            del first[key]
        return {**state_dict, "param_groups": [first, *groups[1:]]}

    def _forget_averages(self, optimizer: Optimizer) -> None:
        self._unpack()
        mine = set(map(id, _held(optimizer)))
        others = {
            name: Row((p, average) for p, average in row.items() if id(p) not in mine)
            for name, row in self._averages.items()
        }
        self._averages = {name: row for name, row in others.items() if len(row)}

    def _unpack(self) -> None:
        for optimizer, packed in self._arrived:
            parameters = _held(optimizer)
            for name, tensors in packed.items():
                row = self._averages.setdefault(name, Row())
                for p, average in zip(parameters, tensors, strict=False):
                    if average is not None:
                        row[p] = average.to(p.device, copy=True)
        self._arrived.clear()

    def _learn(self, name: str, row: Row, shared: Sequence[Tensor], share: float) -> None:
        average = self._averages.setdefault(name, Row())
        for p in shared:
            gradient, before = row.get(p), average.get(p)
            if gradient is None:
                if before is not None:
                    average[p] = before * (1 - share)
                continue
            if self._unit is not None:
                gradient = gradient / self._unit.to(gradient.device)
            if before is None:
                average[p] = gradient  # not a copy: the step's rows are let go now
            elif before.is_sparse or gradient.is_sparse:
                average[p] = (before * (1 - share) + gradient * share).coalesce()
            else:
                before.lerp_(gradient.to(before.dtype), share)

    def _scaled(self, average: Tensor) -> Tensor:
        return average if self._unit is None else average * self._unit.to(average.device)


def _held(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
