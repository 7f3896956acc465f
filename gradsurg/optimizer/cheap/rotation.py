"""rotate=k: each step runs the backward passes of k tasks, and moving averages stand for the gradients of the others.

A step costs k backward passes, whatever the number of tasks. The idea is that of M-ConFIG (Liu, Chu, Thuerey 2024,
"ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks", section 3.2): each step computes the
gradient of one loss, and the surgery works on the momenta of all. Here the tasks that are due take part with their
gradient of this step. So the promise holds exactly for them, and for the other tasks it holds for their averages.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradsurg.gradients.rows import Row, TaskRows
from gradsurg.guarantee.constraint import UpdateConstraint
from gradsurg.optimizer.checkpoint import Checkpoint
from gradsurg.optimizer.report import DeferredReport, Report, settled

__all__ = ["ROWS", "Rotation"]

# Keys of the checkpoint's entry; the averages lie under ROWS.
KEY, ROWS = "rotate", "rows"
# Decay of the averages, β_1 in the paper. The n-th gradient of a task enters with the share (1 - β) / (1 - β^n), so
# the first averages are not biased towards zero.
DECAY = 0.9


class Rotation:
    """Chooses the tasks that are due, `count` in each step (None: rotate= is off), and keeps the averages of all tasks.

    The checkpoint keeps when each task was last due. The averages, m · P numbers, are part of the state dict, so that a
    resumed run is equal to the bit to an uninterrupted one.
    """

    def __init__(self, count: int | None, checkpoint: Checkpoint, make: Callable[[], TaskRows]) -> None:
        self.count = count
        self.checkpoint = checkpoint
        self.make = make
        self._averages: dict[str, Row] = {}
        # Averages from a checkpoint that are not used yet.
        self._arrived: list[tuple[weakref.ref[Optimizer], Mapping[str, Sequence[Tensor | None]]]] = []
        # The tasks of this step, in order -> whether they are due.
        self._present: dict[str, bool] = {}
        # The factor by which autograd scales the losses of this step; None is 1.
        self._unit: Tensor | None = None

    def choose(self, names: Sequence[str], gradient: Tensor | None) -> list[str]:
        """Return the tasks that are due: those without an average, and then those that waited longest."""
        assert self.count is not None
        self._unpack()
        if len(self._averages) > len(known := self.checkpoint.tasks):  # these start afresh if there are too many
            self._averages = {name: row for name, row in self._averages.items() if name in known}
        last: Mapping[str, int] = self.checkpoint.recall(KEY).get("last", {})
        new = [name for name in names if name not in self._averages]
        waiting = sorted((name for name in names if name in self._averages), key=lambda name: last.get(name, -1))
        due = {*new, *waiting[: max(self.count - len(new), 0)]}
        self._present.update((name, name in due or self._present.get(name, False)) for name in names)
        # Averages are kept unscaled; with a factor of 1 they need not be copied to be scaled. A device has little to
        # wait for when the factor is read here, before the first backward pass.
        self._unit = None if gradient is None or float(gradient) == 1 else gradient
        return [name for name in names if name in due]

    def completed(self, rows: TaskRows, skipped: Sequence[str]) -> TaskRows:
        """Return the rows of the tasks that were due and the averages of those that were neither due nor skipped."""
        if all(self._present.values()):
            return rows
        complete = self.make()
        complete.overflowed |= rows.overflowed
        for name, due in self._present.items():
            if name in rows:
                complete.add(name, rows[name].copy())
            elif not due and name not in skipped:
                averages, unit = self._averages[name].items(), self._unit
                complete.add(name, Row((p, a if unit is None else a * unit.to(a.device)) for p, a in averages))
        return complete

    def reported(self, report: Report | DeferredReport) -> Report | DeferredReport:
        """Return the report, marked if averages took part."""
        if all(self._present.values()):
            return report
        report = settled(report)
        fresh = tuple(name for name in report.tasks if self._present.get(name))
        return replace(report, level="moving averages", fresh=fresh)

    @torch.no_grad()
    def end_step(self, constraint: UpdateConstraint | None) -> None:
        """Add the finite gradients of shared parameters in this step to the averages."""
        if not self._present:
            return
        due = [name for name, is_due in self._present.items() if is_due]
        kept = self.checkpoint.recall(KEY)
        last = {**kept.get("last", {}), **dict.fromkeys(due, self.checkpoint.step)}
        counts = dict(kept.get("counts", {}))
        # Without a constraint, tasks share nothing, or a gradient was not finite.
        if constraint is not None:
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

    def averages_of(self, optimizer: Optimizer) -> dict[str, list[Tensor | None]]:
        """Return task name -> one average, or None, per parameter of an optimizer; empty if there are none."""
        self._unpack()
        parameters = _held(optimizer)
        return {name: [average.get(p) for p in parameters] for name, average in self._averages.items()}

    def set_averages(self, optimizer: Optimizer, averages: Mapping[str, Sequence[Tensor | None]]) -> None:
        """Take what `averages_of` returned, for use from the next step on."""
        # The optimizer may not hold its parameters yet: an unpickled one gets them afterwards.
        self._arrived.append((weakref.ref(optimizer), averages))

    def saved(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return what a state dict keeps in one piece (see checkpoint.sealed): the averages, in the host's memory."""
        # Distributed checkpoints pickle that piece, and read it on machines that may lack the device of a tensor.
        if self.count is None:
            return {}
        averages = self.averages_of(optimizer).items()
        return {ROWS: {name: [None if t is None else t.cpu() for t in tensors] for name, tensors in averages}}

    def replace_averages(self, optimizer: Optimizer, averages: Mapping[str, Sequence[Tensor | None]] | None) -> None:
        """Drop an optimizer's averages, and take those of a checkpoint; None if it has none."""
        self._unpack()
        for name, row in list(self._averages.items()):
            for p in _held(optimizer):
                row.pop(p)
            if not len(row):
                del self._averages[name]
        if averages is not None and self.count is not None:
            self.set_averages(optimizer, averages)

    def _unpack(self) -> None:
        for reference, averages in self._arrived:
            optimizer = reference()
            parameters = [] if optimizer is None else _held(optimizer)
            for name, tensors in averages.items():
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
                # Not a copy: the step lets go of its rows now.
                average[p] = gradient
            elif before.is_sparse or gradient.is_sparse:
                average[p] = (before * (1 - share) + gradient * share).coalesce()
            else:
                before.lerp_(gradient.to(before.dtype), share)


def _held(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
