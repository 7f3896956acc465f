"""Heat maps: which tasks conflict, and in which layers."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import torch

from gradsurg.monitor.plot.numbers import Reports, aligned_cosines, degrees, several, share_in_conflict, tasks_of
from gradsurg.monitor.plot.style import axes_or_new, heat, write

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
    share.fill_diagonal_(math.nan)
    image = heat(ax, share)
    for i, j in itertools.product(range(len(names)), repeat=2):
        if i != j:
            together = not math.isnan(float(share[i, j]))
            text = f"{share[i, j]:.0f} %\n{angle[i, j]:.0f}°" if together else "never\ntogether"
            write(ax, i, j, text, float(share[i, j]))
    ax.set(xticks=range(len(names)), yticks=range(len(names)))
    ax.set_xticklabels(names, rotation=0 if max(map(len, names)) < 9 else 30)
    ax.set_yticklabels(names)
    ax.set_title("Steps in conflict (above 90°), and mean angle")
    ax.figure.colorbar(image, ax=ax, label="% of steps")
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
    cosines = torch.full((len(reports), len(blocks), len(pairs)), math.nan, dtype=torch.float64)
    for k, report in enumerate(reports):
        rows = [blocks.index(name) for name in report.blocks]
        place = [report.tasks.index(name) if name in report.tasks else -1 for name in names]
        for p, (i, j) in enumerate(pairs):
            if place[i] >= 0 and place[j] >= 0:
                cosines[k, rows, p] = report.block_cosines[:, place[i], place[j]]
    share = share_in_conflict(cosines).nanmean(0)
    longest = max(map(len, blocks))
    ax = axes_or_new(ax, (2.2 + 0.08 * longest + 1.1 * len(pairs), max(3.0, 1.6 + 0.26 * len(blocks))))
    image = heat(ax, share)
    if len(blocks) * len(pairs) <= 240:
        for i, j in itertools.product(range(len(blocks)), range(len(pairs))):
            if not math.isnan(float(share[i, j])):
                write(ax, i, j, f"{share[i, j]:.0f}", float(share[i, j]))
    ax.set(xticks=range(len(pairs)), yticks=range(len(blocks)))
    ax.set_xticklabels([f"{names[i]}\n{names[j]}" for i, j in pairs])
    ax.set_yticklabels(blocks, fontsize=8)
    ax.set_title("Steps in conflict (above 90°), by layer")
    ax.figure.colorbar(image, ax=ax, label="% of steps")
    return ax
