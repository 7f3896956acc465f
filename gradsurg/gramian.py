"""The only code that touches P numbers: inner products of rows, and their combinations.

`rows` is m lists of one gradient per parameter, None where a task did not reach it. Every function here has a plain
float64 twin in reference.py. On a device other than the CPU the same code runs, block by block.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradsurg.blocks import Workspace, blocks, flat, flat_column
from gradsurg.packed import Packed, alike, packed

__all__ = ["Rows", "combine", "correct_", "gramian", "inner_update"]

Rows = Sequence[Sequence["Tensor | None"]]

# From here on a matrix product of a block beats m(m+1)/2 dot products: CPU ms on one core of an EPYC, 4.2 M numbers in
# float64, dots against product, m = 2 3.7 : 4.0, m = 4 15 : 11, m = 8 52 : 37.
MATMUL_FROM = 4
# Numbers of one parameter that are combined at a time: 4.2 M numbers, m = 4, in blocks of 32 768 7.7 ms, in these 6.1.
COMBINED = 131_072

WORKSPACE = Workspace()
ROWS, MOVEMENT, PRODUCT, SUM = range(4)  # slots of the workspace


@torch.no_grad()
def gramian(rows: Rows, *, exact: bool = False) -> Tensor:
    """Return G_ij = ⟨g_i, g_j⟩ over all parameters.

    Args:
        rows: m lists of one gradient per parameter (dense or sparse, real or complex, any floating dtype) or None.
        exact: Sum pairwise: good to a few units of 1e-16 of ‖g_i‖ ‖g_j‖, at twice the time. Otherwise blocks of
            32 768 are summed by a running dot product: 1e-13 at worst, on constant rows.

    Returns:
        Shape (m, m), float64, symmetric, on the CPU for CPU rows and on the rows' device otherwise.
    """
    m = len(rows)
    total = _Symmetric(m)
    small = packed(rows)
    if small is not None:
        if exact:
            total.add_dots(list(range(m)), small.matrix.unbind(0), exact)
        else:
            total.add_square(list(range(m)), small.matrix)
        rows = small.rest
    rows, sparse = _split_sparse(rows)
    for _, block in blocks(rows):
        present = [i for i, pieces in enumerate(block) if pieces]
        stacked = WORKSPACE.stack(ROWS, block, torch.float64)
        if not exact and _use_matmul(len(present), stacked.device):
            total.add_square(present, stacked)
        else:
            total.add_dots(present, stacked.unbind(0), exact)
    for column in sparse:
        for i, a in enumerate(column):
            for j, b in enumerate(column[: i + 1]):
                if a is not None and b is not None:
                    total.add(i, j, _sparse_dot(a, b))
    return total.result()


@torch.no_grad()
def inner_update(
    rows: Rows,
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    signs: Sequence[float],
    *,
    exact: bool = False,
) -> tuple[Tensor, float]:
    """Return ⟨d, g_i⟩ for every row, and ‖d‖², of the movement d = sign · (before − after).

    Args:
        rows: m lists of gradients, as for `gramian`.
        before: The parameters before the optimizer's step.
        after: The parameters now.
        signs: +1 per parameter, −1 where the optimizer maximises.
        exact: As for `gramian`.

    Returns:
        Shape (m,), float64, CPU; and a number.
    """
    m = len(rows)
    inner, square = [0.0] * m, 0.0
    small = packed(rows)
    if small is not None:
        inner, square = _inner_packed(small, before, after, signs, exact)
        rows = small.rest
        before, after, signs = ([values[k] for k in small.others] for values in (before, after, signs))
    rows, sparse = _split_sparse(rows)
    for sign, block in blocks([before, after, *rows], tags=signs):
        assert isinstance(sign, float)
        old, new = WORKSPACE.stack(MOVEMENT, block[:2], torch.float64).unbind(0)
        movement = old.sub_(new)
        square += _inner(movement, movement, exact)
        present = [i for i, pieces in enumerate(block[2:]) if pieces]
        if not present:
            continue
        stacked = WORKSPACE.stack(ROWS, block[2:], torch.float64)
        if exact:
            products = [_inner(movement, row, exact) for row in stacked.unbind(0)]
        else:
            products = torch.mv(stacked, movement).tolist()
        for i, product in zip(present, products, strict=True):
            inner[i] += sign * product
    for k, column in enumerate(sparse):
        if any(g is not None for g in column):
            d = _real((before[k].detach() - after[k].detach()).double()) * signs[k]
            for i, g in enumerate(column):
                if g is not None:
                    inner[i] += torch.dot(d.reshape(-1), _real(g.to_dense().double()).reshape(-1)).item()
    return torch.tensor(inner, dtype=torch.float64), square


def combine(rows: Rows, weights: Sequence[float], like: Sequence[Tensor], *, exact: bool = False) -> list[Tensor]:
    """Return u = Σ w_i g_i, one new tensor per parameter.

    Args:
        rows: m lists of gradients; at least one of each parameter is not None.
        weights: m numbers. A row of weight 0 is not read, so a row of NaN with weight 0 is harmless.
        like: The parameters: u has their dtypes.
        exact: Add up in float64 and round once: needed where the rows nearly cancel.

    Returns:
        u; sparse where all rows of the parameter are sparse.
    """
    exact = exact or _too_large(weights)
    result: list[Tensor | None] = [None] * len(like)
    grouped: dict[tuple[object, ...], list[int]] = {}
    everywhere = [i for i, weight in enumerate(weights) if weight != 0]
    plain = not exact and everywhere and like[0].dtype in (torch.float32, torch.float64) and alike([*rows, like])
    for k, parameter in enumerate(like):
        if plain and parameter.numel() < COMBINED:
            grouped.setdefault((*everywhere, parameter.dtype, parameter.device), []).append(k)
            continue
        column = [row[k] for row in rows]
        some = next(g for g in column if g is not None)
        used = [i for i, g in enumerate(column) if g is not None and weights[i] != 0]
        if any(g is not None and g.is_sparse for g in column):
            result[k] = _combine_sparse([column[i] for i in used], [weights[i] for i in used], some)
        elif not used:
            result[k] = torch.zeros_like(some, dtype=parameter.dtype)
        elif exact or some.numel() >= COMBINED or parameter.dtype not in (torch.float32, torch.float64):
            out = torch.empty_like(some, dtype=parameter.dtype)
            _sum_blocks([column[i] for i in used], [weights[i] for i in used], out, exact)
            result[k] = out
        else:
            grouped.setdefault((*used, parameter.dtype, parameter.device), []).append(k)
    for key, indices in grouped.items():
        used = [int(i) for i in key[:-2]]  # type: ignore[call-overload]
        dtype = like[indices[0]].dtype
        first, *others = (_all_of([rows[i][k] for k in indices], dtype) for i in used)
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
) -> None:
    """Subtract sign · Σ λ_i g_i from the parameters in place, rounding each number once.

    Args:
        rows: m lists of gradients.
        coefficients: λ, m numbers; a row with 0 is not read.
        after: The parameters; written.
        signs: +1 per parameter, −1 where the optimizer maximises (there the sum is added).
        exact: Add up in float64, for movements that nearly cancel.
    """
    exact = exact or _too_large(coefficients)
    used = [i for i, c in enumerate(coefficients) if c != 0]
    small = packed(rows)
    if small is not None and used:
        _correct_packed(small, used, coefficients, after, signs)
        rows = small.rest
        after, signs = ([values[k] for k in small.others] for values in (after, signs))
    for k, parameter in enumerate(after):
        present = [(rows[i][k], -signs[k] * coefficients[i]) for i in used]
        present = [(g, c) for g, c in present if g is not None]
        if any(g is not None and g.is_sparse for g, _ in present):
            for g, c in present:
                assert g is not None
                parameter.add_(g.to(parameter.dtype), alpha=c)
        elif present:
            _sum_blocks([g for g, _ in present], [c for _, c in present], parameter, exact, add=True)


class _Symmetric:
    """A symmetric m x m float64 accumulator: Python floats on the CPU, a tensor elsewhere."""

    def __init__(self, m: int) -> None:
        self.m = m
        self.entries = [[0.0] * m for _ in range(m)]
        self.tensor: Tensor | None = None

    def add(self, i: int, j: int, value: float) -> None:
        self.entries[max(i, j)][min(i, j)] += value

    def add_dots(self, present: list[int], rows: Sequence[Tensor], exact: bool) -> None:
        for a, i in enumerate(present):
            for b, j in enumerate(present[: a + 1]):
                self.entries[i][j] += _inner(rows[a], rows[b], exact)

    def add_square(self, present: list[int], stacked: Tensor) -> None:
        if self.tensor is None:
            self.tensor = torch.zeros(self.m, self.m, dtype=torch.float64, device=stacked.device)
        if len(present) == self.m:
            self.tensor.addmm_(stacked, stacked.T)
        else:
            index = torch.tensor(present, device=stacked.device)
            self.tensor[index[:, None], index] += stacked @ stacked.T

    def result(self) -> Tensor:
        lower = torch.tensor(self.entries, dtype=torch.float64).reshape(self.m, self.m)
        full = lower + lower.tril(-1).T
        if self.tensor is None:
            return full
        total = full.to(self.tensor.device) + self.tensor
        return (total + total.T) / 2


def _use_matmul(m: int, device: torch.device) -> bool:
    return device.type != "cpu" or m >= MATMUL_FROM


def _inner(a: Tensor, b: Tensor, exact: bool) -> float:
    # torch.dot is a running sum: over 131 072 float64, more than a block has, it is off by 1e-14 on Gaussian numbers
    # and 5e-14 on constant ones; the pairwise sum by 1e-16. In float32 these would be 3e-7 and 7e-5, which nearly
    # opposite tasks amplify beyond the promise of 1e-4.
    if not exact:
        return torch.dot(a, b).item()
    return torch.mul(a, b, out=WORKSPACE.buffer(PRODUCT, a.numel(), a.dtype, a.device)).sum().item()


def _inner_packed(
    small: Packed, before: Sequence[Tensor], after: Sequence[Tensor], signs: Sequence[float], exact: bool
) -> tuple[list[float], float]:
    old, new = small.together(before), small.together(after)
    movement = WORKSPACE.buffer(MOVEMENT, old.numel(), torch.float64, old.device)
    movement.copy_(old)
    movement -= new
    square = _inner(movement, movement, exact)
    sign = small.per_number(signs)
    if isinstance(sign, Tensor):
        movement, sign = movement.mul_(sign), 1.0
    if exact:
        products = [_inner(movement, row, exact) for row in small.matrix.unbind(0)]
    else:
        products = torch.mv(small.matrix, movement).tolist()
    return [sign * product for product in products], square


def _correct_packed(
    small: Packed, used: list[int], coefficients: Sequence[float], after: Sequence[Tensor], signs: Sequence[float]
) -> None:
    parameters = [after[k] for k in small.places]
    change = small.matrix[used[0]] * -coefficients[used[0]]
    for i in used[1:]:
        change.add_(small.matrix[i], alpha=-coefficients[i])
    change.mul_(small.per_number(signs)).add_(flat(parameters))
    parts = [part.view(p.shape) for part, p in zip(change.split(small.sizes), parameters, strict=True)]
    torch._foreach_copy_(parameters, parts)


def _sum_blocks(
    column: list[Tensor | None], weights: list[float], out: Tensor, exact: bool, *, add: bool = False
) -> None:
    """Write Σ w_i g_i into `out`, or add it, block by block, in a wide enough dtype."""
    *views, target = flat_column([*column, out])
    assert target is not None
    wide = torch.float64 if exact else torch.promote_types(target.dtype, torch.float32)
    for goal, *parts in zip(*[view.split(COMBINED) for view in (target, *views) if view is not None], strict=True):
        direct = goal.dtype == wide and not add
        total = goal if direct else WORKSPACE.buffer(SUM, goal.numel(), wide, goal.device)
        if parts[0].dtype == wide:
            torch.mul(parts[0], weights[0], out=total)
        else:
            total.copy_(parts[0]).mul_(weights[0])
        for part, weight in zip(parts[1:], weights[1:], strict=True):
            total.add_(part, alpha=weight)
        if add:
            goal.copy_(total.add_(goal))
        elif not direct:
            goal.copy_(total)
    if target.data_ptr() != out.data_ptr():  # `out` is not dense, so flattening had to copy
        out.copy_(torch.view_as_complex(target.view(*out.shape, 2)) if out.is_complex() else target.view(out.shape))


def _too_large(weights: Sequence[float]) -> bool:
    """Whether a weight does not fit into float32: that of a learned task's gradient of 1e-40, made as long as others.

    Met in training: a task at cross-entropy 0 under normalize="norm". Its weight times its gradient fits again.
    """
    return any(abs(w) > torch.finfo(torch.float32).max for w in weights)


def _all_of(gradients: list[Tensor | None], dtype: torch.dtype) -> list[Tensor]:
    return [g if g.dtype == dtype else g.to(dtype) for g in gradients if g is not None]


def _real(t: Tensor) -> Tensor:
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t


def _split_sparse(rows: Rows) -> tuple[Rows, list[list[Tensor | None]]]:
    """Return the rows with sparse parameters blanked out, and one column per parameter holding only those."""
    if not any(g is not None and g.is_sparse for row in rows for g in row):
        return rows, []
    count = len(rows[0])
    is_sparse = [any(row[k] is not None and row[k].is_sparse for row in rows) for k in range(count)]  # type: ignore[union-attr]
    dense = [[None if is_sparse[k] else g for k, g in enumerate(row)] for row in rows]
    columns = [[row[k] if is_sparse[k] else None for row in rows] for k in range(count)]
    return dense, columns


def _sparse_dot(a: Tensor, b: Tensor) -> float:
    if a.is_sparse and b.is_sparse:
        product = a.double().coalesce() * b.double().coalesce()
        return float(torch.sparse.sum(product).item())
    return float((a.to_dense().double() * b.to_dense().double()).sum().item())


def _combine_sparse(column: list[Tensor | None], weights: list[float], like: Tensor) -> Tensor:
    total: Tensor | None = None
    for g, weight in zip(column, weights, strict=True):
        assert g is not None
        term = g * weight
        if total is None:
            total = term
        elif total.is_sparse == term.is_sparse:
            total = total + term
        else:
            total = total.to_dense() + term.to_dense()
    return torch.zeros_like(like) if total is None else total
