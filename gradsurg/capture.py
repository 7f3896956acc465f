"""How gradients come in: p.grad is put aside, each task's backward pass fills it, the fresh tensors become a row.

autograd hands its own tensor over where `.grad` is None, so moving it costs no copy. torch.autograd.grad would break
reentrant checkpointing, hooks, FSDP2 and parameters outside the optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradsurg.errors import MultiTaskError, unknown_name
from gradsurg.rows import Row, TaskRows

__all__ = ["Capture", "Losses", "Total", "parse_losses", "value_of"]

Losses = Mapping[str, "Tensor | None"] | Sequence["Tensor | None"]


class Capture:
    """Owns the rows and knows whether what stands in `p.grad` is ours.

    Rows are live only while every `p.grad` is the tensor that `write` put there, unchanged (its `_version` tells).
    Otherwise somebody zeroed, clipped or added since: the rows are dropped, and what stands in `p.grad` is foreign,
    which is kept and added to the next result, as a plain backward would do.
    """

    def __init__(self, parameters: Callable[[], list[Tensor]], row_dtype: torch.dtype | None = None) -> None:
        self.parameters = parameters
        self.row_dtype = row_dtype
        self.rows = TaskRows(row_dtype)
        self.is_open = False
        self._fresh = TaskRows(row_dtype)
        self._foreign: Row = {}
        self._plain: list[Row] = []
        self._written: dict[Tensor, tuple[Tensor, int]] = {}
        self._held: dict[Tensor, Tensor | None] = {}

    def open(self) -> None:
        """Put p.grad of every parameter aside, so that backward passes start from nothing."""
        if self.is_open:  # the backward pass that opened it died outside of our reach
            self.abort()
        parameters = self.parameters()
        self._held = {p: p.grad for p in parameters}
        self._was_live = self.is_live(parameters)
        self._fresh, self._plain = TaskRows(self.row_dtype), []
        for p in parameters:
            p.grad = None
        self.is_open = True

    def take(self, name: str) -> None:
        """Move what backward passes left in p.grad into the fresh row of a task."""
        self._fresh.add(name, self._lift())

    def take_plain(self) -> None:
        """Move what is in p.grad to the gradients that take no part in surgery."""
        self._plain.append(self._lift())

    def give(self, name: str, gradients: Row) -> None:
        """Add gradients that were computed elsewhere to the fresh row of a task."""
        self._fresh.add(name, gradients)

    def commit(self) -> None:
        """Make the fresh rows part of the rows; p.grad is None afterwards."""
        self.take_plain()  # a penalty of the same backward pass may have run since our last task
        if not self._was_live:
            self.rows = TaskRows(self.row_dtype)
            self._foreign = {p: g for p, g in self._held.items() if g is not None}
        for row in self._plain:
            for p, g in row.items():
                self._foreign[p] = self._foreign[p] + g if p in self._foreign else g
        if len(self.rows):
            self.rows.merge(self._fresh)
        else:
            self.rows = self._fresh
        self._close()

    def abort(self) -> None:
        """Drop the fresh rows and give p.grad back as it was."""
        for p, gradient in self._held.items():
            p.grad = gradient
        self._close()

    def write(self, result: Mapping[Tensor, Tensor]) -> None:
        """Set p.grad to the result plus what is foreign, for every parameter that has either."""
        self._written = {}
        for p in self.parameters():
            gradient, foreign = result.get(p), self._foreign.get(p)
            if gradient is None:
                p.grad = foreign
            elif foreign is None:
                p.grad = gradient
            else:
                p.grad = gradient + foreign
            if p.grad is not None:
                self._written[p] = (p.grad, p.grad._version)

    def write_pending(self) -> None:
        """Leave a mark in one p.grad while surgery waits: without it, model.zero_grad() could not be noticed."""
        free = ((p, g) for name in self.rows for p, g in self.rows[name].items() if p not in self._foreign)
        p, gradient = next(free, (None, None))
        self.write({} if p is None or gradient is None else {p: gradient.to(p.dtype)})

    def clear(self) -> None:
        """Forget rows, foreign gradients and marks; p.grad is left alone."""
        self.rows = TaskRows(self.row_dtype)
        self._foreign, self._written = {}, {}
        self._close()

    def is_live(self, parameters: list[Tensor]) -> bool:
        """Whether every p.grad is the tensor that we wrote, unchanged."""
        if not len(self.rows) or not self._written:
            return False
        return all(
            (p.grad is None and p not in self._written)
            or (p in self._written and p.grad is self._written[p][0] and p.grad._version == self._written[p][1])
            for p in parameters
        )

    def still_ours(self, p: Tensor) -> bool:
        """Whether p.grad is the tensor that we wrote, clipped or unscaled since or not."""
        return p in self._written and p.grad is self._written[p][0]

    def _lift(self) -> Row:
        lifted = {}
        for p in self.parameters():
            if p.grad is not None:
                lifted[p] = p.grad
                p.grad = None
        return lifted

    def _close(self) -> None:
        self._held, self._plain, self._fresh = {}, [], TaskRows(self.row_dtype)
        self.is_open = False


class Total(torch.autograd.Function):
    """The node behind total(losses): its backward runs the tasks' own backward passes, one after the other."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, run: Callable[[Tensor, bool], None], value: Tensor) -> Tensor:  # noqa: D102
        ctx.run = run
        ctx.set_materialize_grads(False)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[None, None, None]:  # noqa: D102
        if gradient is None:
            return None, None, None
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
        keep = _keeps_graph()
        ctx.run(gradient, keep)
        if not keep:
            ctx.run = None
        return None, None, None


