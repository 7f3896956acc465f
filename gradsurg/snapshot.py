"""Parameters and state of an optimizer before its step, to be put back where the step fails half way."""

from __future__ import annotations

import copy

import torch
from torch.optim import Optimizer

from gradsurg.gradients.param_groups import trained
from gradsurg.gradients.rows import Row

__all__ = ["Snapshot"]


class Snapshot:
    """A copy of all that a step may write.

    Args:
        optimizer: About to step.
        copied: Copies of parameters that there are already; they are used and not made again.
    """

    def __init__(self, optimizer: Optimizer, copied: Row) -> None:
        self._optimizer = optimizer
        self._parameters = Row((p, copied[p] if p in copied else p.detach().clone()) for p in trained(optimizer))
        self._state = {p: copy.deepcopy(state) for p, state in optimizer.state.items()}

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back; state that did not exist before is removed."""
        for p, old in self._parameters.items():
            p.copy_(old)
        self._optimizer.state.clear()
        self._optimizer.state.update(self._state)
