"""Run or resume the benchmark of training quality, and report it.

Without an option: the full table, in two processes; what the cache has is not run again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.quality.cache import Cache
from benchmarks.quality.choose import Results
from benchmarks.quality.problems import PROBLEMS
from benchmarks.quality.runner import share, work

CACHE = Path(__file__).parents[1] / "results" / "quality" / "runs.jsonl"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument(
        "--subset", action="store_true", help="two minutes, in a cache of its own; fails where a promise is broken"
    )
    parser.add_argument("--report", action="store_true", help="tables and plots from the cache; one dated result file")
    parser.add_argument("--times", action="store_true", help="measure the time of a step")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--problems", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS))
    parser.add_argument("--cache", type=Path, default=CACHE)
    options = parser.parse_args()
    if options.subset:
        from benchmarks.quality.subset import subset

        return subset(options.problems)
    if options.times:
        from benchmarks.quality.timing import times

        return times(options.problems)
    cache = Cache(options.cache)
    if options.report:
        from benchmarks.quality.report import report

        print(report(cache, options.problems, options.seeds))
        return 0
    if options.workers > 1:
        return share(options.cache, ["--seeds", str(options.seeds), "--problems", *options.problems], options.workers)
    work(Results(cache, options.problems), None, options.seeds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
