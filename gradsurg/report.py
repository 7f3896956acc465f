"""What a step did: a record that costs nothing until somebody reads it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradsurg.guarantee import Movement

__all__ = ["Report"]


@dataclass(frozen=True)
class Report:
    """One step of several losses, over the shared parameters.

    Everything is derived from the m x m Gramian when it is read; the losses stay on their device until then.

    Attributes:
        step: Number of optimizer steps done before this one.
        tasks: The tasks present, in the order of every vector and matrix here.
        losses: Name -> detached loss of the tasks that had one.
        gramian: G_ij = ⟨g_i, g_j⟩ of the raw gradients, shape (m, m), float64; empty with no shared parameter.
        scales: What normalisation multiplied each row by, shape (blocks, m).
        weights: w of u = Σ w_i g_i, shape (blocks, m); one block unless granularity says otherwise.
        products: ⟨u, g_i⟩, shape (m,).
        square: ‖u‖².
        stationary: Only u = 0 satisfied every task (in every block), so u is 0.
        nonfinite: Tasks with a NaN or infinite gradient.
        path: Which implementation ran, e.g. "torch".
        movement: What the parameters did; None before step() or where guarantee is not "update".
    """

    step: int
    tasks: tuple[str, ...]
    losses: dict[str, Tensor]
    gramian: Tensor
    scales: Tensor
    weights: Tensor
    products: Tensor
    square: Tensor
    stationary: bool = False
    nonfinite: tuple[str, ...] = ()
    path: str = "torch"
    movement: Movement | None = field(default=None)

    @property
    def norms(self) -> Tensor:
        """‖g_i‖, shape (m,)."""
        return self.gramian.diagonal().clamp(min=0).sqrt()

    @property
    def cosines(self) -> Tensor:
        """cos(g_i, g_j), shape (m, m); 0 where a gradient is zero."""
        norms = self.norms
        return _over(self.gramian, norms[:, None] * norms)

    @property
    def direction_cosines(self) -> Tensor:
        """cos(u, g_i), shape (m,), of the direction handed to the optimizer; 0 where either is zero."""
        return _over(self.products, self.norms * self.square.clamp(min=0).sqrt())

    @property
    def update_cosines(self) -> Tensor | None:
        """cos(d, g_i), shape (m,), of the parameters' real movement; None where it was not measured."""
        if self.movement is None:
            return None
        return _over(self.movement.inner, self.norms * self.movement.square**0.5)

    @property
    def conflicts(self) -> list[tuple[str, str]]:
        """Pairs of tasks whose gradients point more than 90° apart."""
        negative = (self.cosines < 0).nonzero().tolist()
        return [(self.tasks[i], self.tasks[j]) for i, j in negative if i < j]

    def scalars(self) -> dict[str, float]:
        """Return one flat dict of numbers, for TensorBoard and the like."""
        result = {f"loss/{name}": float(loss) for name, loss in self.losses.items()}
        columns = {
            "norm": self.norms,
            "weight": self.weights.mean(0),
            "cos_direction": self.direction_cosines,
        }
        if self.update_cosines is not None:
            columns["cos_update"] = self.update_cosines
        for title, column in columns.items():
            result |= {f"{title}/{name}": value for name, value in zip(self.tasks, column.tolist(), strict=True)}
        result["conflicting_pairs"] = float(len(self.conflicts))
        return result

    def __str__(self) -> str:
        update = self.update_cosines
        columns: dict[str, list[str]] = {
            "task": list(self.tasks),
            "loss": [f"{float(self.losses[t]):.4g}" if t in self.losses else "-" for t in self.tasks],
            "norm": [f"{x:.3g}" for x in self.norms.tolist()],
            "weight": [f"{x:.3g}" for x in self.weights.mean(0).tolist()],
            "cos(u, g)": [f"{x:+.3f}" for x in self.direction_cosines.tolist()],
            "cos(d, g)": ["-"] * len(self.tasks) if update is None else [f"{x:+.3f}" for x in update.tolist()],
        }
        widths = {title: max(map(len, [title, *cells])) for title, cells in columns.items()}
        lines = ["  ".join(title.rjust(width) for title, width in widths.items())]
        lines += [
            "  ".join(cells[i].rjust(widths[title]) for title, cells in columns.items()) for i in range(len(self.tasks))
        ]
        pairs = ", ".join(f"{a} and {b}" for a, b in self.conflicts) or "nobody"
        lines.append(f"step {self.step}; in conflict: {pairs}")
        if self.stationary:
            lines.append("Pareto stationary: only a zero direction hurts nobody")
        if self.nonfinite:
            lines.append(f"not finite: {', '.join(self.nonfinite)}")
        if self.movement is not None and self.movement.held:
            lines.append("shared parameters held: no movement hurts nobody")
        return "\n".join(lines)


def _over(numerator: Tensor, denominator: Tensor) -> Tensor:
    safe = torch.where(denominator > 0, denominator, 1)
    return torch.where(denominator > 0, numerator / safe, 0)
