"""A short look at lists of tensors that are as they usually are; for table.py, which looks at all others one by one.

Only functions that run in C look at each tensor. With 297 parameters and m = 4, a step with the update guarantee then
takes the host 1.4 times as long as separate passes, and otherwise 1.9 times (benchmarks.host).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import chain, repeat
from operator import attrgetter, or_

import torch
from torch import Tensor

from gradsurg.linalg.packing import DENSE

__all__ = ["Shape", "Usual", "usual_of"]

# Dtypes, whether aligned, number of elements, partition and sign of one parameter.
Shape = tuple[tuple[torch.dtype, ...], bool, int, int, int]
DTYPE, LAYOUT = attrgetter("dtype"), attrgetter("layout")


@dataclass(frozen=True)
class Usual:
    """Lists that are whole or missing, of contiguous and aligned tensors, with one dtype per role.

    Attributes:
        dtypes: One per role.
        sizes: The number of elements of each parameter.
        columns: The addresses of each list, 0 for a missing tensor.
    """

    dtypes: tuple[torch.dtype, ...]
    sizes: tuple[int, ...]
    columns: list[list[int]]

    def addresses(self) -> list[int]:
        """Return the addresses, one row per parameter."""
        return list(chain.from_iterable(zip(*self.columns, strict=True)))

    def shapes(self, partitions: Sequence[int] | None, signs: Sequence[float] | None) -> list[Shape]:
        """Return the shapes of all parameters."""
        places = repeat(0) if partitions is None else partitions
        turned = repeat(1) if signs is None else map(int, signs)
        return [(self.dtypes, True, *each) for each in zip(self.sizes, places, turned, strict=False)]


def usual_of(lists: Sequence[Sequence[Tensor | None]], roles: Sequence[int]) -> Usual | None:
    """Return what is known of lists if all is as usual, else None."""
    dtypes: dict[int, torch.dtype] = {}
    columns, sizes = [], None
    for one, role in zip(lists, roles, strict=True):
        types = set(map(type, one))
        if types == {type(None)}:
            columns.append([0] * len(one))
            continue
        if not types <= DENSE or set(map(LAYOUT, one)) != {torch.strided}:
            return None
        full: Sequence[Tensor] = one  # type: ignore[assignment]
        found = set(map(DTYPE, full))
        dtype = found.pop()
        if (
            found
            or dtype.is_complex
            or dtypes.setdefault(role, dtype) != dtype
            or not all(map(Tensor.is_contiguous, full))
        ):
            return None
        columns.append(list(map(Tensor.data_ptr, full)))
        sizes = sizes or tuple(map(Tensor.numel, full))
    if sizes is None or 0 in sizes or reduce(or_, chain.from_iterable(columns)) % 16:
        return None
    known = next(iter(dtypes.values()))
    return Usual(tuple(dtypes.get(role, known) for role in range(max(roles) + 1)), sizes, columns)
