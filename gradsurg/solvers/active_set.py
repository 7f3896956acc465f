"""The nonnegative program in plain Python floats, one task at a time: complete, and fastest while programs are small.

A torch call costs about 2 µs whatever its size, and the passive sets of real problems hold one to three tasks, so
arithmetic on lists is several times faster there. pivoting.py is the twin for many programs or many tasks at once.
"""

from __future__ import annotations

from math import isfinite, nan, sqrt

from gradsurg.solvers.tolerances import COARSER

__all__ = ["CLEAR", "CLEAR_ROUNDINGS", "RESIDUAL", "bound", "solve_small"]

Vector = list[float]
Matrix = list[Vector]

# Several tasks enter the passive set at once only while each adds a direction of at least this squared length; closer
# calls are made one at a time, against `rounding` alone. 1e3 roundings: if G is noisy, so is what is left of it.
CLEAR = 1e-8
CLEAR_ROUNDINGS = 1e3
# A task whose part orthogonal to the passive set has at most this many roundings of squared length is dependent.
DEPENDENT = 8.0
# A residual is a sum of products; rounding makes it wrong by less than this times `rounding · (1 + Σλ)`.
RESIDUAL = 4.0


def bound(m: int) -> int:
    """Return the number of changes of the passive set at which one attempt stops, with the λ that it has."""
    return 4 * m + 8


def solve_small(
    G: Matrix, rights: Matrix, masks: list[list[bool]] | None, scales: Vector | None, rounding: float
) -> tuple[Matrix, list[int]]:
    """Return λ and the number of changes of the passive set, one each per right-hand side b.

    Arguments as for `nonnegative`, as lists, for one Gramian.
    """
    m = len(G)
    s = [1 / sqrt(row[i]) if row[i] > 0 else 0.0 for i, row in enumerate(G)]
    A: Matrix | None = None
    healthy = isfinite(sum(map(sum, G))) or all(isfinite(x) for row in G for x in row)
    usable = [x > 0 for x in s]
    answers: Matrix = []
    counts: list[int] = []
    for p, b in enumerate(rights):
        if not (healthy and all(map(isfinite, b)) and (scales is None or isfinite(scales[p]))):
            lam, count = [nan] * m, 0
        elif min(b) >= 0:
            lam, count = [0.0] * m, 0
        else:
            if A is None:
                A = [[x * g * y for g, y in zip(row, s, strict=True)] for row, x in zip(G, s, strict=True)]
            q = [x * y for x, y in zip(b, s, strict=True)]
            size = max(max(q), -min(q)) if scales is None else scales[p]
            free = usable.copy() if masks is None else [x and y for x, y in zip(usable, masks[p], strict=True)]
            lam, count = _checked(A, q, free, size, rounding)
            lam = [x * y for x, y in zip(lam, s, strict=True)]
        answers.append(lam)
        counts.append(count)
    return answers, counts


def _checked(A: Matrix, q: Vector, free: list[bool], size: float, rounding: float) -> tuple[Vector, int]:
    """Return the λ of the first attempt that violates no task, else of the attempt that violates least.

    If rows balance up to 1e-8 … 1e-6, multipliers reach 1e7, and the rounding of G decides which passive set they
    belong to. A later attempt takes such rows for dependent. It may violate one of them by √(8 · rounding) of ‖u‖.
    """
    lam, count, worst = _attempt(A, q, free.copy(), size, rounding)
    for coarse in COARSER if worst < 0 else ():
        if coarse > rounding:
            other, more, violation = _attempt(A, q, free.copy(), size, coarse)
            count += more
            if violation > worst:
                lam, worst = other, violation
            if worst == 0:
                break
    return lam, count


def _attempt(A: Matrix, q: Vector, free: list[bool], size: float, rounding: float) -> tuple[Vector, int, float]:
    """Return λ, the number of changes of the passive set, and the worst violation, for a Gramian of unit diagonal.

    Tasks whose residual is negative enter; λ then walks towards the optimum over the passive set, and lets go of the
    tasks that would turn negative on the way. The value of the program falls with every λ that moves, so no passive
    set comes twice. All violated tasks enter together first. If that leads nowhere, the most violated enters alone: on
    paper it cannot but help. If rounding has it otherwise, it is refused until something else has moved.

    A is sGs and q is sb. `free` says which tasks may enter, and is written; violations are measured against `size`. The
    worst violation is the least residual, or 0.0 if near dependence explains it.
    """
    m = len(q)
    lam, r = [0.0] * m, q
    passive: list[int] = []  # in the order of entering
    rows: Matrix = []  # what elimination of the earlier ones leaves of their rows of [A q]: an LDLᵀ factor
    refused: list[int] = []
    together = True
    clear = max(CLEAR, CLEAR_ROUNDINGS * rounding)
    count, limit = 0, bound(m)
    while count < limit:
        least = -RESIDUAL * rounding * (size + sum(lam))
        entering = [i for i, x in enumerate(r) if x < least and free[i]]
        if not entering:
            break
        if not together:
            entering = [min(entering, key=r.__getitem__)]
        entered = False
        for i in entering:
            row = _eliminate(A[i], q[i], passive, rows, i)
            if row[i] > (clear if together else DEPENDENT * rounding):
                passive.append(i)
                rows.append(row)
                free[i] = False
                entered = True
            elif not together:
                entered = _exchange(i, A, q, passive, rows, free, lam, size, rounding)
        moved = False
        if entered:
            moved, steps = _descend(A, q, passive, rows, free, lam, limit - count)
            moved = moved or any(lam[i] > 0 for i in entering)
            count += steps
            r = q
            for i in passive:
                x = lam[i]
                r = [y + x * z for y, z in zip(r, A[i], strict=True)]
        if moved:
            for i in refused:
                free[i] = True
            refused = []
        elif not together:
            free[entering[0]] = False
            refused += entering
        together = moved
    if count < limit and not refused:
        return lam, count, 0.0
    worst = min((r[i] for i in [*passive, *refused, *(j for j in range(m) if free[j])]), default=0.0)
    return lam, count, worst if worst < -sqrt(DEPENDENT * rounding) * size else 0.0


