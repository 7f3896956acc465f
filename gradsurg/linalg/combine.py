"""Weighted sums of rows: the second pass over the gradients, and the correction of the parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gradsurg.linalg import sparse
from gradsurg.linalg.blocks import SMALL, Rows, cut, flat_column
from gradsurg.linalg.buffers import BUFFERS, SUM
from gradsurg.linalg.packing import DTYPE, alike, packed

__all__ = ["combine", "correct_"]

# Parameters below SMALL are combined in groups, a row at a time. A group has about GROUPED numbers, so that u stays in
# the cache. Times in ms at m = 8, for 5 M numbers (2 M in the last line):
#   numbers per tensor   all together   in groups   one by one
#              100 000             34          19           18
#               25 000             26          22           21
#                4 096                         16           41
GROUPED = 262_144
# Numbers of one parameter that are combined at a time: 4.2 M numbers at m = 4 take 7.7 ms in blocks of 32 768 and
# 6.1 ms in these. If u is written without a buffer in between, 40 M numbers take 78 ms in these and 65 ms in DIRECT.
COMBINED = 131_072
DIRECT = 524_288
# Dtypes of u that are summed as they are.
QUICK = frozenset((torch.float32, torch.float64))


def combine(
    rows: Rows,
    weights: Sequence[float],
    like: Sequence[Tensor],
    *,
    exact: bool = False,
    into: Sequence[Tensor | None] | None = None,
) -> list[Tensor]:
    """Return u = Σ w_i g_i, one tensor per parameter.

    Args:
        rows: m lists of gradients; at least one of each parameter is not None.
        weights: m numbers. A row of weight 0 is not read, so a row of NaN with weight 0 is harmless.
        like: The parameters: u has their dtypes.
        exact: Add up in float64 and round once: needed if the rows nearly cancel.
        into: Tensors like the parameters, or None; large parts of u may be written there.

    Returns:
        u; sparse if all rows of the parameter are sparse.
    """
    exact = exact or _too_large(weights)
    into = [None] * len(like) if into is None else into
    result: list[Tensor | None] = [None] * len(like)
    small = packed(rows)
    dtypes = set(map(DTYPE, like))
    quick = small is not None and not exact and len(dtypes) == 1 and dtypes <= QUICK
    if small is not None and quick and all(map(Tensor.is_contiguous, small.at(like))):
        # In the rows' shapes: over several ranks they are slices of the parameters.
        parts = small.apart(small.sum(weights, *dtypes), rows[0])
        if not small.others:
            return parts
        rest = combine(small.rest, weights, [like[k] for k in small.others], into=[into[k] for k in small.others])
        for k, part in zip([*small.places, *small.others], [*parts, *rest], strict=True):
            result[k] = part
        return [u for u in result if u is not None]
    # By the tasks that have a gradient, dtype and device: the parameters that can be combined by one call per row.
    grouped: dict[tuple[object, ...], list[int]] = {}
    nonzero = [i for i, weight in enumerate(weights) if weight != 0]
    plain = not exact and nonzero and like[0].dtype in QUICK and alike([*rows, like])
    for k, parameter in enumerate(like):
        if plain and parameter.numel() < SMALL:
            grouped.setdefault((*nonzero, parameter.dtype, parameter.device), []).append(k)
            continue
        if plain and parameter.numel() <= DIRECT:
            whole = [g for i in nonzero if (g := rows[i][k]) is not None]
            result[k] = u = torch.mul(whole[0], weights[nonzero[0]], out=into[k])
            for i, g in zip(nonzero[1:], whole[1:], strict=True):
                u.add_(g, alpha=weights[i])
            continue
        present = [(i, g) for i, row in enumerate(rows) if (g := row[k]) is not None]
        some, any_sparse = present[0][1], any(g.is_sparse for _, g in present)
        present = [(i, g) for i, g in present if weights[i] != 0]
        column, factors = [g for _, g in present], [weights[i] for i, _ in present]
        if any_sparse:
            result[k] = sparse.combine(column, factors, some)
        elif not present:
            result[k] = torch.zeros_like(some, dtype=parameter.dtype)
        elif exact or some.numel() >= COMBINED or parameter.dtype not in QUICK:
            out = into[k]
            result[k] = out = torch.empty_like(some, dtype=parameter.dtype) if out is None else out
            _sum_blocks(column, factors, out, exact)
        else:
            grouped.setdefault((*[i for i, _ in present], parameter.dtype, parameter.device), []).append(k)
    for key, indices in ((key, part) for key, every in grouped.items() for part in _groups(every, like)):
        used = [int(i) for i in key[:-2]]  # type: ignore[call-overload]
        dtype = like[indices[0]].dtype
        first, *others = (
            [g if g.dtype == dtype else g.to(dtype) for k in indices if (g := rows[i][k]) is not None] for i in used
        )
        summed = torch._foreach_mul(first, weights[used[0]])
        for i, tensors in zip(used[1:], others, strict=True):
            torch._foreach_add_(summed, tensors, alpha=weights[i])
        for k, u in zip(indices, summed, strict=True):
            result[k] = u
    return [u for u in result if u is not None]


def correct_(
    rows: Rows,
    coefficients: Sequence[float],
    after: Sequence[Tensor],
    signs: Sequence[float],
    *,
    exact: bool = False,
    left: Sequence[Tensor | None] | None = None,
) -> None:
    """Subtract sign · Σ λ_i g_i from the parameters `after` in place, rounding each number once.

    A row with λ_i = 0 is not read. The sign of a parameter is −1 if the optimizer maximises, or any other factor.
    `exact` adds up in float64, for movements that nearly cancel. Numbers that `left` says, a bool tensor per parameter
    or None, stay as they are; see moved.left_in_place.
    """
    exact = exact or _too_large(coefficients)
    used = [i for i, c in enumerate(coefficients) if c != 0]
    small = packed(rows)
    if left is None and small is not None and used:
        small.correct_(coefficients, after, signs, exact)
        rows = small.rest
        after, signs = [after[k] for k in small.others], [signs[k] for k in small.others]
    for k, parameter in enumerate(after):
        present = [(g, -signs[k] * coefficients[i]) for i in used if (g := rows[i][k]) is not None and signs[k] != 0]
        still = None if left is None else left[k]
        if still is not None and present:
            column = [g.to_dense() if g.is_sparse else g for g, _ in present]
            _sum_blocks(column, [c for _, c in present], parameter, exact, add=True, still=still)
        elif any(g.is_sparse for g, _ in present):
            for g, c in present:
                parameter.add_(g.to(parameter.dtype), alpha=c)
        elif present:
            _sum_blocks([g for g, _ in present], [c for _, c in present], parameter, exact, add=True)


def _sum_blocks(
    column: Sequence[Tensor],
    weights: Sequence[float],
    out: Tensor,
    exact: bool,
    *,
    add: bool = False,
    still: Tensor | None = None,
) -> None:
    """Write Σ w_i g_i into `out`, or add it where not `still`, block by block, in a wide enough dtype."""
    target, *views = [t for t in flat_column([out, *column, still]) if t is not None]
    wide = torch.float64 if exact else torch.promote_types(target.dtype, torch.float32)
    direct = target.dtype == wide and not add
    for goal, *parts in cut([target, *views], DIRECT if direct else COMBINED):
        total = goal if direct else BUFFERS.buffer(SUM, goal.numel(), wide, goal.device)
        if parts[0].dtype == wide:
            torch.mul(parts[0], weights[0], out=total)
        else:
            total.copy_(parts[0]).mul_(weights[0])
        for part, weight in zip(parts[1 : len(weights)], weights[1:], strict=True):
            total.add_(part, alpha=weight)
        if still is not None:
            total.masked_fill_(parts[-1], 0)
        if add and goal.dtype == wide:
            goal.add_(total)
        elif add:
            goal.copy_(total.add_(goal))
        elif not direct:
            goal.copy_(total)
    # If `out` is not dense, flattening had to copy it.
    if target.data_ptr() != out.data_ptr():
        out.copy_(torch.view_as_complex(target.view(*out.shape, 2)) if out.is_complex() else target.view(out.shape))


def _groups(indices: list[int], like: Sequence[Tensor]) -> Iterator[list[int]]:
    """Yield the indices of parameters in parts of about GROUPED numbers."""
    group: list[int] = []
    room = GROUPED
    for k in indices:
        group.append(k)
        room -= like[k].numel()
        if room <= 0:
            yield group
            group, room = [], GROUPED
    if group:
        yield group


def _too_large(weights: Sequence[float]) -> bool:
    """Whether a weight does not fit into float32, as the weight of a gradient of 1e-40 that is scaled to norm 1.

    Met in training: a task at cross-entropy 0 under normalize="norm". Its weight times its gradient fits again.
    """
    return any(abs(w) > torch.finfo(torch.float32).max for w in weights)
