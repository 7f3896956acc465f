"""What each fast path of a step is worth: `python -m benchmarks.switches [SWITCH ...]`.

A fast path is a second way to do what the library can do without it, so it has to earn its place: one that costs less
than 5 % of a step on every workload, if it is switched off, is taken out.

Steps with the path switched on and off take turns in one process, each on a model of its own. The two models change
places four times, because two copies of one model can differ by 2 %, by where their memory lies. Times are processor
time of one thread. Other work on the machine only ever adds to them, so the least ones are compared. The same of the
first and the second half of the rounds, and the median over neighbouring steps, tell how far to trust the result.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch

import gradsurg.guarantee.update
import gradsurg.optimizer.inputs
import gradsurg.surgery.pipeline
from benchmarks.contenders import Step, ours
from benchmarks.cpu import seconds, table
from benchmarks.record import conditions, record
from benchmarks.workloads import Workload, mlp, transformer
from gradsurg.gradients.recycle import Recycler

NEEDED = 0.05  # of a step
CHANGES = 4  # of the models' places
WARM = 2  # rounds after each change that do not count


def nothing(*_: Any) -> None:
    return None


# What to put in the place of which function of a module or class, so that a fast path is off.
SWITCHES: dict[str, list[tuple[Any, str, Callable[..., Any]]]] = {
    "pipeline_small": [
        (gradsurg.surgery.pipeline, "applies", lambda *_: False),
        (gradsurg.optimizer.inputs, "knows", lambda *_: False),
    ],
    "first_look": [(gradsurg.guarantee.update, "first_look", nothing)],
    "recycle": [(Recycler, "keep", nothing), (Recycler, "take", nothing)],
}

# Name -> (workload, rounds).
WORKLOADS: dict[str, tuple[Callable[[], Workload], int]] = {
    "perceptron, 0.1 M in 40 tensors, m = 2": (lambda: mlp(2), 1000),
    "perceptron, 0.1 M in 40 tensors, m = 4": (lambda: mlp(4), 1000),
    "perceptron, 0.1 M in 40 tensors, m = 8": (lambda: mlp(8), 800),
    "transformer, 5 M, m = 2": (lambda: transformer(2), 16),
    "transformer, 5 M, m = 8": (lambda: transformer(8), 8),
    "many tensors, 0.4 M in 400, m = 4": (lambda: mlp(4, parameters=400_000, tensors=400), 80),
    "few large tensors, 20 M in 8, m = 2": (lambda: mlp(2, parameters=20_000_000, tensors=8), 24),
    "few large tensors, 20 M in 12, m = 4": (lambda: mlp(4, parameters=20_000_000, tensors=12), 16),
}


@dataclass
class Times:
    """Seconds of the steps with a path switched on and off, in pairs of neighbours."""

    on: list[float] = field(default_factory=list)
    off: list[float] = field(default_factory=list)

    def cost(self, part: slice = slice(None)) -> float:
        """Return by how much the least time is larger without the path, as a share."""
        return min(self.off[part]) / min(self.on[part]) - 1

    def costs(self) -> list[float]:
        """Return this of all rounds and of each half, and the median of the same over neighbouring steps."""
        half = len(self.on) // 2
        median = statistics.median(off / on for on, off in zip(self.on, self.off, strict=True)) - 1
        return [self.cost(), self.cost(slice(half)), self.cost(slice(half, None)), median]


@contextmanager
def switched_off(switch: str) -> Iterator[None]:
    """Do without a fast path inside the block."""
    patches = [mock.patch.object(place, name, instead) for place, name, instead in SWITCHES[switch]]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def measure(switch: str, workload: Callable[[], Workload], rounds: int) -> Times:
    """Return the times of a workload's steps with and without a fast path."""
    times = Times()
    steps: list[Step] = []
    for _ in range(2):
        work = workload()
        steps.append(ours(work, torch.optim.SGD(work.model.parameters(), lr=1e-3)))
    for _ in range(CHANGES):
        steps.reverse()
        with_it, without = steps
        for turn in range(rounds // CHANGES + WARM):
            on = off = 0.0
            for is_on in (True, False) if turn % 2 else (False, True):
                if is_on:
                    on = seconds(with_it)
                else:
                    with switched_off(switch):
                        off = seconds(without)
            if turn >= WARM:
                times.on.append(on)
                times.off.append(off)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("switches", nargs="*", choices=[[], *SWITCHES], default=[])
    parser.add_argument("--only", default="", help="measure the workloads whose name holds this")
    parser.add_argument("--rounds", type=float, default=1.0, help="times as many rounds")
    parser.add_argument("--dry", action="store_true", help="keep no result file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{conditions()}, 1 thread\n")
    for switch in options.switches or SWITCHES:
        rows, sure = [], {}
        for name, (workload, rounds) in WORKLOADS.items():
            if options.only not in name:
                continue
            times = measure(switch, workload, int(rounds * options.rounds))
            costs = times.costs()
            sure[name] = min(costs)  # all four figures have to say so
            rows.append([name, f"{1e3 * min(times.on):.2f}", *(f"{100 * x:+.1f} %" for x in costs)])
            print(switch, rows[-1], flush=True)
        titles = ["", "ms with it, least", "off costs, least", "first half", "second half", "median of the rounds"]
        best = max(sure, key=sure.__getitem__)
        verdict = (
            f"{switch} {'stays' if sure[best] >= NEEDED else 'goes'}: the four figures of one workload are all above "
            f"{100 * sure[best]:.1f} % at best ({best}), and {100 * NEEDED:.0f} % is asked for"
        )
        text = f"{switch}, switched on and off in turn\n\n{table(titles, rows)}\n\n{verdict}"
        print(f"\n{text}\n", flush=True)
        if not options.dry:
            record("switches", f"1 thread, processor time. {text}")


if __name__ == "__main__":
    main()
