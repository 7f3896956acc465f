"""A run's rows on their way between ranks, as the surgeon sees it: nothing at all where there is but one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from gradsurg.distributed.collectives import RanksError
from gradsurg.distributed.detect import Ranks
from gradsurg.distributed.layout import ALONE, Delivery, Exchange, Layout

if TYPE_CHECKING:
    from gradsurg.gradients.capture import Capture

__all__ = ["Session"]


class Session:
    """Starts an exchange when a run begins, hands it each row that was captured, and brings back what arrived.

    Args:
        capture: Where rows come from and arrive.
        ranks: Finds the layout.
    """

    def __init__(self, capture: Capture, ranks: Ranks) -> None:
        self._capture, self.ranks = capture, ranks
        self.layout: Layout = ALONE
        self._exchange: Exchange | None = None
        self._measured: list[str] = []

    def lay_out(self, parameters: Callable[[], Sequence[Tensor]]) -> None:
        """Find out how the parameters are spread over ranks, and keep DDP's own reduction out of the way."""
        self.layout = self.ranks.layout(parameters)
        self.layout.begin()
        self._capture.reach.anywhere = self.layout.anywhere

    def agree_on(self, names: Sequence[str]) -> list[str]:
        """Return the tasks of all ranks; their losses are then averaged, row or none."""
        self._measured = self.layout.agreed(names)
        return self._measured

    def start(self, names: Sequence[str], waiting: bool) -> None:
        """Begin to exchange the rows of these tasks, and of earlier ones that were not sent, unless that has to wait.

        Args:
            names: The tasks whose rows this run will capture.
            waiting: Whether the surgery on them has to wait for other runs.
        """
        if self.layout.several and self.layout.sends(waiting):
            self._open(names, self._capture.to_send())

    def captured(self, name: str) -> None:
        """Send the row of a task whose backward pass is done, while others run."""
        if self._exchange is not None:
            self._exchange.offer(name, *self._capture.part_with(name))

    def settle(
        self, waiting: bool, losses: Mapping[str, Tensor], joined: bool
    ) -> tuple[bool | None, Mapping[str, Tensor], list[str]]:
        """Make the fresh rows those of all ranks, unless that has to wait.

        Args:
            waiting: As for `start`.
            losses: Of this rank.
            joined: Whether there are rows of a second total in the same backward pass, which nobody sent yet.

        Returns:
            Whether rows were exchanged, None for a single rank; the losses, averaged if so; and the names of all tasks.
        """
        if not self.layout.several:
            return None, losses, []
        self._capture.take_plain()  # a penalty of the same backward pass may have run since our last task
        if self._exchange is None and not self.layout.sends(waiting):
            return False, losses, []
        arrived = [] if self._exchange is None else [self._finish(losses)]
        if not arrived or joined:
            fresh = list(self._capture.fresh)
            self._open(fresh, [] if arrived else self._capture.to_send())
            for name in fresh:
                self.captured(name)
            arrived.append(self._finish(losses))
        self._capture.arrived([row for delivery in arrived for row in delivery.rows.items()], arrived[-1].foreign)
        means = {name: loss for delivery in arrived for name, loss in delivery.losses.items()}
        return True, means, list(dict.fromkeys(name for delivery in arrived for name in delivery.rows))

    def fail(self, error: BaseException | None) -> None:
        """Drop the exchange, and tell the others, unless the error is about them or has nothing to say to anybody."""
        exchange, self._exchange = self._exchange, None
        if exchange is None or isinstance(error, RanksError):
            return
        if error is None or isinstance(error, Exception):  # not on Ctrl-C, which must not wait for anybody
            exchange.fail()

    def _open(self, names: Sequence[str], earlier: Sequence[str]) -> None:
        earlier = [name for name in earlier if name not in names]
        self._exchange = self.layout.exchange([*earlier, *names], self._measured)
        for name in earlier:
            self.captured(name)

    def _finish(self, losses: Mapping[str, Tensor]) -> Delivery:
        assert self._exchange is not None
        exchange = self._exchange
        delivery = exchange.finish(self._capture.foreign, losses)
        self._exchange = None
        return delivery
