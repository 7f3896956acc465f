"""From the cache to outcomes: the trial and the checkpoint that validation chose, and what they score on test."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from benchmarks.quality.cache import Cache
from benchmarks.quality.methods import METHODS
from benchmarks.quality.metrics import Numbers, changes, delta_by_task
from benchmarks.quality.problems import Problem, problem
from benchmarks.quality.search import GRID, SINGLE, Trial, config, single, trials, weighted

__all__ = ["FIRST", "Outcome", "Results"]

FIRST = 0  # the seed of the search


@dataclass(frozen=True)
class Outcome:
    """One run at its chosen checkpoint.

    Attributes:
        trial: The chosen learning rate, weight decay and static weights.
        test: Task -> metrics.
        relative: Task -> change of each metric in percent against the single-task run of the same seed; judged tasks
            alone.
        entry: The line of the cache.
    """

    trial: Trial
    test: Numbers
    relative: dict[str, list[float]]
    entry: dict[str, Any]


class Results:
    """What the cache has, read with one rule for all methods.

    Validation decides, test is only reported: with the first seed, which trial; with every seed, which checkpoint. The
    criterion is Δm by task against single-task runs, whose own trials and checkpoints are chosen by their own task.
    """

    def __init__(self, cache: Cache, names: Sequence[str], grid: Sequence[tuple[float, float]] = GRID) -> None:
        self.cache, self.grid = cache, grid
        self.problems = {name: problem(name) for name in names}
        self._chosen: dict[tuple[str, str], Trial] = {}

    def trial(self, name: str, method: str) -> Trial | None:
        """Return the trial that validation chose with the first seed, None as long as some are missing."""
        if (name, method) not in self._chosen:
            found, complete = self.trials(name, method)
            best = self._best(name, method, found) if complete else None
            if best is None:
                return None
            self._chosen[name, method] = best
        return self._chosen[name, method]

    def trials(self, name: str, method: str) -> tuple[list[Trial], bool]:
        """Return a method's trials as far as they are known, and whether that is all of them."""
        plain = trials(method, self.grid)
        best = self._best(name, method, plain) if method in METHODS and METHODS[method].searches_weights else plain[0]
        if best is None:
            return plain, False
        return plain + weighted(method, tuple(self.problems[name].tasks), best, self.grid), True

    def _best(self, name: str, method: str, of: Sequence[Trial]) -> Trial | None:
        """Return the trial that is best on validation with the first seed, None as long as some are missing."""
        p = self.problems[name]
        scored = []
        for trial in of:
            entry = self.cache.get(config(p, method, trial, FIRST))
            best = entry and self._checkpoint(p, method, entry, FIRST)
            if not best:
                return None
            scored.append((best[1], trial))
        return min(scored, key=lambda pair: pair[0])[1]

    def outcome(self, name: str, method: str, seed: int) -> Outcome | None:
        """Return a method's result with a seed, None where it is not there yet."""
        p, trial = self.problems[name], self.trial(name, method)
        entry = trial and self.cache.get(config(p, method, trial, seed))
        base = self.base(name, "test", seed)
        if not trial or not entry or base is None:
            return None
        best = self._checkpoint(p, method, entry, seed)
        if best is None:
            return None
        test = _by_task(p, method, entry["test"][best[0]]) if entry["test"] else {}
        return Outcome(trial, test, self._relative(p, test, base), entry)

    def scores(self, name: str, method: str, entry: dict[str, Any], seed: int) -> Numbers | None:
        """Return the test scores of any run at its best checkpoint."""
        p = self.problems[name]
        best = self._checkpoint(p, method, entry, seed)
        return _by_task(p, method, entry["test"][best[0]]) if best and entry["test"] else None

    def base(self, name: str, split: str, seed: int) -> Numbers | None:
        """Return the scores of the single-task runs of a seed."""
        p = self.problems[name]
        found: dict[str, Sequence[float | None]] = {}
        for task in p.judged:
            method = single(task)
            trial = self.trial(name, method)
            entry = trial and self.cache.get(config(p, method, trial, seed))
            best = entry and self._checkpoint(p, method, entry, seed)
            if not entry or not best:
                return None
            found[task] = entry[split][best[0]]
        return found

    def _checkpoint(self, p: Problem, method: str, entry: dict[str, Any], seed: int) -> tuple[int, float] | None:
        """Return the checkpoint that is best on validation and its criterion; None where the base is missing."""
        if method.startswith(SINGLE):
            ups = _higher(p)[method.removeprefix(SINGLE)]
            marks = [fmean(_signed(v, up) for v, up in zip(look, ups, strict=True)) for look in entry["valid"]]
        else:
            base = self.base(p.name, "valid", seed)
            if base is None:
                return None
            looks = (_by_task(p, method, look) for look in entry["valid"])
            marks = [delta_by_task(self._relative(p, look, base)) for look in looks]
        # A run that broke down has no checkpoints.
        return min(enumerate(marks), key=lambda pair: pair[1]) if marks else (0, math.inf)

    @staticmethod
    def _relative(p: Problem, scores: Numbers, base: Numbers) -> dict[str, list[float]]:
        judged = {task: scores.get(task, [None] * len(base[task])) for task in p.judged}
        return changes(judged, base, _higher(p))


def _higher(p: Problem) -> dict[str, list[bool]]:
    return {name: [metric.higher for metric in task.metrics] for name, task in p.tasks.items()}


def _signed(value: float | None, up: bool) -> float:
    return math.inf if value is None else -value if up else value


def _by_task(p: Problem, method: str, flat: Sequence[float | None]) -> dict[str, Sequence[float | None]]:
    names = [method.removeprefix(SINGLE)] if method.startswith(SINGLE) else list(p.tasks)
    found, at = {}, 0
    for name in names:
        width = len(p.tasks[name].metrics)
        found[name] = flat[at : at + width]
        at += width
    return found
