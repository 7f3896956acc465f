"""How often the update conflicts with a task, with and without the library, under six optimizers.

The main job of gradsurg.demo.digits, with a learning rate schedule and with clip_grad_norm_ between backward and step.
A step conflicts where cos(d, g_i) < -1e-4 for any task: d is what the shared parameters did, g_i comes from
torch.autograd.grad before the step. Exits with 1 where more than 0.1 % of the steps with the library do.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.record import conditions, record
from gradsurg.demo.digits import OPTIMIZERS, TASKS, Data, Job, Run, compare, conflicts

CLIP = 1.0
TITLES = {
    "momentum": "SGD, momentum 0.9",
    "adam": "Adam",
    "adamw": "AdamW, decay 0.1",
    "rmsprop": "RMSprop",
    "adagrad": "Adagrad",
    "nadam": "NAdam",
}


def warm_up_and_cosine(steps: int) -> Callable[[Optimizer], LambdaLR]:
    """Return a builder of a schedule: a tenth of the steps up, the rest down to zero."""

    def factor(step: int) -> float:
        return min((step + 1) / (0.1 * steps), 0.5 + 0.5 * math.cos(math.pi * step / steps))

    return lambda optimizer: LambdaLR(optimizer, factor)


def measure(name: str, data: Data, epochs: int, seeds: list[int]) -> dict[str, list[Run]]:
    schedule = warm_up_and_cosine(epochs * data.train.count)
    return compare(Job(optimizer=name, epochs=epochs, clip=CLIP, schedule=schedule), data, seeds)


def share(runs: list[Run]) -> float:
    """Return how many of 100 steps conflict with some task."""
    return 100 * torch.cat([conflicts(run.update) for run in runs]).double().mean().item()


def score(runs: list[Run], *tasks: str) -> float:
    values = [run.scores[task] for run in runs for task in tasks]
    return sum(values) / len(values)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizer", nargs="+", choices=OPTIMIZERS, default=list(TITLES))
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()

    data, seeds = Data.digits(), list(range(options.seeds))
    lines = [
        f"Conflicts of the update per 100 steps; {', '.join(TASKS)}; {options.epochs} epochs of {data.train.count} "
        f"steps; seeds {seeds}; warm-up and cosine schedule; gradients clipped to norm {CLIP:g}",
        "",
        "| optimizer | plain sum | gradsurg | worst cos, plain | worst cos, gradsurg | digits %, plain | digits %, "
        "gradsurg | pixels R² %, plain | pixels R² %, gradsurg |",
        "| --- | --: | --: | --: | --: | --: | --: | --: | --: |",
    ]
    kept = True
    for name in options.optimizer:
        plain, ours = measure(name, data, options.epochs, seeds).values()
        kept &= share(ours) <= 0.1
        cells = [
            TITLES.get(name, name),
            *(f"{share(runs):.2f}" for runs in (plain, ours)),
            *(f"{min(run.update.min().item() for run in runs):.1g}" for runs in (plain, ours)),
            *(f"{score(runs, 'left', 'right'):.1f}" for runs in (plain, ours)),
            *(f"{score(runs, 'pixels'):.1f}" for runs in (plain, ours)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
        print("\n".join(["", *lines]), flush=True)
    print(f"\n{conditions()}\n{record('conflicts', chr(10).join(lines))}")
    return 0 if kept else 1


if __name__ == "__main__":
    raise SystemExit(main())
