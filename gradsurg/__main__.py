"""`python -m gradsurg`: the demo on overlaid digits; or `python -m gradsurg report`, the page of a history."""

from __future__ import annotations

import argparse
import importlib.util
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from gradsurg import __version__
from gradsurg.demo.digits import BATCH, OPTIMIZERS, PRIORS, TASKS, Data, Job, compare, conflicts, train
from gradsurg.demo.table import plot, table
from gradsurg.monitor.page import main as report
from gradsurg.normalize import NORMALIZERS, Normalizer, PriorLoss
from gradsurg.surgery import SURGERIES
from gradsurg.surgery.pipeline import GUARANTEES

__all__ = ["main"]

NEEDED = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "tqdm": "tqdm"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo, or `report`; return the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] == "report":
        return report(arguments[1:], f"gradsurg {__version__}")
    parser = _parser()
    options = parser.parse_args(arguments)
    if len(set(options.tasks)) < len(options.tasks):
        parser.error(f"argument --tasks: a task is named twice in {' '.join(options.tasks)}")
    missing = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        parser.exit(1, f'The demo needs {" and ".join(missing)}: pip install "gradsurg[demo]"\n')

    began = time.perf_counter()
    normalize: str | Normalizer = options.normalize
    if normalize == PriorLoss.name:
        normalize = PriorLoss({task: PRIORS[task] for task in options.tasks})
    job = Job(
        tasks=tuple(options.tasks),
        optimizer=options.optimizer,
        options={"surgery": options.surgery, "normalize": normalize, "guarantee": options.guarantee},
        epochs=options.epochs,
    )
    # One step finds options that don't fit each other or the tasks.
    try:
        train(replace(job, epochs=1), Data.digits(BATCH, BATCH), wrapped=True)
    except ValueError as error:
        parser.error(str(error))
    seeds = range(options.seed, options.seed + options.runs)
    runs = compare(job, Data.digits(), seeds)
    title = (
        f"{options.optimizer} on overlaid digits: plain sum against gradsurg "
        f"({options.normalize} · {options.surgery} · {options.guarantee})"
    )
    plot(runs, options.output, title)

    print(f"\n{title}\n\n{table(runs)}\n")
    for name, each in runs.items():
        hurt = sum(int(conflicts(run.update).sum()) for run in each)
        steps = sum(len(run.update) for run in each)
        print(f"{name}: {hurt} of {steps} updates raised some task's loss to first order")
    print(
        f"seeds {', '.join(map(str, seeds))}; {options.epochs} epochs; "
        f"gradsurg {__version__}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{platform.system()} {platform.machine()}, {time.strftime('%Y-%m-%d')}; "
        f"{time.perf_counter() - began:.0f} s in all\npicture: {options.output}"
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m gradsurg",
        description="Train one model on several tasks of overlaid digits: on the plain sum of the losses, "
        "and with gradsurg, from the same parameters, on the same batches. Print a table and write a picture. "
        "With `report HISTORY.jsonl`: make a page of what a gradsurg.History recorded; see `report --help`.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--version", action="version", version=f"gradsurg {__version__}, torch {torch.__version__}")
    some = f"some of: {', '.join(TASKS)}"
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK", help=some)
    add("--optimizer", choices=OPTIMIZERS, default="adam", help="the optimizer, plain and wrapped")
    add("--surgery", choices=SURGERIES, default="cone", help="how the tasks' gradients are combined")
    add("--normalize", choices=NORMALIZERS, default="norm", help="how they are scaled before that")
    add("--guarantee", choices=GUARANTEES, default="update", help="what must hurt no task")
    add("--epochs", type=_integer(1, 10_000), default=Job.epochs, help="passes over the 6144 training pairs")
    add("--seed", type=_integer(0, 2**32), default=0, help="first seed, of the parameters and the batches")
    add("--runs", type=_integer(1, 100), default=3, help="number of seeds, for the ± in the table")
    add("--output", type=_png, default="gradsurg-demo.png", metavar="FILE.png", help="where the picture goes")
    return parser


def _integer(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
        return value

    return parse


def _png(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .png")
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {str(path.parent)!r} to write {path.name!r} to")
    return path


if __name__ == "__main__":
    raise SystemExit(main())
