"""One step's traffic under DDP: rows go out as they come, and arrive as slices that all ranks agree about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradsurg.distributed.buckets import Bucket, pack, plan
from gradsurg.distributed.collectives import RanksError, fingerprint, listening
from gradsurg.distributed.layout import Delivery
from gradsurg.errors import MultiTaskError
from gradsurg.gradients.rows import Row

if TYPE_CHECKING:
    from gradsurg.distributed.ddp import DDPLayout

__all__ = ["SliceExchange"]


@dataclass
class _Shipment:
    """A task's row on its way: what of it was sent, and what is left to be sent when the ranks have compared."""

    parts: tuple[Row, ...]
    reached: frozenset[int]
    sent: frozenset[int]
    flights: list[tuple[Bucket, Tensor, Any]] = field(default_factory=list)


def _refuse_sparse(row: Row, who: str) -> None:
    if any(gradient.is_sparse for gradient in row.values()):
        raise MultiTaskError(
            f"{who} a sparse gradient, and gradsurg reduces only dense ones over ranks: build the embedding with "
            "sparse=False"
        )


@dataclass(frozen=True)
class _Heard:
    """What the ranks told each other at the end of the backward passes.

    Attributes:
        failed: The ranks that raised.
        used: Of each task, which parameters it reached on any rank.
        foreign: Which parameters have a gradient that takes no part in surgery, on any rank.
        outside: The same of DDP's parameters that are not this optimizer's.
        means: Name -> loss, mean over ranks.
    """

    failed: list[int]
    used: list[frozenset[int]]
    foreign: list[bool]
    outside: list[bool]
    means: dict[str, Tensor]


