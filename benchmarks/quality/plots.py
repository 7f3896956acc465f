"""The plots: per-task Pareto scatters, differences to the plain sum, and conflicts against quality."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.quality.cache import Cache
from benchmarks.quality.choose import FIRST, Results
from benchmarks.quality.methods import DEFAULT, SUM
from benchmarks.quality.metrics import half_width, spread
from benchmarks.quality.search import config
from benchmarks.quality.summary import Row, Summary

__all__ = ["plot"]

COLOURS = {
    "baselines": "#222222",
    "normalisers alone": "#1b7f79",
    "surgeries alone": "#c1662b",
    "gradsurg": "#6a3d9a",
    "primary": "#b5179e",
}
MARKERS = {SUM: "X", "static": "P", "static_3": "p", "random": "v", "wide": "D", DEFAULT: "*"}


def plot(cache: Cache, summaries: Sequence[Summary], folder: Path) -> list[Path]:
    """Draw all into a folder; return the files."""
    import matplotlib as mpl

    mpl.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [_pareto(cache, summary, folder / f"pareto-{summary.problem.name}.png") for summary in summaries]
    drawn += [_against_sum(summary, folder / f"against-sum-{summary.problem.name}.png") for summary in summaries]
    drawn.append(_conflicts(summaries, folder / "conflicts.png"))
    return drawn


def _panels(count: int) -> tuple[Any, list[Any]]:
    """Return a figure and its panels, two in a row: what fits into a column of text at the size it was drawn in."""
    import matplotlib.pyplot as plt

    across, down = min(count, 2), -(-count // 2)
    figure, axes = plt.subplots(
        down, across, figsize=(4.4 * across if count > 1 else 6.6, 3.9 * down + 0.9), layout="constrained"
    )
    panels = list(axes.flat) if count > 1 else [axes]
    for spare in panels[count:]:
        spare.remove()
    return figure, panels[:count]


def _legend(figure: Any, panels: Sequence[Any]) -> None:
    handles = {text: h for axis in panels for h, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2, fontsize=9, frameon=False)


def _save(figure: Any, path: Path) -> Path:
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _score(row: Row, task: str) -> tuple[float, float]:
    """Return mean and deviation over seeds of a task's score, itself the mean of its metrics."""
    return spread([_mean(outcome.test.get(task, [None])) for outcome in row.outcomes])


def _mean(values: Sequence[float | None]) -> float:
    known = [v for v in values if v is not None]
    return fmean(known) if len(known) == len(values) else math.inf


def _pareto(cache: Cache, summary: Summary, path: Path) -> Path:
    p = summary.problem
    tasks = [task for task in p.tasks if task in p.judged or p.primary is not None]
    pairs = list(itertools.combinations(tasks, 2)) if len(tasks) < 4 else list(itertools.pairwise(tasks))
    figure, panels = _panels(len(pairs))
    trials = _static_trials(cache, p.name)
    for axis, (a, b) in zip(panels, pairs, strict=True):
        points = [(_mean(test[a]), _mean(test[b])) for test in trials]
        if points:
            axis.scatter(*zip(*points, strict=True), s=14, color="0.7", label="static weights, every trial, first seed")
        for name, row in summary.rows.items():
            (x, dx), (y, dy) = _score(row, a), _score(row, b)
            if math.isfinite(x) and math.isfinite(y):
                _point(axis, name, row, x, y, dx, dy)
        if a in summary.single and b in summary.single and summary.single[a]:
            alone = [fmean(fmean(seed) for seed in summary.single[task]) for task in (a, b)]
            axis.axvline(alone[0], color="0.7", lw=1, ls="--", zorder=0)
            axis.axhline(alone[1], color="0.7", lw=1, ls="--", zorder=0, label="single-task runs")
        for task, set_label, invert in (
            (a, axis.set_xlabel, axis.invert_xaxis),
            (b, axis.set_ylabel, axis.invert_yaxis),
        ):
            metrics = p.tasks[task].metrics
            set_label(metrics[0].title if len(metrics) == 1 else f"{task}, mean RMSE % of σ")
            alone = [fmean(seed) for seed in summary.single.get(task, [])]
            ends = _ends([_score(row, task)[0] for row in summary.rows.values()] + alone, metrics[0].higher)
            (axis.set_xlim if task == a else axis.set_ylim)(*ends)
            if not metrics[0].higher:
                invert()  # better is always right and up
    _legend(figure, panels)
    figure.suptitle(
        f"{p.name}: test scores, mean ± sd over seeds\nbetter is right and up; the worst tenth lies outside",
        fontsize=10,
    )
    return _save(figure, path)


