"""From Gramian to weights: normalisation, surgery, priority, gradient guarantee, in that order.

Pure functions of m x m numbers, for the optimizer's steps and for gradsurg.weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from gradsurg.linalg.kernels.dispatch import PROGRAM_UP_TO
from gradsurg.linalg.kernels.table import constant
from gradsurg.normalize import Normalizer, Unscaled
from gradsurg.solvers.problem import HOST, Problem, State
from gradsurg.solvers.simplex import times
from gradsurg.solvers.tolerances import CONFLICT, ROUNDING_EXACT, STATIONARY
from gradsurg.surgery import Surgery
from gradsurg.surgery.margin import Margin, attainable
from gradsurg.surgery.pipeline_small import applies, conflicts, lengths, norms_of
from gradsurg.surgery.pipeline_small import solve as solve_quickly
from gradsurg.surgery.priority import Levels, levels_of, order, protected

__all__ = ["GUARANTEES", "Direction", "Pipeline", "check_mapping", "settled"]

GUARANTEES = {name: name for name in ("update", "gradient", "none")}


@dataclass(frozen=True)
class Direction:
    """The weights of one step and what is known about them, u = Σ w_i g_i over the raw gradients.

    Attributes:
        weights: Shape (..., m), float64.
        scales: What normalisation multiplied the rows by, shape (..., m).
        stationary: Bool, shape (...): only u = 0 satisfies what was asked, so the weights are 0.
        cancellation: Σ |w_i| ‖g_i‖ / ‖u‖, shape (...): how many digits of the gradients cancel in u.
        state: The next state of normaliser and surgery.
        margin_kept: The share of the margins that was asked of u, shape (...): below 1 they were out of reach.
            None if no margin is set.
    """

    weights: Tensor
    scales: Tensor
    stationary: Tensor
    cancellation: Tensor
    state: State
    margin_kept: Tensor | None = None


@dataclass(frozen=True)
class Pipeline:
    """The options of a step that concern m x m numbers, and the function that they make.

    With a margin, u is moved as little as possible until ⟨u, g_i⟩ ≥ τ_i ‖g_i‖ ‖t‖ / √m for every task a guarantee would
    protect, with t = Σ r_i g_i over the normalised rows; see margin.attainable. The √m is there because m orthogonal
    gradients of one length can just have τ = 1. The share of the margins that is kept goes to 0 at a Pareto stationary
    point, so that ‖u‖ is at most ‖t‖ plus twice what it was before.
    """

    normalizer: Normalizer
    surgery: Surgery
    levels: Levels | None = None
    auxiliary: str = "protect"
    guarantee: str = "none"
    margin: Margin = 0.0

    @property
    def conflict_free(self) -> bool:
        """Whether u itself is promised to conflict with no protected task."""
        return self.guarantee == "gradient" or bool(self.margin) or (self.surgery.conflict_free and self.levels is None)

    @property
    def methods(self) -> dict[str, str]:
        """Whose state it is that a step keeps, by stage."""
        levels = "" if self.levels is None else " by levels"
        return {"normalize": self.normalizer.label, "surgery": self.surgery.label + levels}

    def waits(self, m: int) -> bool:
        """Whether a device has to wait for the host to find the weights of m tasks."""
        return self.surgery.waits or self.normalizer.waits or m > PROGRAM_UP_TO

    def protected(self, problem: Problem) -> Tensor | None:
        """Return which tasks a guarantee protects, bool of shape (m,), or None for all."""
        if self.levels is None:
            return None
        levels = levels_of(problem.tasks, self.levels)
        return protected(len(problem.tasks), levels, self.auxiliary, problem.gramian.device)

    def solve(
        self, problem: Problem, state: State, rounding: float
    ) -> tuple[Problem, Tensor, Tensor, Tensor | None, State]:
        """Return the problem after normalisation, its weights, the scales, the margins' share and the next state.

        Every option acts here, in the order of the module's docstring.
        """
        scales, normalizer_state = self._scales(problem, state.get("normalize", {}))
        scaled = problem
        if not isinstance(self.normalizer, Unscaled):
            scaled = replace(problem, gramian=problem.gramian * scales.unsqueeze(-1) * scales.unsqueeze(-2))
        weights, surgery_state = self._ordered(scaled, state.get("surgery", {}))
        kept = None
        if self.margin or (self.guarantee == "gradient" and not (self.surgery.conflict_free and self.levels is None)):
            allowed = self.protected(problem)
            # The nearest direction without conflict, after whatever the surgery did.
            products = (scaled.gramian @ weights.unsqueeze(-1)).squeeze(-1)
            if self.margin:
                margins, kept = self.margins(scaled, allowed, rounding)
                products = products - margins
            correct = problem.solvers.nonnegative
            weights = weights + correct(scaled.gramian, products, allowed=allowed, rounding=rounding)
        return scaled, weights, scales, kept, {"normalize": normalizer_state, "surgery": surgery_state}

    def direction(self, problem: Problem, state: State, rounding: float = ROUNDING_EXACT) -> Direction:
        """Return the weights of u for one step, over the raw gradients, and what is known about them.

        The usual options are worked out in Python floats, one small Gramian at a time; see pipeline_small.py.
        """
        # If the solvers are a device's, nothing may be read back; so too in Triton's interpreter.
        usual = self.levels is None and not self.margin and problem.solvers is HOST
        if not (usual and applies(problem.gramian, self.normalizer, self.surgery)):
            return self._general(problem, state, rounding)
        return self._quick(problem, state, rounding)

    def _quick(self, problem: Problem, state: State, rounding: float) -> Direction:
        weights, scales, nothing, cancellation = solve_quickly(
            problem.gramian[0].tolist(), problem.preferences.tolist(), self.normalizer, self.conflict_free, rounding
        )
        vectors = torch.tensor([weights, scales], dtype=torch.float64)
        return Direction(
            weights=vectors[:1],
            scales=vectors[1:],
            stationary=torch.tensor([nothing]),
            cancellation=torch.tensor([cancellation], dtype=torch.float64),
            state={"normalize": state.get("normalize", {}), "surgery": state.get("surgery", {})},
        )

    def _general(self, problem: Problem, state: State, rounding: float) -> Direction:
        scaled, weights, scales, kept, state = self.solve(problem, state, rounding)
        allowed = self.protected(problem)
        weights, stationary, cancellation = _settle(scaled, weights, rounding, self.conflict_free, allowed)
        return Direction(
            weights=weights if isinstance(self.normalizer, Unscaled) else weights * scales,
            scales=scales,
            stationary=stationary,
            cancellation=cancellation,
            state=state,
            margin_kept=kept,
        )

    def weights(self, problem: Problem) -> Tensor:
        """Return the weights of `direction` alone, in less time, for a caller who keeps no state."""
        scaled, weights, scales, _, _ = self.solve(problem, {}, ROUNDING_EXACT)
        # Others may leave conflicts, and u near 0 is theirs to choose.
        if self.conflict_free:
            weights = settled(scaled, weights, self.protected(problem))
        return weights if isinstance(self.normalizer, Unscaled) else weights * scales

    def scales(self, problem: Problem, state: State) -> tuple[Tensor, State]:
        """Return what normalisation multiplies the rows by, shape (..., m), and the state after it.

        For element-wise surgeries, which have scales and no weights, and so no levels of priority.
        """
        if self.levels is not None:
            raise ValueError(
                f"primary= weighs whole gradients, and surgery={self.surgery.name!r} treats every number by itself: "
                "use one or the other"
            )
        scales, normalizer_state = self._scales(problem, state.get("normalize", {}))
        return scales, {"normalize": normalizer_state, "surgery": state.get("surgery", {})}

    def _scales(self, problem: Problem, state: State) -> tuple[Tensor, State]:
        scales, state = self.normalizer.scales(problem, state)
        if isinstance(self.normalizer, Unscaled):
            return scales, state
        norms = problem.norms
        lengths = scales * norms
        alive = lengths > 0
        # One common factor keeps the mean length of the rows as it was, so that learning rates keep their meaning with
        # every normaliser. For Norm it is 1 up to rounding.
        before, after = (norms * alive).sum(-1, keepdim=True), lengths.sum(-1, keepdim=True)
        factor = torch.where(after > 0, before / after.where(after > 0, torch.ones_like(after)), 1)
        return torch.where(alive, scales * factor, 0), state

    def margins(self, problem: Problem, allowed: Tensor | None, rounding: float) -> tuple[Tensor, Tensor]:
        """Return the lower bound of every ⟨u, g_i⟩, shape (..., m), and the share of the margins that it keeps."""
        gramian, preferences = problem.gramian, problem.preferences
        share, kept = attainable(gramian, self.margin, problem.tasks, allowed, rounding)
        sum_length = ((gramian @ preferences) @ preferences).clamp(min=0).sqrt()
        return sum_length.unsqueeze(-1) * share * problem.norms, kept

    def _ordered(self, problem: Problem, state: State) -> tuple[Tensor, State]:
        levels = levels_of(problem.tasks, self.levels)
        if levels is None:
            return self._weights(problem, state)
        states: dict[str, Any] = dict(state)

        def surgery(gramian: Tensor, level: list[int]) -> Tensor:
            # Each level's surgery remembers by the tasks that it has: levels change as tasks come and go.
            key = "+".join(problem.tasks[i] for i in level)
            weights, states[key] = self._weights(_part(problem, gramian, level), states.get(key, {}))
            return weights

        return order(problem.gramian, levels, self.auxiliary, surgery, problem.solvers), states

    def _weights(self, problem: Problem, state: State) -> tuple[Tensor, State]:
        """Return the surgery's weights; a task with r_i = 0 has no part in them, and conflict-free ones protect it."""
        G = problem.gramian
        if not problem.unwanted or self.surgery.linear:
            return self.surgery.weights(problem, state)
        wanted = [i for i in range(len(problem.tasks)) if i not in problem.unwanted]
        weights = torch.zeros(G.shape[:-1], dtype=G.dtype, device=G.device)
        if wanted:
            index = constant(wanted, G.device, torch.int64)
            found, state = self.surgery.weights(_part(problem, G[..., index[:, None], index], wanted), state)
            weights[..., index] = found
        if self.surgery.conflict_free:
            weights = weights + problem.solvers.nonnegative(G, (G @ weights.unsqueeze(-1)).squeeze(-1))
        return weights, state


