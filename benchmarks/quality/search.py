"""The search that every method gets: the same number of trials, judged on validation, with the first seed."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.quality.methods import METHODS, Method
from benchmarks.quality.problems import Problem

__all__ = ["GRID", "SINGLE", "Trial", "config", "single", "trials", "weighted"]

RATES = (3e-3, 1e-2, 3e-2)
DECAYS = (0.01, 0.5)  # AdamW's weight_decay
GRID = tuple(itertools.product(RATES, DECAYS))
SINGLE = "single:"
# Raised by hand when training itself changes, so that no old line of the cache is taken for a new one.
REVISION = 1


@dataclass(frozen=True)
class Trial:
    """One point of the search."""

    rate: float
    decay: float
    weights: tuple[float, ...] | None = None


def single(task: str) -> str:
    """Return the method name of a single-task run."""
    return SINGLE + task


def trials(method: str, grid: Sequence[tuple[float, float]] = GRID) -> list[Trial]:
    """Return a method's trials over a grid of learning rates and weight decays.

    Static weights start as the plain sum: in half of the common budget, a diagonal of the grid; in the longer search,
    all of it. The rest of their budget is `weighted`, around the best of these.
    """
    found: Method | None = METHODS.get(method)
    if found is not None and found.searches_weights and found.trials == 1:
        grid = _diagonal(grid)
    return [Trial(rate, decay) for rate, decay in grid]


def _diagonal(grid: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return each learning rate once, with a decay that rises with it.

    With the smallest decay alone, tuned weights came out 12 points of Δm behind the sum on few_labels, where the sum
    chose the largest rate with the largest decay: a baseline must not lose by the half of the grid that it never saw.
    """
    rates, decays = (sorted({point[k] for point in grid}) for k in (0, 1))
    return [(rate, decays[k * len(decays) // len(rates)]) for k, rate in enumerate(rates)]


def weighted(method: str, tasks: Sequence[str], best: Trial, grid: Sequence[tuple[float, float]] = GRID) -> list[Trial]:
    """Return the second half of a search for static weights: the best plain trial with other weights, of mean 1.

    First each task in turn ten times as loud as the others, as one would by hand; then drawn ones, in proportions from
    0.1 to 10, by a generator of their own from a fixed seed, so that a search can be resumed. (Twelve draws alone never
    made the pixels of digits, the quiet task, more than twice as loud as the mean.) Empty for methods without static
    weights.
    """
    found: Method | None = METHODS.get(method)
    if found is None or not found.searches_weights:
        return []
    draw = random.Random(0)
    raws = [[10.0 if other == task else 1.0 for other in tasks] for task in tasks]
    count = len(grid) * found.trials - len(trials(method, grid))
    raws += [[10 ** draw.uniform(-1, 1) for _ in tasks] for _ in range(count - len(raws))]
    return [Trial(best.rate, best.decay, tuple(round(w * len(raw) / sum(raw), 4) for w in raw)) for raw in raws[:count]]


def config(problem: Problem, method: str, trial: Trial, seed: int) -> dict[str, Any]:
    """Return all that a run depends on, ready to be hashed."""
    plain = method.startswith(SINGLE) or METHODS[method].options is None
    width = problem.wide if method in METHODS and METHODS[method].wide else 1.0
    # A longer search of the same thing finds the shorter one's runs.
    named = "weighted" if trial.weights else ("sum" if plain and not method.startswith(SINGLE) else method)
    return {
        "revision": REVISION,
        "problem": problem.name,
        "method": named,
        "rate": trial.rate,
        "decay": trial.decay,
        "weights": trial.weights and list(trial.weights),
        "width": width,
        "steps": problem.steps,
        "batch": problem.batch,
        "seed": seed,
    }