def at_end_of_backward(callback: Callable[[], None]) -> None:
    """Run `callback` when the backward pass in progress is complete, or now where torch has no way to say so."""
    engine = torch.autograd.Variable._execution_engine  # type: ignore[attr-defined]
    queue = getattr(engine, "queue_callback", None)  # private, but what DDP and FSDP2 are built on
    if queue is None:
        callback()
    else:
        queue(callback)


def _keeps_graph() -> bool:
    # Private and present since torch 1.x; without it, keeping the graph costs memory but is never wrong.
    probe = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if probe is None else bool(probe())


def parse_losses(losses: Losses, tasks: Sequence[str] | None) -> dict[str, Tensor | None]:
    """Return name -> loss from a dict or a sequence; a loss that cannot be trained on is None.

    Raises:
        ValueError: No task at all, a name that was not declared, two tasks of one name, or a loss that is not a
            real scalar tensor; the message names the task.
    """
    if isinstance(losses, Tensor) or not isinstance(losses, (Mapping, Sequence)) or isinstance(losses, str):
        raise ValueError(
            f"losses is a {type(losses).__name__}: pass the task losses apart, as a dict {{'name': loss, …}} or a list"
        )
    if isinstance(losses, Mapping):
        pairs = [(str(name), loss) for name, loss in losses.items()]
    else:
        if tasks is not None and len(tasks) != len(losses):
            raise ValueError(f"losses has {len(losses)} entries, but {len(tasks)} tasks are declared: {list(tasks)}")
        pairs = list(zip(tasks or map(str, range(len(losses))), losses, strict=True))
    result: dict[str, Tensor | None] = {}
    for name, loss in pairs:
        if name in result:
            raise ValueError(f"losses has two tasks named {name!r}: names must differ")
        if tasks is not None and name not in tasks:
            raise unknown_name("losses", name, tasks)
        result[name] = _checked(name, loss)
    if all(loss is None for loss in result.values()):
        raise ValueError(
            f"losses has no task to train on (given: {list(result)}): at least one must be a tensor that requires grad"
        )
    return result


def _checked(name: str, loss: object) -> Tensor | None:
    if loss is None:
        return None
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"losses[{name!r}] is a {type(loss).__name__}, which carries no gradient: pass the tensor itself, or None "
            "for a task that is absent from this step"
        )
    if loss.numel() != 1:
        raise ValueError(f"losses[{name!r}] has shape {tuple(loss.shape)}: reduce it to a scalar, e.g. with .mean()")
    if loss.is_complex():
        raise ValueError(f"losses[{name!r}] is complex ({loss.dtype}): a loss must be real, e.g. take .abs() or .real")
    return loss


def value_of(losses: Mapping[str, Tensor | None], preferences: Mapping[str, float], plain: Tensor | None) -> Tensor:
    """Return Σ r_i L_i (+ the plain loss), detached, on the first loss's device, in float32 at least."""
    terms = [(loss.detach(), preferences.get(name, 1.0)) for name, loss in losses.items() if loss is not None]
    if plain is not None:
        terms.append((plain.detach(), 1.0))
    device = terms[0][0].device
    total = torch.zeros((), device=device)
    for loss, preference in terms:
        wide = loss.reshape(()).to(device=device, dtype=torch.promote_types(loss.dtype, torch.float32))
        total = total + wide * preference
    return total
