"""The numbers that the pictures show, one per recorded step; NaN if a task was absent."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from gradsurg.optimizer.report import Report

__all__ = [
    "Reports",
    "aligned_cosines",
    "degrees",
    "per_task",
    "reports_of",
    "several",
    "share_in_conflict",
    "tasks_of",
]

Reports = Iterable[Report]


def reports_of(history: Reports) -> list[Report]:
    """Return the reports; anything but a history or an iterable of reports raises TypeError."""
    given: object = history
    if not isinstance(given, Iterable):
        raise TypeError(
            f"a picture was asked of a {type(given).__name__}: pass a gradsurg.History(optimizer) that recorded its "
            "training, or a list of reports"
        )
    return list(history)


def several(history: Reports, use: str = "draw") -> list[Report]:
    """Return the reports that have several tasks over shared parameters; `use` says in the error what for."""
    reports = [report for report in reports_of(history) if len(report.tasks) > 1 and not report.norms.isnan().all()]
    if not reports:
        raise ValueError(f"no recorded step has several tasks that share parameters: there is nothing to {use}")
    return reports


def tasks_of(reports: Sequence[Report]) -> list[str]:
    """Return the names of all tasks, in the order in which they first occur."""
    return list(dict.fromkeys(name for report in reports for name in report.tasks))


def aligned_cosines(reports: Sequence[Report], names: Sequence[str]) -> Tensor:
    """Return the cosines of all pairs, (T, m, m) in the order of `names`; NaN if one of the two is absent."""
    # What no report fills stays NaN, and nanmean leaves it out.
    cosines = torch.full((len(reports), len(names), len(names)), math.nan, dtype=torch.float64)
    for k, report in enumerate(reports):
        place = torch.tensor([names.index(name) for name in report.tasks])
        cosines[k, place[:, None], place] = report.cosines
    return cosines


def share_in_conflict(cosines: Tensor) -> Tensor:
    """Return 100 for a negative cosine, 0 for another, NaN for NaN."""
    return 100 * (cosines < 0).double().where(~cosines.isnan(), math.nan)


def per_task(reports: Sequence[Report], value: Callable[[Report], Tensor]) -> dict[str, Tensor]:
    """Return task -> one value per report, shape (T,)."""
    names = tasks_of(reports)
    values = torch.full((len(names), len(reports)), math.nan, dtype=torch.float64)
    for k, report in enumerate(reports):
        values[[names.index(name) for name in report.tasks], k] = value(report)
    return dict(zip(names, values, strict=True))


def degrees(cosines: Tensor) -> Tensor:
    """Return the angles of cosines."""
    return cosines.clamp(-1, 1).arccos().rad2deg()
