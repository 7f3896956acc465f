"""Δm against single-task runs, by task and by metric, and mean rank. Pure functions of numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

__all__ = ["Numbers", "changes", "delta_by_metric", "delta_by_task", "half_width", "mean_ranks", "spread"]

Numbers = Mapping[str, Sequence[float | None]]  # task -> its metrics; None where a run gave no finite number
# Two-sided 95 % quantiles of Student's t, for 1 … 9 degrees of freedom.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def changes(scores: Numbers, base: Numbers, higher: Mapping[str, Sequence[bool]]) -> dict[str, list[float]]:
    """Return each metric's relative change in percent, negative where it is better than the base; ∞ where missing.

    Example:
        >>> changes({"a": [110.0]}, {"a": [100.0]}, {"a": [True]})
        {'a': [-10.0]}
    """
    return {
        task: [
            math.inf if value is None or b is None else (-1 if up else 1) * 100 * (value - b) / abs(b)
            for value, b, up in zip(values, base[task], higher[task], strict=True)
        ]
        for task, values in scores.items()
    }


def delta_by_task(relative: Mapping[str, Sequence[float]]) -> float:
    """Return Δm with equal say for each task: the mean over tasks of the mean over its metrics.

    Example:
        >>> delta_by_task({"a": [-10.0], "b": [1.0, 3.0]})
        -4.0
    """
    return fmean(fmean(values) for values in relative.values())


def delta_by_metric(relative: Mapping[str, Sequence[float]]) -> float:
    """Return Δm with equal say for each metric, so that a task with many counts as often.

    Example:
        >>> delta_by_metric({"a": [-10.0], "b": [1.0, 3.0]})
        -2.0
    """
    return fmean(value for values in relative.values() for value in values)


def mean_ranks(relative: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, float]:
    """Return method -> mean over the metrics of its rank among the methods, 1 the best, ties sharing their mean rank.

    Depends on which methods are in the table.
    """
    flat = {method: [v for values in tasks.values() for v in values] for method, tasks in relative.items()}
    ranks: dict[str, list[float]] = {method: [] for method in flat}
    for column in zip(*flat.values(), strict=True):
        for method, value in zip(flat, column, strict=True):
            less, equal = sum(v < value for v in column), sum(v == value for v in column)
            ranks[method].append(less + (equal + 1) / 2)
    return {method: fmean(found) for method, found in ranks.items()}


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and standard deviation (0 where there is one value; not a number where some are infinite)."""
    if not all(map(math.isfinite, values)):
        return math.inf, math.nan
    return fmean(values), stdev(values) if len(values) > 1 else 0.0


def half_width(values: Sequence[float]) -> float:
    """Return half the width of the 95 % confidence interval of the mean, ∞ for a single value."""
    n = len(values)
    if n < 2 or not all(map(math.isfinite, values)):
        return math.inf
    return STUDENT[n - 2] * stdev(values) / math.sqrt(n)
