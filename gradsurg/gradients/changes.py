"""Tells what others did to p.grad since we wrote it, and what a penalty of this backward pass added. For capture.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradsurg.gradients.dtensor import local_of, version_of
from gradsurg.gradients.rows import ByParameter, Row, added, is_finite

__all__ = ["holds_same", "how_changed", "is_untouched", "what_was_added"]


def is_untouched(p: Tensor, written: tuple[Tensor, int] | None) -> bool:
    """Whether p.grad is the tensor that was written, of the same version."""
    gradient = p.grad
    if written is None or gradient is None:
        return written is None and gradient is None
    return gradient is written[0] and version_of(gradient) == written[1]


def holds_same(a: Tensor, b: Tensor) -> Tensor:
    """Whether all numbers are finite and equal; the answer is on their device."""
    difference = added(local_of(a), -local_of(b))
    return ~(difference.coalesce().values() if difference.is_sparse else difference).any()


def how_changed(parameters: Sequence[Tensor], written: ByParameter[tuple[Tensor, int]]) -> int:
    """Return 0 if p.grad is what was written, as far as torch knows, 1 if a backward pass may have added to it, else 2.

    A backward pass writes to each gradient once at most. zero_grad(set_to_none=False) does so too, but leaves nothing
    but zeros.
    """
    ours = written.at(parameters)
    if all(map(is_untouched, parameters, ours)):
        return 0
    pairs = [(p.grad, mine) for p, mine in zip(parameters, ours, strict=True) if mine is not None]
    if not all(gradient is mine[0] for gradient, mine in pairs):
        return 2
    # Views of one buffer count their writes together.
    buffers = [id(g if g._base is None else g._base) for _, (g, _) in pairs]
    writes = {buffer: version_of(g) - before for buffer, (_, (g, before)) in zip(buffers, pairs, strict=True)}
    if any(count > buffers.count(buffer) for buffer, count in writes.items()):
        return 2
    # What tasks did not reach, a penalty may: p.grad was None there.
    return 1 if not any(writes.values()) or any(_is_nonzero(g) for _, (g, _) in pairs) else 2


@torch.no_grad()
def what_was_added(parameters: Sequence[Tensor], written: Row) -> Row | None:
    """Return p.grad less what was written there, or None if that is not finite: then it was replaced unseen."""
    if not all(map(is_finite, written.values())):
        return None
    return Row(
        (p, p.grad if (ours := written.get(p)) is None else added(p.grad, -ours))
        for p in parameters
        if p.grad is not None
    )


def _is_nonzero(gradient: Tensor) -> bool:
    return bool((gradient.coalesce().values() if gradient.is_sparse else local_of(gradient)).any())