class SliceExchange:
    """Sends every task's row as soon as it is there, while the next task runs backward.

    Ranks may have different tasks in a step: a small message at the start tells everybody of all of them, and a rank
    sends zeros for those that it lacks. At the end, the ranks compare which parameters each task reached, and whether
    everybody came through: if one raised, all do, and nothing of the step is kept anywhere.

    Args:
        slices: The layout.
        names: The tasks of this rank.
        measured: Tasks whose losses are averaged too, though they have no row; the same on all ranks.
    """

    def __init__(self, slices: DDPLayout, names: Sequence[str], measured: Sequence[str] = ()) -> None:
        self._measured = measured
        self._slices, self._group, self._mine = slices, slices.group, list(names)
        self._waiting: dict[str, tuple[Row, ...]] = {}
        self._shipments: dict[str, _Shipment] = {}
        self._names: list[str] | None = None
        reach = fingerprint(sorted((name, sorted(reached)) for name, reached in slices.reach.items()))
        header = torch.tensor([fingerprint(names), slices.signature, reach])
        self._header, self._header_work = self._group.start_gather(header)

    @property
    def names(self) -> list[str]:
        """The tasks of all ranks, in the order of the lowest rank that has them."""
        if self._names is None:
            with listening("comparing the tasks of this step"):
                self._header_work.wait()
            first, *others = self._header.tolist()
            alike = [all(other[i] == first[i] for other in others) for i in range(len(first))]
            if not alike[1]:
                raise RanksError(
                    "the optimizers of the ranks train parameters of different shapes, dtypes or order: build the same "
                    "model and the same parameter groups on every rank"
                )
            if not alike[2]:
                self._slices.reach.clear()
            lists = [self._mine] if alike[0] else self._group.objects(self._mine)
            self._names = list(dict.fromkeys(name for each in lists for name in each))
        return self._names

    def offer(self, name: str, *parts: Row) -> None:
        """Hand over a task's row, in parts to be added up; sent at once if its turn has come."""
        for part in parts:
            _refuse_sparse(part, f"task {name!r} has")
        self._waiting[name] = parts
        self._send_ready()

    def finish(self, foreign: Row, losses: Mapping[str, Tensor]) -> Delivery:
        """Wait for everything; raises MultiTaskError on every rank if one failed."""
        _refuse_sparse(foreign, "p.grad holds")
        self._send_ready()
        assert len(self._shipments) == len(self.names), "finish() came before every task was offered"
        heard = self._compare(foreign, losses)
        if heard.failed:
            self._land()
            raise RanksError(
                f"rank {heard.failed[0]} raised in the backward passes of this step, so no rank keeps anything of it: "
                "parameters, p.grad and optimizer state are as before. See that rank's own error."
            )
        if not self.names and not any(heard.foreign):
            raise RanksError(
                "no rank has a task in this step: at least one must have a loss that requires grad. Parameters, p.grad "
                "and optimizer state are as before."
            )
        for name, reached in zip(self.names, heard.used, strict=True):
            self._send(self._shipments[name], reached - self._shipments[name].sent)
        averaged = self._average(foreign, heard)
        rows = self._land(heard.used)
        for name, reached in zip(self.names, heard.used, strict=True):
            self._slices.reach[name] = self._slices.reach.get(name, frozenset()) | reached
        return Delivery(rows, averaged, heard.means)

    def fail(self) -> None:
        """Take part in what the others still wait for, with zeros, and tell them that this rank raised."""
        try:
            for name in self._mine:
                self._waiting.setdefault(name, ())
            self._send_ready()
            self._compare(Row(), {}, failed=True)
            self._land()
        except Exception:  # the group itself is broken: they will hear of it from the backend
            return

    def _send_ready(self) -> None:
        for name in self.names[len(self._shipments) :]:
            if name in self._mine and name not in self._waiting:
                return
            parts = self._waiting.pop(name, ())
            reached = frozenset(self._slices.position[p] for part in parts for p in part)
            shipment = _Shipment(parts, reached, self._slices.reach.get(name, frozenset()))
            self._shipments[name] = shipment
            self._send(shipment, shipment.sent)

    def _send(self, shipment: _Shipment, members: frozenset[int]) -> None:
        parameters, owners = self._slices.parameters, self._slices.owners
        for bucket in plan(parameters, sorted(members), owners):
            message = pack(bucket, parameters, shipment.parts, owners)
            message /= self._group.size  # before the sum, as DDP does: float16 could overflow in it
            with listening("reducing the rows of the tasks"):
                part, work = self._slices.start(bucket, message)
            shipment.flights.append((bucket, part, work))
        if members >= shipment.reached:
            shipment.parts = ()  # the copies in flight are all that is needed

    def _compare(self, foreign: Row, losses: Mapping[str, Tensor], *, failed: bool = False) -> _Heard:
        """Add up over ranks what each has, in one message that is read once: the device is waited for one time."""
        n, ranks, tasks = len(self._slices.parameters), self._group.size, self.names
        measured = list(dict.fromkeys([*tasks, *self._measured]))
        flags = [failed and rank == self._group.rank for rank in range(ranks)]
        for name in tasks:
            reached = self._shipments[name].reached
            flags += [k in reached for k in range(n)]
        flags += [p in foreign for p in self._slices.parameters]
        flags += [p.grad is not None for p in self._slices.outside]
        flags += [name in losses for name in measured]
        device = self._group.device
        values = [
            losses[name].double().to(device) if name in losses else torch.zeros((), device=device).double()
            for name in measured
        ]
        sums = self._group.total(torch.cat([torch.tensor(flags).to(device).double(), *(v.view(1) for v in values)]))
        sizes = [ranks, *[n] * len(tasks), n, len(self._slices.outside), len(measured), len(measured)]
        parts = sums.cpu().split(sizes)
        failures, *tables, inside, outside, present, totals = parts
        return _Heard(
            failed=[rank for rank, flag in enumerate(failures.tolist()) if flag],
            used=[frozenset(k for k, flag in enumerate(table.tolist()) if flag) for table in tables],
            foreign=[bool(flag) for flag in inside.tolist()],
            outside=[bool(flag) for flag in outside.tolist()],
            means={name: totals[i] / ranks for i, name in enumerate(measured) if present[i]},
        )

    def _average(self, foreign: Row, heard: _Heard) -> Row:
        """Average what takes no part in surgery, and write it where it is not this optimizer's."""
        inside = [p for p, has in zip(self._slices.parameters, heard.foreign, strict=True) if has]
        outside = [p for p, has in zip(self._slices.outside, heard.outside, strict=True) if has]
        means = self._slices.mean([*inside, *outside], [*foreign.at(inside), *(p.grad for p in outside)])
        for p, mean in zip(outside, means[len(inside) :], strict=True):
            if p.grad is None:
                p.grad = mean
            else:
                p.grad.copy_(mean)
        return Row(zip(inside, means[: len(inside)], strict=True))

    def _land(self, used: Sequence[frozenset[int]] | None = None) -> dict[str, Row]:
        """Wait for all flights and return the pieces of the parameters that some rank used."""
        rows: dict[str, Row] = {}
        parameters = self._slices.parameters
        for i, (name, shipment) in enumerate(self._shipments.items()):
            pieces = Row()
            for bucket, part, work in shipment.flights:
                with listening("reducing the rows of the tasks"):
                    work.wait()
                pieces.update(self._slices.pieces(bucket, part))
            if used is not None and used[i]:  # a task that reached nothing on any rank is absent
                rows[name] = Row((parameters[k], pieces[parameters[k]]) for k in sorted(used[i]))
        return rows
