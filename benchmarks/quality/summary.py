"""What the report and the plots show: every method's outcomes over the seeds, gathered once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from benchmarks.quality.cache import Cache
from benchmarks.quality.choose import FIRST, Outcome, Results
from benchmarks.quality.methods import SUM, Method, methods_for
from benchmarks.quality.metrics import delta_by_metric, delta_by_task, mean_ranks
from benchmarks.quality.problems import Problem
from benchmarks.quality.search import SINGLE

__all__ = ["Row", "Summary", "gather"]


@dataclass(frozen=True)
class Row:
    """One method on one problem; lists are over the seeds that are there, in order."""

    method: Method
    outcomes: list[Outcome]

    @property
    def by_task(self) -> list[float]:
        """Δm by task."""
        return [delta_by_task(outcome.relative) for outcome in self.outcomes]

    @property
    def by_metric(self) -> list[float]:
        """Δm by metric."""
        return [delta_by_metric(outcome.relative) for outcome in self.outcomes]

    def per_hundred(self, level: str) -> list[float]:
        """Conflicts per 100 counted steps, "gradient" or "update"."""
        return [100 * outcome.entry[level] for outcome in self.outcomes if "error" not in outcome.entry]

    def against(self, other: Row) -> list[float]:
        """Return this row's Δm by task less the other's, seed by seed."""
        return [a - b for a, b in zip(self.by_task, other.by_task, strict=False)]


@dataclass(frozen=True)
class Summary:
    """One problem's rows.

    Attributes:
        problem: It.
        rows: Method name -> row, those with at least one seed.
        single: Judged task -> scores of its single-task runs, one list a seed.
        ranks: Method name -> mean rank over metrics and seeds, among the methods that have every seed of the sum.
        failed: (method, trial, error) of runs with the first seed that ended in an error.
    """

    problem: Problem
    rows: dict[str, Row]
    single: dict[str, list[list[float]]]
    ranks: dict[str, float]
    failed: list[tuple[str, str]]


def gather(cache: Cache, names: Sequence[str], seeds: int) -> list[Summary]:
    """Read the cache."""
    cache.refresh()
    results = Results(cache, names)
    return [_gather(results, name, seeds) for name in names]


def _gather(results: Results, name: str, seeds: int) -> Summary:
    p = results.problems[name]
    rows = {}
    for method in methods_for(p):
        outcomes = []
        for seed in range(FIRST, FIRST + seeds):
            outcome = results.outcome(name, method.name, seed)
            if outcome is None:
                break
            outcomes.append(outcome)
        if outcomes:
            rows[method.name] = Row(method, outcomes)
    bases = [base for seed in range(FIRST, FIRST + seeds) if (base := results.base(name, "test", seed))]
    alone = {task: [[v for v in base[task] if v is not None] for base in bases] for task in p.judged}
    return Summary(p, rows, alone, _ranks(rows), _failed(results, name))


def _ranks(rows: dict[str, Row]) -> dict[str, float]:
    count = len(rows[SUM].outcomes) if SUM in rows else 0
    full = {name: row for name, row in rows.items() if len(row.outcomes) >= count}
    per_seed = [mean_ranks({name: row.outcomes[k].relative for name, row in full.items()}) for k in range(count)]
    return {name: fmean(ranks[name] for ranks in per_seed) for name in full} if per_seed else {}


def _failed(results: Results, name: str) -> list[tuple[str, str]]:
    found = []
    for entry in results.cache.entries():
        config = entry["config"]
        if config["problem"] == name and "error" in entry:
            where = f"rate {config['rate']}, decay {config['decay']}, seed {config['seed']}"
            found.append((f"{config['method'].removeprefix(SINGLE)}, {where}", entry["error"]))
    return found
