"""The twin of update.py on a CUDA device: the same decisions, made there for each partition without waiting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from gradsurg.guarantee.metric import ATTEMPTS, LARGEST, TOLERANCE, TOLERANCE_16_BIT, metric_matters
from gradsurg.guarantee.movement import DeferredMovement, stream_of
from gradsurg.linalg.blocks import Rows, real_of
from gradsurg.linalg.kernels.table import constant
from gradsurg.solvers.tolerances import ROUNDING_CUDA, STATIONARY

__all__ = ["project_update_cuda"]


@torch.no_grad()
def project_update_cuda(
    rows: Rows,
    G: Tensor,
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    signs: Sequence[float],
    partitions: Sequence[int],
    allowed: Tensor | None,
    finite: Tensor,
    rates: Sequence[float] | None = None,
    gradients: Sequence[Tensor | None] | None = None,
) -> DeferredMovement:
    """Do what `project_update` does, for all partitions of the parameters at once.

    What the host would decide becomes a mode per partition that the kernels read: correct it, take it back, or leave
    it; and a flag per parameter: which of its numbers stay. Every launch is made; one that finds nothing to do reads no
    parameter. Learning rates are known on the host, so launches that only they need are made only if rates differ.

    Args:
        rows: m lists of gradients per parameter.
        G: Their Gramians, (partitions, m, m), float64.
        before: The parameters before the step.
        after: The same parameters now; written.
        signs: +1 per parameter, −1 if the optimizer maximises.
        partitions: Which partition each parameter belongs to, ascending from 0.
        allowed: Which tasks are protected, bool (m,); None is all.
        finite: Bool (); if False, nothing is done.
        rates: The learning rate of each parameter; None is one for all.
        gradients: p.grad of each parameter at the step; None if it is unknown.
    """
    from gradsurg.linalg.kernels.combine import correct
    from gradsurg.linalg.kernels.cone import nonnegative
    from gradsurg.linalg.kernels.inner import inner, layout_of
    from gradsurg.linalg.kernels.left import left_in_place, shorten
    from gradsurg.linalg.kernels.moved import gramian_moved

    norms = G.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    # First pass over rows and parameters: ⟨d, g_i⟩ and ‖d‖² of every partition.
    layout = layout_of(rows, before, after, gradients, signs=signs, partitions=partitions)
    measure = partial(inner, rows, before, after, partitions=partitions, layout=layout)
    products, square = measure()
    live = finite & (square > 0) & torch.isfinite(square) & torch.isfinite(products).all(-1)
    coefficients = nonnegative(G, products, allowed=allowed, scale=square.sqrt(), rounding=ROUNDING_CUDA)
    coefficients = torch.where(live.unsqueeze(-1), coefficients, 0)
    corrected = (coefficients != 0).any(-1)
    # Second pass, where some task would get worse: which numbers did the optimizer leave in place?
    m, metric = len(rows), _metric_of([1.0] * len(after) if rates is None else rates, partitions)
    left = left_in_place(layout, m, partitions, _modes(corrected))
    # Third pass, where it left some or rates differ: the Gramian in the metric of the step.
    limited = corrected & constant(metric.differ, G.device, torch.bool) if any(metric.differ) else None
    asked = left.some if limited is None else torch.maximum(left.some, _modes(limited))
    moved, length, pulled = gramian_moved(layout, m, constant(metric.factors, G.device), left.flags, asked)
    measured = pulled if limited is None else pulled | limited
    gramian = torch.where(measured[:, None, None], moved, G)
    scale = torch.where(measured, length, square).sqrt()
    step = nonnegative(gramian, products, allowed=allowed, scale=scale, rounding=ROUNDING_CUDA)
    coefficients = torch.where(measured.unsqueeze(-1), step, coefficients)
    rest, spread = _lengths(norms, products, square, coefficients)
    held = corrected & ~measured & (rest <= STATIONARY * ROUNDING_CUDA * spread)
    # Fourth pass: d ← d + M Σ λ_i g_i, or back to the parameters before the step.
    signed = [sign * factor for sign, factor in zip(signs, metric.factors, strict=True)]
    factors = constant(signed, G.device)
    write = partial(correct, rows, after=after, before=before, layout=layout, factors=factors, flags=left.flags)
    write(coefficients, modes=_modes(corrected & ~held, held))
    if limited is not None:
        farthest = left_in_place(layout, m, partitions, _modes(limited)).farthest
        shorten(layout, m, metric.shares(left.farthest, farthest), after)
    tolerance, half_place = _precision(after, partitions)
    effect = torch.where(corrected.unsqueeze(-1), products + (G @ coefficients.unsqueeze(-1)).squeeze(-1), products)
    movement = DeferredMovement(effect, torch.where(corrected, rest, square), corrected, held)
    small = half_place * _norms(after, partitions) <= 0.5 * tolerance * rest.clamp(min=0).sqrt()
    unsure = corrected & ~held & (measured | ~small)
    watched = norms > 0 if allowed is None else (norms > 0) & allowed
    # Where rounding is not small against the movement, or a metric was needed, measure what is stored, and aim further
    # inside.
    margin, sizes = torch.zeros_like(norms), gramian.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    for _ in range(ATTEMPTS):
        found, length = measure(modes=_modes(unsure))
        movement = replace(
            movement,
            inner=torch.where(unsure.unsqueeze(-1), found, movement.inner),
            square=torch.where(unsure, length, movement.square),
        )
        slack = found + (tolerance * length.sqrt()).unsqueeze(-1) * norms
        unsure = unsure & (watched & (slack < 0)).any(-1)
        margin = margin + torch.where(unsure.unsqueeze(-1) & watched, (-found).clamp(min=0), 0)
        step = nonnegative(gramian, found - margin, allowed=allowed, scale=length.sqrt(), rounding=ROUNDING_CUDA)
        step = torch.where(unsure.unsqueeze(-1), step, 0)
        # A longer step means that the cone has next to no inside: the tasks are opposed to within rounding.
        hopeless = unsure & ~((step * sizes).sum(-1) <= 2 * length.sqrt())
        held, unsure = held | hopeless, unsure & ~hopeless
        write(step, modes=_modes(unsure, hopeless))
    write(coefficients, modes=_modes(torch.zeros_like(unsure), unsure))
    held = held | unsure | (corrected & (movement.square == 0))
    return replace(
        movement,
        inner=torch.where(held.unsqueeze(-1), 0, movement.inner),
        square=torch.where(held, 0, movement.square),
        held=held,
        stream=stream_of(held.device),
    )


class _Metric(NamedTuple):
    """What learning rates say about the metric of a step, on the host.

    Attributes:
        factors: M per parameter: its rate as a share of the highest one of its partition.
        differ: Whether M matters in each partition.
        groups: The number of each parameter's rate among all rates of all partitions.
        owners: The partition of each of these rates.
    """

    factors: list[float]
    differ: list[bool]
    groups: list[int]
    owners: list[int]

    def shares(self, plain: Tensor, corrected: Tensor) -> Tensor:
        """Return the share that each partition may keep, given max |d| of each parameter before and after."""
        groups, owners = (constant(each, plain.device, torch.int64) for each in (self.groups, self.owners))
        none = plain.new_zeros(len(self.owners))
        before, after = (none.scatter_reduce(0, groups, far, "amax") for far in (plain, corrected))
        share = (LARGEST * before / after).nan_to_num(nan=1.0)
        return plain.new_ones(len(self.differ)).scatter_reduce(0, owners, share, "amin")


def _metric_of(rates: Sequence[float], partitions: Sequence[int]) -> _Metric:
    both = list(zip(partitions, rates, strict=True))
    found: dict[int, set[float]] = {}
    for k, rate in both:
        found.setdefault(k, set()).add(rate)
    highest = [max(some) for some in found.values()]
    differ = [metric_matters(some) for some in found.values()]
    factors = [rate / highest[k] if differ[k] and highest[k] > 0 else 1.0 - differ[k] for k, rate in both]
    numbers = {pair: number for number, pair in enumerate(dict.fromkeys(both))}
    return _Metric(factors, differ, [numbers[pair] for pair in both], [k for k, _ in numbers])


def _modes(write: Tensor, take_back: Tensor | None = None) -> Tensor:
    """Return LEAVE, WRITE or HOLD per partition, as kernels/vectors.py numbers them, int32."""
    modes = write.to(torch.int32)
    return modes if take_back is None else modes + 2 * take_back.to(torch.int32)


def _lengths(norms: Tensor, products: Tensor, square: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """Return ‖d + Σ λ_i g_i‖², by complementary slackness, and (‖d‖ + Σ λ_i ‖g_i‖)², shape (partitions,)."""
    total = square.sqrt() + (coefficients * norms).sum(-1)
    return square + (coefficients * products).sum(-1), total.square()


def _precision(after: Sequence[Tensor], partitions: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the tolerance of cosines and half a last place of a number, per partition."""
    count = partitions[-1] + 1
    tolerance, half_place = [TOLERANCE] * count, [0.0] * count
    for p, k in zip(after, partitions, strict=True):
        half_place[k] = max(half_place[k], torch.finfo(p.dtype).eps / 2)
        if p.element_size() <= 2:
            tolerance[k] = TOLERANCE_16_BIT
    return constant(tolerance, after[0].device), constant(half_place, after[0].device)


def _norms(parameters: Sequence[Tensor], partitions: Sequence[int]) -> Tensor:
    """Return ‖θ‖ of every partition, float64."""
    norms = torch._foreach_norm(list(map(real_of, parameters)))
    alike = len({norm.dtype for norm in norms}) == 1
    squares = torch.stack(norms if alike else [norm.double() for norm in norms]).double().square()
    # index_add would add in another order each time. Here every partition sums its own numbers, and a zero at the end.
    members: list[list[int]] = [[] for _ in range(partitions[-1] + 1)]
    for k, partition in enumerate(partitions):
        members[partition].append(k)
    most = max(map(len, members))
    places = [k for each in members for k in (each + [len(squares)] * most)[:most]]
    index = constant(places, squares.device, torch.int64).view(-1, most)
    return torch.cat([squares, squares.new_zeros(1)])[index].sum(-1).sqrt()
