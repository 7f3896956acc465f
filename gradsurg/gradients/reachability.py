"""Tells which parameters a task reaches although compiled code returns zeros for the others. For capture.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from gradsurg.gradients.dtensor import local_of
from gradsurg.gradients.rows import Row

__all__ = ["Reachability", "is_apart"]


class Reachability:
    """Remembers every parameter for which a task ever had a gradient other than zero.

    One compiled graph has one backward pass for all its outputs. If the heads are inside, each task gets zeros instead
    of None for the heads of the others, and all heads would look shared. So a gradient of zeros counts as none if the
    task never reached the parameter before. Nothing is lost, since zeros add nothing. A parameter whose gradient is
    zero only at first (a new adapter's) is reached from its first other number on.
    """

    def __init__(self) -> None:
        # Turns flags of this rank into flags that are set on any rank; see Layout.anywhere.
        self.anywhere: Callable[[Tensor], Tensor] = lambda flags: flags
        self._known: dict[str, WeakIdKeyDictionary] = {}

    def sift(self, name: str, row: Row) -> Row:
        """Remove from a task's row the parameters that it does not reach, and return these with their zeros."""
        # Parameters that are known to be reached aren't looked at again: soon only the other tasks' heads are.
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


def is_apart(gradients: Sequence[Tensor]) -> Tensor | None:
    """Whether no two tasks have a number other than 0 at one place, and together they have half of all places.

    Fewer may be chance, as with a table of embeddings of which each batch touches a few rows.

    Returns:
        Bool, shape (), on the gradients' device; None if it cannot be told.
    """
    if any(g.is_sparse for g in gradients):
        return None
    touched = [local_of(g) != 0 for g in gradients]
    if touched[0].is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    count = torch.zeros_like(touched[0], dtype=torch.int32)
    for each in touched:
        count += each
    several = torch.stack([each.any() for each in touched]).sum() > 1
    return (count <= 1).all() & several & ((count > 0).sum() * 2 >= count.numel())
