"""Rows whose small tensors are packed into one matrix, once a step, for all who read them.

Forty tensors of a few thousand numbers cost more in calls than in arithmetic, and a step reads them up to four times:
for the Gramian, for u, for the movement, for its correction.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Sequence
from operator import attrgetter

import torch
from torch import Tensor
from torch.nn import Parameter

from gradsurg.blocks import SMALL, flat

__all__ = ["Packed", "Table", "alike", "packed"]

# Numbers of one row that are packed at most: with 8 bytes each, 1 MiB a task whatever the model's size.
MOST = 131_072

DTYPE, DEVICE, LAYOUT = map(attrgetter, ("dtype", "device", "layout"))
DENSE = frozenset((Tensor, Parameter))


class Table(list[list["Tensor | None"]]):
    """m lists of one gradient (or None) per parameter, that remember how they were packed.

    The tensors must not be written to while the table is in use.
    """

    def __init__(self, rows: Iterable[list[Tensor | None]]) -> None:
        super().__init__(rows)
        self._layout: tuple[list[int], list[int], list[int], list[list[Tensor | None]]] | None = None

    def packed(self) -> Packed | None:
        """Return the small tensors as a matrix, and the others; None where nothing can be packed."""
        if self._layout is None:
            self._layout = self._lay_out()
        places, others, sizes, rest = self._layout
        if not places:
            return None
        return Packed(MATRIX.of(self, places, sum(sizes)), places, sizes, others, rest)

    def _lay_out(self) -> tuple[list[int], list[int], list[int], list[list[Tensor | None]]]:
        places: list[int] = []
        others: list[int] = []
        sizes: list[int] = []
        if len(self) and len(self[0]) > 1 and alike(self):
            some = self[0][0]
            assert some is not None
            if some.device.type == "cpu" and some.is_floating_point() and some.layout is torch.strided:
                room = MOST
                for k, size in enumerate(map(Tensor.numel, self[0])):  # type: ignore[arg-type]
                    if size < SMALL and size <= room:
                        places.append(k)
                        sizes.append(size)
                        room -= size
                    else:
                        others.append(k)
        return places, others, sizes, [[row[k] for k in others] for row in self] if others else []


class Packed:
    """What a table holds, in two parts.

    Attributes:
        matrix: The small tensors of each row one after the other, shape (m, numbers), float64. It is overwritten when
            another table is packed: read it, and do not keep it.
        places: The positions of these in the rows.
        sizes: How many numbers each of them has.
        others: The positions of the rest.
        rest: The rest, as rows; empty where there is none.
    """

    def __init__(
        self, matrix: Tensor, places: list[int], sizes: list[int], others: list[int], rest: list[list[Tensor | None]]
    ) -> None:
        self.matrix, self.places, self.sizes, self.others, self.rest = matrix, places, sizes, others, rest

    def together(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the packed positions of one more list, such as the parameters, as one vector."""
        return flat(tensors if not self.others else [tensors[k] for k in self.places])

    def per_number(self, values: Sequence[float]) -> Tensor | float:
        """Return one value per packed number from one per parameter; the value itself where all are equal."""
        chosen = [values[k] for k in self.places] if self.others else values
        first = chosen[0]
        if all(value == first for value in chosen):
            return first
        return torch.repeat_interleave(torch.tensor(chosen, dtype=torch.float64), torch.tensor(self.sizes))


def packed(rows: Sequence[Sequence[Tensor | None]]) -> Packed | None:
    """Return what `Table.packed` does; None of rows that are no table."""
    return rows.packed() if isinstance(rows, Table) else None


def alike(lists: Sequence[Sequence[Tensor | None]]) -> bool:
    """Whether nothing is missing and all have one dtype, device and layout, asked without a loop in Python."""
    tensors = [t for row in lists for t in row]
    return DENSE.issuperset(map(type, tensors)) and all(
        len(set(map(attribute, tensors))) == 1 for attribute in (DTYPE, DEVICE, LAYOUT)
    )


class _Matrix(threading.local):
    """The memory of the last matrix, one a thread, and whose rows are in it."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.float64)
        self._holder: weakref.ref[Table] | None = None  # weak: rows go when their step is over

    def of(self, table: Table, places: list[int], width: int) -> Tensor:
        m = len(table)
        if self._memory.numel() < m * width:
            self._memory, self._holder = torch.empty(m * width, dtype=torch.float64), None
        matrix = self._memory[: m * width].view(m, width)
        if self._holder is None or self._holder() is not table:
            whole = len(places) == len(table[0])
            for goal, row in zip(matrix.unbind(0), table, strict=True):
                goal.copy_(flat(row if whole else [row[k] for k in places]))  # type: ignore[arg-type]
            self._holder = weakref.ref(table)
        return matrix


MATRIX = _Matrix()
