"""The exchange of one run's rows between ranks, for the engine; with a single rank it does nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from gradsurg.distributed.detect import Ranks
from gradsurg.distributed.layout import ALONE, Delivery, Exchange, Layout, tell_others
from gradsurg.gradients.capture import Capture

__all__ = ["Session"]


class Session:
    """Starts an exchange when a run begins, sends each captured row, and hands the capture what arrives."""

    def __init__(self, capture: Capture, ranks: Ranks) -> None:
        self._capture, self.ranks = capture, ranks
        self.layout: Layout = ALONE
        self._exchange: Exchange | None = None
        self._measured: list[str] = []
        self.preferences: Mapping[str, float] = {}  # of this step alone

    def lay_out(self, parameters: Callable[[], Sequence[Tensor]]) -> None:
        """Find out how the parameters are spread over ranks, and switch off DDP's own reduction."""
        self.layout = self.ranks.layout(parameters)
        self.layout.begin()
        self._capture.reach.anywhere, self._capture.on_any_rank = self.layout.anywhere, self.layout.raised

    def agree_on(self, names: Sequence[str]) -> list[str]:
        """Return the tasks of all ranks; their losses are then averaged, with or without a row."""
        self._measured = self.layout.agreed(names)
        return self._measured

    def start(self, names: Sequence[str], waiting: bool) -> None:
        """Begin to exchange the rows that this run will capture, and earlier rows that were not sent.

        Nothing is sent now if the surgery is `waiting` for other runs, and the layout lets rows wait with it.
        """
        if self.layout.several and self.layout.sends(waiting):
            self._open(names, self._capture.to_send())

    def captured(self, name: str) -> None:
        """Send the row of a task whose backward pass is done, while the next runs."""
        if self._exchange is not None:
            self._exchange.offer(name, *self._capture.part_with(name))

    def settle(
        self, waiting: bool, losses: Mapping[str, Tensor], joined: bool
    ) -> tuple[bool | None, Mapping[str, Tensor], list[str]]:
        """Replace the fresh rows by those of all ranks, unless that has to wait, as for `start`.

        `joined` tells that a second total ran in the same backward pass, whose rows were not sent yet.

        Return whether rows were exchanged, None for a single rank; the losses, averaged if so; and all tasks' names.
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
            # The rows of a second total of this backward pass came after the first exchange was under way.
            arrived.append(self._finish(losses))
        rows = [row for delivery in arrived for row in delivery.rows.items()]
        self._capture.arrived(rows, arrived[-1].foreign, arrived[-1].blank)
        means = {name: loss for delivery in arrived for name, loss in delivery.losses.items()}
        return True, means, list(dict.fromkeys(name for delivery in arrived for name in delivery.rows))

    def fail(self, error: BaseException | None) -> None:
        """Drop the exchange, and tell the other ranks."""
        exchange, self._exchange = self._exchange, None
        tell_others(exchange, error)

    def _open(self, names: Sequence[str], earlier: Sequence[str]) -> None:
        earlier = [name for name in earlier if name not in names]
        self._exchange = self.layout.exchange([*earlier, *names], self._measured, self.preferences)
        for name in earlier:
            self.captured(name)

    def _finish(self, losses: Mapping[str, Tensor]) -> Delivery:
        assert self._exchange is not None
        delivery = self._exchange.finish(self._capture.foreign, losses, self._capture.untouched())
        self._exchange = None
        return delivery