def _exchange(
    i: int,
    A: Matrix,
    q: Vector,
    passive: list[int],
    rows: Matrix,
    free: list[bool],
    lam: Vector,
    size: float,
    rounding: float,
) -> bool:
    """Let task i, which depends on the passive ones, replace one of them; return whether it did.

    With a_i = Σ c_j a_j, λ_i = t and λ_j − t c_j leave u as it is, and the value falls by t times i's violation. t
    grows until the first λ_j is 0; that task leaves. If no c_j is positive, t could grow for ever: no direction has
    what all these tasks ask for, and i is refused.

    Source: Goldfarb & Idnani 1983, "A numerically stable dual method for solving strictly convex quadratic programs".
    """
    line = _substitute(passive, rows, i)
    # i is dependent up to a part of this length. If b has a direction behind it, no larger violation comes of that.
    slack = sqrt(DEPENDENT * rounding) * (1 + sum(abs(x) for _, x in line))
    if q[i] + sum(q[j] * x for j, x in line) >= -slack * size:
        return False
    blocking = [(lam[j] / -x, j) for j, x in line if x < -slack]
    if not blocking:
        return False
    before = passive[:], rows[:], lam[:]
    share, out = min(blocking)
    for j, x in line:
        lam[j] = max(lam[j] + share * x, 0.0)
    lam[out], lam[i] = 0.0, share
    _leave([out], A, q, passive, rows, free)
    row = _eliminate(A[i], q[i], passive, rows, i)
    if row[i] <= DEPENDENT * rounding:
        passive[:], rows[:], lam[:] = before
        free[out] = False
        return False
    passive.append(i)
    rows.append(row)
    free[i] = False
    return True


def _descend(
    A: Matrix, q: Vector, passive: list[int], rows: Matrix, free: list[bool], lam: Vector, limit: int
) -> tuple[bool, int]:
    """Move λ to the optimum over the passive set less those in the way; return whether it moved, and the solves."""
    moved = False
    for count in range(1, limit + 1):
        goal = _substitute(passive, rows, len(q))
        blocking = [i for i, x in goal if x <= 0]
        if not blocking:
            for i, x in goal:
                lam[i] = x
            return moved, count
        share, first = min((lam[i] / (lam[i] - x) if lam[i] > 0 else 0.0, i) for i, x in goal if x <= 0)
        if share > 0:
            moved = True
            for i, x in goal:
                lam[i] = max(lam[i] + share * (x - lam[i]), 0.0)
            lam[first] = 0.0
        _leave([i for i in blocking if lam[i] == 0], A, q, passive, rows, free)
    return moved, limit


def _leave(out: list[int], A: Matrix, q: Vector, passive: list[int], rows: Matrix, free: list[bool]) -> None:
    first = min(map(passive.index, out))
    again = [i for i in passive[first:] if i not in out]
    del passive[first:], rows[first:]
    for i in out:
        free[i] = True
    for i in again:
        rows.append(_eliminate(A[i], q[i], passive, rows, i))
        passive.append(i)


def _eliminate(row: Vector, right: float, passive: list[int], rows: Matrix, i: int) -> Vector:
    left = [*row, right]
    for j, other in zip(passive, rows, strict=True):
        f = other[i] / other[j]
        left = [x - f * y for x, y in zip(left, other)]  # noqa: B905 (the innermost loop; strict= adds a third)
    return left


def _substitute(passive: list[int], rows: Matrix, column: int) -> list[tuple[int, float]]:
    """Return the x of A_PP x = −(that column of [A q])_P, in pairs with the task, the last to enter first."""
    goal: list[tuple[int, float]] = []
    for i, row in zip(reversed(passive), reversed(rows), strict=True):
        total = row[column]
        for j, x in goal:
            total += row[j] * x
        goal.append((i, -total / row[i]))
    return goal