def _part(problem: Problem, gramian: Tensor, rows: list[int]) -> Problem:
    """Return the problem of these rows alone; the Gramian is theirs."""
    index = constant(rows, gramian.device, torch.int64)
    return replace(
        problem,
        gramian=gramian,
        preferences=problem.preferences[index],
        tasks=tuple(problem.tasks[i] for i in rows),
        losses=None if problem.losses is None else problem.losses[index],
        unwanted=tuple(k for k, i in enumerate(rows) if i in problem.unwanted),
    )


def _settle(
    problem: Problem, weights: Tensor, rounding: float, conflict_free: bool, allowed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Set u to 0 if it is nothing but rounding or conflicts, and measure how much of the gradients cancels in it."""
    products = (problem.gramian @ weights.unsqueeze(-1)).squeeze(-1)
    square = torch.linalg.vecdot(weights, products)
    length = torch.linalg.vecdot(weights.abs(), problem.norms)
    cancellation = length / square.clamp(min=0).sqrt()
    # Only a promise can be broken by rounding.
    if not conflict_free:
        return weights, torch.zeros_like(square, dtype=torch.bool), cancellation
    in_conflict = products < -CONFLICT * problem.norms * square.clamp(min=0).sqrt().unsqueeze(-1)
    in_conflict = in_conflict if allowed is None else in_conflict & allowed
    nothing = (square <= STATIONARY * rounding * length.square()) | in_conflict.any(-1)
    return weights.masked_fill(nothing.unsqueeze(-1), 0), nothing, cancellation


def settled(problem: Problem, weights: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Return the weights of a conflict-free method, or zeros if their u is nothing but rounding, or conflicts."""
    # Without a conflict nothing can cancel.
    if not problem.gramian.min().item() < 0:
        return weights
    # Ten tensor operations take four times as long as this.
    if weights.ndim == 1:
        gramian, w = problem.gramian.tolist(), weights.tolist()
        products, norms = times(gramian, w), norms_of(gramian)
        square, length = lengths(w, products, norms)
        if square > STATIONARY * ROUNDING_EXACT * length * length and not conflicts(products, norms, square):
            return weights
    return _settle(problem, weights, ROUNDING_EXACT, True, allowed)[0]


def check_mapping(argument: str, value: Mapping[Any, Any] | None, *, zero: bool = False) -> dict[str, float]:
    """Return positive, finite numbers per task name, `zero` if allowed, or raise a ValueError that names the task."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{argument}={value!r}: pass a dict from task name to number, such as {{'depth': 0.5}}")
    for name, number in value.items():
        if not isinstance(name, str):
            raise ValueError(f"{argument}[{name!r}]: the keys are task names, such as {{'depth': 0.5}}")
        if not isinstance(number, Real) or not (0 < float(number) < float("inf") or (zero and number == 0)):
            must = "be 0 or" if zero else "be"
            raise ValueError(f"{argument}[{name!r}]={number!r}: must {must} positive and finite, such as 0.5")
    return {name: float(number) for name, number in value.items()}
