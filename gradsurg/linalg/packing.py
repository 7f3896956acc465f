"""Rows whose small tensors are packed into one matrix, once per step, for every pass that reads them.

Forty tensors of a few thousand numbers cost more in calls than in arithmetic. A step reads them up to four times: for
the Gramian, for u, for the movement and for its correction.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from itertools import chain
from operator import add, attrgetter

import torch
from torch import Tensor
from torch.nn import Parameter

from gradsurg.linalg.blocks import BLOCK, SMALL, Rows, evenly, flat
from gradsurg.linalg.buffers import BUFFERS, ROWS, Matrix, products_with_last

__all__ = ["GradientTable", "PackedRows", "alike", "packed"]

# The most numbers of one row that are packed: half a MiB per task in float32, whatever the model's size.
MOST = 131_072
# For map() over all tensors, without a loop in Python.
DTYPE, DEVICE, LAYOUT = map(attrgetter, ("dtype", "device", "layout"))
DENSE = frozenset((Tensor, Parameter))


class GradientTable(list[list["Tensor | None"]]):
    """m lists of one gradient (or None) per parameter, packed at most once.

    The tensors must not be written to while the table is in use.
    """

    _packed: PackedRows | None = None

    @functools.cached_property
    def plain(self) -> bool:
        """Whether every entry is a dense, real tensor of one dtype, on the CPU."""
        if not (len(self) and len(self[0]) and alike(self)):
            return False
        some = self[0][0]
        assert some is not None
        return some.device.type == "cpu" and some.dtype.is_floating_point and some.layout is torch.strided

    def packed(self) -> PackedRows | None:
        """Return the small tensors as a matrix, and the others; None if nothing can be packed."""
        if self._packed is None and self.plain and len(self[0]) > 1:
            self._packed = _pack(self)
        return self._packed


class PackedRows:
    """The content of a GradientTable in two parts: small tensors in a matrix, and the rest as rows.

    The matrix has the small tensors of each row one after the other, shape (m, numbers), in the rows' dtype: those of
    the parameters at `places`, with `sizes` numbers each. `others` are the places of the rest.
    """

    def __init__(
        self, matrix: Tensor, places: list[int], sizes: list[int], others: list[int], rest: list[list[Tensor | None]]
    ) -> None:
        self.matrix, self.places, self.sizes, self.others, self.rest = matrix, places, sizes, others, rest

    def at(self, tensors: Sequence[Tensor | None]) -> list[Tensor]:
        """Return the entries of another list, such as the parameters, at the packed positions."""
        if not self.others:
            return list(tensors)  # type: ignore[arg-type]
        return [tensors[k] for k in self.places]  # type: ignore[misc]

    def apart(self, vector: Tensor, like: Sequence[Tensor | None]) -> list[Tensor]:
        """Cut a vector of all packed numbers into views, in the shapes of the packed entries of `like`."""
        return torch._utils._unflatten_dense_tensors(vector, self.at(like))  # type: ignore[no-any-return]

    def per_number(self, values: Sequence[float]) -> Tensor | float:
        """Return one value per packed number from one per parameter; a single value if all are equal."""
        chosen = [values[k] for k in self.places]
        if chosen.count(chosen[0]) == len(chosen):
            return chosen[0]
        return torch.repeat_interleave(torch.tensor(chosen, dtype=torch.float64), torch.tensor(self.sizes))

    def wide(self) -> Iterator[Matrix]:
        """Yield blocks of columns in float64, each in the buffer that the next one overwrites."""
        m, count = self.matrix.shape
        # As a whole, 100 000 numbers of eight tasks take 6 MiB, which the backward passes push out of the cache.
        for part in torch.split(self.matrix, evenly(count, BLOCK), dim=1):
            matrix = BUFFERS.matrix(ROWS, m, part.shape[1], part.device)
            matrix.numbers.copy_(part)
            yield matrix

    def inner(
        self, before: Sequence[Tensor], after: Sequence[Tensor], signs: Sequence[float], exact: bool
    ) -> tuple[list[float], float]:
        """Return ⟨d, g_i⟩ and ‖d‖² of the packed numbers, as movement.inner_update does of all."""
        old, new = flat(self.at(before)), flat(self.at(after))
        sign = self.per_number(signs)
        size = evenly(old.numel(), BLOCK)
        products = [0.0] * (len(self.matrix) + 1)
        for start in range(0, old.numel(), size):
            here = slice(start, start + size)
            gradients = self.matrix[:, here]
            matrix = BUFFERS.matrix(ROWS, len(gradients) + 1, gradients.shape[1], gradients.device)
            matrix.numbers[:-1].copy_(gradients)
            d = matrix.rows[-1].copy_(old[here]).sub_(new[here])
            if isinstance(sign, Tensor):
                d.mul_(sign[here])
            products = list(map(add, products, products_with_last(matrix, exact)))
        *inner, square = products
        return inner if isinstance(sign, Tensor) else [sign * x for x in inner], square

    def sum(self, weights: Sequence[float], dtype: torch.dtype) -> Tensor:
        """Return Σ w_i g_i of the packed numbers, added up in a dtype; rows of weight 0 are not read."""
        total: Tensor | None = None
        # One row after the other, as for rows that are not packed, so that both round alike. A matrix product would
        # save 20 µs, but then the last digit would depend on what else is packed.
        for weight, row in zip(weights, self.matrix.unbind(0), strict=True):
            if not weight:
                continue
            if row.dtype != dtype:
                row = row.to(dtype)
            total = row * weight if total is None else total.add_(row, alpha=weight)
        return torch.zeros(self.matrix.shape[1], dtype=dtype) if total is None else total

    def correct_(
        self, coefficients: Sequence[float], after: Sequence[Tensor], signs: Sequence[float], exact: bool
    ) -> None:
        """Subtract sign · Σ λ_i g_i from the packed parameters, as combine.correct_ does from all."""
        parameters = self.at(after)
        dtype = torch.float64 if exact else torch.promote_types(parameters[0].dtype, torch.float32)
        change = self.sum(coefficients, dtype).mul_(self.per_number(signs))
        torch._foreach_copy_(parameters, self.apart(torch.sub(flat(parameters), change), after))


def packed(rows: Rows) -> PackedRows | None:
    """Return `GradientTable.packed`; None for rows of any other type."""
    return rows.packed() if isinstance(rows, GradientTable) else None


def alike(lists: Rows) -> bool:
    """Whether no tensor is missing and all have one dtype, device and layout."""
    tensors = list(chain.from_iterable(lists))
    return (
        DENSE.issuperset(map(type, tensors))
        and len(set(map(DTYPE, tensors))) == 1
        and len(set(map(DEVICE, tensors))) == 1
        and len(set(map(LAYOUT, tensors))) == 1
    )


def _pack(rows: GradientTable) -> PackedRows | None:
    dense: list[Tensor] = rows[0]  # type: ignore[assignment]  # a plain table misses none
    sizes = list(map(Tensor.numel, dense))
    every = range(len(sizes))
    places: list[int] = []
    room = MOST
    for k in every:
        if 0 < sizes[k] < SMALL and sizes[k] <= room and dense[k].is_contiguous():
            places.append(k)
            room -= sizes[k]
    if not places:
        return None
    others = sorted(set(every).difference(places))
    matrix = flat([row[k] for row in rows for k in places]).view(len(rows), -1)  # type: ignore[misc]
    return PackedRows(matrix, places, [sizes[k] for k in places], others, [[row[k] for k in others] for row in rows])
