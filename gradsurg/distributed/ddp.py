"""DDP: every rank trains all parameters; each owns a slice of every task's averaged gradient."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gradsurg.distributed.buckets import Bucket, cut, flat_reals, plan, share, unpack
from gradsurg.distributed.collectives import Group, fingerprint, listening, start_all_gather, start_reduce_scatter
from gradsurg.distributed.ddp_exchange import SliceExchange
from gradsurg.distributed.ddp_reducer import Replica
from gradsurg.distributed.layout import Layout, generator_of
from gradsurg.gradients.rows import ByParameter, Row
from gradsurg.linalg.measure import Measure

__all__ = ["DDPLayout"]


class Spread(Layout):
    """Features: every rank has those of its own part of the batch, and none of another's.

    Losses are means over ranks, so a task's gradient with respect to the features of the whole batch is, piece by
    piece, 1 / ranks of what the ranks compute. Lengths and inner products are the sums of the ranks', over ranks².
    """

    several = True

    def __init__(self, group: Group) -> None:
        self._group = group

    def measure(self, parameters: Sequence[Tensor]) -> Measure:
        return Measure(total=self.total)

    def generators(self, parameters: Sequence[Tensor], generator: torch.Generator) -> list[torch.Generator]:
        """Return one a tensor and rank: no two draw the same numbers."""
        return [generator_of(generator, k, self._group.rank) for k in range(len(parameters))]

    def total(self, numbers: Tensor) -> Tensor:
        """Add up products of gradients."""
        return self._group.total(numbers) / self._group.size**2


class DDPLayout(Layout):
    """Rows are reduced to their owners, multiplied piece by piece, and only their combination is gathered.

    With P numbers, m tasks and W ranks, a rank sends (m + 1) P (W − 1) / W, half of what reducing m rows to everybody
    takes, and keeps m P / W of rows. A step whose update has to be projected gathers P once more. That is the least
    while p.grad is whole on every rank, which clipping needs: an owner has to hear every rank's part of m rows, and a
    rank, of others' slices, the direction before its optimizer can move, and the correction, another combination of
    the rows, after. (m + 2) P (W − 1) / W is still at most (m + 1) P while W ≤ m + 2.

    Args:
        parameters: What the optimizers train.
        replicas: The DDP modules that own them.
        group: Their process group.
    """

    several = True
    whole_rows = False

    def __init__(self, parameters: Sequence[Tensor], replicas: Sequence[Replica], group: Group) -> None:
        self.parameters, self.replicas, self.group = list(parameters), list(replicas), group
        self.position = ByParameter((p, k) for k, p in enumerate(parameters))
        self.signature = fingerprint([(tuple(p.shape), p.dtype) for p in parameters])
        # Of each task, which parameters some rank's backward pass was seen to reach: these are sent as soon as the
        # pass is over. What it reaches beyond is sent at the end, when the ranks have compared; so None stays None.
        self.reach: dict[str, frozenset[int]] = {}
        mine = {id(p) for p in parameters}
        # Of the DDP modules, but not this optimizer's: they get what a plain backward pass would have given them.
        self.outside = [p for replica in replicas for p in replica.parameters() if id(p) not in mine]
        self._synced, self._quiet = True, False

    def begin(self) -> None:  # noqa: D102
        for replica in self.replicas:
            replica.cancel()
        if not self._quiet:
            self._synced = all(replica.synced for replica in self.replicas)

    def sends(self, waiting: bool) -> bool:
        """Whether rows are exchanged now: not inside no_sync(), nor while surgery waits anyway."""
        return self._synced and not waiting

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

    def agreed(self, names: Sequence[str]) -> list[str]:  # noqa: D102
        return self.group.union(names)

    def exchange(self, names: Sequence[str], measured: Sequence[str] = ()) -> SliceExchange:  # noqa: D102
        return SliceExchange(self, names, measured)

    @property
    def owners(self) -> int:
        """Among how many ranks the numbers of a row are shared out."""
        return self.group.size

    def start(self, bucket: Bucket, message: Tensor) -> tuple[Tensor, Any]:
        """Begin to add up a bucket over ranks, and return where this rank's part will be, and what to wait for."""
        part = torch.empty(bucket.width, dtype=bucket.dtype, device=bucket.device)
        return part, start_reduce_scatter(part, message, self.group.group)

    def pieces(self, bucket: Bucket, part: Tensor) -> Row:
        """Return what this rank holds of a bucket's members."""
        return unpack(bucket, part, self.parameters, self.owners)

    def held(self, parameters: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:  # noqa: D102
        return [cut(t, self.group.size, self.group.rank) for t in tensors]

    def measure(self, parameters: Sequence[Tensor]) -> Measure:  # noqa: D102
        return Measure(total=self.group.total)

    def generators(self, parameters: Sequence[Tensor], generator: torch.Generator) -> list[torch.Generator]:
        """Return one a parameter and owner: no two slices draw the same numbers."""
        return [generator_of(generator, self.position[p], self.group.rank) for p in parameters]

    def total(self, numbers: Tensor) -> Tensor:  # noqa: D102
        return self.group.total(numbers)

    def agree(self, number: int) -> bool:  # noqa: D102
        return self.group.agree(number)

    def averaging(self) -> SliceExchange | None:
        """Begin an exchange without rows: what stands in p.grad at its end is averaged, as DDP itself does."""
        return SliceExchange(self, []) if self._synced else None

    def mean_losses(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:  # noqa: D102
        return self.group.mean(losses)

    def of_features(self) -> Layout:  # noqa: D102
        return Spread(self.group)

    def whole(self, result: Row) -> Row:
        """Gather the pieces of all ranks into tensors like the parameters."""
        parameters, ranks = list(result), self.group.size
        buckets = plan(parameters, range(len(parameters)), ranks)
        sent: list[tuple[Tensor, Any]] = []
        whole = Row()
        with listening("gathering what the owners of the slices computed"):
            for bucket in buckets:
                part = torch.cat([flat_reals(result[parameters[k]]).to(bucket.dtype) for k in bucket.members])
                message = torch.empty(ranks, bucket.width, dtype=bucket.dtype, device=bucket.device)
                work = start_all_gather(message, part, self.group.group)
                sent.append((message, work))
            for bucket, (message, work) in zip(buckets, sent, strict=True):
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

    def mean(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> list[Tensor]:
        """Return the mean over ranks of whole gradients, None counting as zeros; averaging twice is harmless."""
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
