"""The memory of the last direction, written again where nobody else can see it.

Memory that malloc hands out anew is touched for the first time in every step: to fill 80 MB of it takes 55 ms, and of
memory that was there before, 7 ms.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

import torch
from torch import Tensor

from gradsurg.gradients.rows import ByParameter

__all__ = ["FROM", "Spare"]

# Numbers from which on a tensor is kept; malloc keeps smaller ones itself.
FROM = 131_072


class Spare:
    """Tensors that stood in p.grad, one a parameter, until they can be used again."""

    def __init__(self) -> None:
        self._kept: ByParameter[Tensor] = ByParameter()

    def keep(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Keep these results of parameters on the CPU; those of before that were not taken are let go."""
        large = [pair for pair in pairs if pair[1].numel() >= FROM]
        self._kept = ByParameter((p, u) for p, u in large if type(u) is Tensor and u.device.type == "cpu")

    def take(self, parameters: Iterable[Tensor]) -> list[Tensor | None] | None:
        """Return for each parameter a tensor laid out as itself to be written to, or None; None where nothing is kept.

        One that somebody still refers to, be it as p.grad, by a name or through a view, is never returned.
        """
        return [self._one(p) for p in parameters] if self._kept else None

    def _one(self, p: Tensor) -> Tensor | None:
        if p not in self._kept:
            return None
        spare = self._kept.pop(p)
        assert spare is not None
        # The counts are private; without them nothing is ever free. Ours are the name `spare` and the call's argument;
        # of the tensor this name; of the memory, the tensor and the storage object that is asked.
        count = getattr(torch._C, "_storage_Use_Count", None)
        if count is None or not hasattr(spare, "_use_count") or spare.layout is not torch.strided:
            return None
        alone = sys.getrefcount(spare) == 2 and spare._use_count() == 1 and count(spare.untyped_storage()._cdata) == 2
        alike = spare.shape == p.shape and spare.dtype == p.dtype and spare.stride() == p.stride()
        return spare if alone and alike else None
