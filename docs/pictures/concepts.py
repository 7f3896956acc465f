"""Draw the pictures of docs/concepts.md and docs/index.md.

Every arrow is what the library computes for the gradients shown.

python docs/pictures/concepts.py [FOLDER]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Polygon, Wedge
from torch import Tensor

import gradsurg

FOLDER = Path(__file__).parent
DARK, ORANGE, BLUE, GREEN = "#000000", "#D55E00", "#0072B2", "#009E73"
HURT, SAFE = "#F3D9CC", "#D5E8F2"
REACH = 10.0


def main(folder: Path) -> None:
    """Write all of them."""
    for draw in (conflict, cone, normalisation, priority, update, landing):
        with rc_context({"svg.hashsalt": draw.__name__, "svg.fonttype": "path", "font.size": 11}):
            figure = draw()
            figure.savefig(folder / f"{draw.__name__}.svg", metadata={"Date": None, "Creator": None})


def conflict() -> Figure:
    """Two gradients more than 90° apart, and their sum, which hurts the shorter."""
    first, second = torch.tensor([2.2, 0.3]), torch.tensor([-0.9, 0.7])
    figure, (left, right) = canvas(2)
    left.add_patch(half_plane(first, SAFE))
    arrow(left, first, "g₁", DARK)
    left.set_title("Moving into the blue half\nlowers task 1's loss")
    right.add_patch(half_plane(second, SAFE))
    arrow(right, second, "g₂", ORANGE)
    arrow(right, first, "g₁", DARK)
    arrow(right, first + second, "g₁ + g₂", BLUE, dashed=True)
    right.set_title("Task 2's half: g₁ lies outside (a conflict),\nand the sum does too: it hurts task 2")
    return figure


def cone() -> Figure:
    """The directions that hurt neither, and the nearest of them to the sum."""
    J = torch.tensor([[2.2, 0.3], [-0.9, 0.7]])
    total, u = J.sum(0), gradsurg.combine(J, surgery="cone")
    figure, (left, right) = canvas(2)
    two_gradients(left, J)
    two_gradients(right, J)
    left.set_title("The dual cone: every direction\nwithin 90° of both gradients")
    arrow(right, total, "g₁ + g₂", BLUE, dashed=True)
    arrow(right, u, "u", GREEN)
    right.plot(*torch.stack([total, u]).T.tolist(), color=GREEN, linestyle=":", linewidth=2)
    right.set_title("u is the point of the cone nearest to\nthe sum: the least change that hurts no task")
    return figure


def normalisation() -> Figure:
    """A loud and a quiet task, before and after."""
    J = torch.tensor([[1.9, 0.2], [0.1, 0.5]])
    scales = gradsurg.weights(J @ J.T, surgery="sum", normalize="norm")
    figure, (left, right) = canvas(2)
    arrow(left, J[0], "g₁", DARK)
    arrow(left, J[1], "g₂", ORANGE)
    arrow(left, J.sum(0), "g₁ + g₂", BLUE, dashed=True)
    left.set_title("A loud task and a quiet one: no conflict,\nand yet the sum is all but task 1's")
    scaled = J * scales[:, None]
    arrow(right, scaled[0], "s₁ g₁", DARK)
    arrow(right, scaled[1], "s₂ g₂", ORANGE)
    arrow(right, gradsurg.combine(J, surgery="sum", normalize="norm"), "their sum", BLUE, dashed=True)
    right.set_title("normalize='norm': equal lengths,\nthe mean length as before")
    return figure


def priority() -> Figure:
    """One primary task, one auxiliary: protected, or helping."""
    J = torch.tensor([[2.2, 0.3], [-0.9, 0.7]])
    figure, axes = canvas(2)
    for each, auxiliary, title in (
        (axes[0], "protect", "primary=task 1, auxiliary='protect':\ng₁, bent until task 2 is not hurt"),
        (axes[1], "help", "auxiliary='help': g₁, plus the part of g₂\nthat does not slow task 1 down"),
    ):
        each.add_patch(half_plane(J[1] if auxiliary == "protect" else J[0], SAFE))
        arrow(each, J[0], "g₁", DARK)
        arrow(each, J[1], "g₂", ORANGE)
        arrow(each, gradsurg.combine(J, surgery="sum", primary=0, auxiliary=auxiliary), "u", GREEN)
        each.set_title(title)
    return figure


def update() -> Figure:
    """What Adam makes of a direction that hurts no task, and what gradsurg makes of Adam's step."""
    J = torch.tensor([[1.5, 0.9], [-0.2, 1.3]])
    moves = {guarantee: adam_step(J, surgery="cone", guarantee=guarantee) for guarantee in ("none", "update")}
    u = gradsurg.combine(J, surgery="cone")
    figure, (left, right) = canvas(2)
    two_gradients(left, J)
    two_gradients(right, J)
    arrow(left, u, "u", GREEN)
    left.set_title("The gradient that the optimizer gets\nhurts no task …")
    arrow(right, moves["none"], "Adam", BLUE, dashed=True)
    arrow(right, moves["update"], "d", GREEN)
    right.plot(*torch.stack([moves["none"], moves["update"]]).T.tolist(), color=GREEN, linestyle=":", linewidth=2)
    right.set_title("… but Adam still follows its last step\nand hurts task 2. Projected, its step is d")
    return figure


