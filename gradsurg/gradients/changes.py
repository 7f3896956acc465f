"""Tells what others did to p.grad since we wrote it, and what a penalty of this backward pass added. For capture.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradsurg.gradients.dtensor import local_of, version_of
from gradsurg.gradients.rows import ByParameter, Row, added, is_finite

__all__ = ["holds_same", "is_untouched", "was_added_to", "what_was_added"]


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


def was_added_to(parameters: Sequence[Tensor], written: ByParameter[tuple[Tensor, int]]) -> bool:
    """Whether one backward pass may have added to the gradients that were written, and nothing else changed them.

    It writes to each once at most. zero_grad(set_to_none=False) does so too, but leaves nothing but zeros.
    """
    pairs = [(p.grad, ours) for p, ours in zip(parameters, written.at(parameters), strict=True) if ours is not None]
    if not all(gradient is ours[0] for gradient, ours in pairs):
        return False
    # Views of one buffer count their writes together.
    buffers = [id(g if g._base is None else g._base) for _, (g, _) in pairs]
    writes = {buffer: version_of(g) - before for buffer, (_, (g, before)) in zip(buffers, pairs, strict=True)}
    if any(count > buffers.count(buffer) for buffer, count in writes.items()):
        return False
    return not any(writes.values()) or any(_is_nonzero(g) for _, (g, _) in pairs)


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
