"""A Report as text for a prompt and as HTML for a notebook: a row per task, and remarks below."""

from __future__ import annotations

import html
import math
from typing import Any

from torch import Tensor

__all__ = ["as_html", "as_text"]

# The argument of each function is a Report; report.py imports this file, so its type cannot be named here.


def as_text(report: Any) -> str:
    """Return aligned columns."""
    columns = _columns(report)
    widths = {title: max(map(len, [title, *cells])) for title, cells in columns.items()}
    rows = zip(*columns.values(), strict=True)
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths.values(), strict=True)) for row in rows]
    head = "  ".join(title.rjust(width) for title, width in widths.items())
    return "\n".join([head, *lines, *_remarks(report)])


def as_html(report: Any) -> str:
    """Return an HTML table."""
    columns = _columns(report)
    head = "".join(f"<th>{html.escape(title)}</th>" for title in columns)
    rows = (
        "".join(f'<td style="text-align:right">{html.escape(cell)}</td>' for cell in row)
        for row in zip(*columns.values(), strict=True)
    )
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    remarks = "<br>".join(map(html.escape, _remarks(report)))
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table><p>{remarks}</p>"


def _columns(report: Any) -> dict[str, list[str]]:
    tasks, losses, update = report.tasks, report.losses, report.update_cosines
    norms = zip(tasks, report.norms.tolist(), strict=True)
    return {
        "task": list(tasks),
        "loss": [f"{float(losses[name]):.4g}" if name in losses else "-" for name in tasks],
        "norm": [f"{x:.3g}" if x == x or name in report.nonfinite else "-" for name, x in norms],
        "weight": [f"{x:.3g}" for x in report.weights.mean(0).tolist()],
        "cos(u, g)": _signed(report.direction_cosines),
        "cos(d, g)": ["-"] * len(tasks) if update is None else _signed(update),
    }


def _signed(cosines: Tensor) -> list[str]:
    return [f"{x:+.3f}" if x == x else "-" for x in cosines.tolist()]


def _remarks(report: Any) -> list[str]:
    lines = [f"step {report.step}; {_conflicts(report)}"]
    if report.change > 0:
        lines[0] += f"; surgery changed the sum by {report.change:.1%}"
    if len(report.weights) > 1:
        lines.append(f"weights: mean over {len(report.weights)} blocks")
    if report.stationary:
        lines.append("Pareto stationary: only a zero direction hurts no task")
    if report.level != "gradients":
        lines.append(f"cosines and weights are those of: {report.level}")
    if report.margin_kept is not None and float(report.margin_kept.min()) < 1:
        lines.append(f"margins out of reach: {100 * float(report.margin_kept.min()):.3g} % of them kept")
    if report.nonfinite:
        lines.append(f"not finite: {', '.join(report.nonfinite)}")
    if report.movement is not None and report.movement.held:
        lines.append("shared parameters held: every movement hurts a task")
    return lines


def _conflicts(report: Any) -> str:
    if len(report.tasks) == 1:
        return "one task: nobody to be in conflict with"
    if not report.tasks or math.isnan(report.conflict_rate):
        if report.level == "gradients" and not report.nonfinite:
            return "no two of these tasks share a parameter: no surgery"
        return "conflicts were not measured"
    return "in conflict: " + (", ".join(f"{a} and {b}" for a, b in report.conflicts) or "no two tasks")
