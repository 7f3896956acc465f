"""UPGrad weights: gradsurg.weights against TorchJD's UPGradWeighting, in one process.

Two kinds of instance at m = 4 and 8: rows less 0.9 of their mean, where most tasks conflict, and rows without any
negative entry, where nobody does. Beside each time stands the answer's error, the longest ‖u − u*‖ / ‖u*‖: the peer
adds 1e-4 of the trace to the diagonal and so solves a neighbouring problem; ours is rounded to the input's float32.
Exits with 1 where a target is missed: 0.6 of the peer's time in conflict, 40 µs without.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from benchmarks.record import conditions, record

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torchjd.aggregation import UPGradWeighting

import gradsurg
from gradsurg.solvers.pivoting import solve_batched

INSTANCES, TURN, WARM_UP, P = 400, 40, 5, 100
RATIO, FREE = 0.6, 40.0  # the targets: share of the peer's time, and microseconds


def gramians(m: int, conflicting: bool) -> list[Tensor]:
    result = []
    for seed in range(INSTANCES):
        J = torch.randn(m, P, generator=torch.Generator().manual_seed(seed))
        J = J - 0.9 * J.mean(0) if conflicting else J.abs()
        result.append(J @ J.T)
    return result


def microseconds(solvers: list[Callable[[Tensor], Tensor]], instances: list[Tensor]) -> list[np.ndarray]:
    """Return percentiles 20, 50, 80 of each solver, in turns of 40 calls: a busy spell of the machine hits both."""
    times: list[list[float]] = [[] for _ in solvers]
    for start in range(0, len(instances), TURN):
        for solve, taken in zip(solvers, times, strict=True):
            for G in [*instances[start : start + WARM_UP], *instances[start : start + TURN]]:
                begin = time.perf_counter()
                solve(G)
                taken.append(time.perf_counter() - begin)
            del taken[-TURN - WARM_UP : -TURN]
    return [np.percentile(np.array(taken) * 1e6, [20, 50, 80]) for taken in times]


def error(solve: Callable[[Tensor], Tensor], factor: float, instances: list[Tensor]) -> float:
    """Return the longest ‖u − u*‖ / ‖u*‖, u* from the float64 twin that works on all programs at once."""
    worst = 0.0
    for G in instances:
        G, w = G.double(), solve(G).double() * factor
        m = len(G)
        multipliers, _ = solve_batched(G.expand(m, m, m), G, None, None, rounding=4e-16)
        best = 1 + multipliers.sum(0)
        worst = max(worst, float(((w - best) @ G @ (w - best)).clamp(min=0).sqrt() / (best @ G @ best).sqrt()))
    return worst


def main() -> int:
    peer = UPGradWeighting()

    def ours(G: Tensor) -> Tensor:
        return gradsurg.weights(G, surgery="upgrad")

    lines = [
        "| m | conflicts | TorchJD, µs (20 … 80 %) | gradsurg, µs (20 … 80 %) | ratio | TorchJD's error | ours |",
        "| -: | :-- | --: | --: | --: | --: | --: |",
    ]
    missed = []
    for m in (4, 8):
        for conflicting in (True, False):
            instances = gramians(m, conflicting)
            theirs, mine = microseconds([peer, ours], instances)
            ratio = mine[1] / theirs[1]
            worst = error(peer, m, instances), error(ours, 1, instances)
            times = [f"{median:.0f} ({low:.0f} … {high:.0f})" for low, median, high in (theirs, mine)]
            kind = "most pairs" if conflicting else "none"
            lines.append(f"| {m} | {kind} | {times[0]} | {times[1]} | {ratio:.2f} | {worst[0]:.0e} | {worst[1]:.0e} |")
            if (conflicting and ratio > RATIO) or (not conflicting and mine[1] > FREE):
                missed.append(f"m = {m}, {'conflicting' if conflicting else 'free'}")
    lines += ["", f"targets: ratio ≤ {RATIO} in conflict, {FREE:.0f} µs without; missed: {', '.join(missed) or 'none'}"]
    print("\n".join(lines))
    print(f"\n{conditions()}\n{record('solvers', chr(10).join(lines))}")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
