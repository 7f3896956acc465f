"""Processor time of a step, every method in one process in turns.

One thread never waits for anything here, so on an idle machine wall time is the same; on a shared one it is not: with
load 12 on two cores, 2 ms of processor time took 2 ms, and 4 ms took 25, because a turn of the scheduler lay between.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence

import torch

from benchmarks.quality.methods import methods_for
from benchmarks.quality.problems import batches, problem
from benchmarks.quality.search import Trial, config
from benchmarks.quality.train import build, one_step
from benchmarks.record import RESULTS, conditions

__all__ = ["TIMES", "times"]

TIMES = RESULTS / "quality" / "times.json"
ROUNDS, WARM = 25, 3


def times(names: Sequence[str]) -> int:
    """Measure, print and keep the median of each method and problem, in milliseconds."""
    torch.set_num_threads(1)
    found: dict[str, dict[str, float]] = {}
    for name in names:
        p = problem(name)
        tasks = list(p.tasks)
        source = batches(p, tasks, 0)
        weights = (1.0,) * len(tasks)
        runners = {}
        for method in methods_for(p):
            trial = Trial(1e-3, 0.01, weights if method.searches_weights else None)
            each = config(p, method.name, trial, 0)
            runners[method.name] = (*build(p, each, tasks), each["weights"])
        spent: dict[str, list[float]] = {row: [] for row in runners}
        for _ in range(ROUNDS + WARM):
            parts = next(source)
            for row, (net, optimizer, scale) in runners.items():
                began = time.process_time()
                one_step(p, net, optimizer, parts, tasks, scale)
                spent[row].append(1000 * (time.process_time() - began))
        found[name] = {row: round(statistics.median(ms[WARM:]), 3) for row, ms in spent.items()}
        print(name, found[name], flush=True)
    TIMES.parent.mkdir(parents=True, exist_ok=True)
    TIMES.write_text(json.dumps({"conditions": conditions(), "ms": found}, indent=1) + "\n", encoding="utf-8")
    return 0
