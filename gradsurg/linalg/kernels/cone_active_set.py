"""The active-set method of one nonnegative or simplex program, in Triton. cone.py launches it for many at once."""

import triton
import triton.language as tl

from gradsurg.solvers.tolerances import COARSER

__all__ = ["cone_kernel"]

COARSER_0, COARSER_1, COARSER_2 = map(tl.constexpr, COARSER)


@triton.jit(do_not_specialize=["m", "shared", "attempts"])
def cone_kernel(
    gramians,  # float64 (programs / shared, m, m)
    linears,  # float64 (programs, m): b; not read if SIMPLEX
    allowed,  # int8 (programs, m)
    scales,  # float64 (programs,): ‖t‖; negative is max |b_i| / ‖g_i‖; not read if SIMPLEX
    roundings,  # float64 (1,)
    answers,  # float64 (programs, m)
    turns,  # int32 (programs,): how many steps were done
    m,
    shared,  # how many consecutive programs have one Gramian
    attempts,  # 1, and one for each of COARSER above the rounding
    M: tl.constexpr,  # m rounded up to a power of two
    SIMPLEX: tl.constexpr,
):
    """λ = argmin_{λ ≥ 0} ½ λᵀGλ + λᵀb; or, if SIMPLEX, α = argmin_{α ≥ 0, Σα = 1} αᵀGα.

    The active-set method of solvers/active_set.py, with the same rules and thresholds. That one keeps a factor of the
    passive part. This one eliminates the passive part from the whole tableau (A, q), one index after the other, anew in
    every step. It gives the multipliers and what every refused task would add (its Schur complement), and no error is
    carried from step to step.
    """
    program = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, M)
    j = tl.arange(0, M)
    diagonal = i[:, None] == j[None, :]
    inside = i < m
    square = inside[:, None] & (j < m)[None, :]
    entries = gramians + (program // shared) * m * m + i[:, None] * m + j[None, :]
    A = tl.load(entries, mask=square, other=0.0)
    usable = (tl.load(allowed + program * m + i, mask=inside, other=0) != 0) & inside
    rounding = tl.load(roundings)
    lengths = tl.sum(tl.where(diagonal, A, 0.0), axis=1)
    at_origin = usable & (lengths <= 0.0)
    if SIMPLEX:
        # The nonnegative program of G + c·11ᵀ and b = −c·1, whose answer is a multiple of α: see solvers/simplex.py.
        least = tl.min(tl.where(usable & (lengths > 0.0), lengths, float("inf")), axis=0)
        c = tl.where(least < float("inf"), least, 1.0)
        A = tl.where(square, A + c, 0.0)
        b = tl.where(inside, -c, 0.0)
        lengths = tl.where(inside, lengths + c, 0.0)
    else:
        b = tl.load(linears + program * m + i, mask=inside, other=0.0)
    s = tl.where(lengths > 0.0, 1.0 / tl.sqrt(tl.where(lengths > 0.0, lengths, 1.0)), 0.0)
    A = A * s[:, None] * _transposed(s, diagonal)
    q = b * s
    size = tl.max(tl.abs(q), axis=0)
    if not SIMPLEX:
        given = tl.load(scales + program)
        size = tl.where(given >= 0.0, given, tl.where(given < 0.0, size, given))
    # x − x is 0 for finite x alone; a maximum would drop a NaN.
    wrong = tl.sum(tl.sum(tl.where(A - A == 0.0, 0, 1), axis=1), axis=0)
    wrong += tl.sum(tl.where(b - b == 0.0, 0, 1), axis=0) + tl.where(size - size == 0.0, 0, 1)
    # If no task is in conflict, the answer is 0, whatever G is.
    if not SIMPLEX:
        wrong = tl.where(tl.sum(tl.where(b >= 0.0, 0, 1), axis=0) > 0, wrong, 0)
        size = tl.where(tl.sum(tl.where(b >= 0.0, 0, 1), axis=0) > 0, size, 0.0)
    idle = tl.where((wrong > 0) | (size == 0.0), 1, 0)
    q = tl.where(idle > 0, 0.0, q / tl.where(idle > 0, 1.0, size))
    usable = usable & (s > 0.0)
    # Sets are int32, not bool: the interpreter cannot combine a block's mask with a single condition.
    passive = tl.zeros([M], tl.int32)
    banned = tl.zeros([M], tl.int32)
    multipliers = tl.zeros([M], tl.float64)
    best = tl.zeros([M], tl.float64)
    best_worst = tl.sum(best, axis=0) - float("inf")
    attempt = 0
    turn = 0
    left = 8 * m + 16
    going = 1 - idle
    while going > 0:
        T, goal = _eliminated(A, q, passive, i, rounding, m, M)
        blocking = (passive > 0) & (goal <= 0.0)
        blocked = tl.max(blocking.to(tl.int32), axis=0)
        # If a multiplier would turn negative, walk as far as may be and let that task go.
        down = multipliers > goal
        way = tl.where(down, multipliers / tl.where(down, multipliers - goal, 1.0), 0.0)
        way = tl.where(blocking, way, 2.0)
        share = tl.min(way, axis=0)
        out = tl.min(tl.where(way == share, i, M), axis=0)
        walked = tl.where(passive > 0, tl.maximum(multipliers + share * (goal - multipliers), 0.0), 0.0)
        leaving = tl.where(i == out, blocked, 0)
        new = tl.where(leaving > 0, 0.0, tl.where(blocked > 0, walked, goal))
        changed = tl.max((new != multipliers).to(tl.int32), axis=0)
        moved = tl.where(blocked > 0, tl.where(share > 0.0, 1, 0), changed)
        # A task that could not move is not taken back before something else has: no cycles.
        banned = tl.where(moved > 0, 0, tl.maximum(banned, leaving))
        multipliers = new
        passive = tl.where(leaving > 0, 0, passive)
        # Else take in the task that is most violated, beyond what rounding can do to a residual.
        residual = q + tl.sum(A * _transposed(multipliers, diagonal), axis=1)
        tolerance = 4.0 * rounding * (1.0 + tl.sum(multipliers, axis=0))
        candidate = usable & (passive == 0) & (banned == 0) & (residual < -tolerance)
        lowest = tl.min(tl.where(candidate, residual, float("inf")), axis=0)
        enter = tl.min(tl.where(candidate, tl.where(residual == lowest, i, M), M), axis=0)
        entering = tl.where(i == enter, 1 - blocked, 0)
        added = tl.sum(tl.where(diagonal, T, 0.0), axis=1)
        independent = tl.where(added > 8.0 * rounding, entering, 0)
        passive = tl.maximum(passive, independent)
        banned = tl.maximum(banned, entering - independent)
        # A task that depends on the passive ones replaces the first of them whose multiplier is used up on the line
        # along which u stays as it is: see _exchange in solvers/active_set.py.
        if tl.max(entering - independent, axis=0) > 0:
            line = _substituted(T, tl.sum(tl.where(j[None, :] == enter, T, 0.0), axis=1), passive, i, rounding, m, M)
            slack = tl.sqrt(8.0 * rounding) * (1.0 + tl.sum(tl.abs(line), axis=0))
            fall = tl.sum(tl.where(i == enter, q, line * q), axis=0)
            barrier = (passive > 0) & (line < -slack)
            reach = tl.where(barrier, multipliers / tl.where(barrier, -line, 1.0), float("inf"))
            share = tl.min(reach, axis=0)
            falls = tl.where(fall < -slack, 1, 0)
            exchanged = tl.where(share < float("inf"), falls, 0)
            out = tl.min(tl.where(reach == share, i, M), axis=0)
            share = tl.where(exchanged > 0, share, 0.0)
            gone = tl.where(i == out, exchanged, 0)
            walked = tl.where(gone > 0, 0.0, tl.maximum(multipliers + share * line, 0.0))
            walked = tl.where(i == enter, share, walked)
            multipliers = tl.where(exchanged > 0, walked, multipliers)
            passive = tl.where(gone > 0, 0, tl.where(i == enter, exchanged, passive))
            banned = tl.where(exchanged > 0, 0, banned)
        turn += 1
        left -= 1
        # Nothing enters: done, unless a refused task is violated by more than near dependence explains. Then all begins
        # anew with a coarser rounding, and the attempt that violates least is the answer: see _checked there.
        if tl.where((blocked == 0) & (enter == M), 1, tl.where(left > 0, 0, 1)) > 0:
            worst = tl.min(tl.where(usable, residual, float("inf")), axis=0)
            violated = tl.where(worst < -tl.sqrt(8.0 * rounding), 1, 0)
            worst = tl.where(violated > 0, worst, 0.0)
            best = tl.where(worst > best_worst, multipliers, best)
            best_worst = tl.maximum(worst, best_worst)
            attempt += 1
            going = tl.where(attempt < attempts, violated, 0)
            coarser = tl.where(rounding < _exact(COARSER_1), _exact(COARSER_1), _exact(COARSER_2))
            rounding = tl.where(rounding < _exact(COARSER_0), _exact(COARSER_0), coarser)
            passive = tl.zeros([M], tl.int32)
            banned = tl.zeros([M], tl.int32)
            multipliers = tl.zeros([M], tl.float64)
            left = 8 * m + 16
    answer = tl.where(idle > 0, 0.0, size) * best * s
    if SIMPLEX:
        # Tasks at the origin are the minimum and share it; else the mass is what the multipliers say.
        some = tl.sum(at_origin.to(tl.int32), axis=0) > 0
        mass = tl.where(some, at_origin.to(tl.float64), answer)
        total = tl.sum(mass, axis=0)
        answer = tl.where(total == 0.0, 0.0, mass / tl.where(total == 0.0, 1.0, total))
    answer = tl.where(wrong > 0, float("nan"), answer)
    tl.store(answers + program * m + i, answer, mask=inside)
    tl.store(turns + program, turn)


@triton.jit
def _exact(constant: tl.constexpr):
    """Return a float64: a constant in an expression may be one of float32, and 1e-10 is not exact there."""
    return tl.full([], constant, tl.float64)


@triton.jit
def _transposed(x, diagonal):
    """Return a vector over rows as one over columns, (1, M): a sum, because layouts differ between the two."""
    return tl.sum(tl.where(diagonal, x[:, None], 0.0), axis=0)[None, :]


@triton.jit
def _eliminated(A, q, passive, i, rounding, m, M: tl.constexpr):
    """Return A after elimination of the passive set P downwards, and −A_PP⁻¹ q_P (0 elsewhere).

    Eliminated downwards, then substituted backwards: A_PP = LDLᵀ, whose residual is a rounding of Σλ however nearly
    dependent the rows are. Gauss and Jordan's elimination in both directions leaves √cond times as much, 6e-8 if two
    rows are 1e-7 from opposite, and corrections by its inverse do not converge there.
    """
    j = tl.arange(0, M)[None, :]
    T = A
    c = q
    waiting = i >= 0  # rows that are not yet eliminated
    for k in range(0, m):
        if tl.sum(tl.where(i == k, passive, 0), axis=0) > 0:
            row = tl.sum(tl.where(i[:, None] == k, T, 0.0), axis=0)
            column = tl.sum(tl.where(j == k, T, 0.0), axis=1)
            # A task enters with a pivot of 8 roundings; an exchange may leave less, and the check at the end sees that.
            pivot = tl.maximum(tl.sum(tl.where(i == k, column, 0.0), axis=0), 0.01 * rounding)
            ck = tl.sum(tl.where(i == k, c, 0.0), axis=0)
            waiting = waiting & (i != k)
            factor = tl.where(waiting, column / pivot, 0.0)
            T = T - factor[:, None] * row[None, :]
            c = c - factor * ck
    return T, _substituted(T, c, passive, i, rounding, m, M)


@triton.jit
def _substituted(T, c, passive, i, rounding, m, M: tl.constexpr):
    """Return −x of T_PP x = c_P (0 elsewhere), for T_PP upper triangular."""
    j = tl.arange(0, M)[None, :]
    goal = tl.zeros([M], tl.float64)
    for back in range(0, m):
        k = m - 1 - back
        if tl.sum(tl.where(i == k, passive, 0), axis=0) > 0:
            column = tl.sum(tl.where(j == k, T, 0.0), axis=1)
            pivot = tl.maximum(tl.sum(tl.where(i == k, column, 0.0), axis=0), 0.01 * rounding)
            x = tl.sum(tl.where(i == k, c, 0.0), axis=0) / pivot
            goal = tl.where(i == k, -x, goal)
            c = tl.where(i < k, c - column * x, c)
    return goal
