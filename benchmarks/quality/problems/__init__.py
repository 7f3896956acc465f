"""The problems, on real data that ships in packages: name -> builder, from a seed."""

from __future__ import annotations

from benchmarks.quality.problems.base import Metric, Net, Problem, Split, Stream, Task, batches
from benchmarks.quality.problems.chinese import chinese, few_labels
from benchmarks.quality.problems.digits import digits
from benchmarks.quality.problems.tables import tables

__all__ = ["PROBLEMS", "Metric", "Net", "Problem", "Split", "Stream", "Task", "batches", "problem"]

PROBLEMS = {"digits": digits, "tables": tables, "chinese": chinese, "few_labels": few_labels}
# Its data differ from seed to seed; the others' differ in initial parameters and in the order of batches alone.
RESAMPLED = ("tables", "few_labels")
_BUILT: dict[tuple[str, int], Problem] = {}


def problem(name: str, seed: int = 0) -> Problem:
    """Return a problem; built once a process, and once a seed where the seed matters."""
    key = (name, seed if name in RESAMPLED else 0)
    if key not in _BUILT:
        _BUILT[key] = PROBLEMS[name](seed)
    return _BUILT[key]
