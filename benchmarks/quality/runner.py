"""The order of work, and the loop that any number of processes run on one cache."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.choose import FIRST, Results
from benchmarks.quality.methods import TIERS, methods_for, tier
from benchmarks.quality.problems import problem
from benchmarks.quality.search import config, single
from benchmarks.quality.train import run

__all__ = ["planned", "share", "work"]

STINT = 10  # runs, before the plan is made anew: choices may have become possible that come earlier in it


def planned(results: Results, methods: Sequence[str] | None, seeds: int) -> Iterator[dict[str, Any] | None]:
    """Yield every run, tier by tier of methods, in each with seeds outermost.

    So after each seed a complete table of a tier exists. With the first seed all trials; with the others the chosen
    trial. None stands for runs that cannot be named yet.
    """
    for now, seed in itertools.product(range(len(TIERS) + 1), range(FIRST, FIRST + seeds)):
        for name, p in results.problems.items():
            rows = [method.name for method in methods_for(p) if methods is None or method.name in methods]
            rows = [row for row in rows if tier(row) == now]
            for row in [*(map(single, p.judged) if now == 0 else ()), *rows]:
                if seed == FIRST:
                    known, complete = results.trials(name, row)
                    yield from (config(p, row, trial, seed) for trial in known)
                    if not complete:
                        yield None
                else:
                    trial = results.trial(name, row)
                    yield config(p, row, trial, seed) if trial else None


def work(results: Results, methods: Sequence[str] | None, seeds: int) -> None:
    """Run what is missing and not claimed by another process, until nothing is missing."""
    torch.set_num_threads(1)  # the batches are too small to share
    cache = results.cache
    while True:
        cache.refresh()
        plan = list(planned(results, methods, seeds))
        todo = [each for each in plan if each is not None and cache.get(each) is None]
        if not todo and None not in plan:
            return
        done = 0
        for each in todo:
            with cache.claim(each) as mine:
                cache.refresh()
                if mine and cache.get(each) is None:
                    cache.append(each, attempt(each))
                    done += 1
            if done == STINT:
                break
        if done:
            missing = sum(each is None or cache.get(each) is None for each in plan)
            print(f"{time.strftime('%H:%M:%S')}  {len(plan) - missing} of {len(plan)} runs", flush=True)
        if not done:
            time.sleep(1)  # what is missing is being run elsewhere


def attempt(each: dict[str, Any]) -> dict[str, Any]:
    """Run; a run that ends in an error is a result too, and the report lists it."""
    problem(each["problem"], each["seed"])  # an error here is not the method's
    try:
        return run(each)
    except (ValueError, ArithmeticError, RuntimeError) as error:
        return {"valid": [], "test": [], "error": f"{type(error).__name__}: {error}"}


def share(path: Path, arguments: Sequence[str], workers: int) -> int:
    """Run so many processes on one cache; return the worst exit status."""
    command = [sys.executable, "-m", "benchmarks.quality", "--workers", "1", "--cache", str(path), *arguments]
    running = [subprocess.Popen(command) for _ in range(workers)]
    return max(abs(process.wait()) for process in running)
