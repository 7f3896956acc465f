"""Rows whose small tensors are packed into one matrix, once a step, for all who read them.

Forty tensors of a few thousand numbers cost more in calls than in arithmetic, and a step reads them up to four times:
for the Gramian, for u, for the movement, for its correction.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from operator import add, attrgetter

import torch
from torch import Tensor
from torch.nn import Parameter

from gradsurg.linalg.blocks import BLOCK, SMALL, evenly, flat
from gradsurg.linalg.buffers import BUFFERS, ROWS, Matrix, products_with_last

__all__ = ["GradientTable", "PackedRows", "alike", "packed"]

# Numbers of one row that are packed at most: half a MiB a task in float32, whatever the model's size.
MOST = 131_072

DTYPE, DEVICE, LAYOUT = map(attrgetter, ("dtype", "device", "layout"))
DENSE = frozenset((Tensor, Parameter))


class GradientTable(list[list["Tensor | None"]]):
    """m lists of one gradient (or None) per parameter, that are packed once.

    The tensors must not be written to while the table is in use.
    """

    def __init__(self, rows: Iterable[list[Tensor | None]]) -> None:
        super().__init__(rows)
        self._packed: PackedRows | None = None

    @functools.cached_property
    def plain(self) -> bool:
        """Whether there is a dense, real tensor of one dtype at every place, on the CPU."""
        if not (len(self) and len(self[0]) and alike(self)):
            return False
        some = self[0][0]
        assert some is not None
        return some.device.type == "cpu" and some.dtype.is_floating_point and some.layout is torch.strided

    def packed(self) -> PackedRows | None:
        """Return the small tensors as a matrix, and the others; None where nothing can be packed."""
        if self._packed is None and self.plain and len(self[0]) > 1:
            self._packed = _pack(self)
        return self._packed


class PackedRows:
    """What a table holds, in two parts.

    Attributes:
        matrix: The small tensors of each row one after the other, shape (m, numbers), in the rows' dtype.
        places: The positions of these in the rows.
        sizes: How many numbers each of them has.
        others: The positions of the rest.
        rest: The rest, as rows.
    """

    def __init__(
        self, matrix: Tensor, places: list[int], sizes: list[int], others: list[int], rest: list[list[Tensor | None]]
    ) -> None:
        self.matrix, self.places, self.sizes, self.others, self.rest = matrix, places, sizes, others, rest

    def at(self, tensors: Sequence[Tensor | None]) -> list[Tensor]:
        """Return the packed ones of one more list, such as the parameters."""
        if not self.others:
            return list(tensors)  # type: ignore[arg-type]
        return [tensors[k] for k in self.places]  # type: ignore[misc]

    def apart(self, vector: Tensor, like: Sequence[Tensor | None]) -> list[Tensor]:
        """Return views of a vector in the shapes of the packed ones of a list."""
        return torch._utils._unflatten_dense_tensors(vector, self.at(like))  # type: ignore[no-any-return]

    def per_number(self, values: Sequence[float]) -> Tensor | float:
        """Return one value per packed number from one per parameter; the value itself where all are equal."""
        chosen = [values[k] for k in self.places]
        if chosen.count(chosen[0]) == len(chosen):
            return chosen[0]
        return torch.repeat_interleave(torch.tensor(chosen, dtype=torch.float64), torch.tensor(self.sizes))

    def wide(self) -> Iterator[Matrix]:
        """Yield the columns of the matrix in blocks, as matrices of the workspace; each is overwritten by the next.

        Whole, 100 000 numbers of eight tasks take 6 MiB, which a step's backward passes drive out of the cache.
        """
        m, count = self.matrix.shape
        for part in torch.split(self.matrix, evenly(count, BLOCK), dim=1):
            matrix = BUFFERS.matrix(ROWS, m, part.shape[1], part.device)
            matrix.numbers.copy_(part)
            yield matrix

    def inner(
        self, before: Sequence[Tensor], after: Sequence[Tensor], signs: Sequence[float], exact: bool
    ) -> tuple[list[float], float]:
        """Return what gramian.inner_update does, of the packed numbers."""
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
        for weight, row in zip(weights, self.matrix.unbind(0), strict=True):
            # Rounded as rows that are not packed are: a matrix product would save 20 µs, and change the last digit of
            # a step with what else is in it.
            if not weight:
                continue
            if row.dtype != dtype:
                row = row.to(dtype)
            total = row * weight if total is None else total.add_(row, alpha=weight)
        return torch.zeros(self.matrix.shape[1], dtype=dtype) if total is None else total

    def correct_(
        self, coefficients: Sequence[float], after: Sequence[Tensor], signs: Sequence[float], exact: bool
    ) -> None:
        """Do what gramian.correct_ does, to the packed parameters."""
        parameters = self.at(after)
        dtype = torch.float64 if exact else torch.promote_types(parameters[0].dtype, torch.float32)
        change = self.sum(coefficients, dtype).mul_(self.per_number(signs))
        torch._foreach_copy_(parameters, self.apart(torch.sub(flat(parameters), change), after))


def packed(rows: Sequence[Sequence[Tensor | None]]) -> PackedRows | None:
    """Return what `Table.packed` does; None of rows that are no table."""
    return rows.packed() if isinstance(rows, GradientTable) else None


def alike(lists: Sequence[Sequence[Tensor | None]]) -> bool:
    """Whether nothing is missing and all have one dtype, device and layout, asked without a loop in Python."""
    tensors = list(chain.from_iterable(lists))
    return (
        DENSE.issuperset(map(type, tensors))
        and len(set(map(DTYPE, tensors))) == 1
        and len(set(map(DEVICE, tensors))) == 1
        and len(set(map(LAYOUT, tensors))) == 1
    )


def _pack(rows: GradientTable) -> PackedRows | None:
    dense: list[Tensor] = rows[0]  # type: ignore[assignment]  # the table is plain: none is missing
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
