"""The output of the demo: a table of the results, and a picture of conflicts and test losses over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradsurg.demo.digits import TASKS, Run, conflicts

__all__ = ["percent", "plot", "spread", "table"]

# A light broken line and a dark full one: they differ without red or green, and in grey print.
STYLES: dict[str, dict[str, Any]] = {
    "plain sum": {"color": "#E69F00", "linestyle": "--", "marker": "o"},
    "gradsurg": {"color": "#0072B2", "linestyle": "-", "marker": "s"},
}


def table(runs: dict[str, list[Run]]) -> str:
    """Return the comparison as a Markdown table: mean over the seeds, ± standard deviation."""
    tasks = list(next(iter(runs.values()))[0].scores)
    titles = [
        *(TASKS[task] for task in tasks),
        "conflicts per 100 steps, gradient",
        "conflicts per 100 steps, update",
        "worst cos(update, a task's gradient)",
        "seconds per step",
    ]
    columns = [["", *titles]]
    for name, each in runs.items():
        scores = [spread([run.scores[task] for run in each], ".1f") for task in tasks]
        gradient = spread([percent(run.gradient) for run in each], ".1f")
        update = spread([percent(run.update) for run in each], ".1f")
        worst = min(run.update.min().item() for run in each)
        seconds = spread([run.seconds for run in each], ".4f")
        columns.append([name, *scores, gradient, update, f"{worst:.1g}", seconds])
    widths = [max(map(len, column)) for column in columns]
    lines = [
        _line([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in zip(*columns, strict=True)
    ]
    # The colons align numbers on the right.
    rule = _line(["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "\n".join([lines[0], rule, *lines[1:]])


def plot(runs: dict[str, list[Run]], path: Path, title: str) -> None:
    """Write the picture to a PNG file: lines are means over the seeds, bands reach from the least to the greatest."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    tasks = list(next(iter(runs.values()))[0].scores)
    figure = Figure(figsize=(9, 5.6), dpi=110, layout="constrained")
    figure.suptitle(title, fontsize=11)
    grid = figure.add_gridspec(2, 2 * len(tasks))
    conflicts_of_gradient = figure.add_subplot(grid[0, : len(tasks)])
    conflicts_of_update = figure.add_subplot(grid[0, len(tasks) :])
    losses = [figure.add_subplot(grid[1, 2 * i : 2 * i + 2]) for i in range(len(tasks))]

    for name, each in runs.items():
        _draw(conflicts_of_gradient, name, [_per_epoch(run, run.gradient) for run in each], first=1)
        _draw(conflicts_of_update, name, [_per_epoch(run, run.update) for run in each], first=1)
        for i, axes in enumerate(losses):
            _draw(axes, name, [run.losses[:, i] for run in each], first=0)

    for axes, what in ((conflicts_of_gradient, "gradient as handed over"), (conflicts_of_update, "update as made")):
        axes.set(title=f"Conflicts per 100 steps: {what}", ylim=(-4, 104))
    conflicts_of_gradient.legend(frameon=False, fontsize=9)
    for axes, task in zip(losses, tasks, strict=True):
        axes.set(title=f"Test loss: {TASKS[task].partition(',')[0]}", yscale="log", xlabel="epoch")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter("{x:g}")
    for axes in figure.axes:
        axes.title.set_fontsize(10)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.savefig(path)


def _per_epoch(run: Run, cosines: Tensor) -> Tensor:
    # All epochs have equally many steps, because only full batches are used.
    return 100 * conflicts(cosines).double().reshape(len(run.losses) - 1, -1).mean(1)


def _draw(axes: Any, name: str, lines: Sequence[Tensor], first: int) -> None:
    values = torch.stack(list(lines))
    epochs = list(range(first, first + values.shape[1]))
    style = STYLES[name]
    axes.plot(epochs, values.mean(0).tolist(), label=name, markersize=4, **style)
    low, high = values.amin(0).tolist(), values.amax(0).tolist()
    axes.fill_between(epochs, low, high, color=style["color"], alpha=0.2, linewidth=0)


def percent(cosines: Tensor) -> float:
    """Return the percentage of steps that conflict with some task."""
    return 100 * conflicts(cosines).double().mean().item()


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def spread(values: Sequence[float], form: str = ".1f") -> str:
    """Return "mean ± standard deviation", or the one value."""
    numbers = torch.tensor(values, dtype=torch.float64)
    mean = format(numbers.mean().item(), form)
    return mean if len(values) == 1 else f"{mean} ± {format(numbers.std().item(), form)}"
