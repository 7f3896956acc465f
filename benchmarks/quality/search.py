"""The search that every method gets: the same number of trials, judged on validation, with the first seed."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.quality.methods import METHODS, Method
from benchmarks.quality.problems import Problem

__all__ = ["GRID", "SINGLE", "Trial", "config", "single", "trials"]

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


def trials(method: str, tasks: Sequence[str], grid: Sequence[tuple[float, float]] = GRID) -> list[Trial]:
    """Return a method's trials over a grid of learning rates and weight decays.

    For static weights each trial has weights of its own, in proportions from 0.1 to 10, of mean 1.

    They are drawn by a generator of their own from a fixed seed, so that the search can be resumed, and the longer
    search begins with the shorter one's.
    """
    found: Method | None = METHODS.get(method)
    if found is None or not found.searches_weights:
        return [Trial(rate, decay) for rate, decay in grid]
    draw = random.Random(0)
    points = []
    for rate, decay in tuple(grid) * found.trials:
        raw = [10 ** draw.uniform(-1, 1) for _ in tasks]
        points.append(Trial(rate, decay, tuple(round(w * len(raw) / sum(raw), 4) for w in raw)))
    return points


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