def _ends(values: Sequence[float], higher: bool) -> tuple[float, float]:
    """Return the limits of an axis that leave out the worst tenth: one failed method must not squeeze the others."""
    known = sorted(v for v in values if math.isfinite(v))
    cut = len(known) // 10
    low, high = (known[cut], known[-1]) if higher else (known[0], known[len(known) - 1 - cut])
    room = 0.12 * (high - low) or 1.0
    return low - room, high + room


def _point(axis: Any, name: str, row: Row, x: float, y: float, dx: float, dy: float) -> None:
    colour = COLOURS[row.method.group]
    if name in MARKERS:
        axis.errorbar(x, y, dy, dx, color=colour, lw=0.7, zorder=3)
        size = 160 if name == DEFAULT else 60
        axis.scatter(
            x, y, s=size, marker=MARKERS[name], color=colour, zorder=4, label=row.method.title, edgecolor="white"
        )
    else:
        axis.scatter(x, y, s=18, color=colour, alpha=0.75, zorder=2, label=row.method.group)


def _static_trials(cache: Cache, name: str) -> list[Any]:
    """Return the test scores of every trial of the search for static weights, each at its best checkpoint."""
    results = Results(cache, [name])
    p = results.problems[name]
    found = []
    for trial in results.trials(name, "static_3")[0]:
        entry = cache.get(config(p, "static_3", trial, FIRST))
        test = results.scores(name, "static_3", entry, FIRST) if entry else None
        if test:
            found.append(test)
    return found


def _against_sum(summary: Summary, path: Path) -> Path:
    import matplotlib.pyplot as plt

    base = summary.rows[SUM]
    found = []
    for name, row in summary.rows.items():
        values = row.against(base)
        if name != SUM and all(map(math.isfinite, values)):
            found.append((fmean(values), half_width(values), row))
    found.sort(key=lambda item: -item[0])
    figure, axis = plt.subplots(figsize=(7.5, 0.2 * len(found) + 1.4), layout="constrained")
    middle = sorted(abs(mean) for mean, _, _ in found)
    reach = 2.5 * middle[int(0.8 * (len(middle) - 1))] + 1 if middle else 1
    for k, (mean, half, row) in enumerate(found):
        colour = COLOURS[row.method.group]
        if abs(mean) > reach:  # one method far off must not squeeze all others into a line
            side = math.copysign(reach, mean)
            text = f"{mean:+.0f} →" if side > 0 else f"← {mean:+.0f}"
            axis.text(side, k, text, color=colour, fontsize=8, va="center", ha="right" if side > 0 else "left")
            continue
        if math.isfinite(half):
            axis.plot([mean - half, mean + half], [k, k], color=colour, lw=1.2)
        axis.plot(mean, k, "o", ms=4, color=colour)
    axis.set_yticks(range(len(found)), [row.method.title for _, _, row in found], fontsize=8)
    for label, (_, _, row) in zip(axis.get_yticklabels(), found, strict=True):
        label.set_color(COLOURS[row.method.group])
    axis.axvline(0, color="0.6", lw=0.8, zorder=0)
    axis.set_xlim(-reach, reach)
    axis.set_ylim(-1, len(found))
    axis.set_xlabel("Δm less the plain sum's, % points; left is better")
    spread_shown = ", 95 % confidence intervals" if len(base.outcomes) > 1 else ""
    axis.set_title(
        f"{summary.problem.name}: difference to the plain sum, seeds: {len(base.outcomes)}{spread_shown}", fontsize=10
    )
    return _save(figure, path)


def _conflicts(summaries: Sequence[Summary], path: Path) -> Path:
    figure, panels = _panels(len(summaries))
    for axis, summary in zip(panels, summaries, strict=True):
        deltas = []
        for name, row in summary.rows.items():
            mean, _ = spread(row.by_task)
            shares = row.per_hundred("update")
            if math.isfinite(mean) and shares:
                deltas.append(mean)
                _point(axis, name, row, fmean(shares), mean, 0.0, 0.0)
        axis.set_xlabel("updates that conflict, per 100")
        axis.set_ylabel("Δm by task, % (up is better)")
        axis.set_title(summary.problem.name, fontsize=10)
        if deltas:  # far-off methods would squeeze all others into one line
            ordered = sorted(deltas)
            low, high = ordered[0], ordered[int(0.9 * (len(ordered) - 1))]
            axis.set_ylim(high + 0.4 * (high - low) + 0.5, low - 0.1 * (high - low) - 0.5)
    _legend(figure, panels)
    return _save(figure, path)
