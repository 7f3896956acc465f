"""One backward pass added to p.grad, and averaged over ranks at the end of the backward pass that it is part of."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from torch import Tensor

from gradsurg.distributed.layout import Exchange, Layout, tell_others
from gradsurg.gradients.rows import HeldGradients, Row, laid_out
from gradsurg.linalg.sparse import added

__all__ = ["Averaged"]


class Averaged:
    """A block whose backward passes fill p.grad; if it raises, p.grad is as before, on all ranks.

    What was in p.grad before is averaged with the rest. If it was averaged already, that changes nothing; if it comes
    from micro-batches in no_sync(), it has to be, as in DDP.
    """

    def __init__(self, parameters: Sequence[Tensor], layout: Layout) -> None:
        self._parameters = parameters
        self._layout = layout
        self._exchange: Exchange | None = None
        self._quiet = layout.quiet()
        self._results: tuple[Row, ...] = ()
        self.held_gradients = HeldGradients(list(parameters))

    def __enter__(self) -> Averaged:
        self._quiet.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            # FSDP2's own reduction may find out here that another rank is gone, and says so better than `error`.
            self._quiet.__exit__(kind, error, trace)
        except BaseException as said_better:
            self.drop(said_better)
            raise
        if error is not None:
            self.drop(error)

    def begin(self) -> Averaged:
        """Begin to average; from now on, other ranks are told of errors."""
        self._exchange = self._layout.averaging()
        return self

    def add(self, *results: Row) -> None:
        """Add results to p.grad: now, or when they are averaged; until then p.grad is empty."""
        if self._exchange is None:
            self.held_gradients.add(*results)
        else:
            self._results = results

    def complete(self) -> None:
        """Average what was in p.grad, what was added, and what the rest of the outer backward pass left there."""
        if self._exchange is None:
            return
        # A penalty in the same outer backward pass may have run since, and is averaged with the rest.
        together = self.held_gradients.standing()
        for p, gradient in (pair for row in (*self._results, self.held_gradients.lift()) for pair in row.items()):
            together[p] = added(together.get(p), gradient)
        try:
            delivery = self._exchange.finish(together, {})
        except BaseException as error:
            self.drop(error)
            raise
        self._exchange = None
        for p in self._parameters:
            mean = delivery.foreign.get(p)
            p.grad = None if mean is None else laid_out(p, mean)

    def drop(self, error: BaseException | None = None) -> None:
        """Give p.grad back as it was, and tell the other ranks."""
        self.held_gradients.restore()
        exchange, self._exchange = self._exchange, None
        tell_others(exchange, error)
