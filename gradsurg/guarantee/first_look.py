"""The movement of a step in single precision: enough to see that nobody is hurt, where nobody is nearly hurt."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

import torch
from torch import Tensor

from gradsurg.guarantee.copies import Part
from gradsurg.linalg.blocks import BLOCK, cut, flat
from gradsurg.linalg.buffers import Buffers
from gradsurg.linalg.packing import DTYPE, GradientTable

__all__ = ["CLEAR", "first_look"]

# Numbers of a large tensor that are looked at at a time, half as many again at most.
LOOKED_AT = 65_536
# A float32 sum of n products errs by n · 6e-8 of ‖d‖ ‖g‖ at worst, in whatever order it is done: 6e-3 for a block.
# Cosines from here on are positive whatever rounding did.
CLEAR = 1e-2
# Products below 1e-38 are lost in float32: n of them are at most n · 1e-38, a hundredth of what is asked of each sum.
LEAST = 1e-36

BUFFERS = Buffers()


def first_look(
    rows: Sequence[Sequence[Tensor | None]],
    norms: Sequence[float],
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    signs: Sequence[float],
) -> tuple[list[float], float] | None:
    """Return ⟨d, g_i⟩ and ‖d‖² of d = sign · (before − after), where cos(d, g_i) ≥ 0.01 for every task.

    The float64 twin is gramian.inner_update, which takes three times as long. Rounding a difference of two float32
    numbers costs 6e-8 of the difference itself, so that d is as good as its sums: typically 1e-7 of ‖d‖ ‖g_i‖.

    Args:
        rows: m lists of gradients; anything but a table of float32 on the CPU is not looked at.
        norms: ‖g_i‖.
        before: The parameters before the step.
        after: The parameters now.
        signs: +1 per parameter, −1 where the optimizer maximises.

    Returns:
        m numbers and a number; None where some cosine is lower, or nothing can be said.
    """
    if not isinstance(rows, GradientTable) or not rows.plain:
        return None
    small = rows.packed()
    others = range(len(signs)) if small is None else small.others
    vector = before.before.vector_of(small) if isinstance(before, Part) else None
    old = before if vector is None else [vector, *(before[k] for k in others)]
    if set(map(DTYPE, (*rows[0], *old, *after))) != {torch.float32}:
        return None
    if not all(map(Tensor.is_contiguous, (*old, *after))):
        return None
    inner, square = [0.0] * len(rows), 0.0
    if small is not None:
        sign = small.per_number(signs)
        if isinstance(sign, Tensor):
            return None
        new = flat(small.at(after))  # of several tensors a copy, to be overwritten, and of one a view of it
        d = torch.sub(
            flat(small.at(before)) if vector is None else vector, new, out=new if len(small.places) > 1 else None
        )
        for part, block in zip(d.split(BLOCK), small.matrix.split(BLOCK, dim=1), strict=True):
            square += torch.dot(part, part).item()
            inner = [x + sign * y for x, y in zip(inner, torch.mv(block, part).tolist(), strict=True)]
    for k in others:
        columns = [row[k] for row in rows]
        if not all(g is not None and g.is_contiguous() for g in columns):
            return None
        for was, now, *parts in cut([t.view(-1) for t in (before[k], after[k], *columns) if t is not None], LOOKED_AT):
            d = torch.sub(was, now, out=BUFFERS.buffer(0, was.numel(), torch.float32, was.device))
            square += torch.dot(d, d).item()
            inner = [x + signs[k] * torch.dot(d, g).item() for x, g in zip(inner, parts, strict=True)]
    enough, least = CLEAR * square**0.5, LEAST * sum(map(Tensor.numel, after))
    clear = least <= square < inf and all(
        max(enough * norm, least) <= x < inf or norm == 0 for x, norm in zip(inner, norms, strict=True)
    )
    return (inner, square) if clear else None
