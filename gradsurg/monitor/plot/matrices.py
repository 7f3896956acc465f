"""Heat maps: which tasks conflict, and in which layers."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import torch

from gradsurg.monitor.plot.numbers import Reports, aligned_cosines, degrees, several, share_in_conflict, tasks_of
from gradsurg.monitor.plot.style import axes_or_new, heat_map

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["conflict_matrix", "layers"]


def conflict_matrix(history: Reports, *, ax: Axes | None = None) -> Axes:
    """Draw how often each pair of tasks conflicts: share of the recorded steps, and the mean angle.

    Args:
        history: A History, or reports.
        ax: Where to draw.

    Raises:
        ValueError: No step of several tasks was recorded.
    """
    reports = several(history)
    names = tasks_of(reports)
    ax = axes_or_new(ax, (1.6 + 0.95 * len(names), 1.2 + 0.8 * len(names)))
    cosines = aligned_cosines(reports, names)
    share = share_in_conflict(cosines).nanmean(0)
    angle = degrees(cosines).nanmean(0)
    # A task does not conflict with itself: these cells stay empty.
    share.fill_diagonal_(math.nan)
    texts = {
        (i, j): "never\ntogether" if share[i, j].isnan() else f"{share[i, j]:.0f} %\n{angle[i, j]:.0f}°"
        for i, j in itertools.permutations(range(len(names)), 2)
    }
    heat_map(ax, share, texts, names, names)
    ax.tick_params(axis="x", labelrotation=0 if max(map(len, names)) < 9 else 30)
    ax.set_title("Steps in conflict (above 90°), and mean angle")
    return ax


def layers(history: Reports, *, ax: Axes | None = None) -> Axes:
    """Draw where tasks conflict: share of the recorded steps, for each pair of tasks and each of the report's blocks.

    With wrap(..., granularity="tensor") each parameter is a block, with "group" each parameter group.

    Args:
        history: A History, or reports.
        ax: Where to draw.

    Raises:
        ValueError: Every report has a single block, or none has several tasks.
    """
    reports = [report for report in several(history) if report.gramians is not None]
    blocks = list(dict.fromkeys(name for report in reports for name in report.blocks))
    if len(blocks) < 2:
        raise ValueError("the reports have one block: wrap(..., granularity='tensor') looks at each parameter")
    names = tasks_of(reports)
    pairs = list(itertools.combinations(range(len(names)), 2))
    cosines = torch.full((len(reports), len(blocks), len(names), len(names)), math.nan, dtype=torch.float64)
    # What a report lacks stays NaN: a task that was absent, or a block that no task reached.
    for k, report in enumerate(reports):
        rows = torch.tensor([blocks.index(name) for name in report.blocks])
        place = torch.tensor([names.index(name) for name in report.tasks])
        cosines[k, rows[:, None, None], place[:, None], place] = report.block_cosines
    share = share_in_conflict(torch.stack([cosines[:, :, i, j] for i, j in pairs], -1)).nanmean(0)
    longest = max(map(len, blocks))
    ax = axes_or_new(ax, (2.2 + 0.08 * longest + 1.1 * len(pairs), max(3.0, 1.6 + 0.26 * len(blocks))))
    # Numbers on more cells could not be read.
    seen = (~share.isnan()).nonzero().tolist() if share.numel() <= 240 else []
    texts = {(i, j): f"{share[i, j]:.0f}" for i, j in seen}
    heat_map(ax, share, texts, blocks, [f"{names[i]}\n{names[j]}" for i, j in pairs])
    ax.tick_params(axis="y", labelsize=8)
    ax.set_title("Steps in conflict (above 90°), by layer")
    return ax
