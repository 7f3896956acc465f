"""The node behind total(losses), and the end of the backward pass that runs it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gradsurg.errors import MultiTaskError
from gradsurg.gradients.compile import graph_is_kept, in_compiled_autograd, outside_compilation

__all__ = ["Finish", "Total", "at_end_of_backward", "at_once", "pass_in_progress"]

Finish = Callable[[Callable[[], None], Callable[[], None]], None]  # at_end_of_backward or at_once


class Total(torch.autograd.Function):
    """The node behind total(losses): its backward runs the tasks' own backward passes, one after the other."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, run: Callable[[Tensor, bool], None], value: Tensor) -> Tensor:  # noqa: D102
        ctx.run = run
        ctx.run_tasks = outside_compilation(_run_tasks)  # found here, where torch.compile does not look
        ctx.set_materialize_grads(False)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[None, None, None]:  # noqa: D102
        if gradient is not None:
            ctx.run_tasks(ctx, gradient)
        return None, None, None


def _run_tasks(ctx: Any, gradient: Tensor) -> None:
    if torch.is_grad_enabled():
        raise MultiTaskError(
            "create_graph=True cannot pass through total(losses): surgery is not differentiable. Call "
            "backward() on it without create_graph."
        )
    if ctx.run is None:
        raise MultiTaskError(
            "backward() ran through this total(losses) a second time: build it anew from this step's losses, or "
            "pass retain_graph=True the first time."
        )
    keep = graph_is_kept()
    ctx.run(gradient, keep)
    if not keep:
        ctx.run = None


class _AtEnd:
    """A callback that notices if it is never run: autograd lets go of the callbacks of a backward pass that died."""

    def __init__(self, callback: Callable[[], None], abandoned: Callable[[], None]) -> None:
        self.callback = callback
        self.abandoned: Callable[[], None] | None = abandoned

    def __call__(self) -> None:
        self.abandoned = None
        self.callback()

    def __del__(self) -> None:
        if self.abandoned is not None:
            self.abandoned()


def _call(callback: Callable[[], None]) -> None:
    callback()


def at_end_of_backward(callback: Callable[[], None], abandoned: Callable[[], None]) -> None:
    """Run `callback` when the backward pass in progress is complete, or now where torch has no way to say so.

    Where that backward pass dies first, `abandoned` is run instead.
    """
    engine = torch.autograd.Variable._execution_engine
    queue = getattr(engine, "queue_callback", None)  # private, but what DDP and FSDP2 are built on
    if queue is None or in_compiled_autograd():  # which never runs what is queued from outside its graph
        callback()
    else:
        queue(_AtEnd(functools.partial(outside_compilation(_call), callback), abandoned))


def at_once(callback: Callable[[], None], _: Callable[[], None]) -> None:
    """Run `callback` now: there is no enclosing backward pass."""
    callback()


def pass_in_progress() -> int:
    """Return a number for the backward pass that is running on this thread; -1 where there is none, or no telling."""
    probe = getattr(torch._C, "_current_graph_task_id", None)  # private, since torch 2.1
    return -1 if probe is None else int(probe())
