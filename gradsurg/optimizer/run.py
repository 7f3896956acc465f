"""The two objects that a wrapped optimizer drops: Run after one backward, Step after one optimizer step.

Passes is the interface of all ways to run backward passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from gradsurg.errors import MultiTaskError
from gradsurg.gradients.compile import Watch, advise, graph_is_kept
from gradsurg.gradients.losses import Compute, seed_of
from gradsurg.gradients.rows import HeldGradients, Row, TaskRows
from gradsurg.gradients.total import at_end_of_backward
from gradsurg.guarantee.constraint import UpdateConstraint

__all__ = ["Passes", "Run", "Step", "Task", "refuse_nesting", "several_processes"]

Task = Tensor | Compute | None


@dataclass(eq=False)
class Run:
    """One backward call of the user: its losses, and what is known of it until the surgery is done.

    Attributes:
        losses: Task name -> loss, or a function that computes it, or None for a task that is absent.
        plain: A loss that takes no part in surgery.
        features: What total(losses, features=...) was given.
        preferences: Those of this step alone: task name -> r_i ≥ 0.
        nested: Whether it runs inside another backward pass, as total(losses).backward() does.
        retain_graph: Whether the graphs are kept for another run.
        gradient: What autograd scales every loss by; None is 1.
        parameters: What the optimizers train, listed once per run.
        known: Task name -> detached loss.
        outer_pass: The number of the backward pass around it; see pass_in_progress().
        joins: Whether it adds rows to a run that another total opened in the same backward pass.
        joined: Whether another total did so to this one.
        owner: The optimizer, kept alive for as long as the total may run backward.
        on_live_rows: Whether what stood in p.grad when the total was built, or ran last, was all ours.
        others: How many other totals were built and have not run, at most.
        unbatched: Why the passes could not be run as one, if an attempt showed it.
    """

    losses: Mapping[str, Task] = field(default_factory=dict)
    plain: Tensor | None = None
    features: list[Tensor] | None = None
    preferences: dict[str, float] = field(default_factory=dict)
    nested: bool = False
    retain_graph: bool = False
    gradient: Tensor | None = None
    parameters: list[Tensor] = field(default_factory=list)
    known: dict[str, Tensor] = field(default_factory=dict)
    outer_pass: int = -1
    joins: bool = False
    joined: bool = False
    owner: object = None
    on_live_rows: bool = False
    others: int = 0
    unbatched: str = ""
    _used: bool = False

    def begin(self, gradient: Tensor | None) -> None:
        """Begin with the gradient that autograd handed to the total; None for optimizer.backward(losses).

        A backward pass that is to be differentiated again, or that ran through this total before, is refused.
        """
        self.gradient = gradient
        if not self.nested:
            return
        if torch.is_grad_enabled():
            raise MultiTaskError(
                "create_graph=True cannot pass through total(losses): surgery is not differentiable. Call "
                "backward() on it without create_graph."
            )
        if self._used:
            raise MultiTaskError(
                "backward() ran through this total(losses) a second time: build it anew from this step's losses, or "
                "pass retain_graph=True the first time."
            )
        # torch tells our node nothing of retain_graph=True but through the graph itself.
        self.retain_graph = graph_is_kept()

    def end(self) -> None:
        """Drop the losses, and their graphs with them, unless another run may come."""
        self.on_live_rows = self.nested
        if self.nested and not self.retain_graph:
            self.losses, self.plain, self.features, self._used = {}, None, None, True

    def excuse(self, rows: TaskRows) -> None:
        """Forget that gradients overflowed if the losses are scaled: the scaler sees the infinity and scales less."""
        if self.gradient is not None and float(self.gradient) != 1:
            rows.overflowed.clear()

    def when_done(self, finish: Callable[[], None], abandoned: Callable[[], None]) -> None:
        """Call `finish` when the backward pass around it is complete, or now; `abandoned` if that pass dies first."""
        if self.nested:
            at_end_of_backward(finish, abandoned)
        else:
            finish()

    def run_plain(self, held: HeldGradients, losses: Iterable[Tensor]) -> tuple[Watch, Row]:
        """Run the plain loss's backward pass before those of the losses; return their watch, and its gradients."""
        plain = None if self.plain is None or not self.plain.requires_grad else self.plain
        watch = Watch([*losses] if plain is None else [*losses, plain])
        if plain is not None:
            with advise():
                torch.autograd.backward(plain, seed_of(self.gradient, plain), retain_graph=True)
            watch.check(plain, "plain=")
        return watch, held.lift()

    @property
    def present(self) -> dict[str, Tensor | Compute]:
        """The tasks that take part: those with a function, or a loss that requires grad."""
        return {
            name: task
            for name, task in self.losses.items()
            if task is not None and (not isinstance(task, Tensor) or task.requires_grad)
        }

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The losses that are there already."""
        return {name: loss for name, loss in self.losses.items() if isinstance(loss, Tensor)}


@dataclass(eq=False)
class Step:
    """What waits for the optimizer's next step; dropped by this step and by zero_grad().

    Attributes:
        losses: Task name -> detached loss of the last run.
        skipped: Tasks that nonfinite="skip_task" left out.
        preferences: Those of this step alone; they are part of what its surgery starts from.
        pending: Whether there are rows that no surgery has seen.
        entered: The declared tasks that left task() since the last surgery.
        constraint: What the update must respect; None if there is no task to protect.
        next_state: What normaliser and surgery will remember after the step.
        stepped: id of each of several optimizers that used this surgery.
        unrun: Number of totals that were built and whose backward never ran.
        unaveraged: Whether p.grad is this rank's alone: a pass without rows ran in no_sync().
    """

    losses: Mapping[str, Tensor] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    preferences: dict[str, float] = field(default_factory=dict)
    pending: bool = False
    entered: set[str] = field(default_factory=set)
    constraint: UpdateConstraint | None = None
    next_state: Mapping[str, Any] | None = None
    stepped: set[int] = field(default_factory=set)
    unrun: int = 0
    unaveraged: bool = False


class Passes(Protocol):
    """The way in which tasks' backward passes run: one by one, batched, or with the weights of an earlier step.

    It remembers nothing itself, so that copies of an optimizer can share it.
    """

    def run(self, engine: Any, run: Run) -> None:
        """Fill the rows of a run and do the surgery, or whatever this way does instead."""

    def end_step(self, engine: Any) -> None:
        """Note that the optimizer has stepped."""


def refuse_nesting(busy: tuple[str, str] | None, what: str) -> None:
    """Refuse calls that bring gradients in while another such call is in progress."""
    kind, name = busy or ("", "")
    if kind == "function":
        raise MultiTaskError(f"{what} was called inside the function of {name!r}: it must only compute a loss")
    if kind == "task":
        raise MultiTaskError(f"{what} was called inside `with optimizer.task(...)`: only loss.backward() belongs there")
    if kind == "total" and what == "total() or backward()":
        raise MultiTaskError(
            "a loss that total() or backward() was given holds a total(losses) of the same optimizer: hand over "
            "the losses that it was made of"
        )


def several_processes() -> bool:
    """Tell whether torch.distributed runs; it may still have a single rank."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()
