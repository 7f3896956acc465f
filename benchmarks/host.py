"""What the CUDA path costs the host, without a card: `python -m benchmarks.host`.

Triton's launches do nothing here, and every tensor is on the CPU, so the numbers that a step computes mean nothing.
What it costs the host to prepare and launch the work does: processor time of one thread, least of the steps. On a
card each launch adds a few microseconds of the driver's, so they are counted as well: our kernels, and torch's
operations beyond those of separate backward passes, views left out. Models: the perceptron of benchmarks.cpu, and 24
layers of a transformer, narrow, so that passes take as little as they can; AdamW, fused, as on a card.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import gradsurg
import gradsurg.optimizer.direction
from benchmarks.cpu import table
from benchmarks.gpu_training import Transformer
from benchmarks.record import record
from benchmarks.workloads import Residual

TASKS = 4


class Counter(TorchDispatchMode):
    """Counts operations that would launch something."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view and func.overloadpacket.__name__ not in ("empty", "empty_like", "detach")
        return func(*args, **(kwargs or {}))


@contextmanager
def launching_nothing() -> Iterator[list[str]]:
    """Let steps take the kernels' path on the CPU; yields the names of the kernels that they launch."""
    from triton.runtime.jit import JITFunction

    launched: list[str] = []

    def launcher(self: Any, grid: object) -> Callable[..., None]:
        return lambda *arguments, **options: launched.append(self.__name__)

    with (
        mock.patch.object(JITFunction, "__getitem__", launcher),
        mock.patch.object(gradsurg.optimizer.direction, "_path", return_value="triton"),
    ):
        yield launched


def models() -> Iterator[tuple[str, nn.Module, Tensor, int]]:
    """Yield each body, its input, and how wide its features are."""
    yield "perceptron, 0.1 M", nn.Sequential(*(Residual(91) for _ in range(12))), torch.randn(32, 91), 91
    yield "transformer, 24 layers", Transformer(24, 16, 64), torch.randint(64, (2, 4)), 16


def contenders(body: nn.Module, x: Tensor, width: int) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield steps with separate backward passes, and ours with each guarantee."""
    model = nn.ModuleList([body, *(nn.Linear(width, 10) for _ in range(TASKS))])

    def losses() -> dict[str, Tensor]:
        h = body(x)
        return {f"task {k}": head(h).square().mean() for k, head in enumerate(list(model)[1:])}

    # Garbage would make parameters grow without end.
    plain = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

    def separate() -> None:
        plain.zero_grad()
        for loss in (tasks := [*losses().values()]):
            loss.backward(retain_graph=loss is not tasks[-1])
        plain.step()

    yield "separate backward passes", separate
    for guarantee in ("gradient", "update"):
        inner = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
        optimizer = gradsurg.wrap(inner, guarantee=guarantee)

        def ours(optimizer: gradsurg.MultiTaskOptimizer = optimizer) -> None:
            optimizer.zero_grad()
            optimizer.total(losses()).backward()
            optimizer.step()

        yield f"gradsurg, guarantee {guarantee}", ours


def least(runs: Sequence[Callable[[], None]], steps: int) -> list[float]:
    """Return the least time of each; they take turns."""
    times = [math.inf] * len(runs)
    for turn in range(steps + 3):
        for k, run in enumerate(runs):
            began = time.thread_time()
            run()
            if turn >= 3:  # the first ones fill caches
                times[k] = min(times[k], time.thread_time() - began)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rows = []
    with launching_nothing() as launched:
        for name, body, x, width in models():
            titles, runs = zip(*contenders(body, x, width), strict=True)
            times, usual = least(runs, steps), 0
            for title, run, seconds in zip(titles, runs, times, strict=True):
                launched.clear()
                with Counter() as counter:
                    run()
                usual = usual or counter.count
                beyond = f"{len(launched)} + {counter.count - usual}" if launched else "-"
                rows.append((name, title, f"{1e3 * seconds:.1f}", f"{seconds / times[0]:.2f}", beyond))
    text = table(("model, m = 4", "step", "ms", "times the passes", "kernels of ours + operations beyond them"), rows)
    print(text)
    print(f"written: {record('host', text)}")


if __name__ == "__main__":
    main()
