"""How gradients come in: p.grad is emptied, each task's backward pass fills it, and the fresh tensors become a row.

If `.grad` is None, autograd puts its own tensor there, so moving it costs no copy. torch.autograd.grad would break
reentrant checkpointing, hooks, FSDP2 and parameters outside the optimizer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from gradsurg.errors import MultiTaskError
from gradsurg.gradients.changes import holds_same, how_changed, what_was_added
from gradsurg.gradients.compile import anything_compiled
from gradsurg.gradients.dtensor import on_every_rank, version_of
from gradsurg.gradients.reachability import Reachability
from gradsurg.gradients.recycle import Recycler
from gradsurg.gradients.rows import ByParameter, HeldGradients, Row, TaskRows, is_finite, laid_out
from gradsurg.gradients.sentinel import Sentinels, watched
from gradsurg.linalg.sparse import added

__all__ = ["Capture"]


class Capture:
    """Owns the rows and knows whether what stands in `p.grad` is ours.

    Rows are live only while every `p.grad` is the tensor that `write` put there, unchanged and finite. Otherwise it was
    zeroed, clipped or added to since: the rows are dropped, and what stands in `p.grad` is foreign. Foreign gradients
    are kept and added to the next result, as a plain backward would do.

    Most changes show in `_version`. Those through `.data` or `.numpy()` do not, so the numbers are compared too, with
    those of the surgery done once more. That costs nothing in a step with one backward pass, because then there are no
    rows when the next run opens. On a device the answer is not read: it selects what rows and foreign gradients are.

    While surgery is deferred (`write_pending`) no result stands in `p.grad`, only a sentinel in two of them. Rows are
    then live while the sentinels are there, and whatever is added to any `p.grad` meanwhile is foreign.
    """

    def __init__(self, parameters: Callable[[], list[Tensor]], make: Callable[[], TaskRows] = TaskRows) -> None:
        self.parameters = parameters
        self.make = make
        self.rows = make()
        # Under DDP, rows of this rank alone: those of no_sync(), or of deferred surgery.
        self.unsent = make()
        self.reach = Reachability()
        # Turns flags of this rank into flags that are set on any rank; see Layout.raised.
        self.on_any_rank: Callable[[Tensor], Tensor] = lambda flags: flags
        self.fresh = make()
        self.recycled = Recycler()
        # Whether losses came as one tensor, whose graph gives zeros where a task reaches nothing.
        self.stacked = False
        # While a run is open.
        self._held: HeldGradients | None = None
        # Those of the run, until p.grad is written.
        self._parameters: list[Tensor] = []
        self._foreign, self._next_foreign = Row(), Row()
        self._written: ByParameter[tuple[Tensor, int]] = ByParameter()
        self._sentinels: Sentinels | None = None
        # Returns once more what `write` was given, and whether p.grad still holds it, if a device knows.
        self._again: Callable[[], Row] | None = None
        self._unread: Tensor | None = None

    def open(self, parameters: list[Tensor], were_live: bool = False) -> bool:
        """Take p.grad away, so that passes start from nothing; return False if rows do not stand for it any more.

        Rows that `were_live` when the total was built stay so if only its own backward pass added to p.grad since.
        """
        change = self._change(parameters, were_live)
        penalty = what_was_added(parameters, self._again()) if change == 1 and self._again is not None else None
        self._was_live = change == 0 or penalty is not None
        self._next_foreign = self._foreign_among(parameters) if penalty is None else penalty
        self._select_on_device(parameters)
        self._held, self._parameters = HeldGradients(parameters), parameters
        self.fresh = self.make()
        return self._was_live or not self._written

    def still_nonfinite(self) -> tuple[str, ...]:
        """Return the tasks whose NaN or infinity stands in p.grad, though their rows count no more."""
        return () if all(map(is_finite, self.foreign.values())) else tuple(self.rows.nonfinite())

    def take(self, name: str) -> None:
        """Move what backward passes left in p.grad into the fresh row of a task."""
        row = self.lift()
        # The module is imported by the first compilation; asked here, because this runs once per task.
        if self.stacked or ("torch._functorch.aot_autograd" in sys.modules and anything_compiled()):
            self.fresh.leave_blank(self.reach.sift(name, row))
        self.fresh.add(name, row)

    def take_plain(self) -> None:
        """Move what is in p.grad to the gradients that take no part in surgery."""
        for p, g in self.lift().items():
            self._next_foreign[p] = added(self._next_foreign.get(p), g)

    def part_with(self, name: str) -> tuple[Row, ...]:
        """Return a task's fresh row, and what of it was not sent before; the fresh one belongs to the caller now."""
        # What all ranks made of the row comes back through `arrived`.
        fresh = self.fresh.drop(name) if name in self.fresh else Row()
        return (fresh, self.unsent[name]) if name in self.to_send() else (fresh,)

    def to_send(self) -> list[str]:
        """Return the tasks with rows that were not sent before, as far as these still count."""
        return list(self.unsent) if self._was_live else []

    @property
    def foreign(self) -> Row:
        """What others put into p.grad, in the run that is open."""
        return self._next_foreign

    def untouched(self) -> list[Tensor]:
        """Return the parameters for which compiled code returned nothing but zeros to this rank."""
        return [*self.fresh.untouched(), *(self.unsent.untouched() if self._was_live else ())]

    def arrived(self, rows: Iterable[tuple[str, Row]], foreign: Row, blank: Row) -> None:
        """Take what the exchange between ranks made of the fresh rows, the foreign gradients and the untouched ones."""
        overflowed, self.fresh = self.fresh.overflowed, self.make()
        self.fresh.overflowed |= overflowed
        for name, row in rows:
            self.fresh.add(name, row)
        self.fresh.blank, self._next_foreign = blank, foreign

    def commit(self, sent: bool | None = None) -> HeldGradients:
        """Make the fresh rows part of the rows and return what was in p.grad; it is None now.

        Over several ranks, rows that were not `sent` are kept apart until they are.
        """
        # A penalty of the same backward pass may have run since our last task.
        self.take_plain()
        held = self._held
        assert held is not None
        self._foreign = self._next_foreign
        if not self._was_live:
            self.rows = self.make()
        if not self._was_live or sent:
            self.unsent = self.make()
        rows, unsent = self.rows, self.unsent
        if sent is False or len(rows):
            # If memory runs out in between, there are no rows rather than half merged ones. A head's p.grad may be a
            # tensor of the rows, and stays as it is, to go back if the surgery fails.
            self.part_with_rows()
            (unsent if sent is False else rows).merge(self.fresh, held.standing())
            self.rows, self.unsent = rows, unsent
        else:
            self.rows = self.fresh
        self._close()
        return held

    def abort(self) -> None:
        """Drop the fresh rows and give p.grad back as it was."""
        if self._held is not None:
            self._held.restore()
            self._close()

    def write(self, result: Row, again: Callable[[], Row] | None = None) -> None:
        """Set p.grad to the result plus what is foreign, for every parameter that has either.

        Args:
            result: The gradients.
            again: Returns them once more, to the bit; None if nothing but the sentinels tell whether rows are live.
        """
        parameters, self._parameters = self._parameters or self.parameters(), []
        totals = result.at(parameters)
        if self._foreign:
            foreign = self._foreign.at(parameters)
            totals = [a if b is None else added(a, b) for a, b in zip(totals, foreign, strict=True)]
        written = []
        for p, total in zip(parameters, totals, strict=True):
            if total is not None and total.layout is torch.strided and total.stride() != p.stride():
                total = laid_out(p, total)
            p.grad = total
            if total is not None:
                written.append((p, (total, total._version if type(total) is Tensor else version_of(total))))
        self._written, self._sentinels, self._again = ByParameter(written), None, again

    def has_foreign(self) -> bool:
        """Return whether p.grad holds gradients that belong to no task."""
        return bool(self._foreign)

    def write_pending(self) -> None:
        """Leave sentinels in p.grad while surgery is deferred; else model.zero_grad() could not be noticed."""
        parameters = self._parameters or self.parameters()
        somewhere = [p for p in parameters if p.numel() > 0 and (self.rows.of(p) or self.unsent.of(p))]
        reached = [p for p in somewhere if on_every_rank(p)]
        if somewhere and not reached:
            raise MultiTaskError(
                "surgery cannot wait here: of every parameter that the tasks reach, some rank holds nothing. Leave out "
                "accumulate(), or shard over fewer ranks."
            )
        parameters = watched(reached, self._foreign)
        self.write(Row())
        self._sentinels = Sentinels(parameters) if parameters else None
        for p in parameters:
            assert p.grad is not None
            self._written[p] = (p.grad, version_of(p.grad))

    def clear(self) -> None:
        """Forget rows, foreign gradients and the sentinels; p.grad is left alone."""
        if self.has_rows():
            self.part_with_rows()
        if self._written or self._foreign:
            self._foreign, self._written = Row(), ByParameter()
        self._sentinels = self._again = None
        self._close()

    def part_with_rows(self) -> None:
        """Begin new rows; another reference to the old ones sees them unchanged."""
        self.rows, self.unsent = self.make(), self.make()

    def has_rows(self) -> bool:
        """Whether there are rows, live or not."""
        return bool(len(self.rows) or len(self.unsent))

    def is_live(self) -> bool:
        """Whether the rows still stand for what is in p.grad of the parameters."""
        return self._change(self.parameters()) == 0

    def is_untouched(self) -> bool:
        """Whether p.grad are the tensors that we wrote, and nothing wrote to them since, as far as torch knows."""
        return how_changed(self.parameters(), self._written) == 0

    def _change(self, parameters: list[Tensor], were_live: bool = False) -> int:
        """Return 0 if rows still stand for p.grad, 1 if this backward pass may have added to it, else 2."""
        if not self.has_rows() or not self._written:
            return 2
        if self._sentinels is not None:
            return 2 if self._sentinels.fate() == "gone" else 0
        here = how_changed(parameters, self._written)
        if not were_live or self._again is None:
            here *= 2
        # Ranks have to agree, because the next steps are taken together.
        change = int(self.on_any_rank(torch.tensor([here > 0, here > 1])).sum())
        return 2 if change == 0 and not self._holds_what_was_written() else change

    @torch.no_grad()
    def _holds_what_was_written(self) -> bool:
        """Compare the numbers; on a device, leave the answer there and return True."""
        self._unread = None
        if self._again is None:
            return True
        again = self._again()
        for p, foreign in self._foreign.items():
            again[p] = added(again.get(p), foreign)
        answers = [holds_same(tensor, again[p]) for p, (tensor, _) in self._written.items()]
        device = next((answer.device for answer in answers if not _may_be_read(answer)), answers[0].device)
        differ = ~torch.stack([answer.to(device) for answer in answers]).all()
        same = ~self.on_any_rank(differ.reshape(1))[0]
        if _may_be_read(same):
            return bool(same)
        self._unread = same
        return True

    @torch.no_grad()
    def _select_on_device(self, parameters: list[Tensor]) -> None:
        """If a device knows whether the rows are live, make them zeros, and p.grad foreign, in case they are not."""
        same, self._unread = self._unread, None
        if same is None:
            return
        for p, (tensor, _) in self._written.items():
            known = self._foreign.get(p)
            self._next_foreign[p] = torch.where(same, torch.zeros_like(tensor) if known is None else known, tensor)
        for rows in (self.rows, self.unsent):
            for row in map(rows.__getitem__, rows):
                for p, g in list(row.items()):
                    row[p] = torch.where(same, g, torch.zeros_like(g))

    def still_ours(self, p: Tensor) -> bool:
        """Whether p.grad is the tensor that we wrote, clipped or unscaled since or not."""
        written = self._written.get(p)
        return written is not None and p.grad is written[0]

    def sentinels_were_changed(self) -> bool:
        """Whether p.grad was clipped, unscaled or masked while surgery was deferred, which cannot reach the rows."""
        return self._sentinels is not None and self._sentinels.fate() in ("scaled", "in part")

    def _foreign_among(self, parameters: list[Tensor]) -> Row:
        """Return what others put into p.grad, or what we knew of it if all of p.grad is ours."""
        # What we wrote stands there untouched, so the foreign part of it is the one that we remember.
        if self._was_live and self._sentinels is None:
            return self._foreign.copy()
        standing = Row((p, p.grad) for p in parameters if p.grad is not None)
        if self._was_live and self._sentinels is not None:
            for p in self._sentinels.parameters:
                standing.pop(p)
            standing.update(self._sentinels.below())
        return standing

    def lift(self) -> Row:
        """Return what backward passes left in p.grad since the run was opened, and leave it empty."""
        return Row() if self._held is None else self._held.lift()

    def _close(self) -> None:
        if self._held is not None:
            self._held, self._next_foreign, self.fresh = None, Row(), self.make()


def _may_be_read(answer: Tensor) -> bool:
    return answer.device.type == "cpu"
