"""Projected gradient descent on the simplex, which the stochastic relatives of MGDA do instead of solving."""

from __future__ import annotations

from gradsurg.surgery.blockwise import Block, Vector

__all__ = ["onto_simplex", "resumed"]


def onto_simplex(point: Vector) -> Vector:
    """Return the nearest point with entries ≥ 0 that add up to 1.

    Source: Held, Wolfe & Crowder 1974; the threshold is found by sorting.

    Example:
        >>> onto_simplex([0.5, 1.0, -1.0])
        [0.25, 0.75, 0.0]
    """
    highest = max(point)  # taken off first: a 1 would be lost beside numbers of 1e16
    threshold, total = 0.0, 0.0
    for k, x in enumerate(sorted((x - highest for x in point), reverse=True), start=1):
        total += x
        if x * k <= total - 1:
            break
        threshold = (total - 1) / k
    return [max(x - highest - threshold, 0.0) for x in point]


def resumed(block: Block) -> Vector:
    """Return the weights of the last step: the mean of them for a task that was not there, then made to add up to 1.

    All r_i / Σ r_j at first.
    """
    known = [block.memory[name] for name in block.tasks if name in block.memory]
    if not known:
        return block.shares
    typical = sum(known) / len(known)
    found = [block.memory.get(name, typical) for name in block.tasks]
    total = sum(found)
    return [x / total for x in found] if total > 0 else block.shares
