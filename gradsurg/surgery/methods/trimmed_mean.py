"""Trimmed mean: per number, the mean of the gradients without the extremes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradsurg.surgery.base import ElementwiseSurgery, check

__all__ = ["TrimmedMean"]

# Up to here the m - b smallest are found sooner than all are sorted: 50 numbers of 8 tasks 7.3 µs against 10.0; of
# 100 000 numbers of 16 tasks it takes 43 ms against 34.
SMALL = 1000


@dataclass(frozen=True)
class TrimmedMean(ElementwiseSurgery):
    """Per element: the mean, weighted by r, of what is left of the m numbers without the b largest and b smallest.

    With fewer than 2b + 1 gradients as many are trimmed as leave one or two: the median.

    When it fails: it is meant for copies of *one* task of which b are corrupt. Of different tasks it drops those that
    want most, number by number, and the direction may conflict with any of them.

    Args:
        trim: b ≥ 0.

    Source: Yin et al. 2018, "Byzantine-robust distributed learning", definition 2.

    Example:
        >>> import torch, gradsurg
        >>> J = torch.tensor([[1.0, 5.0], [2.0, 4.0], [900.0, -900.0]])
        >>> gradsurg.combine(J, surgery="trimmed_mean").tolist()
        [2.0, 4.0]
    """

    trim: int = 1
    name, paper = "trimmed_mean", "Yin et al. 2018"
    promise = "b corrupt copies of a task among 2b + 1 cannot take it out of the range of the others"
    draws = False

    def __post_init__(self) -> None:
        check("trim", self.trim, self.trim >= 0, "not be negative")

    def combine(self, columns: Tensor, preferences: Tensor | None, generator: torch.Generator) -> Tensor:  # noqa: D102
        m, size = columns.shape
        trim = min(self.trim, (m - 1) // 2)
        if preferences is None and size <= SMALL:
            return columns.topk(m - trim, 0, largest=False)[0][trim:].mean(0)
        values, order = columns.sort(dim=0)
        values = values[trim : m - trim]
        if preferences is None:
            return values.mean(0)
        pull = preferences[order[trim : m - trim]]
        return (values * pull).sum(0) / pull.sum(0)
