"""The default step's weights in Python floats: one Gramian of few tasks on the CPU, norm or none, cone or sum.

Thirty torch operations on 4 x 4 numbers take 0.25 ms; all backward passes of a small network take 4 ms. `Pipeline` uses
this twin if `applies`, and does everything else in torch.
"""

from __future__ import annotations

from math import inf, isfinite, nan, sqrt
from operator import mul

import torch
from torch import Tensor

from gradsurg.normalize import Norm, Normalizer, Unscaled
from gradsurg.solvers.active_set import Matrix, Vector, solve_small
from gradsurg.solvers.simplex import times
from gradsurg.solvers.tolerances import CONFLICT, STATIONARY
from gradsurg.surgery import Cone, Sum, Surgery

__all__ = ["all_finite", "applies", "conflicts", "knows", "lengths", "norms_of", "solve"]


# More tasks than this, and torch is faster than loops over floats.
MOST = 16


def all_finite(gramian: Tensor) -> bool:
    """Whether every number is finite."""
    # A finite sum takes 3 µs and decides nearly always.
    return isfinite(gramian.sum().item()) or bool(torch.isfinite(gramian).all())


def norms_of(gramian: Matrix) -> Vector:
    """Return ‖g_i‖."""
    return [sqrt(max(row[i], 0.0)) for i, row in enumerate(gramian)]


def lengths(weights: Vector, products: Vector, norms: Vector) -> tuple[float, float]:
    """Return ‖u‖² and Σ |w_i| ‖g_i‖ of u = Σ w_i g_i, from its products with the gradients and their norms."""
    return sum(map(mul, weights, products)), sum(abs(x) * y for x, y in zip(weights, norms, strict=True))


def conflicts(products: Vector, norms: Vector, square: float) -> bool:
    """Whether the cosine of u with a gradient is below what the guarantee allows, from ⟨u, g_i⟩, ‖g_i‖ and ‖u‖²."""
    least = -CONFLICT * sqrt(max(square, 0.0))
    # The first comparison decides nearly always.
    return min(products) < least * min(norms) and any(x < least * y for x, y in zip(products, norms, strict=True))


def applies(gramian: Tensor, normalizer: Normalizer, surgery: Surgery) -> bool:
    """Whether `solve` knows these methods, and the Gramian is one small one on the CPU."""
    return (
        gramian.ndim == 3
        and len(gramian) == 1
        and gramian.shape[-1] <= MOST
        and gramian.device.type == "cpu"
        and knows(normalizer, surgery)
    )


def knows(normalizer: Normalizer, surgery: Surgery) -> bool:
    """Whether `solve` knows these methods. They need neither losses nor random numbers."""
    return type(surgery) in (Cone, Sum) and (
        type(normalizer) is Unscaled or (type(normalizer) is Norm and not normalizer.smoothing)
    )


def solve(
    gramian: Matrix, preferences: Vector, normalizer: Normalizer, project: bool, rounding: float
) -> tuple[Vector, Vector, bool, float]:
    """Return weights over the raw gradients, scales, whether only u = 0 is left, and the cancellation in u.

    The Gramian is finite, its entries good to `rounding`. `project` says whether the sum is projected onto the dual
    cone, and set to 0 if it is nothing but rounding.
    """
    norms = norms_of(gramian)
    scales = [1.0] * len(norms)
    scaled = gramian
    if not isinstance(normalizer, Unscaled):
        alive = [x for x in norms if x > 0]
        mean = sum(alive) / max(len(alive), 1)
        scales = [mean / x if x > 0 else 0.0 for x in norms]
        after = sum(map(mul, scales, norms))
        factor = sum(alive) / after if after > 0 else 1.0
        scales = [x * factor for x in scales]
        scaled = [[x * s * t for x, t in zip(row, scales, strict=True)] for row, s in zip(gramian, scales, strict=True)]
        norms = list(map(mul, norms, scales))
    weights = preferences
    products = times(scaled, weights)
    if project and min(products) < 0:
        found, _ = solve_small(scaled, [products], None, None, rounding)
        weights = [x + y for x, y in zip(weights, found[0], strict=True)]
        products = times(scaled, weights)
    square, length = lengths(weights, products, norms)
    cancellation = length / sqrt(square) if square > 0 else inf if length > 0 else nan
    nothing = project and (square <= STATIONARY * rounding * length * length or conflicts(products, norms, square))
    if nothing:
        weights = [0.0] * len(weights)
    return list(map(mul, weights, scales)), scales, nothing, cancellation
