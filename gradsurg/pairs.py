"""Pairs of tasks, and how often they conflict over a run."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradsurg.optimizer.report import Report

__all__ = ["Pair", "pairs"]


@dataclass(frozen=True)
class Pair:
    """Two tasks over the steps in which both were present.

    Attributes:
        tasks: Their names.
        share: In how much of the steps they conflict, from 0 to 1.
        cosine: Mean cosine of their gradients.
        thirds: The share in the first, middle and last third of these steps.
        steps: How many there were.
    """

    tasks: tuple[str, str]
    share: float
    cosine: float
    thirds: tuple[float, ...]
    steps: int


def pairs(reports: Sequence[Report]) -> list[Pair]:
    """Return every pair of tasks that met, the most often conflicting first."""
    cosines: dict[tuple[str, str], list[float]] = {}
    for report in reports:
        table = report.cosines.tolist()
        for (i, a), (j, b) in itertools.combinations(enumerate(report.tasks), 2):
            key, value = ((a, b) if (b, a) not in cosines else (b, a)), table[i][j]
            if not math.isnan(value):
                cosines.setdefault(key, []).append(value)
    found = [_pair(names, torch.tensor(values, dtype=torch.float64)) for names, values in cosines.items()]
    return sorted(found, key=lambda pair: (-pair.share, pair.cosine))


def _pair(names: tuple[str, str], cosines: Tensor) -> Pair:
    hurt = (cosines < 0).double()
    thirds = tuple(float(part.mean()) for part in hurt.tensor_split(3) if len(part))
    return Pair(names, float(hurt.mean()), float(cosines.mean()), thirds, len(cosines))
