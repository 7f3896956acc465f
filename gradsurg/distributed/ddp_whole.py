"""DDP with whole rows on every rank: for rows that outlive their step and are part of every rank's state dict."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradsurg.distributed.ddp import DDPLayout
from gradsurg.gradients.rows import Row

__all__ = ["DDPWholeLayout"]


class DDPWholeLayout(DDPLayout):
    """Every rank receives all of every row, and does with it what one process does.

    For k rows a rank sends 2 k P (W - 1) / W numbers, and nothing for the combination or the projection of the update.
    Measurements alone are taken from the first rank: kernels may add up in another order on another device.
    """

    whole_rows = True

    def held(self, parameters: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:  # noqa: D102
        return list(tensors)

    def generators(self, parameters: Sequence[Tensor], generator: torch.Generator) -> list[torch.Generator]:
        """Return the same generator for all parameters, as in one process."""
        return [generator] * len(parameters)

    def total(self, numbers: Tensor) -> Tensor:
        """Return what the first rank measured of its rows, which all ranks have."""
        return self.group.first(numbers)

    def whole(self, result: Row) -> Row:  # noqa: D102
        return result

    def put_back(self, parameters: Sequence[Tensor], held: Sequence[Tensor]) -> None:
        """Do nothing: the held parts are the parameters themselves."""
