"""margin=: every task gains a share of what it could, scaled down if not all can. For pipeline and guarantee."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from gradsurg.solvers.nonnegative import nonnegative

__all__ = ["Margin", "attainable", "named", "parse_margin"]

# One number for all tasks, or (name, number) pairs with 0 for the tasks not named.
Margin = float | tuple[tuple[str, float], ...]

# A margin counts as out of reach if the shortest direction that should keep it misses it by more than this cosine. The
# solver leaves out a row that lies within √(8 · 4e-13) = 2e-6 of the span of others.
MISSED = 1e-5


def parse_margin(value: float | Mapping[str, float]) -> Margin:
    """Return a margin as the pipeline takes it, from a number in [0, 1) or a dict from task name to such numbers."""
    given: dict[Any, Any] = dict(value) if isinstance(value, Mapping) else {"": value}
    for name, number in given.items():
        real = isinstance(number, Real) and not isinstance(number, bool)
        if not isinstance(name, str) or not real or not 0 <= float(number) < 1:
            given_as = f"margin[{name!r}]={number!r}" if isinstance(value, Mapping) else f"margin={value!r}"
            raise ValueError(f"{given_as}: pass a number in [0, 1), or a dict from task name to such numbers")
    if isinstance(value, Mapping):
        return tuple((name, float(number)) for name, number in given.items() if number > 0)
    return float(value)


def named(margin: Margin) -> tuple[str, ...]:
    """Return the tasks that a margin names."""
    return tuple(name for name, _ in margin) if isinstance(margin, tuple) else ()


def attainable(
    gramian: Tensor, margin: Margin, tasks: Sequence[str], allowed: Tensor | None, rounding: float
) -> tuple[Tensor, Tensor]:
    """Return what is asked of every task as a share of ‖g_i‖ ‖t‖, and the share of the margins that this keeps.

    Margins ask for ⟨u, g_i⟩ ≥ τ_i ‖g_i‖ ‖t‖ / √m. With v the shortest vector that has ⟨v, g_i⟩ ≥ τ_i ‖g_i‖, a
    direction no longer than t satisfies that iff ‖v‖ ≤ √m. Otherwise all τ_i are multiplied by √m / ‖v‖, or by 0 if
    there is no v. The gradients' lengths do not matter. `allowed` says which tasks are protected, bool (m,), or None
    for all; `rounding` is the relative error of the Gramian's entries, as for `nonnegative`.

    Returns:
        kept · τ_i / √m, shape (..., m), 0 for tasks that are not protected or have no gradient; kept, shape (...).

    Source: Su Jianlin 2022, kexue.fm 8907, asks for no conflict, which is margin 0.
    """
    m = len(tasks)
    asked = dict.fromkeys(tasks, margin) if isinstance(margin, float) else dict(margin)
    tau = torch.tensor([asked.get(task, 0.0) for task in tasks], dtype=torch.float64, device=gramian.device)
    norms = gramian.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    watched = norms > 0 if allowed is None else (norms > 0) & allowed
    tau = torch.where(watched, tau, 0)
    # Unit gradients keep the program well scaled, and a margin is a cosine.
    inverse = torch.where(norms > 0, 1 / norms.where(norms > 0, torch.ones_like(norms)), 0)
    unit = gramian * inverse.unsqueeze(-1) * inverse.unsqueeze(-2)
    shortest = nonnegative(unit, -tau, allowed=watched, rounding=rounding)
    cosines = (unit @ shortest.unsqueeze(-1)).squeeze(-1)
    length = torch.linalg.vecdot(shortest, cosines).clamp(min=0).sqrt()
    missed = (torch.where(watched, tau - cosines, 0) > MISSED).any(-1)
    kept = torch.where(length > sqrt(m), sqrt(m) / length, 1).masked_fill(missed, 0)
    return kept.unsqueeze(-1) * tau / sqrt(m), kept
