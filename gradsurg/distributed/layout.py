"""What each rank holds of the parameters and rows, and what of that it counts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from gradsurg.distributed.collectives import fingerprint
from gradsurg.gradients.rows import Row
from gradsurg.linalg.measure import Measure

__all__ = ["ALONE", "Delivery", "Exchange", "Layout", "generator_of"]


class Delivery:
    """What an exchange brought.

    Attributes:
        rows: Task name -> what this rank holds of the task's gradients, in the order that all ranks agreed on.
        foreign: The averaged gradients that take no part in surgery.
        losses: Name -> mean over ranks; a rank without the task counts as 0, as its gradient does.
    """

    def __init__(self, rows: dict[str, Row], foreign: Row, losses: dict[str, Tensor]) -> None:
        self.rows, self.foreign, self.losses = rows, foreign, losses


class Exchange(Protocol):
    """One step's traffic of rows between ranks."""

    @property
    def names(self) -> list[str]:
        """The tasks of all ranks, in an order that is everybody's."""

    def offer(self, name: str, *parts: Row) -> None:
        """Hand over a task's row, in parts to be added up; may start to send it."""

    def finish(self, foreign: Row, losses: Mapping[str, Tensor]) -> Delivery:
        """Wait for everything; raises MultiTaskError on every rank if one failed."""

    def fail(self) -> None:
        """Tell the others that this rank raised, so that they need not wait for it."""


class Layout:
    """One process: it holds and counts all of everything. Subclasses say what is different over several ranks.

    The gradients and parameters that gramian.py and guarantee.py see are those that `held` returns.
    """

    several = False
    whole_rows = True  # whether every rank holds all of every row

    def begin(self) -> None:
        """Make the model's own synchronisation fit for several backward passes, or refuse."""

    def sends(self, waiting: bool) -> bool:
        """Whether rows are exchanged now, `waiting` being whether their surgery has to wait."""
        return not waiting

    def quiet(self) -> AbstractContextManager[None]:
        """Keep the model's own synchronisation out of the passes inside this block."""
        return nullcontext()

    def agreed(self, names: Sequence[str]) -> list[str]:
        """Return the tasks of all ranks, in an order that is everybody's."""
        return list(names)

    def exchange(self, names: Sequence[str], measured: Sequence[str] = ()) -> Exchange:
        """Begin the exchange of the rows of the tasks that this rank has; `measured` have losses all the same."""
        raise NotImplementedError

    def held(self, parameters: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return what this rank holds of tensors shaped like the parameters."""
        return list(tensors)

    def measure(self, parameters: Sequence[Tensor]) -> Measure:
        """Return what measures these parameters."""
        return Measure()

    def generators(self, parameters: Sequence[Tensor], generator: torch.Generator) -> list[torch.Generator]:
        """Return what each parameter's random numbers are drawn from: equal where ranks hold the same numbers."""
        return [generator] * len(parameters)

    def on_any_rank(self, names: Iterable[str], mine: Sequence[str]) -> list[str]:
        """Return those of `names`, which all ranks have in one order, that are in some rank's `mine`."""
        flags = self.added(torch.tensor([name in mine for name in names], dtype=torch.float64))
        return [name for name, flag in zip(names, flags, strict=True) if flag]

    def total(self, numbers: Tensor) -> Tensor:
        """Add up what the ranks measured, each of what it counts."""
        return numbers

    def added(self, numbers: Tensor) -> Tensor:
        """Add up over ranks."""
        return self.total(numbers)

    def anywhere(self, flags: Tensor) -> Tensor:
        """Return which flags are set on any rank, where all ranks ask at this point; else those of this rank."""
        return flags

    def agree(self, number: int) -> bool:
        """Whether all ranks gave this one number, and it is not 0."""
        return number != 0

    def averaging(self) -> Exchange | None:
        """Begin to average what one backward pass leaves in p.grad; None where that need not be done, or not now."""
        return None

    def mean_losses(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the means over ranks of losses that all ranks have."""
        return dict(losses)

    def of_features(self) -> Layout:
        """Return the layout of features, of which each rank has those of its own part of the batch."""
        return self

    def whole(self, result: Row) -> Row:
        """Make gradients for p.grad of what this rank holds of them."""
        return result

    def put_back(self, parameters: Sequence[Tensor], held: Sequence[Tensor]) -> None:
        """Write what was changed in the held part of the parameters into the parameters of all ranks."""


def generator_of(generator: torch.Generator, *what: object) -> torch.Generator:
    """Return a generator of its own for one thing, the same in every process and state of the given one."""
    return torch.Generator().manual_seed(fingerprint([generator.initial_seed(), *what]))


ALONE = Layout()
