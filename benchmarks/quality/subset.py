"""The two-minute subset: every problem and each kind of method once, and checks that can fail."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.cache import Cache
from benchmarks.quality.choose import FIRST, Results
from benchmarks.quality.methods import DEFAULT, METHODS, SUBSET, SUM, methods_for
from benchmarks.quality.metrics import delta_by_task
from benchmarks.quality.runner import planned, work
from benchmarks.record import conditions

__all__ = ["broken", "subset"]

GRID = ((1e-2, 0.01),)


def subset(names: Sequence[str]) -> int:
    """Run and print; return 1 where something that must hold does not."""
    with tempfile.TemporaryDirectory() as folder:
        results = Results(Cache(Path(folder) / "runs.jsonl"), names, GRID)
        work(results, SUBSET, seeds=1)
        wrong = _read_back(results)
        for name, p in results.problems.items():
            print(f"\n{p.title}\n{'':36} {'Δm %':>8} {'gradient':>9} {'update':>7}   conflicts per 100 steps")
            for method in methods_for(p):
                outcome = results.outcome(name, method.name, FIRST) if method.name in SUBSET else None
                if outcome is not None:
                    entry = outcome.entry
                    if "error" not in entry:
                        delta, gradient, update = delta_by_task(outcome.relative), entry["gradient"], entry["update"]
                        print(f"{method.title:36} {delta:8.1f} {100 * gradient:9.0f} {100 * update:7.0f}")
                    wrong += [f"{name}, {method.title}: {what}" for what in broken(method.name, entry, bool(p.primary))]
                elif method.name in SUBSET:
                    wrong.append(f"{name}, {method.title}: no result")
    print(f"\n{conditions()}; one trial (rate {GRID[0][0]:g}, decay {GRID[0][1]:g}), one seed")
    print("\n".join(["", *(f"WRONG: {what}" for what in wrong)] if wrong else ["", "all checks hold"]))
    return bool(wrong)


def broken(method: str, entry: dict[str, Any], ordered: bool) -> list[str]:
    """Return what a run shows that must not be.

    Args:
        method: Its name.
        entry: The line of the cache.
        ordered: Whether a primary task may come before others, so that these may be hurt.
    """
    if "error" in entry:
        return [str(entry["error"])]
    found = []
    if any(number is None for look in entry["valid"] + entry["test"] for number in look):
        found.append("a score is not finite")
    if method == DEFAULT and (entry["update"] or entry["gradient"]):
        found.append(f"the update guarantee is broken: gradient {entry['gradient']}, update {entry['update']}")
    if METHODS[method].group == "surgeries alone" and method == "cone" and entry["gradient"]:
        found.append(f"a conflict-free surgery conflicts in {entry['gradient']} of the steps")
    if method == SUM and not ordered and entry["config"]["problem"] == "digits" and not entry["update"]:
        found.append("the plain sum never conflicts: then the counting is wrong, or the problem is")
    return found


def _read_back(results: Results) -> list[str]:
    """Open the cache anew, as a resumed run does: nothing may be missing."""
    again = Results(Cache(results.cache.path), list(results.problems), results.grid)
    again.cache.refresh()
    missing = [each for each in planned(again, SUBSET, 1) if each is None or again.cache.get(each) is None]
    return [f"{len(missing)} runs were not in the cache when it was opened again"] if missing else []
