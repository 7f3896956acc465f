"""What is refused or warned of before anything is touched: calls in the wrong place, totals and names left unused."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import Tensor

from gradsurg.errors import MultiTaskError, warn

if TYPE_CHECKING:
    from gradsurg.optimizer.engine import Surgeon

__all__ = [
    "refuse_cheap",
    "refuse_nesting",
    "refuse_scaled_mark",
    "warn_of_foreign_gradients",
    "warn_of_no_losses",
    "warn_of_unknown_names",
    "warn_of_unrun_totals",
]


def refuse_nesting(surgeon: Surgeon, what: str) -> None:
    """Refuse what would take gradients inside a task's function or block."""
    if surgeon.computing is not None:
        raise MultiTaskError(
            f"{what} was called inside the function of {surgeon.computing!r}: it must only compute a loss"
        )
    if surgeon.in_task:
        raise MultiTaskError(f"{what} was called inside `with optimizer.task(...)`: only loss.backward() belongs there")


def refuse_cheap(surgeon: Surgeon, what: str) -> None:
    """Refuse rows from outside in the modes that save backward passes: these choose which ones run."""
    for option, value, off in (
        ("refresh_every", surgeon.settings.refresh_every, 1),
        ("rotate", surgeon.settings.rotate, None),
    ):
        if value != off:
            raise MultiTaskError(
                f"{what} brings gradients that are computed already, so {option}={value} could save nothing: use "
                f"total() or backward(), or wrap without {option}="
            )


def refuse_scaled_mark(surgeon: Surgeon) -> None:
    """Refuse to go on where p.grad was changed while surgery waits, and the rows cannot know."""
    if not surgeon.pending:
        return
    handed_scale = any(getattr(optimizer, "grad_scale", None) is not None for optimizer in surgeon.optimizers)
    if handed_scale or surgeon.capture.mark_was_scaled():
        absent = [name for name in surgeon.settings.tasks or () if name not in surgeon.capture.rows]
        raise MultiTaskError(
            "p.grad was clipped, unscaled or zeroed in place while surgery was waiting, which would undo it. It "
            f"waits inside accumulate(), and for declared tasks that have not come (now: {absent}): run the last "
            "backward outside accumulate(), or wrap without tasks=. optimizer.zero_grad() starts afresh."
        )


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
