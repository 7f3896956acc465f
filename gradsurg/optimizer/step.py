"""The optimizer's own step: what comes before it, what it is judged by after, and what is put back where it fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import LBFGS, Optimizer

from gradsurg.errors import MultiTaskError
from gradsurg.gradients.param_groups import trained
from gradsurg.guarantee.copies import Before, Snapshot

if TYPE_CHECKING:
    from gradsurg.optimizer.engine import Surgeon
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


def before_step(surgeon: Surgeon, optimizer: Optimizer, closure: bool) -> Before:
    """Finish what is pending and return copies of the parameters, by which the step is judged or undone."""
    if surgeon.in_task:
        raise MultiTaskError("step() was called inside `with optimizer.task(...)`: leave the block first")
    surgeon.abort()  # of a backward pass that died, where nobody told us
    surgeon.finish_pending()
    if not closure:
        warn_of_unrun_totals(surgeon)
    warn_of_unknown_names(surgeon)
    surgeon.first = None
    before = _copies(surgeon, optimizer, closure)
    surgeon.snapshot = Snapshot(optimizer, before.row) if surgeon.settings.atomic else None
    return before


def _copies(surgeon: Surgeon, optimizer: Optimizer, closure: bool) -> Before:
    if surgeon.settings.guarantee != "update":
        return Before()
    if closure:  # which parameters are shared is known only once the closure has run
        return Before(trained(optimizer))
    if surgeon.judgement is None:
        return Before()
    mine = trained(optimizer)
    judged = surgeon.judgement.among(mine)
    if not any(map(surgeon.capture.still_ours, judged)):
        warn_of_foreign_gradients(judged)
        return Before()
    return Before([p for p in mine if p.grad is not None], surgeon.judgement.packs())


def watch(surgeon: Surgeon, closure: Callable[[], Any]) -> Callable[[], Any]:
    """Return a closure that keeps the rows of its first evaluation, by which the whole step is judged."""

    def watched() -> Any:
        if surgeon.first is not None:  # an optimizer that evaluates again: this evaluation gets rows of its own
            surgeon.capture.part_with_rows()
        value = closure()
        surgeon.finish_pending()
        if surgeon.first is None:
            surgeon.first = (surgeon.judgement, surgeon.latest)
        return value

    return watched


def after_step(surgeon: Surgeon, optimizer: Optimizer, before: Before) -> None:
    """Project the movement, then let the rows go."""
    surgeon.snapshot = None
    if _only_builds_state(surgeon, optimizer):
        return
    warn_of_unrun_totals(surgeon)
    warn_of_no_losses(surgeon)
    if surgeon.first is not None:
        surgeon.judgement, surgeon.latest = surgeon.first
        surgeon.first = None
    if len(before) and surgeon.judgement is not None:
        movement = surgeon.judgement.hold(optimizer, before)
        if surgeon.latest is not None and movement is not None:
            surgeon.latest = surgeon.latest.with_movement(movement)
    surgeon.stepped.add(id(optimizer))
    if all(id(other) in surgeon.stepped for other in surgeon.optimizers):
        _end_of_step(surgeon)


def _only_builds_state(surgeon: Surgeon, optimizer: Optimizer) -> bool:
    """Tell whether a step had no task and no learning rate above 0.

    torch.distributed.checkpoint makes such a step to have an optimizer's state built, with plain SGD at every
    checkpoint. Were it counted, a run that is saved would draw other random numbers than one that is not.
    """
    if surgeon.latest is not None and surgeon.latest.step == surgeon.memory.step:
        return False
    return all(_is_zero(group.get("lr")) for group in optimizer.param_groups)


def _is_zero(rate: object) -> bool:
    # Where the rate was a tensor it puts one on the CPU; one on a device is not read, which would wait for it.
    if isinstance(rate, torch.Tensor):
        return rate.device.type == "cpu" and not rate.any()
    return rate == 0


def take_back(surgeon: Surgeon, optimizer: Optimizer, before: Before) -> None:
    """Undo what a failed step did to that of which there is a copy; rows stay for another try."""
    if surgeon.snapshot is not None:
        surgeon.snapshot.restore()
        surgeon.snapshot = surgeon.first = None
        return
    with torch.no_grad():
        for p, old in before.row.items():
            p.copy_(old)
    if surgeon.first is not None and isinstance(optimizer, LBFGS):
        # It was in the middle of a line search, and its state half way to the next: torch's own cannot go on.
        optimizer.state.clear()
    surgeon.first = None


def _end_of_step(surgeon: Surgeon) -> None:
    if surgeon.settings.refresh_every > 1:
        surgeon.refresh.end_step(surgeon.report if surgeon.judgement is not None else None)
    surgeon.rotation.end_step(surgeon.judgement)
    surgeon.memory.end_step(surgeon.next_state)
    surgeon.stepped.clear()
    surgeon.forget()


def warn_of_unrun_totals(surgeon: Surgeon) -> None:
    """Say, each time, that a total of this step never ran."""
    if surgeon.unrun:
        surgeon.unrun = 0
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


def warn_of_no_losses(surgeon: Surgeon) -> None:
    """Say once that a wrapped optimizer steps on gradients of a plain backward(), as if it were not wrapped."""
    if surgeon.latest is not None or surgeon.warned_of_no_losses or surgeon.memory.tasks:
        return
    if any(p.grad is not None for p in surgeon.parameters()):
        surgeon.warned_of_no_losses = True
        warn(
            "this optimizer is wrapped, but has been given no task's loss yet: it steps on the gradients of a plain "
            "backward(), without surgery or guarantee. Call optimizer.total(losses).backward() with the losses apart."
        )


def warn_of_unknown_names(surgeon: Surgeon) -> None:
    """Say once that an option names nobody: task() learns names one by one, and so cannot refuse."""
    if surgeon.warned_of_names or not surgeon.memory.tasks:
        return
    try:
        surgeon.introduce(())
    except ValueError as error:
        surgeon.warned_of_names = True
        warn(str(error))
