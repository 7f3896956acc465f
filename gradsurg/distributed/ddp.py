"""DDP: every rank trains all parameters, and owns a slice of every task's averaged gradient."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from gradsurg.distributed.buckets import Bucket, cut, flat_reals, plan, share
from gradsurg.distributed.collectives import Group, listening, start_all_gather
from gradsurg.distributed.ddp_exchange import SliceExchange, Slicing
from gradsurg.distributed.ddp_reducer import Replica
from gradsurg.distributed.layout import NONE, Layout, generator_of
from gradsurg.gradients.rows import Row

__all__ = ["DDPLayout", "DDPWholeLayout"]


class SpreadFeatures(Layout):
    """Features: every rank has the features of its own part of the batch, and no others.

    Losses are means over ranks. So a task's gradient with respect to the features of the whole batch consists of what
    the ranks compute, over their number W; its lengths and inner products are the sums over ranks, over W².
    """

    several = True
    group: Group

    def __init__(self, group: Group) -> None:
        self.group = group

    def generators(self, parameters: Sequence[Tensor], generator: torch.Generator) -> list[torch.Generator]:
        """Return one per tensor and rank: no two draw the same numbers."""
        return [generator_of(generator, k, self.group.rank) for k in range(len(parameters))]

    def total(self, numbers: Tensor) -> Tensor:
        """Return the sum over ranks of products of gradients."""
        return self.group.total(numbers) / self.group.size**2


class DDPLayout(Layout):
    """Rows are reduced to their owners and multiplied slice by slice; only their combination is gathered.

    With P numbers, m tasks and W ranks, a rank sends (m + 1) P (W − 1) / W numbers, and keeps m P / W of the rows. To
    reduce m rows to every rank takes twice as many. A step whose update has to be projected gathers P once more.
    No layout sends less while p.grad is whole on every rank, as clipping requires: an owner needs every rank's part of
    m rows; each rank needs the direction before its optimizer moves, and the correction after. For W ≤ m + 2 the
    (m + 2) P (W − 1) / W of such a step are still at most (m + 1) P.

    `options` are those of wrap() that have to be the same on all ranks, as text.
    """

    several = True
    whole_rows = False
    group: Group

    def __init__(
        self, parameters: Sequence[Tensor], replicas: Sequence[Replica], group: Group, options: Mapping[str, str]
    ) -> None:
        self.replicas, self.group = list(replicas), group
        mine = {id(p) for p in parameters}
        outside = [p for replica in replicas for p in replica.parameters() if id(p) not in mine]
        self._slicing = Slicing(list(parameters), outside, group, self.whole_rows, options)
        self._synced, self._quiet = True, False

    def begin(self) -> None:  # noqa: D102
        for replica in self.replicas:
            replica.cancel()
        if not self._quiet:
            # DDP unsets this inside no_sync().
            self._synced = all(replica.module.require_backward_grad_sync for replica in self.replicas)

    def sends(self, waiting: bool) -> bool:
        """Whether rows are exchanged now: not inside no_sync(), nor while surgery waits anyway."""
        return self._synced and not waiting

    def send_now(self) -> None:  # noqa: D102
        self._synced = True

    @contextmanager
    def quiet(self) -> Iterator[None]:  # noqa: D102
        with ExitStack() as stack:
            for replica in self.replicas:
                stack.enter_context(replica.quiet())
            self._quiet = True
            try:
                yield
            finally:
                self._quiet = False

    def exchange(  # noqa: D102
        self, names: Sequence[str], measured: Sequence[str] = (), preferences: Mapping[str, float] = NONE
    ) -> SliceExchange:
        return SliceExchange(self._slicing, names, measured, preferences)

    def averaging(self) -> SliceExchange | None:
        """Begin an exchange without rows: what is in p.grad at its end is averaged, as DDP itself does."""
        return SliceExchange(self._slicing, []) if self._synced else None

    def held(self, parameters: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:  # noqa: D102
        return [cut(t, self.group.size, self.group.rank) for t in tensors]

    def generators(self, parameters: Sequence[Tensor], generator: torch.Generator) -> list[torch.Generator]:
        """Return one per parameter and owner: no two slices draw the same numbers."""
        return [generator_of(generator, self._slicing.position[p], self.group.rank) for p in parameters]

    def of_features(self) -> Layout:  # noqa: D102
        return SpreadFeatures(self.group)

    def whole(self, result: Row) -> Row:
        """Gather the pieces of all ranks into tensors like the parameters."""
        parameters, ranks = list(result), self.group.size
        sent: list[tuple[Bucket, Tensor, Any]] = []
        whole = Row()
        with listening("gathering what the owners of the slices computed"):
            for bucket in plan(parameters, range(len(parameters)), ranks):
                part = torch.cat([flat_reals(result[parameters[k]]).to(bucket.dtype) for k in bucket.members])
                message = torch.empty(ranks, bucket.width, dtype=bucket.dtype, device=bucket.device)
                sent.append((bucket, message, start_all_gather(message, part, self.group.group)))
            for bucket, message, work in sent:
                work.wait()
                for k, offset in zip(bucket.members, bucket.offsets, strict=True):
                    p = parameters[k]
                    flat = message[:, offset : offset + share(p, ranks)].reshape(-1)
                    if p.is_complex():
                        flat = torch.view_as_complex(flat.view(-1, 2))
                    whole[p] = torch.empty_like(p, requires_grad=False).copy_(flat[: p.numel()].view(p.shape))
        return whole

    def put_back(self, parameters: Sequence[Tensor], held: Sequence[Tensor]) -> None:
        """Gather every owner's piece of the parameters, and write them on all ranks."""
        for p, value in self.whole(Row(zip(parameters, held, strict=True))).items():
            p.detach().copy_(value)


class DDPWholeLayout(DDPLayout):
    """Every rank receives all of every row, and does with it what one process does.

    For rows that outlive their step and are part of every rank's state dict. For k rows a rank sends 2 k P (W - 1) / W
    numbers, and nothing for the combination or the projection of the update.
    """

    whole_rows = True
    # Nothing is cut and nothing gathered: as in one process, the held parts are the parameters themselves.
    held, generators, whole, put_back = Layout.held, Layout.generators, Layout.whole, Layout.put_back

    def total(self, numbers: Tensor) -> Tensor:
        """Return what the first rank measured of its rows, which all ranks have.

        Kernels may add up in another order on another device.
        """
        return self.group.total(numbers if self.group.rank == 0 else torch.zeros_like(numbers))
