"""The nonnegative program in plain Python floats: few tasks, few programs, one Gramian.

A torch call costs about 2 µs whatever the size, and one step of the method needs twenty of them; the passive sets of
real problems hold one to three tasks, so plain arithmetic on lists is several times faster. batched.py is the twin.
"""

from __future__ import annotations

from math import isfinite, nan, sqrt
from operator import mul

__all__ = ["solve_small"]

Vector = list[float]
Matrix = list[Vector]


def solve_small(
    G: Matrix, rights: Matrix, masks: list[list[bool]] | None, scales: Vector | None, rounding: float
) -> Matrix:
    """Return one λ per right-hand side b; arguments as for `nonnegative`."""
    m = len(G)
    answers: Matrix = []
    scaled: tuple[Matrix, Vector] | None = None
    for p, b in enumerate(rights):
        if min(b) >= 0:  # nobody is in conflict (False with a NaN in b's first place only: checked below)
            answers.append([0.0] * m if _finite(b) else [nan] * m)
            continue
        if scaled is None:
            scaled = _unit_diagonal(G)
        A, s = scaled
        q = [x * y for x, y in zip(b, s, strict=True)]
        size = max(map(abs, q)) if scales is None else scales[p]
        if not (isfinite(size) and _finite(b) and all(map(_finite, A))):
            answers.append([nan] * m)
            continue
        if size == 0:
            answers.append([0.0] * m)
            continue
        usable = [x > 0 for x in s] if masks is None else [x > 0 and y for x, y in zip(s, masks[p], strict=True)]
        multipliers = _active_set(A, [x / size for x in q], usable, rounding)
        answers.append([size * x * y for x, y in zip(multipliers, s, strict=True)])
    return answers


def _finite(values: Vector) -> bool:
    return isfinite(sum(values))  # a sum is finite only if every term is, or if it overflows, which is no use either


def _unit_diagonal(G: Matrix) -> tuple[Matrix, Vector]:
    s = [1 / sqrt(row[i]) if row[i] > 0 else 0.0 for i, row in enumerate(G)]
    return [[x * g * y for g, y in zip(row, s, strict=True)] for row, x in zip(G, s, strict=True)], s


def _active_set(A: Matrix, q: Vector, usable: list[bool], rounding: float) -> Vector:
    """Return λ for a Gramian of unit diagonal; the multipliers are kept as a full vector, zeros outside."""
    m = len(q)
    passive, factor, lam = _start(A, q, usable, rounding)
    banned: set[int] = set()
    for _ in range(8 * m + 16):
        # What rounding can do to a residual grows with the multipliers that it is a sum of.
        lowest, enter = -4 * rounding * (1 + sum(lam)), -1
        for i, row in enumerate(A):
            if lam[i] == 0 and usable[i] and i not in banned and i not in passive:
                r = q[i] + sum(map(mul, row, lam))
                if r < lowest:
                    lowest, enter = r, i
        if enter < 0:
            break
        new = _append(A, passive, factor, enter)
        if new[-1] * new[-1] <= 8 * rounding:
            banned.add(enter)
            continue
        passive.append(enter)
        factor.append(new)
        if _descend(A, q, passive, factor, lam, banned):
            banned.clear()
    return lam


def _start(A: Matrix, q: Vector, usable: list[bool], rounding: float) -> tuple[list[int], Matrix, Vector]:
    """Return a passive set to start from, its Cholesky factor and its λ > 0.

    It is everybody in conflict, less those whose multiplier comes out negative: one solve instead of one per task, and
    most often already the answer.
    """
    wanted = [i for i, x in enumerate(q) if x < 0 and usable[i]]
    lam = [0.0] * len(q)
    while wanted:
        passive: list[int] = []
        factor: Matrix = []
        for i in wanted:
            row = _append(A, passive, factor, i)
            if row[-1] * row[-1] > 8 * rounding:
                passive.append(i)
                factor.append(row)
        goal = _solve(factor, [-q[i] for i in passive])
        if min(goal) > 0:
            for i, z in zip(passive, goal, strict=True):
                lam[i] = z
            return passive, factor, lam
        wanted = [i for i, z in zip(passive, goal, strict=True) if z > 0]
    return [], [], lam


def _descend(A: Matrix, q: Vector, passive: list[int], factor: Matrix, lam: Vector, banned: set[int]) -> bool:
    """Move λ to the optimum over the passive set, letting go of tasks that block the way; return whether it moved."""
    moved = False
    while passive:
        goal = _solve(factor, [-q[i] for i in passive])
        if min(goal) > 0:
            moved = moved or any(lam[i] != z for i, z in zip(passive, goal, strict=True))
            for i, z in zip(passive, goal, strict=True):
                lam[i] = z
            break
        share, out = min(
            (lam[i] / (lam[i] - z), i) if lam[i] > z else (0.0, i) for i, z in zip(passive, goal, strict=True) if z <= 0
        )
        for i, z in zip(passive, goal, strict=True):
            lam[i] = max(lam[i] + share * (z - lam[i]), 0.0)
        lam[out] = 0.0
        if share > 0:
            moved = True
        else:
            banned.add(out)  # it could not move: not again before something else has
        at = passive.index(out)
        del passive[at], factor[at:]
        for k in range(at, len(passive)):
            factor.append(_append(A, passive[:k], factor, passive[k]))
    return moved


def _append(A: Matrix, passive: list[int], factor: Matrix, enter: int) -> Vector:
    """Return the row that `enter` adds to the Cholesky factor; its last entry is the length of its new part."""
    against = A[enter]
    row: Vector = []
    for j, other in zip(passive, factor, strict=True):
        row.append((against[j] - sum(map(mul, row, other))) / other[-1])
    row.append(sqrt(max(against[enter] - sum(map(mul, row, row)), 0.0)))
    return row


def _solve(factor: Matrix, right: Vector) -> Vector:
    y: Vector = []
    for row, b in zip(factor, right, strict=True):
        y.append((b - sum(map(mul, row, y))) / row[-1])
    z: Vector = []
    for row in reversed(factor):
        last = y.pop() / row[-1]
        z.append(last)
        y = [v - last * x for v, x in zip(y, row, strict=False)]
    z.reverse()
    return z
