"""Report: what a step found and did, made and brought from the device when it is read."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from gradsurg.guarantee.movement import DeferredMovement, Movement, catch_up, joined
from gradsurg.optimizer.report_table import as_html, as_text

__all__ = ["DeferredReport", "Report", "settled"]


@dataclass(frozen=True, repr=False)
class Report:
    """One step of several losses, over the shared parameters.

    All numbers follow from the m x m Gramian and are computed when they are read; losses stay on their device until
    then. A block is a part of the shared parameters that surgery treats apart: the whole model, a parameter group or a
    parameter, by granularity=.

    Attributes:
        step: Number of optimizer steps done before this one.
        tasks: The tasks present, in the order of every vector and matrix here.
        losses: Name -> detached loss of the tasks that had one.
        gramian: G_ij = ⟨g_i, g_j⟩ of the raw gradients, shape (m, m), float64. Its diagonal is NaN if nothing was
            measured: no two tasks share a parameter, or there is a single task.
        scales: What normalisation multiplied each row by, shape (blocks, m).
        weights: w of u = Σ w_i g_i, shape (blocks, m).
        products: ⟨u, g_i⟩, shape (m,).
        square: ‖u‖².
        stationary: Only u = 0 satisfied every task, in every block, so u is 0.
        nonfinite: Tasks with a NaN or infinite gradient.
        margin_kept: The share of the margins that was within reach, shape (blocks,); None without margin=.
        path: Which implementation ran, e.g. "torch".
        movement: The movement of the parameters; None before step(), and if guarantee is not "update".
        preferences: r_i, shape (m,); None if nothing was measured.
        gramians: One Gramian per block, shape (blocks, m, m); `gramian` is their sum. None if nothing was measured.
        blocks: The names of the blocks: "model", "group 0" …, or those of the parameters that the optimizer knows.
        level: The gradients that gramian, weights and cosines belong to. "gradients": those of this step's losses.
            "features": the gradients with respect to the features, with total(losses, features=...). "reused weights":
            weights of an earlier step, with refresh_every=; the rest is NaN. "moving averages": averages for the tasks
            that are not in `fresh`, with rotate=.
        fresh: The tasks whose gradient was computed in this step; None is all.

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

    def with_movement(self, movement: DeferredMovement | Movement) -> Report | DeferredReport:
        """Return the report with one more movement: several optimizers may share the rows."""
        if isinstance(movement, DeferredMovement):  # the report was read before the step
            return DeferredReport(self.step, lambda: self, (movement,))
        return replace(self, movement=joined([*([] if self.movement is None else [self.movement]), movement]))

    @property
    def norms(self) -> Tensor:
        """‖g_i‖, shape (m,)."""
        return self.gramian.diagonal().clamp(min=0).sqrt()

    @property
    def cosines(self) -> Tensor:
        """cos(g_i, g_j), shape (m, m); 0 if a gradient is zero, NaN if it was not measured."""
        return _cosines(self.gramian)

    @property
    def block_cosines(self) -> Tensor:
        """cos(g_i, g_j) inside each block, shape (blocks, m, m); NaN if a task does not reach the block."""
        if self.gramians is None:
            return torch.full((len(self.blocks), *self.gramian.shape), float("nan"), dtype=torch.float64)
        reached = self.gramians.diagonal(dim1=-2, dim2=-1) > 0
        both = reached.unsqueeze(-1) & reached.unsqueeze(-2)
        return _cosines(self.gramians).where(both, float("nan"))

    @property
    def direction_cosines(self) -> Tensor:
        """cos(u, g_i), shape (m,), of the direction u that the optimizer got; 0 and NaN as in `cosines`."""
        return _over(self.products, self.norms * self.square.clamp(min=0).sqrt())

    @property
    def update_cosines(self) -> Tensor | None:
        """cos(d, g_i), shape (m,), of the real movement d of the parameters; None if it was not measured."""
        if self.movement is None:
            return None
        return _over(self.movement.inner, self.norms * self.movement.square**0.5)

    @property
    def change(self) -> float:
        """‖u − t‖ / ‖t‖ with t = Σ r_i s_i g_i, the sum after normalisation: how much surgery changed.

        0 if no two tasks were in conflict, 1 if u is 0; NaN if the weights were not measured.
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
        """Share of the pairs of tasks that are in conflict; 0 with a single task, NaN if no pair was measured."""
        pairs = math.comb(len(self.tasks), 2)
        if not pairs:
            return 0.0
        between = self.cosines[~torch.eye(len(self.tasks), dtype=torch.bool)]
        return float("nan") if bool(between.isnan().all()) else len(self.conflicts) / pairs

    def scalars(self) -> dict[str, float]:
        """Return one flat dict of numbers, for loggers such as TensorBoard."""
        result = {f"loss/{name}": float(loss) for name, loss in self.losses.items()}
        columns = {"norm": self.norms, "weight": self.weights.mean(0), "cos_direction": self.direction_cosines}
        if self.update_cosines is not None:
            columns["cos_update"] = self.update_cosines
        for title, column in columns.items():
            result |= {f"{title}/{name}": value for name, value in zip(self.tasks, column.tolist(), strict=True)}
        rate = self.conflict_rate
        result["conflicting_pairs"] = rate if math.isnan(rate) else float(len(self.conflicts))
        result |= {"conflict_rate": rate, "change": self.change}
        if self.margin_kept is not None:
            result["margin_kept"] = float(self.margin_kept.min())
        return result

    def __str__(self) -> str:
        return as_text(self)

    __repr__ = __str__  # for a prompt: the fields are a dozen tensors, which say less

    def _repr_html_(self) -> str:
        """Return the same for a notebook."""
        return as_html(self)


def _cosines(gramian: Tensor) -> Tensor:
    norms = gramian.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    return _over(gramian, norms.unsqueeze(-1) * norms.unsqueeze(-2))


def _over(numerator: Tensor, denominator: Tensor) -> Tensor:
    # Not "> 0": NaN, which was not measured, stays NaN.
    zero = denominator == 0
    return torch.where(zero, 0, numerator / torch.where(zero, 1, denominator))


def _square(gramians: Tensor, weights: Tensor) -> float:
    """Return ‖Σ w_i g_i‖², summed over the blocks."""
    return float(torch.linalg.vecdot(weights, (gramians @ weights.unsqueeze(-1)).squeeze(-1)).sum().clamp(min=0))


def _ratio(part: float, whole: float) -> float:
    # Weights that differ from those of the sum in the last place are no change: 1e-12 of a length.
    if whole <= 0 or part <= 1e-24 * whole:
        return 0.0 if part == part else part
    return math.sqrt(part / whole)


@dataclass(frozen=True)
class DeferredReport:
    """A report that is made when it is read; if its numbers are on a device, reading waits for it.

    `make` leaves out the `movements`: of the optimizers that share the report, those that came since.
    """

    step: int
    make: Callable[[], Report]
    movements: tuple[DeferredMovement | Movement, ...] = ()

    def with_movement(self, movement: DeferredMovement | Movement) -> DeferredReport:
        """Return the report with one more movement."""
        return replace(self, movements=(*self.movements, movement))

    def reading(self, look: Callable[[], object]) -> DeferredReport:
        """Return the report, and let `look` run when it is read."""

        def make() -> Report:
            look()
            return self.make()

        return replace(self, make=make)

    def read(self) -> Report:
        """Return the report, on the CPU."""
        report = self.make()
        for movement in map(_on_host, self.movements):
            report = replace(
                report, movement=movement if report.movement is None else joined([report.movement, movement])
            )
        return report


def settled(report: Report | DeferredReport) -> Report:
    """Return the report itself, waiting for the device if it is there."""
    return report.read() if isinstance(report, DeferredReport) else report


def _on_host(movement: DeferredMovement | Movement) -> Movement:
    """Return the movement of all partitions together, waiting for the device if it is there."""
    if isinstance(movement, Movement):
        return movement
    catch_up(movement.stream)
    corrected, held = bool(movement.corrected.any()), bool(movement.held.any())
    return Movement(movement.inner.sum(0).cpu(), float(movement.square.sum()), corrected, held)
