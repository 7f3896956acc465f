"""Worker processes that stay: one pool per number of ranks and test session, because importing torch takes seconds.

A job is a module-level function of a tests/distributed/jobs_*.py; every rank calls it with the same arguments in one
gloo process group on loopback, and returns something picklable. A pool in which a job failed or ran out of time is
ended, and the next test starts another.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

TIMEOUT = 60.0  # seconds a job may take: one takes 0.1 to 3 s; waiting longer means that ranks wait for each other
GROUP_TIMEOUT = 20.0  # seconds after which a collective gives up on a lost rank

FOLDER = Path(__file__).parent


class RankError(AssertionError):
    """What the ranks raised, one traceback a rank; `results` is what the others returned."""

    results: list[Any]


class Pool:
    """`ranks` processes that wait for jobs."""

    def __init__(self, ranks: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(
            ["torch", "torch.distributed.fsdp", "torch.distributed.tensor.parallel", "gradsurg"]
        )
        self.ranks = ranks
        self._folder = tempfile.TemporaryDirectory()
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(ranks):
            here, there = context.Pipe()
            store = str(Path(self._folder.name) / "store")
            process = context.Process(target=_serve, args=(there, rank, ranks, store), daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def run(self, job: Callable[..., Any], *arguments: Any, timeout: float = TIMEOUT) -> list[Any]:
        """Return what every rank's job returned; raises RankError with all tracebacks, and what the others returned."""
        for pipe in self._pipes:
            pipe.send((Path(job.__code__.co_filename).stem, job.__name__, arguments))
        results, failures = [], []
        for rank, pipe in enumerate(self._pipes):
            try:
                if not pipe.poll(timeout):
                    failures.append(f"rank {rank}: no answer within {timeout} s")
                    continue
                ok, value = pipe.recv()
            except (EOFError, ConnectionError):
                failures.append(f"rank {rank}: the process died")
                continue
            (results if ok else failures).append(value if ok else f"rank {rank}:\n{value}")
        if failures:
            self.end()
            error = RankError("\n".join(failures))
            error.results = results
            raise error
        return results

    @property
    def alive(self) -> bool:
        """Whether it can take a job."""
        return bool(self._processes) and all(process.is_alive() for process in self._processes)

    def end(self) -> None:
        """Stop the processes."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []
        self._folder.cleanup()


def _serve(pipe: Connection, rank: int, ranks: int, store: str) -> None:
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "no two tasks touch the same number")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=timedelta(seconds=GROUP_TIMEOUT)
    )
    while True:
        try:
            module, name, arguments = pipe.recv()
        except EOFError:
            return
        torch.manual_seed(0)
        try:
            pipe.send((True, getattr(load(module), name)(*arguments)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


def load(stem: str) -> Any:
    """Import a file of this folder by name, wherever the process was started."""
    spec = importlib.util.spec_from_file_location(stem, FOLDER / f"{stem}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
