"""How far a correction moves single numbers if learning rates differ by layer: `python -m benchmarks.jumps`.

An MLP of 7 layers of width 16 with three tasks, learning rates that fall by 0.3 a layer towards the input, and the
default surgery. Three projections of the update: the plain one, for which all numbers are alike, the one in the metric
of the learning rates, and the same with the limit of two plain steps, which is the library's. Each trains on its own.
In each step the largest movement of a number is divided by the largest plain step of its group, which is what the
optimizer did before the projection.

The second table is what the look at numbers that the optimizer left in place costs (linalg.moved.left_in_place), in
steps that are corrected; with and without it, steps take turns in one process.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.optim import Optimizer

import gradsurg
import gradsurg.guarantee.metric
import gradsurg.guarantee.update
from benchmarks.contenders import Step
from benchmarks.cpu import seconds, table
from benchmarks.record import conditions, record
from benchmarks.workloads import Workload, mlp
from gradsurg.guarantee.constraint import UpdateConstraint
from gradsurg.guarantee.copies import ParameterCopies

WIDTH, DEPTH, DECAY, SEEDS, STEPS = 16, 6, 0.3, 20, 100
OPTIMIZERS: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "SGD, momentum 0.9": (torch.optim.SGD, {"momentum": 0.9}),
    "Adam": (torch.optim.Adam, {}),
}
PROJECTIONS = ["plain", "in the metric", "in the metric, limited"]


@contextmanager
def projecting(how: str) -> Iterator[None]:
    """Project updates in this way inside the block."""
    with ExitStack() as stack:
        if how == "plain":
            alike = lambda _, optimizer, mine: ([1.0] * len(mine), [None] * len(mine))  # noqa: E731
            stack.enter_context(mock.patch.object(UpdateConstraint, "_meant", alike))
        elif how == "in the metric":
            stack.enter_context(mock.patch.object(gradsurg.guarantee.metric, "LARGEST", math.inf))
        yield


def shares_of(name: str, seed: int) -> list[float]:
    """Train, and return for each corrected step the largest movement of a number, in plain steps of its group."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        *itertools.chain(*((nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(DEPTH))), nn.Linear(WIDTH, 3)
    )
    linears = [module for module in net if isinstance(module, nn.Linear)]
    make, options = OPTIMIZERS[name]
    groups = [{"params": [*layer.parameters()], "lr": 1e-2 * DECAY ** (DEPTH - k)} for k, layer in enumerate(linears)]
    optimizer = gradsurg.wrap(make(groups, **options))
    x, y = torch.randn(128, WIDTH), torch.randn(128, 3) * torch.tensor([1.0, -1.0, 1.0])
    shares: list[float] = []

    def watched(constraint: UpdateConstraint, inner: Optimizer, before: ParameterCopies) -> Any:
        steps = largest_steps(inner, before)
        movement = enforce(constraint, inner, before)
        if movement is not None and movement.corrected:
            pairs = zip(largest_steps(inner, before), steps, strict=True)
            shares.append(max((now / plain for now, plain in pairs if plain > 0), default=0.0))
        return movement

    enforce = UpdateConstraint.enforce
    with mock.patch.object(UpdateConstraint, "enforce", watched):
        for _ in range(STEPS):
            batch = torch.randint(0, 128, (32,))
            out = net(x[batch])
            a, b, c = (out - y[batch]).square().mean(0)
            optimizer.zero_grad()
            optimizer.total({"a": a, "b": b + 0.5 * out[:, 0].sum(), "c": c}).backward()
            optimizer.step()
    return shares


def largest_steps(optimizer: Optimizer, before: ParameterCopies) -> list[float]:
    """Return the largest movement of a number since `before`, per group."""
    return [
        max(float((p.detach() - before[p]).abs().max()) for p in group["params"]) for group in optimizer.param_groups
    ]


def jumps() -> str:
    """Return the table of jumps."""
    rows = []
    for name, how in itertools.product(OPTIMIZERS, PROJECTIONS):
        with projecting(how):
            found = [shares_of(name, seed) for seed in range(SEEDS)]
        every = sorted(itertools.chain(*found))
        middle = sorted(map(max, found))[SEEDS // 2]
        numbers = [every[len(every) // 2], middle, every[-1]]
        rows.append([name, how, f"{len(every) / (SEEDS * STEPS):.0%}", *(f"{x:.3g}" for x in numbers)])
        print(rows[-1], flush=True)
    titles = ["", "projection", "steps corrected", "median step", "largest of a run, median", "largest of all"]
    return (
        f"{SEEDS} seeds, {STEPS} steps each, rates falling by {DECAY} over {DEPTH + 1} layers. Largest movement of a "
        f"number in a corrected step, in plain steps of its group.\n\n{table(titles, rows)}"
    )


def opposed(work: Workload) -> Step:
    """Return a step of SGD in which the last task works against the first one, so that the update is corrected."""
    optimizer = gradsurg.wrap(torch.optim.SGD(work.model.parameters(), lr=1e-4), surgery="sum", normalize="none")

    def step() -> None:
        optimizer.zero_grad()
        losses = work.losses()
        optimizer.total([*losses[:-1], losses[-1] - 3 * losses[0]]).backward()
        optimizer.step()
        movement = None if optimizer.report is None else optimizer.report.movement
        assert movement is not None
        assert movement.corrected

    return step


def nothing(before: Sequence[Any], *_: Any) -> list[None]:
    return [None] * len(before)


def looks(rounds: int) -> str:
    """Return the table of what the look costs."""
    rows = []
    sizes: dict[str, Callable[[], Workload]] = {
        "perceptron, 0.1 M in 40 tensors, m = 2": lambda: mlp(2),
        "perceptron, 0.1 M in 40 tensors, m = 8": lambda: mlp(8),
        "few large tensors, 20 M in 8, m = 2": lambda: mlp(2, parameters=20_000_000, tensors=8),
    }
    for name, build in sizes.items():
        step, on, off = opposed(build()), [], []
        count = rounds if "large" not in name else max(rounds // 20, 3)
        for turn in range(count + 2):
            times = {}
            for with_it in (True, False) if turn % 2 else (False, True):
                with ExitStack() as stack:
                    if not with_it:
                        place = mock.patch.object(gradsurg.guarantee.update, "left_in_place", nothing)
                        stack.enter_context(place)
                    times[with_it] = seconds(step)
            if turn >= 2:
                on.append(times[True])
                off.append(times[False])
        rows.append([name, f"{1e3 * min(on):.2f}", f"{1e3 * min(off):.2f}", f"{1 - min(off) / min(on):.1%}"])
        print(rows[-1], flush=True)
    titles = ["", "ms a corrected step, least", "without the look", "share of the step"]
    return f"1 thread, processor time.\n\n{table(titles, rows)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100, help="of the second table")
    parser.add_argument("--dry", action="store_true", help="keep no result file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{conditions()}, 1 thread\n")
    text = f"{jumps()}\n\n{looks(options.rounds)}"
    print(f"\n{text}\n")
    if not options.dry:
        record("jumps", text)


if __name__ == "__main__":
    main()
