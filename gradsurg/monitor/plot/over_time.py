"""Angles, weights, norms, losses and conflicts over the steps: one curve per task, or per pair of tasks."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import torch

from gradsurg.monitor.plot.numbers import (
    Reports,
    aligned_cosines,
    degrees,
    per_task,
    reports_of,
    several,
    share_in_conflict,
    tasks_of,
)
from gradsurg.monitor.plot.style import curves_over_time

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["angles", "conflicts", "losses", "norms", "weights"]


def conflicts(history: Reports, *, ax: Axes | None = None) -> Axes:
    """Draw when each pair of tasks conflicts: the share of steps, over time, for the six worst pairs.

    Args:
        history: A History, or reports.
        ax: Where to draw.

    Raises:
        ValueError: No step of several tasks was recorded.
    """
    reports = several(history)
    names = tasks_of(reports)
    cosines = aligned_cosines(reports, names)
    curves = {
        f"{names[i]} – {names[j]}": share_in_conflict(cosines[:, i, j])
        for i, j in itertools.combinations(range(len(names)), 2)
    }
    worst = sorted(curves, key=lambda name: -float(curves[name].nan_to_num(0).mean()))[:6]
    # A single step has a share of 0 or 100 %, so each point is the mean of at least eight.
    points = min(24, max(1, len(reports) // 8))
    ax = curves_over_time(ax, reports, {name: curves[name] for name in worst}, points=points)
    ax.set(title="Conflicts over time", ylabel="% of steps", ylim=(-4, 104))
    return ax


def angles(history: Reports, *, of: str = "update", ax: Axes | None = None) -> Axes:
    """Draw the angle between the update and each task's gradient; above 90° a task is hurt.

    Args:
        history: A History, or reports.
        of: "update", the movement of the parameters (measured under guarantee="update"); or "direction", the gradient
            that the optimizer got.
        ax: Where to draw.

    Raises:
        ValueError: Another `of`; no step of several tasks, or none with a measured update.
    """
    if of not in ("update", "direction"):
        raise ValueError(f"of={of!r}: use 'update' or 'direction'")
    reports = several(history)
    if of == "update":
        reports = [report for report in reports if report.update_cosines is not None]
        if not reports:
            raise ValueError("no update was measured: that needs guarantee='update'. of='direction' is always there")
    # Both are properties of a report: update_cosines and direction_cosines.
    curves = per_task(reports, lambda r: degrees(getattr(r, f"{of}_cosines")))
    ax = curves_over_time(ax, reports, curves)
    ax.axhline(90, color="black", linewidth=1)
    ax.text(
        0.995, 90, "above: this task is hurt", ha="right", va="bottom", fontsize=8, transform=ax.get_yaxis_transform()
    )
    # The line at 90° is always in view, so that a run without conflicts does not look like one with many.
    largest = max(float(curve.nan_to_num(0).max()) for curve in curves.values())
    ax.set(title=f"Angle between the {of} and each task's gradient", ylabel="degrees", ylim=(0, max(105, largest + 5)))
    return ax


def weights(history: Reports, *, ax: Axes | None = None) -> Axes:
    """Draw each task's weight in the direction, the mean over the report's blocks; in a plain sum it is 1.

    Args:
        history: A History, or reports.
        ax: Where to draw.

    Raises:
        ValueError: No step of several tasks was recorded.
    """
    reports = several(history)
    curves = per_task(reports, lambda r: r.weights.mean(0))
    ax = curves_over_time(ax, reports, curves, log=True, title="Weights", ylabel="weight of the raw gradient")
    # The weight in a plain sum.
    ax.axhline(1, color="black", linewidth=0.8, zorder=0)
    return ax


def norms(history: Reports, *, ax: Axes | None = None) -> Axes:
    """Draw the length of each task's gradient over the shared parameters, before normalisation.

    Args:
        history: A History, or reports.
        ax: Where to draw.

    Raises:
        ValueError: No step of several tasks was recorded.
    """
    reports = several(history)
    curves = per_task(reports, lambda r: r.norms)
    return curves_over_time(ax, reports, curves, log=True, title="Length of each task's gradient", ylabel="norm")


def losses(history: Reports, *, ax: Axes | None = None) -> Axes:
    """Draw the losses as they were handed over.

    Args:
        history: A History, or reports.
        ax: Where to draw.

    Raises:
        ValueError: No loss was recorded.
    """
    reports = [report for report in reports_of(history) if report.losses]
    if not reports:
        raise ValueError("no loss was recorded: with task() and set_gradients() there are none")
    names = list(dict.fromkeys(name for report in reports for name in report.losses))
    curves = {
        name: torch.tensor([float(r.losses[name]) if name in r.losses else math.nan for r in reports]).double()
        for name in names
    }
    return curves_over_time(ax, reports, curves, log=True, title="Losses of the batches", ylabel="loss")
