"""DDP, with whole rows on every rank: for rows that outlive their step, and have to be in everybody's state dict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradsurg.distributed.buckets import Bucket, unpack
from gradsurg.distributed.collectives import start_all_reduce
from gradsurg.distributed.ddp import DDPLayout
from gradsurg.gradients.rows import Row
from gradsurg.linalg.measure import Measure

__all__ = ["DDPWholeLayout"]


class DDPWholeLayout(DDPLayout):
    """A row is reduced to everybody, and from there on every rank does what one process does.

    For k rows a rank sends 2 k P (W - 1) / W, and nothing for the combination or the projection of the update. Only
    what was measured is the first rank's on all ranks: kernels may add up in another order on another device.
    """

    whole_rows = True

    @property
    def owners(self) -> int:
        """Everybody owns all."""
        return 1

    def start(self, bucket: Bucket, message: Tensor) -> tuple[Tensor, Any]:
        """Begin to add up a bucket over ranks."""
        return message.view(-1), start_all_reduce(message, self.group.group)

    def pieces(self, bucket: Bucket, part: Tensor) -> Row:
        """Return the whole gradients of a bucket's members."""
        return Row((p, flat.view(p.shape)) for p, flat in unpack(bucket, part, self.parameters, 1).items())

    def held(self, parameters: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:  # noqa: D102
        return list(tensors)

    def measure(self, parameters: Sequence[Tensor]) -> Measure:  # noqa: D102
        return Measure(total=self.total)

    def generators(self, parameters: Sequence[Tensor], generator: torch.Generator) -> list[torch.Generator]:
        """Return one for all, as in one process."""
        return [generator] * len(parameters)

    def total(self, numbers: Tensor) -> Tensor:
        """Return what the first rank measured of its rows, which are those of all."""
        return self.group.first(numbers)

    def added(self, numbers: Tensor) -> Tensor:  # noqa: D102
        return self.group.total(numbers)

    def whole(self, result: Row) -> Row:  # noqa: D102
        return result

    def put_back(self, parameters: Sequence[Tensor], held: Sequence[Tensor]) -> None:
        """Do nothing: what is held are the parameters themselves."""
