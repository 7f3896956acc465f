"""What a step did: a record that costs nothing until somebody reads it."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from gradsurg.guarantee.movement import DeferredMovement, Movement, catch_up, joined

__all__ = ["DeferredReport", "Report", "settled"]


@dataclass(frozen=True, repr=False)
class Report:
    """One step of several losses, over the shared parameters.

    Everything is derived from the m x m Gramian when it is read; the losses stay on their device until then.

    Attributes:
        step: Number of optimizer steps done before this one.
        tasks: The tasks present, in the order of every vector and matrix here.
        losses: Name -> detached loss of the tasks that had one.
        gramian: G_ij = ⟨g_i, g_j⟩ of the raw gradients, shape (m, m), float64; NaN on the diagonal where nothing was
            measured: no two tasks share a parameter, or one is alone.
        scales: What normalisation multiplied each row by, shape (blocks, m).
        weights: w of u = Σ w_i g_i, shape (blocks, m); one block unless granularity says otherwise.
        products: ⟨u, g_i⟩, shape (m,).
        square: ‖u‖².
        stationary: Only u = 0 satisfied every task (in every block), so u is 0.
        nonfinite: Tasks with a NaN or infinite gradient.
        margin_kept: The share of the margins that could be asked for, shape (blocks,); None where no margin is set.
        path: Which implementation ran, e.g. "torch".
        movement: What the parameters did; None before step() or where guarantee is not "update".
        preferences: r_i, shape (m,); None where nothing was measured.
        gramians: The same as `gramian`, one a block, shape (blocks, m, m); None where nothing was measured.
        blocks: The names of the blocks: "model", "group 0" …, or the parameters', as far as the optimizer knows them.
        level: What gramian, weights and cosines are about. "gradients": those of this step's losses. "features": the
            losses' gradients with respect to the features, of total(losses, features=...). "reused weights": weights
            of an earlier step, of refresh_every=; the rest is NaN. "moving averages": of rotate=, for the tasks that
            are not in `fresh`.
        fresh: The tasks whose gradient was computed in this step; None where that is all.

    Example:
        >>> import torch, gradsurg
        >>> w = torch.nn.Parameter(torch.tensor([0.0, 0.0]))
        >>> optimizer = gradsurg.wrap(torch.optim.SGD([w], lr=0.1))
        >>> optimizer.total({"a": 3 * w[0], "b": w[1] - w[0]}).backward()
        >>> optimizer.step()
        >>> report = optimizer.report
        >>> report.conflicts, report.norms.round(decimals=2).tolist()
        ([('a', 'b')], [3.0, 1.41])
        >>> bool((report.update_cosines >= -1e-4).all())  # the step hurt neither
        True
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
    margin_kept: Tensor | None = None
    path: str = "torch"
    movement: Movement | None = field(default=None)
    preferences: Tensor | None = None
    gramians: Tensor | None = None
    blocks: tuple[str, ...] = ("model",)
    level: str = "gradients"
    fresh: tuple[str, ...] | None = None

    def with_movement(self, movement: object) -> Report:
        """Return the report of a step that has also done this; further optimizers may have moved before."""
        assert isinstance(movement, Movement)
        return replace(self, movement=joined([*([] if self.movement is None else [self.movement]), movement]))

    @property
    def norms(self) -> Tensor:
        """‖g_i‖, shape (m,)."""
        return self.gramian.diagonal().clamp(min=0).sqrt()

    @property
    def cosines(self) -> Tensor:
        """cos(g_i, g_j), shape (m, m); 0 where a gradient is zero, NaN where norms were not measured."""
        return _cosines(self.gramian)

    @property
    def block_cosines(self) -> Tensor:
        """cos(g_i, g_j) inside each block, shape (blocks, m, m); NaN where a task does not reach the block."""
        if self.gramians is None:
            return torch.full((len(self.blocks), *self.gramian.shape), float("nan"), dtype=torch.float64)
        reached = self.gramians.diagonal(dim1=-2, dim2=-1) > 0
        both = reached.unsqueeze(-1) & reached.unsqueeze(-2)
        return _cosines(self.gramians).where(both, float("nan"))

    @property
    def direction_cosines(self) -> Tensor:
        """cos(u, g_i), shape (m,), of the direction handed to the optimizer; 0 and NaN as in `cosines`."""
        return _over(self.products, self.norms * self.square.clamp(min=0).sqrt())

    @property
    def update_cosines(self) -> Tensor | None:
        """cos(d, g_i), shape (m,), of the parameters' real movement; None where it was not measured."""
        if self.movement is None:
            return None
        return _over(self.movement.inner, self.norms * self.movement.square**0.5)

    @property
    def change(self) -> float:
        """‖u − t‖ / ‖t‖, t = Σ r_i s_i g_i the sum after normalisation: how much surgery took away or added.

        0 where nobody was in conflict, 1 where u is 0; NaN where there are no weights to read it from.
        """
        if self.gramians is None or self.preferences is None:
            return float("nan")
        summed = self.scales * self.preferences
        return _ratio(_square(self.gramians, self.weights - summed), _square(self.gramians, summed))

    @property
    def conflicts(self) -> list[tuple[str, str]]:
        """Pairs of tasks whose gradients point more than 90° apart."""
        negative = (self.cosines < 0).nonzero().tolist()
        return [(self.tasks[i], self.tasks[j]) for i, j in negative if i < j]

    @property
    def conflict_rate(self) -> float:
        """Share of the pairs of tasks that are in conflict; 0 with a single task, NaN where no pair was measured."""
        pairs = math.comb(len(self.tasks), 2)
        if pairs and not self._measured:
            return float("nan")
        return len(self.conflicts) / pairs if pairs else 0.0

    @property
    def _measured(self) -> bool:
        """Whether the angle between any two tasks is known."""
        return not bool(self.cosines[~torch.eye(len(self.tasks), dtype=torch.bool)].isnan().all())

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
        unknown = math.isnan(self.conflict_rate)
        result["conflicting_pairs"] = float("nan") if unknown else float(len(self.conflicts))
        result["conflict_rate"] = self.conflict_rate
        result["change"] = self.change
        if self.margin_kept is not None:
            result["margin_kept"] = float(self.margin_kept.min())
        return result

    def __str__(self) -> str:
        columns = self._columns()
        widths = {title: max(map(len, [title, *cells])) for title, cells in columns.items()}
        lines = ["  ".join(title.rjust(width) for title, width in widths.items())]
        lines += [
            "  ".join(cells[i].rjust(widths[title]) for title, cells in columns.items()) for i in range(len(self.tasks))
        ]
        return "\n".join([*lines, *self._remarks()])

    __repr__ = __str__  # what a prompt shows: the fields are a dozen tensors, which say less

    def _repr_html_(self) -> str:
        """Return the same for a notebook."""
        columns = self._columns()
        head = "".join(f"<th>{html.escape(title)}</th>" for title in columns)
        rows = (
            "".join(f'<td style="text-align:right">{html.escape(cell)}</td>' for cell in row)
            for row in zip(*columns.values(), strict=True)
        )
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        remarks = "<br>".join(map(html.escape, self._remarks()))
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table><p>{remarks}</p>"

    def _columns(self) -> dict[str, list[str]]:
        update = self.update_cosines
        return {
            "task": list(self.tasks),
            "loss": [f"{float(self.losses[t]):.4g}" if t in self.losses else "-" for t in self.tasks],
            "norm": [
                f"{x:.3g}" if x == x or t in self.nonfinite else "-"
                for t, x in zip(self.tasks, self.norms.tolist(), strict=True)
            ],
            "weight": [f"{x:.3g}" for x in self.weights.mean(0).tolist()],
            "cos(u, g)": _signed(self.direction_cosines),
            "cos(d, g)": ["-"] * len(self.tasks) if update is None else _signed(update),
        }

    def _fights(self) -> str:
        if len(self.tasks) == 1:
            return "one task: nobody to be in conflict with"
        if not self._measured:
            if self.level == "gradients" and not self.nonfinite:
                return "no two of these tasks share a parameter: no surgery"
            return "conflicts were not measured"
        return "in conflict: " + (", ".join(f"{a} and {b}" for a, b in self.conflicts) or "nobody")

    def _remarks(self) -> list[str]:
        lines = [f"step {self.step}; {self._fights()}"]
        if self.change > 0:
            lines[0] += f"; surgery changed the sum by {self.change:.1%}"
        if len(self.weights) > 1:
            lines.append(f"weights: mean over {len(self.weights)} blocks")
        if self.stationary:
            lines.append("Pareto stationary: only a zero direction hurts nobody")
        if self.level != "gradients":
            lines.append(f"cosines and weights are those of: {self.level}")
        if self.margin_kept is not None and float(self.margin_kept.min()) < 1:
            lines.append(f"margins out of reach: {100 * float(self.margin_kept.min()):.3g} % of them kept")
        if self.nonfinite:
            lines.append(f"not finite: {', '.join(self.nonfinite)}")
        if self.movement is not None and self.movement.held:
            lines.append("shared parameters held: no movement hurts nobody")
        return lines


