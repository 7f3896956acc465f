"""The clock of benchmarks.gpu: times, launches and memory of a call on one device, and the rows that it keeps."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_report import number

__all__ = ["Bench", "count_launches"]

# Clocks of the fastest devices in a second; a slower one is kept busy for longer than it need be.
CLOCKS = 2e9


class Bench:
    """Times things on one device; on a rehearsal, only runs them.

    `write` is called with all results after each of them, so that a run that is killed loses nothing.
    """

    def __init__(
        self,
        rehearse: bool,
        minutes: float = math.inf,
        write: Callable[[list[dict[str, Any]]], object] = lambda results: None,
    ) -> None:
        self.rehearse, self.write = rehearse, write
        self.device = torch.device("cpu" if rehearse else "cuda")
        self.until = time.monotonic() + 60 * minutes
        self.results: list[dict[str, Any]] = []
        self.copy_bandwidth = float("nan")
        # Twice the largest second-level cache there is: what is timed starts with nothing of its own in it.
        self.flush = torch.empty(1 if rehearse else 256 << 20, dtype=torch.int8, device=self.device)

    def time(self, run: Callable[[], object], repeats: int = 20, ahead: bool = False) -> dict[str, float]:
        """Return median, 20th and 80th percentile of the device's time, and the host's, in seconds.

        `ahead` keeps the device busy beforehand, twice as long as the host takes to launch all of it: else what takes
        the device less than it takes the host to launch would be timed by the host.
        """
        run()
        if self.rehearse:
            return dict.fromkeys(("seconds", "p20", "p80", "host"), float("nan"))
        launching = []
        for _ in range(3):
            torch.cuda.synchronize()
            before = time.perf_counter()
            run()
            launching.append(time.perf_counter() - before)
        wait = int(CLOCKS * (2 * min(launching) + 1e-4))
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        host = []
        for start, end in events:
            self.flush.zero_()
            if ahead:
                torch.cuda._sleep(wait)
            start.record()
            before = time.perf_counter()
            run()
            host.append(time.perf_counter() - before)
            end.record()
        torch.cuda.synchronize()
        times = sorted(start.elapsed_time(end) / 1e3 for start, end in events)
        return {
            "seconds": statistics.median(times),
            "p20": times[len(times) // 5],
            "p80": times[4 * len(times) // 5],
            "host": statistics.median(host),
        }

    def watch(self, run: Callable[[], object], repeats: int = 20, ahead: bool = False) -> dict[str, float]:
        """Return `time`'s numbers, how many kernels and copies one call launches, and the most memory it takes."""
        times = self.time(run, repeats, ahead)
        if self.rehearse:
            return {**times, "launches": float("nan"), "extra_bytes": float("nan")}
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        extra = torch.cuda.max_memory_allocated() - base
        return {**times, "launches": count_launches(run), "extra_bytes": extra}

    def fits(self, size: int) -> bool:
        """Whether so many bytes can be had, with a tenth to spare."""
        if self.rehearse:
            return True
        torch.cuda.empty_cache()  # what torch keeps of earlier tensors counts as taken
        return size * 1.1 < torch.cuda.mem_get_info()[0]

    def late(self, what: str) -> bool:
        """Whether the time is up; says of what is to come then that it is left out."""
        if time.monotonic() < self.until:
            return False
        print(f"the time is up: {what} is left out", flush=True)
        return True

    def keep(self, what: str, **row: Any) -> None:
        self.results.append({"what": what, **row})
        print(f"{what:24}" + "  ".join(f"{key} {number(value)}" for key, value in row.items()), flush=True)
        self.write(self.results)

    def attempt(self, what: str, run: Callable[[], dict[str, Any]], **row: Any) -> None:
        """Keep a row with the numbers that `run` returns, or one that says how it failed."""
        try:
            row |= run()
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
        self.keep(what, **row)

    def rows(self, m: int, parameters: int, dtype: torch.dtype, tensors: int = 1) -> list[list[Tensor]]:
        size = max(1, parameters // tensors)
        return [
            [torch.randn(size, device=self.device, dtype=dtype) for _ in range(tensors)]
            for _ in range(m)
        ]  # fmt: skip


def count_launches(run: Callable[[], object]) -> int:
    """Return how many kernels and copies one call puts on the device."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        run()
        torch.cuda.synchronize()
    return sum(event.count for event in recorded.key_averages() if event.device_type.name == "CUDA")
