"""Paths of two parameters over the contours of their losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradsurg.monitor.plot.style import axes_or_new, styles

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["trajectory"]


def trajectory(
    losses: Mapping[str, Callable[[Tensor], Tensor]],
    paths: Mapping[str, Tensor],
    *,
    ax: Axes | None = None,
    resolution: int = 120,
) -> Axes:
    """Draw paths of two parameters over the contours of their losses.

    Args:
        losses: Name -> function of points (..., 2) that returns losses (...). The contours show their sum; the lowest
            point of each is marked if it is in view.
        paths: Name -> points, shape (T, 2); a circle marks the start, a full marker the end.
        ax: Where to draw.
        resolution: Number of grid points in each direction.

    Raises:
        ValueError: There is no path, or a path is not of shape (T, 2).

    Example:
        >>> import torch, gradsurg.plot
        >>> losses = {"a": lambda p: p[..., 0] ** 2, "b": lambda p: (p[..., 1] - 1) ** 2}
        >>> path = torch.tensor([[2.0, 2.0], [1.0, 1.5], [0.5, 1.2]])
        >>> gradsurg.plot.trajectory(losses, {"mine": path}, resolution=20).get_title()
        'Paths over the summed loss'
    """
    if not paths or any(path.ndim != 2 or path.shape[1] != 2 or not len(path) for path in paths.values()):
        raise ValueError("paths must be name -> tensor of shape (T, 2), and at least one")
    points = {name: path.detach().double().cpu() for name, path in paths.items()}
    every = torch.cat(list(points.values()))
    low, high = every.amin(0), every.amax(0)
    # A path along an axis, or of a single point, gets some height too.
    margin = 0.15 * (high - low).clamp(min=0.1 * float((high - low).max()) + 1e-6)
    low, high = low - margin, high + margin
    x, y = (torch.linspace(float(low[i]), float(high[i]), resolution, dtype=torch.float64) for i in range(2))
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)
    ax = axes_or_new(ax, (5.4, 4.6))
    # Each loss is called once, with all points of the grid.
    surfaces = {name: loss(grid).detach() for name, loss in losses.items()}
    if surfaces:
        total = torch.stack(list(surfaces.values())).sum(0)
        ax.contour(x.numpy(), y.numpy(), total.numpy(), levels=18, colors="0.7", linewidths=0.8)
    for name, surface in surfaces.items():
        row, column = divmod(int(surface.argmin()), resolution)
        # On the edge of the grid: the lowest point lies outside of the picture.
        if {row, column} & {0, resolution - 1}:
            continue
        ax.plot(float(x[column]), float(y[row]), marker="*", color="black", markersize=9, linestyle="none")
        ax.annotate(f"best for {name}", (float(x[column]), float(y[row])), (4, 4), textcoords="offset points")
    for (name, path), style in zip(points.items(), styles(), strict=False):
        ax.plot(*path.T.tolist(), label=name, **{**style, "marker": None})
        ax.plot(*path[0].tolist(), marker="o", markerfacecolor="white", color=style["color"], linestyle="none")
        ax.plot(*path[-1].tolist(), marker=style["marker"], color=style["color"], linestyle="none", markersize=7)
    ax.set(title="Paths over the summed loss", xlim=(float(x[0]), float(x[-1])), ylim=(float(y[0]), float(y[-1])))
    ax.legend(frameon=False, fontsize=9)
    return ax