def _signed(cosines: Tensor) -> list[str]:
    return [f"{x:+.3f}" if x == x else "-" for x in cosines.tolist()]


def _cosines(gramian: Tensor) -> Tensor:
    norms = gramian.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    return _over(gramian, norms.unsqueeze(-1) * norms.unsqueeze(-2))


def _over(numerator: Tensor, denominator: Tensor) -> Tensor:
    zero = denominator == 0  # and not "> 0": what was not measured, NaN, stays so
    return torch.where(zero, 0, numerator / torch.where(zero, 1, denominator))


def _square(gramians: Tensor, weights: Tensor) -> float:
    """Return ‖Σ w_i g_i‖², summed over the blocks."""
    return float(torch.linalg.vecdot(weights, (gramians @ weights.unsqueeze(-1)).squeeze(-1)).sum().clamp(min=0))


def _ratio(part: float, whole: float) -> float:
    # Weights that differ from the sum's in the last place alone are no change; 1e-12 of a length is one.
    if whole <= 0 or part <= 1e-24 * whole:
        return 0.0 if part == part else part
    return math.sqrt(part / whole)


@dataclass(frozen=True)
class DeferredReport:
    """A report that is made when it is read, which then waits for the device, if there is one.

    Attributes:
        step: As in the report.
        make: Makes it, but for the movement.
        movements: What the optimizers that share it did since.
    """

    step: int
    make: Callable[[], Report]
    movements: tuple[DeferredMovement | Movement, ...] = ()

    def with_movement(self, movement: object) -> DeferredReport:
        """Return the report of a step that has also done this."""
        assert isinstance(movement, (DeferredMovement, Movement))
        return replace(self, movements=(*self.movements, movement))

    def read(self) -> Report:
        """Return the report, on the CPU."""
        report = self.make()
        return replace(report, movement=_joined(self.movements)) if self.movements else report


def settled(report: Report | DeferredReport) -> Report:
    """Return the report itself, waiting for the device where it is still there."""
    return report.read() if isinstance(report, DeferredReport) else report


def _joined(movements: Sequence[DeferredMovement | Movement]) -> Movement | None:
    there = [movement for movement in movements if isinstance(movement, DeferredMovement)]
    if not there:  # one judgement makes all of them, on a device or not
        return joined([movement for movement in movements if isinstance(movement, Movement)])
    for movement in there:
        catch_up(movement.stream)
    return Movement(
        inner=torch.cat([movement.inner for movement in there]).sum(0).cpu(),
        square=float(torch.cat([movement.square for movement in there]).sum()),
        corrected=bool(torch.cat([movement.corrected for movement in there]).any()),
        held=bool(torch.cat([movement.held for movement in there]).any()),
    )
