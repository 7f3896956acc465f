"""One weighting of the losses for a whole step, for optimizers that evaluate them many times, such as L-BFGS."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradsurg.errors import warn
from gradsurg.gradients.rows import Row
from gradsurg.linalg.combine import combine
from gradsurg.optimizer.engine import Engine
from gradsurg.optimizer.report import Report

__all__ = ["LineSearch", "searches", "warn_of_many_evaluations"]


def searches(optimizer: Optimizer) -> bool:
    """Tell whether a step compares losses and gradients of several evaluations: L-BFGS, but for a single one."""
    if not any("lbfgs" in each.__name__.lower() for each in type(optimizer).__mro__):
        return False
    return any(group.get("max_iter") != 1 or group.get("line_search_fn") for group in optimizer.param_groups)


def warn_of_many_evaluations(engine: Engine, optimizer: Optimizer) -> None:
    """Warn once that no guarantee holds for such a step."""
    if engine.options.guarantee == "update" and "evaluations" not in engine.told:
        engine.told.add("evaluations")
        warn(
            f"a step of {type(optimizer).__name__.removeprefix('MultiTask')} evaluates the losses many times, so "
            "guarantee='update' does not hold for it: its movement belongs to many gradients. The weights of the first "
            "evaluation hold for the whole step. wrap(..., guarantee='gradient') says the same without this warning."
        )


class LineSearch:
    """Holds the weights w_i of a step's first surgery: p.grad = Σ w_i ∇L_i and the value Σ w_i L_i belong together.

    They sum to what the preferences sum to. If the first surgery has no single weight per task, or they are all 0, the
    preferences are the weights.
    """

    def __init__(self) -> None:
        self._weights: dict[str, float] | None = None

    @torch.no_grad()
    def evaluate(self, engine: Engine, value: object) -> object:
        """Write p.grad of the evaluation that was just done, and return its value, in place of the closure's."""
        rows = engine.capture.rows
        preferred = engine.options.preferring(engine.step.preferences).preferences
        preferences = {name: preferred.get(name, 1.0) for name in engine.step.losses}
        if self._weights is None:
            self._weights = _scaled(engine.report, preferences)
        # Ways that save backward passes leave no rows: their p.grad is the sum by their own weights.
        if len(rows) != len(preferences) or any(p.grad is not None and not rows.of(p) for p in engine.parameters()):
            return value
        weights = {name: self._weights.get(name, r) for name, r in preferences.items()}
        parameters = [p for p in engine.parameters() if rows.of(p)]
        table, factors = rows.table(parameters), [weights[name] for name in rows]
        row = Row(zip(parameters, combine(table, factors, parameters), strict=True))
        beside = engine.capture.has_foreign()
        engine.capture.write(engine.session.layout.whole(row))
        if value is None:
            return None
        losses = {name: loss.double() for name, loss in engine.step.losses.items()}
        own = torch.stack([weights[name] * loss for name, loss in losses.items()]).sum()
        if beside:
            # A loss beside the tasks is part of the closure's value and of p.grad.
            own += float(value) - torch.stack([r * losses[name] for name, r in preferences.items()]).sum()  # type: ignore[arg-type]
        return own.to(value.dtype) if isinstance(value, Tensor) else float(own)


def _scaled(report: Report | None, preferences: Mapping[str, float]) -> dict[str, float]:
    if report is None or len(report.weights) != 1 or set(report.tasks) != set(preferences):
        return dict(preferences)
    weights = dict(zip(report.tasks, report.weights[0].tolist(), strict=True))
    total = sum(weights.values())
    if not 0 < total < float("inf"):
        return dict(preferences)
    return {name: w * sum(preferences.values()) / total for name, w in weights.items()}
