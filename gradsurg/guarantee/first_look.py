"""A fast float32 check of the update, before the float64 path of update.py."""

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

# Numbers of a large tensor in one float32 sum; a last piece may be half as long again.
LOOKED_AT = 65_536
# A float32 sum of n products errs by at most n · 6e-8 of ‖d‖ ‖g‖, in any order: by 6e-3 for one piece. So a cosine of
# at least CLEAR is positive, whatever rounding did.
CLEAR = 1e-2
# Products below 1e-38 are lost in float32: n of them are at most n · 1e-38, a hundredth of n · LEAST.
LEAST = 1e-36

BUFFERS = Buffers()


def first_look(
    rows: Sequence[Sequence[Tensor | None]],
    norms: Sequence[float],
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    signs: Sequence[float],
) -> tuple[list[float], float] | None:
    """Return ⟨d, g_i⟩ and ‖d‖² of d = sign · (before − after), if cos(d, g_i) ≥ 0.01 for every task.

    The margin of 0.01 is so wide that rounding cannot change the verdict; otherwise the caller uses the float64 twin,
    linalg.movement.inner_update, which takes three times as long. The difference of two float32 numbers is rounded by
    6e-8 of itself, so the products err by their sums alone, typically by 1e-7 of ‖d‖ ‖g_i‖.

    Args:
        rows: m lists of gradients; for anything but a GradientTable of float32 on the CPU the result is None.
        norms: ‖g_i‖.
        before: The parameters before the step.
        after: The parameters now.
        signs: +1 per parameter, −1 if the optimizer maximises.

    Returns:
        m numbers and a number; None if a cosine is lower, or float32 cannot tell.
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
        # flat() copies several tensors, and the copy may be overwritten; of a single tensor it is a view.
        new = flat(small.at(after))
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
