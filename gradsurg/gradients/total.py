"""The node behind total(losses), and the end of the backward pass that runs it. For optimizer/."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gradsurg.gradients.compile import in_compiled_autograd, outside_compilation

__all__ = ["Total", "at_end_of_backward", "pass_in_progress"]


class Total(torch.autograd.Function):
    """The node behind total(losses): its backward runs the tasks' own backward passes, one after the other."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, run: Callable[[Tensor], None], value: Tensor) -> Tensor:  # noqa: D102
        ctx.run = run
        # Else a total without a gradient would get zeros, and run its tasks.
        ctx.set_materialize_grads(False)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[None, None, None]:  # noqa: D102
        if gradient is not None:
            ctx.run(gradient)
        return None, None, None


class _AtEnd:
    """A callback that notices if it is never run: autograd lets go of the callbacks of a backward pass that died."""

    # For __del__, if Ctrl-C comes before __init__ is done.
    abandoned: Callable[[], None] | None = None

    def __init__(self, callback: Callable[[], None], abandoned: Callable[[], None]) -> None:
        self.callback = callback
        self.abandoned = abandoned

    def __call__(self) -> None:
        self.abandoned = None
        self.callback()

    def __del__(self) -> None:
        if self.abandoned is not None:
            self.abandoned()


# outside_compilation() keeps every function that it was given for good; so it is given this one, and no closure.
def _call(callback: Callable[[], None]) -> None:
    callback()


def at_end_of_backward(callback: Callable[[], None], abandoned: Callable[[], None]) -> None:
    """Run `callback` when the backward pass in progress is complete, or now if torch cannot tell when that is.

    If that backward pass dies first, `abandoned` is run instead.
    """
    # Private, but DDP and FSDP2 are built on it. Compiled autograd never runs what is queued from outside its graph.
    queue = getattr(torch.autograd.Variable._execution_engine, "queue_callback", None)
    if queue is None or in_compiled_autograd():
        callback()
    else:
        queue(_AtEnd(functools.partial(outside_compilation(_call), callback), abandoned))


def pass_in_progress() -> int:
    """Return a number for the backward pass that is running on this thread; -1 if there is none, or torch is older."""
    # Private, and there since torch 2.1.
    probe = getattr(torch._C, "_current_graph_task_id", None)
    return -1 if probe is None else int(probe())
