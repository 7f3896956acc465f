"""Axes, curves and heat maps of all pictures, readable in grey and by the colour-blind."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradsurg.optimizer.report import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["axes_or_new", "curves_over_time", "heat_map", "styles"]

# Okabe and Ito's colours, from dark to light and back, so that neighbours differ in grey too.
COLOURS = ("#000000", "#E69F00", "#0072B2", "#CC79A7", "#009E73", "#56B4E9", "#D55E00", "#BBBBBB")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (6, 1.5, 1, 1.5)), (0, (3, 1, 1, 1, 1, 1)))
MARKERS = "os^Dv<>P"
# Most points of a curve: more steps are averaged, so that noise does not hide the trend.
POINTS = 100


def axes_or_new(ax: Axes | None, size: tuple[float, float] = (6.4, 3.6)) -> Axes:
    """Return `ax`, or the axes of a new figure."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError('gradsurg.plot needs matplotlib: pip install "gradsurg[plot]"') from None
    if ax is not None:
        return ax
    # If pyplot is in use, as in a notebook, it owns the figure and shows it. Otherwise the figure needs no display, and
    # is freed when the caller drops it.
    pyplot = sys.modules.get("matplotlib.pyplot")
    make = Figure if pyplot is None else pyplot.figure
    return make(figsize=size, layout="constrained").add_subplot()


def styles() -> Iterator[dict[str, Any]]:
    """Yield colour, dashes and marker of one task after the other."""
    return (
        {"color": COLOURS[k % len(COLOURS)], "linestyle": DASHES[k % len(DASHES)], "marker": MARKERS[k % len(MARKERS)]}
        for k in itertools.count()
    )


def curves_over_time(
    ax: Axes | None,
    reports: Sequence[Report],
    curves: Mapping[str, Tensor],
    *,
    points: int = POINTS,
    log: bool = False,
    **labels: Any,
) -> Axes:
    """Draw each curve, one value per report (NaN is a gap), as means over bins of equally many steps.

    With `log` the axis is logarithmic if all values are positive and span more than a factor of 20; `labels` go to
    ax.set().
    """
    ax = axes_or_new(ax)
    steps = torch.tensor([report.step for report in reports], dtype=torch.float64)
    # Equally many steps in each bin, wherever they lie: reports may come at uneven intervals.
    bins = torch.arange(len(steps)).tensor_split(min(points, len(steps)))
    at = torch.stack([steps[each].mean() for each in bins])
    for (name, values), style in zip(curves.items(), styles(), strict=False):
        means = torch.stack([values[each].nanmean() for each in bins])
        seen = ~means.isnan()
        x, y = at[seen].tolist(), means[seen].tolist()
        ax.plot(x, y, label=name, linewidth=1.6, markersize=4.5, markevery=max(1, len(x) // 8), **style)
    values = torch.cat(list(curves.values()))
    values = values[values.isfinite()]
    if log and len(values) and 0 < 20 * float(values.min()) < float(values.max()):
        ax.set_yscale("log")
    ax.set(xlabel="step", **labels)
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    return ax


def heat_map(
    ax: Axes, share: Tensor, texts: Mapping[tuple[int, int], str], rows: Sequence[str], columns: Sequence[str]
) -> None:
    """Draw percentages in a map whose lightness falls evenly, with a text on some cells; NaN is light grey."""
    from matplotlib import colormaps

    colours = colormaps["cividis_r"].with_extremes(bad="0.93")
    image = ax.imshow(share.numpy(), cmap=colours, vmin=0, vmax=100, aspect="auto")
    for (i, j), text in texts.items():
        # The text must stand out from its cell.
        ax.text(j, i, text, ha="center", va="center", fontsize=9, color="white" if share[i, j] > 50 else "black")
    ax.set_xticks(range(len(columns)), columns)
    ax.set_yticks(range(len(rows)), rows)
    ax.figure.colorbar(image, ax=ax, label="% of steps")
