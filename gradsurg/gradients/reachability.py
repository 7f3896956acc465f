"""Which parameters a task reaches, where compiled code returns zeros for those that it does not."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from gradsurg.gradients.dtensor import local_of
from gradsurg.gradients.rows import Row

__all__ = ["Reachability"]


class Reachability:
    """Remembers every parameter for which a task ever had a gradient other than zero.

    One compiled graph has one backward pass for all that it returns: with the heads inside, each task gets zeros for
    the heads of the others instead of None, and all of them would look shared. So a gradient that is zero throughout,
    of a parameter that the task never reached before, counts as none. Nothing is lost by that, since zeros add
    nothing; a parameter whose gradient is zero at first only (a new adapter's) is reached from the first number on.
    """

    def __init__(self) -> None:
        self.anywhere: Callable[[Tensor], Tensor] = (
            _here  # of flags, those that are set on any rank; see Layout.anywhere
        )
        self._known: dict[str, WeakIdKeyDictionary] = {}

    def sift(self, name: str, row: Row) -> Row:
        """Take out of a task's row what it does not reach, and return that.

        Only parameters not known to be reached are looked at, so that this soon costs no more than the others' heads.
        """
        known = self._known.setdefault(name, WeakIdKeyDictionary())
        unknown = [(p, g) for p, g in row.items() if p not in known and not g.is_sparse]
        if not unknown:
            return Row()
        device = unknown[0][0].device
        answers = self.anywhere(torch.stack([local_of(gradient).any().to(device) for _, gradient in unknown])).tolist()
        blank = Row(pair for pair, reached in zip(unknown, answers, strict=True) if not reached)
        for p, _ in unknown:
            if p in blank:
                row.pop(p)
            else:
                known[p] = True
        return blank

    def count(self, parameter: Tensor, names: Iterable[str]) -> int:
        """Return how many of these tasks are known to reach a parameter."""
        return sum(parameter in self._known.get(name, ()) for name in names)


def _here(flags: Tensor) -> Tensor:
    return flags
