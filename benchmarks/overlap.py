"""Over a slow link, rows travel while the next task runs backward: what that saves.

Two gloo processes on one machine. The link is artificial: every reduce-scatter of a row is done when its bytes would
have arrived at the given bandwidth, one after the other, however fast the machine really was. Compared are our step,
the same step that waits for each row before the next task runs, and one whose link takes no time.

Run: python -m benchmarks.overlap [--record]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import gradsurg
from benchmarks.record import conditions, record

TASKS, WIDTH, LAYERS, BATCH, STEPS = 4, 512, 6, 256, 12
MODES = ("overlapped", "one after the other", "no link")


class Net(nn.Module):
    """A trunk of 1.6 M numbers and four small heads."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(LAYERS):
            layers += [nn.Linear(WIDTH, WIDTH), nn.Tanh()]
        self.trunk = nn.Sequential(*layers)
        self.heads = nn.ModuleList(nn.Linear(WIDTH, 1) for _ in range(TASKS))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the task losses."""
        z = self.trunk(x)
        return [(head(z) - i).square().mean() for i, head in enumerate(self.heads)]


class Link:
    """A link that carries one message at a time."""

    def __init__(self, seconds_per_byte: float, waits: bool) -> None:
        self.seconds_per_byte, self.waits, self.free = seconds_per_byte, waits, 0.0

    def slowed(self, send: Callable[..., Any]) -> Callable[..., Any]:
        """Return a collective whose result arrives when the link has carried it."""

        def call(part: Tensor, message: Tensor, **options: Any) -> Any:
            work = send(part, message, **options)
            begin = max(time.perf_counter(), self.free)
            self.free = begin + message.numel() * message.element_size() * self.seconds_per_byte
            arrival = _Arrival(work, self.free)
            if self.waits:
                arrival.wait()
            return arrival

        return call


class _Arrival:
    def __init__(self, work: Any, due: float) -> None:
        self.work, self.due = work, due

    def wait(self) -> None:
        self.work.wait()
        time.sleep(max(self.due - time.perf_counter(), 0.0))


def step(model: nn.Module, optimizer: gradsurg.MultiTaskOptimizer, x: Tensor) -> float:
    """Return the seconds from the end of the forward pass to the end of the step."""
    losses = model(x)
    optimizer.zero_grad()
    dist.barrier()
    begin = time.perf_counter()
    optimizer.total(losses).backward()
    optimizer.step()
    return time.perf_counter() - begin


def measure(rank: int, store: str, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = DistributedDataParallel(Net())
    optimizer = gradsurg.wrap(torch.optim.SGD(model.parameters(), lr=1e-3), guarantee="gradient")
    x = torch.randn(BATCH, WIDTH)
    name = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
    send = getattr(dist, name)
    bare = statistics.median(step(model, optimizer, x) for _ in range(4))
    # A row takes as long as a task's share of the step: with less there is little to hide, with more it cannot be.
    rows = sum(p.numel() for p in model.module.trunk.parameters()) * 4
    pace = torch.tensor(bare / (TASKS + 1) / rows)
    dist.broadcast(pace, 0)
    times: dict[str, list[float]] = {mode: [] for mode in MODES}
    for _ in range(STEPS):
        for mode in MODES:  # in turn, so that a slow moment of the machine meets all of them
            link = Link(0.0 if mode == "no link" else float(pace), waits=mode == "one after the other")
            setattr(dist, name, link.slowed(send))
            times[mode].append(step(model, optimizer, x))
    setattr(dist, name, send)
    if rank == 0:
        results.put((float(pace) * rows, {mode: statistics.median(each) for mode, each in times.items()}))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="append to benchmarks/results")
    arguments = parser.parse_args()
    results = mp.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(measure, (str(Path(folder) / "store"), results), nprocs=2)  # type: ignore[attr-defined, no-untyped-call]
        row, times = results.get()
    lines = [
        f"{TASKS} tasks; the link takes {1e3 * row:.1f} ms a row",
        "",
        "| step | ms | over no link |",
        "|--|--|--|",
    ]
    bare = times["no link"]
    lines += [f"| {mode} | {1e3 * t:.1f} | {1e3 * (t - bare):+.1f} ms |" for mode, t in times.items()]
    hidden = 1 - (times["overlapped"] - bare) / (times["one after the other"] - bare)
    lines += ["", f"Hidden behind backward passes: {hidden:.0%} of the link's time."]
    text = "\n".join(lines)
    print(text if not arguments.record else f"{text}\n\nwritten to {record('overlap', text)}")
    print(conditions())


if __name__ == "__main__":
    main()
