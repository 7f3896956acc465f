"""Where a step goes: how many files of the library it enters, and how often: `python -m benchmarks.flow`.

A reader who follows one step with a finger needs to change the file at every stay. Counted is a warm default step with
three tasks on a small network, zero_grad, total, backward and step, in the order in which functions are called: a stay
is a maximal run of calls of functions of one file, without what torch and Python do in between. A default step should
enter no file of an option that is off.

With `stays` as an argument the stays are listed in order, with `torchjd` the peer is counted, too.

Another version of the library is counted with its folder in PYTHONPATH: `PYTHONPATH=FOLDER python benchmarks/flow.py`.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from types import CodeType, FrameType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import gradsurg

__all__ = ["OPTIONS", "Flow", "calls_before_backward", "default_step", "flow", "off"]

TASKS = ("a", "b", "c")
WARM = 2  # steps that are done before one is counted

# Files that only an option needs, and the options; of the files that two patterns match, the first one counts.
OPTIONS = {
    "distributed/layout.py": "",  # what one process has, too
    "distributed/*": "several ranks",
    "optimizer/cheap/batched.py": "batched",
    "optimizer/cheap/features.py": "features",
    "optimizer/cheap/*": "refresh_every",
    "optimizer/schedule.py": "batched, refresh_every, rotate",
    "*_cuda.py": "backend='triton'",
    "linalg/kernels/*": "backend='triton'",
    "linalg/elementwise.py": "surgery='graddrop' and the like",
    "linalg/sparse.py": "sparse gradients",
    "gradients/dtensor.py": "several ranks",
    "surgery/methods/cone.py": "",
    "surgery/methods/*": "surgery",
    "surgery/priority.py": "primary",
    "surgery/margin.py": "margin",
    "surgery/blockwise.py": "granularity",
    "normalize/__init__.py": "",
    "normalize/base.py": "",
    "normalize/norm.py": "",
    "normalize/*": "normalize",
    "monitor/*": "loggers",
}


@dataclass(frozen=True)
class Flow:
    """The functions of a package that a step called, in order.

    Attributes:
        calls: One pair (file below the package's folder, function) per call.
    """

    calls: list[tuple[str, str]]

    @property
    def stays(self) -> Counter[str]:
        """File -> how often a function of it was called after one of another file, in the order of first entry."""
        return Counter(file for file, _ in itertools.groupby(file for file, _ in self.calls))

    @property
    def files(self) -> list[str]:
        """The files entered, in the order of first entry."""
        return list(self.stays)


def flow(step: Callable[[], None], package: ModuleType = gradsurg) -> Flow:
    """Return which functions of a package a call calls; on the CPU autograd runs backward passes on its own thread."""
    here: dict[CodeType, str | None] = {}
    calls: list[tuple[str, str]] = []

    def watch(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            code = frame.f_code
            if code not in here:
                here[code] = _inside(code, package)
            file = here[code]
            if file is not None:
                calls.append((file, code.co_name))

    sys.setprofile(watch)
    try:
        step()
    finally:
        sys.setprofile(None)
    return Flow(calls)


def calls_before_backward(step: Callable[[], None]) -> list[str]:
    """Return the functions of ours that are on the stack when they have autograd run its first backward pass."""
    found: list[str] = []

    def watch(frame: FrameType, event: str, _: Any) -> None:
        if event != "call" or found or frame.f_code.co_name != "_engine_run_backward":
            return
        # The user's own backward() has none of ours below it.
        stack: FrameType | None = frame
        while stack is not None:
            file = _inside(stack.f_code, gradsurg)
            if file is not None:
                found.insert(0, f"{file}: {stack.f_code.co_name}")
            stack = stack.f_back

    sys.setprofile(watch)
    try:
        step()
    finally:
        sys.setprofile(None)
    return found


def off(file: str) -> str:
    """Return the option that a file belongs to, and that a default step leaves off; "" if there is none."""
    return next((option for pattern, option in OPTIONS.items() if fnmatch(file, pattern)), "")


def _inside(code: CodeType, package: ModuleType) -> str | None:
    folder = Path(str(package.__file__)).parent
    path = Path(code.co_filename)
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else None


Step = Callable[[Tensor, list[Tensor]], None]


class _Network:
    """A trunk and one head per task, so small that a step is all bookkeeping."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
        self.heads = nn.ModuleList(nn.Linear(4, 2) for _ in TASKS)
        self.optimizer: Any = torch.optim.SGD([*self.trunk.parameters(), *self.heads.parameters()], lr=1e-3)

    def forward(self) -> tuple[Tensor, list[Tensor]]:
        """Return the features and the losses of a new batch."""
        features = self.trunk(torch.randn(12, 6))
        return features, [(head(features) - torch.randn(12, 2)).square().mean() for head in self.heads]

    def warm(self, step: Step) -> Callable[[], None]:
        """Do some steps, and return the next one, whose forward pass is done."""
        for _ in range(WARM):
            step(*self.forward())
        return functools.partial(step, *self.forward())


def default_step(*, by_total: bool = True) -> tuple[Callable[[], None], Any]:
    """Return a warm step with the default options, and the wrapped optimizer.

    Args:
        by_total: Whether the losses go through total(losses).backward() instead of backward(losses).
    """
    net = _Network()
    optimizer = gradsurg.wrap(net.optimizer)

    def step(_: Tensor, losses: list[Tensor]) -> None:
        optimizer.zero_grad()
        given = dict(zip(TASKS, losses, strict=True))
        if by_total:
            optimizer.total(given).backward()
        else:
            optimizer.backward(given)
        optimizer.step()

    return net.warm(step), optimizer


def peer_step() -> tuple[Callable[[], None], ModuleType]:
    """Return a warm step of TorchJD on the same network, with the surgery that is our default, and its package."""
    import torchjd
    from torchjd.aggregation import DualProj
    from torchjd.autojac import jac_to_grad, mtl_backward

    net, aggregator = _Network(), DualProj()
    shared = list(net.trunk.parameters())

    def step(features: Tensor, losses: list[Tensor]) -> None:
        net.optimizer.zero_grad()
        mtl_backward(losses, features)
        jac_to_grad(shared, aggregator)
        net.optimizer.step()

    return net.warm(step), torchjd


def describe(counted: Flow) -> str:
    """Return the files that a step entered, with the stays in each and the option that it belongs to."""
    lines = [
        f"{count:6}  {file}{f'  <- {off(file)} is off' if off(file) else ''}" for file, count in counted.stays.items()
    ]
    return "\n".join([" stays  file", *lines])


def told(counted: Flow) -> str:
    """Return the stays in order, each with the functions called in it."""
    stays = itertools.groupby(counted.calls, key=lambda call: call[0])
    return "\n".join(f"{file}: {', '.join(name for _, name in calls)}" for file, calls in stays)


def total_of(counted: Flow) -> str:
    return f"{len(counted.files)} files, {counted.stays.total()} stays, {len(counted.calls)} calls"


def main(arguments: Sequence[str]) -> None:
    torch.set_num_threads(1)
    step, optimizer = default_step()
    counted = flow(step)
    assert bool((optimizer.report.gramian < 0).any()), "the tasks of the step that is counted must be in conflict"
    if "stays" in arguments:
        print(f"{told(counted)}\n")
    print(describe(counted))
    unused = {file: count for file, count in counted.stays.items() if off(file)}
    print(f"\na default step with {len(TASKS)} tasks: {total_of(counted)}")
    print(f"of them in files of options that are off: {len(unused)} files, {sum(unused.values())} stays")
    for by_total in (True, False):
        stack = calls_before_backward(default_step(by_total=by_total)[0])
        what = "total(losses).backward()" if by_total else "backward(losses)"
        print(f"\n{what}: {len(stack)} calls of ours on the stack at the first backward pass")
        print("\n".join(f"  {'  ' * depth}{call}" for depth, call in enumerate(stack)))
    if "torchjd" in arguments:
        peer, package = peer_step()
        print(f"\nTorchJD {getattr(package, '__version__', '')}: {total_of(flow(peer, package))}")


if __name__ == "__main__":
    main(sys.argv[1:])
