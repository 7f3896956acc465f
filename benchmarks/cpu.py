"""Time and memory of a step on the CPU, beside every peer: `python -m benchmarks.cpu [PART ...]`.

Parts: mlp and transformer (whole steps of a small perceptron and of 5 M parameters, m = 2, 4, 8), surgery (rows read
for the Gramian and for u, against the time of copying as much), memory (peak of a process of its own, above that of the
plain step), growth (the surgery's cost over m, numbers and tensors, with the slope in log-log scale). The cheap modes:
benchmarks.cheap.

Times are processor time of one thread, and contenders take turns. Other work on the machine reaches even that, through
caches and memory, and only ever adds: what is compared is the least of the rounds. How the ratio to the plain passes of
the same round was spread is printed beside it, with its median. Everything goes into one dated file of
benchmarks/results; the documentation's tables and its plot are made from that. Parts that are named are added to the
file of the day, without names it is begun anew.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import torch

from benchmarks.contenders import ALONE, CONTENDERS, NARROW, OURS, PEERS, PLAIN, Step, build
from benchmarks.record import conditions, peak_bytes, record, result_file
from benchmarks.workloads import WORKLOADS
from gradsurg.gradients.recycle import FROM
from gradsurg.linalg.combine import combine
from gradsurg.linalg.gramian import gramian
from gradsurg.linalg.packing import GradientTable

ALLOWED = {"transformer": 1.08, "mlp": 1.5}
SURGERY_ALLOWED = 3.0


def seconds(run: Step) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(titles)} |", f"| --- |{' --: |' * (len(titles) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def steps(name: str, tasks: Sequence[int], rounds: int) -> str:
    """Return a table of whole steps of a workload per number of tasks."""
    texts, workload = [], WORKLOADS[name]
    for m in tasks:
        contenders = {title: build(title, workload(m)) for title in CONTENDERS}
        times: dict[str, list[float]] = {title: [] for title in contenders}
        for turn in range(rounds + 1):
            for title, step in contenders.items():
                once = seconds(step)
                if turn:  # the first warms up
                    times[title].append(once)
        least = {title: min(spent) for title, spent in times.items()}
        rows = []
        for title, spent in times.items():
            ratios = [a / b for a, b in zip(spent, times[PLAIN], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            share, spread = f"{least[title] / least[PLAIN]:.2f}", f"{middle:.2f}, {low:.2f} to {high:.2f}"
            rows.append([title, f"{1e3 * least[title]:.2f}", share, spread])
        fastest = min(PEERS, key=least.__getitem__)
        verdicts = [
            f"{ours}: {least[ours] / least[PLAIN]:.2f} × plain (allowed {ALLOWED[name]}), the fastest peer "
            f"({fastest}) takes {least[fastest] / least[ours]:.2f} × as long"
            for ours in OURS
        ]
        verdicts.append(
            f"{ALONE}: {least[ALONE] / least[PLAIN]:.2f} × plain, the fastest peer takes "
            f"{least[fastest] / least[ALONE]:.2f} × as long"
        )
        heading = f"{name}, m = {m}: zero_grad, forward, backward, surgery and SGD's step, {rounds} rounds"
        titles = ["", "ms, least", "× m plain backward passes, least", "median and quartiles of the rounds"]
        texts.append("\n\n".join([heading, table(titles, rows), *verdicts]))
        print(texts[-1], flush=True)
    return "\n\n".join(texts)


def surgery_times(m: int, numbers: int, tensors: int, rounds: int) -> tuple[float, float]:
    """Return seconds of the Gramian and the combination together, and of reading the rows twice and writing u once.

    As in training, u is written to the memory of the last one where gradients/recycle.py keeps that; so is the copy.
    """
    shapes = [numbers // tensors] * tensors
    rows = GradientTable([torch.randn(size) for size in shapes] for _ in range(m))
    like, weights = [torch.zeros(size) for size in shapes], [1.0 / (i + 1) for i in range(m)]
    target = like
    kept = [u if u.numel() >= FROM else None for u in target]

    def compute_direction() -> None:
        table = GradientTable(rows)  # packed anew, as in every step
        gramian(table)
        combine(table, weights, like, into=kept)

    def copy() -> None:
        torch._foreach_copy_(target, [g for g in rows[0] if g is not None])

    compute_direction()
    copy()
    ours = min(seconds(compute_direction) for _ in range(rounds))
    copied = min(seconds(copy) for _ in range(rounds))
    return ours, copied / 2 * (2 * m + 1)  # a copy reads once and writes once


def surgery(rounds: int) -> str:
    """Return a table of the surgery alone on large models."""
    rows = []
    for numbers in (5_000_000, 100_000_000):
        for m in (2, 4, 8):
            ours, bound = surgery_times(m, numbers, 50, rounds)
            rows.append([f"{numbers / 1e6:.0f} M, m = {m}", f"{1e3 * ours:.0f}", f"{ours / bound:.2f}"])
    titles = ["", "surgery, ms", f"× reading rows twice, writing u (allowed {SURGERY_ALLOWED:.0f})"]
    text = f"Surgery alone, 50 tensors\n\n{table(titles, rows)}"
    print(text, flush=True)
    return text


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Return the least-squares slope of log y over log x."""
    x, y = ([math.log(point[k]) for point in points] for k in (0, 1))
    return statistics.linear_regression(x, y).slope


