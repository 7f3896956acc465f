"""The optimizer's own step: what comes before it, what it is judged by after, and what is put back where it fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import LBFGS, Optimizer

from gradsurg.errors import MultiTaskError
from gradsurg.gradients.param_groups import trained
from gradsurg.guarantee.copies import ParameterCopies, Snapshot

if TYPE_CHECKING:
    from gradsurg.optimizer.engine import Engine
from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import Tensor

from gradsurg.errors import warn

__all__ = [
    "after_step",
    "before_step",
    "take_back",
    "warn_of_foreign_gradients",
    "warn_of_no_losses",
    "warn_of_unknown_names",
    "warn_of_unrun_totals",
    "watch",
]


def before_step(engine: Engine, optimizer: Optimizer, closure: bool) -> ParameterCopies:
    """Finish what is pending and return copies of the parameters, by which the step is judged or undone."""
    if engine.in_task:
        raise MultiTaskError("step() was called inside `with optimizer.task(...)`: leave the block first")
    engine.abort()  # of a backward pass that died, where nobody told us
    engine.finish_pending()
    if not closure:
        warn_of_unrun_totals(engine)
    warn_of_unknown_names(engine)
    engine.first = None
    before = _copies(engine, optimizer, closure)
    engine.snapshot = Snapshot(optimizer, before.row) if engine.options.atomic else None
    return before


def _copies(engine: Engine, optimizer: Optimizer, closure: bool) -> ParameterCopies:
    if engine.options.guarantee != "update":
        return ParameterCopies()
    if closure:  # which parameters are shared is known only once the closure has run
        return ParameterCopies(trained(optimizer))
    if engine.constraint is None:
        return ParameterCopies()
    mine = trained(optimizer)
    judged = engine.constraint.among(mine)
    if not any(map(engine.capture.still_ours, judged)):
        warn_of_foreign_gradients(judged)
        return ParameterCopies()
    return ParameterCopies([p for p in mine if p.grad is not None], engine.constraint.packs())


def watch(engine: Engine, closure: Callable[[], Any]) -> Callable[[], Any]:
    """Return a closure that keeps the rows of its first evaluation, by which the whole step is judged."""

    def watched() -> Any:
        if engine.first is not None:  # an optimizer that evaluates again: this evaluation gets rows of its own
            engine.capture.part_with_rows()
        value = closure()
        engine.finish_pending()
        if engine.first is None:
            engine.first = (engine.constraint, engine.latest)
        return value

    return watched


def after_step(engine: Engine, optimizer: Optimizer, before: ParameterCopies) -> None:
    """Project the movement, then let the rows go."""
    engine.snapshot = None
    if _only_builds_state(engine, optimizer):
        return
    warn_of_unrun_totals(engine)
    warn_of_no_losses(engine)
    if engine.first is not None:
        engine.constraint, engine.latest = engine.first
        engine.first = None
    if len(before) and engine.constraint is not None:
        movement = engine.constraint.enforce(optimizer, before)
        if engine.latest is not None and movement is not None:
            engine.latest = engine.latest.with_movement(movement)
    engine.stepped.add(id(optimizer))
    if all(id(other) in engine.stepped for other in engine.optimizers):
        _end_of_step(engine)


def _only_builds_state(engine: Engine, optimizer: Optimizer) -> bool:
    """Tell whether a step had no task and no learning rate above 0.

    torch.distributed.checkpoint makes such a step to have an optimizer's state built, with plain SGD at every
    checkpoint. Were it counted, a run that is saved would draw other random numbers than one that is not.
    """
    if engine.latest is not None and engine.latest.step == engine.checkpoint.step:
        return False
    return all(_is_zero(group.get("lr")) for group in optimizer.param_groups)


def _is_zero(rate: object) -> bool:
    # Where the rate was a tensor it puts one on the CPU; one on a device is not read, which would wait for it.
    if isinstance(rate, torch.Tensor):
        return rate.device.type == "cpu" and not rate.any()
    return rate == 0


def take_back(engine: Engine, optimizer: Optimizer, before: ParameterCopies) -> None:
    """Undo what a failed step did to that of which there is a copy; rows stay for another try."""
    if engine.snapshot is not None:
        engine.snapshot.restore()
        engine.snapshot = engine.first = None
        return
    with torch.no_grad():
        for p, old in before.row.items():
            p.copy_(old)
    if engine.first is not None and isinstance(optimizer, LBFGS):
        # It was in the middle of a line search, and its state half way to the next: torch's own cannot go on.
        optimizer.state.clear()
    engine.first = None


def _end_of_step(engine: Engine) -> None:
    if engine.options.refresh_every > 1:
        engine.refresh.end_step(engine.report if engine.constraint is not None else None)
    engine.rotation.end_step(engine.constraint)
    engine.checkpoint.end_step(engine.next_state)
    engine.stepped.clear()
    engine.forget()


def warn_of_unrun_totals(engine: Engine) -> None:
    """Say, each time, that a total of this step never ran."""
    if engine.unrun:
        engine.unrun = 0
        warn(
            "total(losses) was built but its backward() never ran, or ran with inputs=, which leaves it out: this "
            "step has nothing of its tasks. Call optimizer.total(losses).backward()."
        )


def warn_of_foreign_gradients(judged: Iterable[Tensor]) -> None:
    """Say, each time, that p.grad is no longer what the surgery wrote, so that the step cannot be judged by it."""
    if any(p.grad is not None for p in judged):
        warn(
            "p.grad was replaced between the surgery and step(), so this step is the optimizer's own, without "
            "guarantee='update'. Change it in place, as in p.grad.mul_(0.5), or call optimizer.zero_grad() where the "
            "losses were to be dropped."
        )


def warn_of_no_losses(engine: Engine) -> None:
    """Say once that a wrapped optimizer steps on gradients of a plain backward(), as if it were not wrapped."""
    if engine.latest is not None or engine.warned_of_no_losses or engine.checkpoint.tasks:
        return
    if any(p.grad is not None for p in engine.parameters()):
        engine.warned_of_no_losses = True
        warn(
            "this optimizer is wrapped, but has been given no task's loss yet: it steps on the gradients of a plain "
            "backward(), without surgery or guarantee. Call optimizer.total(losses).backward() with the losses apart."
        )


def warn_of_unknown_names(engine: Engine) -> None:
    """Say once that an option names nobody: task() learns names one by one, and so cannot refuse."""
    if engine.warned_of_names or not engine.checkpoint.tasks:
        return
    try:
        engine.introduce(())
    except ValueError as error:
        engine.warned_of_names = True
        warn(str(error))