def landing() -> Figure:
    """The first picture that a visitor sees: a step of Adam on the sum of the losses, and one with gradsurg."""
    J = torch.tensor([[2.0, 0.5], [-0.6, 1.1]])
    figure, (left, right) = canvas(2)
    two_gradients(left, J)
    two_gradients(right, J)
    arrow(left, adam_step(J, surgery="sum", guarantee="none"), "step", BLUE, dashed=True)
    left.set_title("Sum of the losses: Adam's step leaves the\nblue region, and the loss of task 2 rises")
    arrow(right, adam_step(J, surgery="cone", guarantee="update"), "step", GREEN)
    right.set_title("gradsurg: the step stays in the region\nwhere no task's loss rises")
    return figure


def adam_step(J: Tensor, *, surgery: str, guarantee: str) -> Tensor:
    """Return the movement of two parameters under Adam, whose momentum holds one earlier step."""
    w = torch.nn.Parameter(torch.zeros(2))
    adam = torch.optim.Adam([w], lr=1.9, betas=(0.9, 0.9))
    w.grad = torch.tensor([2.0, -4.0])
    adam.step()
    before = w.detach().clone()
    optimizer = gradsurg.wrap(adam, normalize="none", surgery=surgery, guarantee=guarantee)
    optimizer.zero_grad()
    optimizer.set_gradients({"1": [J[0]], "2": [J[1]]})
    optimizer.step()
    return before - w.detach()


def two_gradients(axes: Axes, J: Tensor) -> None:
    """Draw the gradients of two tasks and the region that hurts neither."""
    axes.add_patch(dual_cone(J))
    arrow(axes, J[0], "g₁", DARK)
    arrow(axes, J[1], "g₂", ORANGE)


def canvas(count: int) -> tuple[Figure, list[Axes]]:
    """Return a figure with square, bare axes around the origin."""
    figure = Figure(figsize=(4.2 * count, 3.5), layout="constrained")
    axes = list(figure.subplots(1, count))
    for each in axes:
        each.set(xlim=(-1.9, 3.1), ylim=(-1.5, 2.5), aspect="equal", xticks=[], yticks=[])
        each.spines[:].set_color("0.8")
        each.plot(0, 0, marker="o", color="black", markersize=4)
        each.title.set_fontsize(10.5)
    return figure, axes


def arrow(axes: Axes, to: Tensor, label: str, colour: str, *, dashed: bool = False) -> None:
    """Draw from the origin, with the label beyond the head."""
    x, y = to.tolist()
    style = {"arrowstyle": "-|>", "color": colour, "linewidth": 2.2, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", (x, y), (0, 0), arrowprops={**style, "linestyle": "--" if dashed else "-"})
    length = max((x * x + y * y) ** 0.5, 1e-6)
    place = (x + 0.25 * x / length, y + 0.25 * y / length)
    across = "left" if x > 0.3 * length else "right" if x < -0.3 * length else "center"
    axes.text(*place, label, color=colour, ha=across, va="center", fontsize=12)


def half_plane(gradient: Tensor, colour: str) -> Polygon:
    """Return the directions within 90° of a gradient."""
    along = gradient / gradient.norm() * REACH
    side = torch.stack([-along[1], along[0]])
    return Polygon(torch.stack([side, side + along, along - side, -side]).tolist(), color=colour, zorder=0, linewidth=0)


def dual_cone(J: Tensor) -> Wedge:
    """Return the directions within 90° of both of two gradients."""
    angles = torch.atan2(J[:, 1], J[:, 0]).rad2deg()
    low, high = float(angles.max()) - 90, float(angles.min()) + 90
    return Wedge((0, 0), REACH, low, high, color=SAFE, zorder=0, linewidth=0)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
