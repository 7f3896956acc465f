"""Which part of parameters and rows each rank holds, and which part of these it counts: the base class of all layouts.

`Layout` itself is one process, which holds and counts everything; ddp.py and fsdp.py derive from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from gradsurg.distributed.collectives import Group, RanksError, fingerprint, merged
from gradsurg.gradients.rows import Row
from gradsurg.linalg.measure import Measure

__all__ = ["ALONE", "NONE", "Delivery", "Exchange", "Layout", "generator_of", "tell_others"]

NONE: Mapping[str, float] = MappingProxyType({})


@dataclass(frozen=True)
class Delivery:
    """The result of an exchange.

    Attributes:
        rows: Task name -> the part of the task's gradients that this rank holds, in an order that all ranks share.
        foreign: The averaged gradients that take no part in surgery.
        losses: Name -> mean over ranks; a rank without the task counts as 0, as its gradient does.
        blank: Zeros, like rows, of parameters that are untouched on some rank. Others may have rows of them.
    """

    rows: dict[str, Row]
    foreign: Row
    losses: dict[str, Tensor]
    blank: Row


class Exchange(Protocol):
    """The exchange of rows between ranks in one step."""

    def offer(self, name: str, *parts: Row) -> None:
        """Hand over a task's row, in parts to be added up; may start to send it."""

    def finish(self, foreign: Row, losses: Mapping[str, Tensor], untouched: Sequence[Tensor] = ()) -> Delivery:
        """Wait for all rows; raises MultiTaskError on every rank if one failed.

        Compiled code returned nothing but zeros for the parameters `untouched`.
        """

    def fail(self) -> None:
        """Tell the others that this rank raised, so that they do not wait for it."""


class Layout:
    """One process, which holds and counts everything. Subclasses override what differs over several ranks."""

    # Whether rows have to be exchanged.
    several = False
    # Whether every rank holds all of every row.
    whole_rows = True
    # None is this process alone.
    group: Group | None = None

    def begin(self) -> None:
        """Prepare the model's own synchronisation for several backward passes, or refuse."""

    def sends(self, waiting: bool) -> bool:
        """Whether rows are exchanged now; `waiting` tells whether their surgery has to wait."""
        return not waiting

    def send_now(self) -> None:
        """Exchange rows from now on until the next run begins, also those that no_sync() kept back."""

    def quiet(self) -> AbstractContextManager[None]:
        """Keep the model's own synchronisation out of the backward passes inside this block."""
        return nullcontext()

    def exchange(
        self, names: Sequence[str], measured: Sequence[str] = (), preferences: Mapping[str, float] = NONE
    ) -> Exchange:
        """Begin to exchange the rows of this rank's tasks; the losses of the `measured` tasks are averaged too."""
        raise NotImplementedError

    def averaging(self) -> Exchange | None:
        """Begin to average what one backward pass leaves in p.grad; None if that is not needed, or not now."""
        return None

    # -- parts of parameters and rows -------------------------------------------------------------------------------

    def held(self, parameters: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the parts that this rank holds of tensors shaped like the parameters."""
        return list(tensors)

    def whole(self, result: Row) -> Row:
        """Return gradients for p.grad, made of the parts that this rank holds."""
        return result

    def put_back(self, parameters: Sequence[Tensor], held: Sequence[Tensor]) -> None:
        """Write the held parts, which were changed, into the parameters of all ranks."""

    def measure(self, parameters: Sequence[Tensor]) -> Measure:
        """Return what measures lengths and inner products of these parameters."""
        return Measure() if self.group is None else Measure(total=self.total, gather=self.group.gather)

    def generators(self, parameters: Sequence[Tensor], generator: torch.Generator) -> list[torch.Generator]:
        """Return one random generator per parameter; ranks that hold the same numbers draw the same."""
        return [generator] * len(parameters)

    def of_features(self) -> Layout:
        """Return the layout of features, of which each rank has those of its own part of the batch."""
        return self

    # -- questions to all ranks: each stands on `added` or on another question of the group --------------------------

    def added(self, numbers: Tensor) -> Tensor:
        """Return the sum over ranks."""
        return numbers if self.group is None else self.group.total(numbers)

    def total(self, numbers: Tensor) -> Tensor:
        """Return the sum over ranks of what each measured of the part that it counts."""
        return self.added(numbers)

    def anywhere(self, flags: Tensor) -> Tensor:
        """Return which flags are set on any rank, if all ranks ask at this point; otherwise those of this rank."""
        return flags

    def raised(self, flags: Tensor) -> Tensor:
        """Return which flags are set on any rank; all ranks have to ask at this point."""
        return flags if self.group is None else self.added(flags.to(torch.int32)) > 0

    def on_any_rank(self, names: Iterable[str], mine: Sequence[str]) -> list[str]:
        """Return those of `names`, equal and in one order on all ranks, that are in `mine` on any rank."""
        # Ranks give flags of one length, so that no names have to travel.
        flags = self.added(torch.tensor([name in mine for name in names], dtype=torch.float64))
        return [name for name, flag in zip(names, flags, strict=True) if flag]

    def mean_losses(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the means over ranks of losses that all ranks have."""
        return dict(losses) if self.group is None else self.group.mean(losses)

    def agree(self, number: int) -> bool:
        """Whether all ranks gave this one number, and it is not 0."""
        if self.group is None:
            return number != 0
        # Asked with 0 too: the others wait for the answer.
        heard = self.group.gather(torch.tensor(number))
        return number != 0 and bool((heard == number).all())

    def agreed(self, names: Sequence[str]) -> list[str]:
        """Return the tasks of all ranks, in the order of the lowest rank that has them."""
        if self.group is None:
            return list(names)
        heard = self.group.gather(torch.tensor(fingerprint(names)))
        return merged([names] if bool((heard == heard[0]).all()) else self.group.objects(list(names)))


def generator_of(generator: torch.Generator, *what: object) -> torch.Generator:
    """Return a generator for one thing; equal in all processes, and independent of what was drawn from the other."""
    return torch.Generator().manual_seed(fingerprint([generator.initial_seed(), *what]))


def tell_others(exchange: Exchange | None, error: BaseException | None) -> None:
    """Tell the other ranks that this one failed, unless they know, or it was interrupted and must not wait for them."""
    if exchange is not None and not isinstance(error, RanksError) and (error is None or isinstance(error, Exception)):
        exchange.fail()


ALONE = Layout()