def growth(rounds: int) -> str:
    """Return the surgery's cost over m, over numbers and over tensors, with slopes."""
    curves: dict[str, tuple[list[int], Callable[[int], float]]] = {
        "m, at 1 M numbers in 20 tensors": (
            [1, 2, 4, 8, 16, 32, 64],
            lambda m: surgery_times(m, 1_000_000, 20, rounds)[0],
        ),
        "numbers, at m = 4 in 20 tensors": (
            [100_000, 1_000_000, 10_000_000, 100_000_000],
            lambda numbers: surgery_times(4, numbers, 20, rounds)[0],
        ),
        "tensors, at m = 4 and 1 M numbers": (
            [1, 10, 100, 1000, 10_000],
            lambda tensors: surgery_times(4, 1_000_000, tensors, rounds)[0],
        ),
    }
    texts = []
    for title, (values, measure) in curves.items():
        points = [(float(value), measure(value)) for value in values]
        rows = [[f"{value:.0f}", f"{1e3 * spent:.2f}"] for value, spent in points]
        texts.append(f"Over {title}: slope {slope(points):.2f}\n\n{table(['', 'ms'], rows)}")
        print(texts[-1], flush=True)
    return "\n\n".join(texts)


def peak(contender: str, m: int) -> int | None:
    """Return the peak resident bytes of a process that does three steps of a contender; None where it fails."""
    code = (
        "import torch; torch.set_num_threads(1); from benchmarks.record import peak_bytes;"
        "from benchmarks.contenders import build; from benchmarks.workloads import transformer;"
        f"step = build({contender!r}, transformer({m}, width=512, layers=10, sequences=1, length=16));"
        "[step() for _ in range(3)]; print(peak_bytes())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        print(f"{contender}, m = {m}: {done.stderr.strip().splitlines()[-1]}")
        return None
    return int(done.stdout.split()[-1])


def memory() -> str:
    """Return a table of peak memory above that of the plain step, in copies of the parameters (32 M, float32)."""
    from benchmarks.workloads import transformer

    model = transformer(4, width=512, layers=10, sequences=1, length=16).model
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    rows = []
    for m in (2, 4):
        base = peak(PLAIN, m) or 0
        # At this size autogram takes longer than all the others together.
        titles = [title for title in [*OURS, *NARROW, *PEERS] if title != "TorchJD, autogram"]
        for title, bytes_used in [(title, peak(title, m)) for title in titles]:
            above = "fails" if bytes_used is None else f"{(bytes_used - base) / size:.2f}"
            rows.append([f"m = {m}, {title}", above])
    text = f"Peak memory above m plain backward passes, P = {size / 4e6:.0f} M\n\n{table(['', 'P'], rows)}"
    print(text, flush=True)
    return text


def main() -> None:
    """Measure the parts that were asked for and append them to today's file."""
    parts: dict[str, Callable[[int], str]] = {
        "surgery": surgery,
        "mlp": lambda rounds: steps("mlp", (2, 4, 8), 60 * rounds),
        "transformer": lambda rounds: steps("transformer", (2, 4, 8), rounds),
        "memory": lambda _: memory(),
        "growth": growth,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[[], *parts], default=[])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{conditions()}, 1 thread\n")
    if not options.parts:
        result_file("cpu").unlink(missing_ok=True)
    for part in options.parts or parts:
        text = parts[part](options.rounds)
        record("cpu", f"1 thread, processor time. {text}")
    print(f"peak of this process: {peak_bytes() >> 20} MB")


if __name__ == "__main__":
    main()
