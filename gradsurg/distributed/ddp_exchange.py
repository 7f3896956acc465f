"""The exchange of one step under DDP: rows are sent as soon as they are there, and arrive as slices on their owners."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from gradsurg.distributed.buckets import Bucket, cut, flat_reals, pack, plan, share, unpack
from gradsurg.distributed.collectives import Group, RanksError, fingerprint, listening, merged, start_reduce_scatter
from gradsurg.distributed.layout import NONE, Delivery
from gradsurg.errors import MultiTaskError
from gradsurg.gradients.rows import ByParameter, Row

__all__ = ["SliceExchange", "Slicing"]


@dataclass
class Slicing:
    """What all exchanges of one layout share, for the parameters that the optimizers train.

    Attributes:
        outside: Other parameters of the DDP modules: they get what a plain backward pass would have given them.
        group: The ranks.
        whole: Every rank gets all of every row, instead of its slice.
        options: Those of wrap() that have to be the same on all ranks, as text.
        reach: Of each task, which parameters the backward pass of any rank was seen to reach. These are sent as soon
            as the pass is over. The others that it reaches are sent at the end, after the ranks have compared, so that
            a gradient that is None on all ranks stays None.
    """

    parameters: list[Tensor]
    outside: list[Tensor]
    group: Group
    whole: bool
    options: Mapping[str, str]
    reach: dict[str, frozenset[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.position = ByParameter((p, k) for k, p in enumerate(self.parameters))
        self.signature = fingerprint([*((tuple(p.shape), p.dtype) for p in self.parameters), *self.options.items()])
        self.owners = 1 if self.whole else self.group.size  # of the numbers of a row

    def start(self, bucket: Bucket, parts: Sequence[Row]) -> tuple[Tensor, Any]:
        """Begin to average a bucket over ranks, and return where this rank's part will be, and what to wait for."""
        message = pack(bucket, self.parameters, parts, self.owners)
        message /= self.group.size  # before the sum, as in DDP: float16 could overflow in it
        if self.whole:
            return message.view(-1), dist.all_reduce(message, group=self.group.group, async_op=True)
        part = torch.empty(bucket.width, dtype=bucket.dtype, device=bucket.device)
        return part, start_reduce_scatter(part, message, self.group.group)

    def pieces(self, bucket: Bucket, part: Tensor) -> Row:
        """Return what this rank holds of a bucket's members."""
        pieces = unpack(bucket, part, self.parameters, self.owners)
        return Row((p, flat.view(p.shape)) for p, flat in pieces.items()) if self.whole else pieces

    def zeros(self, blank: Sequence[bool]) -> Row:
        """Return what this rank holds of zeros like some parameters."""
        zeros = [torch.zeros_like(p) for p in compress(self.parameters, blank)]
        held = zeros if self.whole else [cut(z, self.owners, self.group.rank) for z in zeros]
        return Row(zip(compress(self.parameters, blank), held, strict=True))

    def mean(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> list[Tensor]:
        """Return the means over ranks of whole gradients; None counts as zeros. To average twice changes nothing."""
        result = Row()
        for bucket in plan(parameters, range(len(parameters)), 1):
            flats = []
            for k in bucket.members:
                p, g = parameters[k], gradients[k]
                flats.append(p.new_zeros(share(p, 1), dtype=bucket.dtype) if g is None else flat_reals(g))
            message = torch.cat(flats) / self.group.size
            with listening("averaging the gradients that take no part in surgery"):
                dist.all_reduce(message, group=self.group.group)
            for p, flat in unpack(bucket, message, parameters, 1).items():
                result[p] = torch.empty_like(p, requires_grad=False).copy_(flat.view(p.shape))
        return [result[p] for p in parameters]


@dataclass
class _Shipment:
    """A task's row on its way: what of it was sent, and what is sent after the ranks have compared."""

    parts: tuple[Row, ...]
    reached: frozenset[int]
    sent: frozenset[int]
    flights: list[tuple[Bucket, Tensor, Any]] = field(default_factory=list)


class _Heard(NamedTuple):
    """What the ranks told each other at the end of the backward passes."""

    failed: list[int]  # the ranks that raised
    used: list[frozenset[int]]  # of each task, which parameters it reached on any rank
    foreign: list[bool]  # which parameters have a gradient outside surgery, on any rank
    blank: list[bool]  # for which compiled code returned nothing but zeros, on any rank
    outside: list[bool]  # the same of DDP's parameters that are not this optimizer's
    means: dict[str, Tensor]  # name -> loss, mean over ranks


class SliceExchange:
    """Sends every task's row as soon as it is there, while the next task runs backward.

    Ranks may have different tasks in a step: a small message at the start tells all ranks the tasks of each, and a rank
    sends zeros for those that it lacks. At the end, the ranks compare which parameters each task reached, and whether
    every rank came through. If one raised, all raise, and no rank keeps anything of the step.

    The tasks `measured`, the same on all ranks, have their losses averaged even without a row.
    """

    def __init__(
        self,
        slicing: Slicing,
        names: Sequence[str],
        measured: Sequence[str] = (),
        preferences: Mapping[str, float] = NONE,
    ) -> None:
        self._slicing, self._group, self._mine, self._measured = slicing, slicing.group, list(names), measured
        self._waiting: dict[str, tuple[Row, ...]] = {}
        self._shipments: dict[str, _Shipment] = {}
        self._names: list[str] | None = None
        self._preferences = sorted(preferences.items())
        reach = fingerprint(sorted((name, sorted(reached)) for name, reached in slicing.reach.items()))
        # Sent before the first backward pass, and waited for after it: it costs no time of its own.
        header = torch.tensor([fingerprint(names), fingerprint([slicing.signature, self._preferences]), reach])
        self._header, self._header_work = self._group.start_gather(header)

    @property
    def names(self) -> list[str]:
        """The tasks of all ranks, in the order of the lowest rank that has them."""
        if self._names is None:
            with listening("comparing the tasks of this step"):
                self._header_work.wait()
            same_names, same_signature, same_reach = (self._header == self._header[0]).all(0).tolist()
            if not same_signature:
                self._group.refuse_other_options(self._slicing.options, self._preferences)
                raise RanksError(
                    "the optimizers of the ranks train parameters of different shapes, dtypes or order: build the same "
                    "model and the same parameter groups on every rank"
                )
            # A rank that joined late, or loaded another state, expects other parameters than the rest.
            if not same_reach:
                self._slicing.reach.clear()
            self._names = merged([self._mine] if same_names else self._group.objects(self._mine))
        return self._names

    def offer(self, name: str, *parts: Row) -> None:
        """Hand over a task's row, in parts to be added up; sent at once if all tasks before it were."""
        for part in parts:
            _refuse_sparse(part, f"task {name!r} has")
        self._waiting[name] = parts
        self._send_ready()

    def finish(self, foreign: Row, losses: Mapping[str, Tensor], untouched: Sequence[Tensor] = ()) -> Delivery:
        """Wait for all rows; raises MultiTaskError on every rank if one failed."""
        _refuse_sparse(foreign, "p.grad holds")
        self._send_ready()
        assert len(self._shipments) == len(self.names), "finish() came before every task was offered"
        heard = self._compare(foreign, losses, untouched)
        if heard.failed:
            # What is on its way has to arrive: a later message would be taken for it.
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
        # What was reached for the first time was not expected, so no rank has sent it yet.
        for name, used in zip(self.names, heard.used, strict=True):
            self._send(self._shipments[name], used - self._shipments[name].sent)
        averaged = self._average(foreign, heard)
        rows = self._land(heard.used)
        for name, used in zip(self.names, heard.used, strict=True):
            self._slicing.reach[name] = self._slicing.reach.get(name, frozenset()) | used
        return Delivery(rows, averaged, heard.means, self._slicing.zeros(heard.blank))

    def fail(self) -> None:
        """Take part in what the others still wait for, with zeros, and tell them that this rank raised."""
        try:
            for name in self._mine:
                self._waiting.setdefault(name, ())
            self._send_ready()
            self._compare(Row(), {}, failed=True)
            self._land()
        except Exception:  # the group itself is broken: the others hear of it from the backend
            return

    def _send_ready(self) -> None:
        for name in self.names[len(self._shipments) :]:
            if name in self._mine and name not in self._waiting:
                return
            parts = self._waiting.pop(name, ())
            reached = frozenset(self._slicing.position[p] for part in parts for p in part)
            shipment = _Shipment(parts, reached, self._slicing.reach.get(name, frozenset()))
            self._shipments[name] = shipment
            self._send(shipment, shipment.sent)

    def _send(self, shipment: _Shipment, members: frozenset[int]) -> None:
        for bucket in plan(self._slicing.parameters, sorted(members), self._slicing.owners):
            with listening("reducing the rows of the tasks"):
                shipment.flights.append((bucket, *self._slicing.start(bucket, shipment.parts)))
        if members >= shipment.reached:
            shipment.parts = ()  # the copies in flight are all that is needed

    def _compare(
        self, foreign: Row, losses: Mapping[str, Tensor], untouched: Sequence[Tensor] = (), *, failed: bool = False
    ) -> _Heard:
        """Add up over ranks what each has, in one message that is read once: this waits for the device one time."""
        parameters, outside = self._slicing.parameters, self._slicing.outside
        n, ranks, tasks, device = len(parameters), self._group.size, self.names, self._group.device
        measured = merged([tasks, self._measured])
        # Flags and losses go in one message of float64: counts up to 2^53 are exact.
        flags = [failed and rank == self._group.rank for rank in range(ranks)]
        for name in tasks:
            reached = self._shipments[name].reached
            flags += [k in reached for k in range(n)]
        flags += [p in foreign for p in parameters]
        blank = {self._slicing.position[p] for p in untouched}
        flags += [k in blank for k in range(n)]
        flags += [p.grad is not None for p in outside]
        flags += [name in losses for name in measured]
        zero = torch.zeros((), dtype=torch.float64, device=device)
        values = [losses[name].double().to(device).view(1) if name in losses else zero.view(1) for name in measured]
        sums = self._group.total(torch.cat([torch.tensor(flags).to(device).double(), *values]))
        sizes = [ranks, *[n] * len(tasks), n, n, len(outside), len(measured), len(measured)]
        failures, *used, inside, zeros, others, present, totals = sums.cpu().split(sizes)
        return _Heard(
            failed=[rank for rank, flag in enumerate(failures.tolist()) if flag],
            used=[frozenset(k for k, flag in enumerate(each.tolist()) if flag) for each in used],
            foreign=(inside > 0).tolist(),
            blank=(zeros > 0).tolist(),
            outside=(others > 0).tolist(),
            means={name: totals[i] / ranks for i, name in enumerate(measured) if present[i]},
        )

    def _average(self, foreign: Row, heard: _Heard) -> Row:
        """Average what takes no part in surgery; other parameters of the modules get their means into p.grad."""
        inside = [p for p, has in zip(self._slicing.parameters, heard.foreign, strict=True) if has]
        outside = [p for p, has in zip(self._slicing.outside, heard.outside, strict=True) if has]
        means = self._slicing.mean([*inside, *outside], [*foreign.at(inside), *(p.grad for p in outside)])
        for p, mean in zip(outside, means[len(inside) :], strict=True):
            if p.grad is None:
                p.grad = mean
            else:
                p.grad.copy_(mean)
        return Row(zip(inside, means[: len(inside)], strict=True))

    def _land(self, used: Sequence[frozenset[int]] | None = None) -> dict[str, Row]:
        """Wait for all flights and return the pieces of the parameters that any rank used."""
        rows: dict[str, Row] = {}
        parameters = self._slicing.parameters
        for i, (name, shipment) in enumerate(self._shipments.items()):
            pieces = Row()
            for bucket, part, work in shipment.flights:
                with listening("reducing the rows of the tasks"):
                    work.wait()
                pieces.update(self._slicing.pieces(bucket, part))
            if used is not None and used[i]:  # a task that reached nothing on any rank is absent
                rows[name] = Row((parameters[k], pieces[parameters[k]]) for k in sorted(used[i]))
        return rows


def _refuse_sparse(row: Row, who: str) -> None:
    if any(gradient.is_sparse for gradient in row.values()):
        raise MultiTaskError(
            f"{who} a sparse gradient, and gradsurg reduces only dense ones over ranks: build the embedding with "
            "sparse=False"
        )
