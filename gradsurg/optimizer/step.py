"""Around the optimizer's own step: copies before it, the guarantee on its update, and the undoing if it fails."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from gradsurg.distributed.averaging import Averaged
from gradsurg.distributed.check_sync import compare
from gradsurg.errors import MultiTaskError, warn
from gradsurg.gradients.param_groups import parameter_names, trained
from gradsurg.gradients.reachability import is_apart
from gradsurg.guarantee.constraint import UpdateConstraint
from gradsurg.guarantee.copies import ParameterCopies, Snapshot
from gradsurg.optimizer.engine import Engine
from gradsurg.optimizer.line_search import LineSearch, searches, warn_of_many_evaluations
from gradsurg.optimizer.report import DeferredReport, Report

__all__ = ["Attempt", "after_step", "before_step", "enforce", "take_back", "watch"]


@dataclass(eq=False)
class Attempt:
    """One call of step(), until it has worked or was undone.

    `copies` are the parameters before the step, as far as the guarantee or undoing needs them. With atomic=True,
    `snapshot` is all that the step may write. `first` is the constraint and the report of gradients from before the
    step, else of the closure's first evaluation; `value` is what that one returned. `search` has L-BFGS's weights.
    """

    copies: ParameterCopies
    snapshot: Snapshot | None = None
    first: tuple[UpdateConstraint | None, Report | DeferredReport | None] | None = None
    search: LineSearch | None = None
    evaluations: int = 0
    value: Any = None

    def unmoved(self) -> bool:
        """Whether parameters were copied, and all still are what they were."""
        return len(self.copies) > 0 and all(torch.equal(p, old) for p, old in self.copies.row.items())


def before_step(engine: Engine, optimizer: Optimizer, closure: bool) -> Attempt:
    """Finish pending surgery, and copy what the guarantee or the undoing of the step needs."""
    if engine.busy is not None and engine.busy[0] == "task":
        raise MultiTaskError("step() was called inside `with optimizer.task(...)`: leave the block first")
    # A run is open here only if its backward pass died without telling us.
    engine.abort()
    if engine.step.pending or engine.step.unaveraged:
        _send_what_waits(engine)
    engine.finish_pending()
    if not closure:
        _warn_of_unrun_totals(engine)
    _warn_of_unknown_names(engine)
    if "reached" not in engine.told:
        _warn_of_what_is_reached(engine)
    if engine.options.check_sync_every and engine.checkpoint.step % engine.options.check_sync_every == 0:
        _check_sync(engine, optimizer)
    # Copied last: surgery that waited has just decided which parameters are shared.
    copies = _copies(engine, optimizer, closure)
    search = LineSearch() if closure and searches(optimizer) else None
    snapshot = Snapshot(optimizer, copies.row) if engine.options.atomic else None
    # Gradients that were there before the closure belong to the weights before the step, as those of SAM.
    first = (engine.step.constraint, engine.latest) if closure and engine.step.constraint is not None else None
    return Attempt(copies, snapshot, first, search)


def _check_sync(engine: Engine, optimizer: Optimizer) -> None:
    engine.lay_out()
    if (group := engine.session.layout.group) is not None:
        names, every = parameter_names(engine.optimizers), engine.options.check_sync_every
        named = [(names[id(p)], p) for p in trained(optimizer)]
        compare(group, named, f"check_sync_every={every}, before step {engine.checkpoint.step}")


def _send_what_waits(engine: Engine) -> None:
    """Let the ranks exchange what backward passes in no_sync() left on each of them: now is the last time."""
    # The layout was told by no_sync() to keep everything back.
    engine.session.layout.send_now()
    if not engine.step.pending and any(p.grad is not None for p in engine.parameters()):
        with Averaged(engine.parameters(), engine.session.layout).begin() as averaged:
            averaged.complete()
    engine.step.unaveraged = False


def _copies(engine: Engine, optimizer: Optimizer, closure: bool) -> ParameterCopies:
    constraint = engine.step.constraint
    if engine.options.guarantee != "update" or (constraint is None and not closure):
        return ParameterCopies()
    mine = trained(optimizer)
    # Which parameters are shared is known only once the closure has run.
    if closure or constraint is None:
        return ParameterCopies(mine)
    # A p.grad that is ours, clipped or not, tells that the step follows from the rows.
    judged = constraint.among(mine)
    if any(map(engine.capture.still_ours, judged)):
        return ParameterCopies([p for p in mine if p.grad is not None], constraint.packs())
    if any(p.grad is not None for p in judged):
        warn(
            "p.grad was replaced between the surgery and step(), so this step is the optimizer's own, without "
            "guarantee='update'. Change it in place, as in p.grad.mul_(0.5), or call optimizer.zero_grad() if the "
            "losses were to be dropped."
        )
    return ParameterCopies()


def watch(engine: Engine, optimizer: Optimizer, closure: Callable[[], Any], attempt: Attempt) -> Callable[[], Any]:
    """Return a closure that keeps the constraint of its first evaluation, which holds for the whole step."""

    def watched() -> Any:
        # At unmoved weights, the step is judged by what is there after this evaluation, which may clear or add.
        if attempt.first is not None and attempt.evaluations == 0 and attempt.unmoved():
            attempt.first = None
        # An optimizer that evaluates again, as LBFGS does: this evaluation gets rows of its own.
        if attempt.first is not None:
            engine.capture.part_with_rows()
        value = closure()
        if engine.step.pending or engine.step.unaveraged:
            _send_what_waits(engine)
        engine.finish_pending()
        if "reached" not in engine.told:
            _warn_of_what_is_reached(engine)
        if attempt.evaluations == 0:
            attempt.value = value
        if attempt.first is None:
            attempt.first = (engine.step.constraint, engine.latest)
        attempt.evaluations += 1
        # A single task is the plain optimizer's, whatever that does.
        if attempt.evaluations == (3 if attempt.search is None else 2) and len(engine.step.losses) > 1:
            warn_of_many_evaluations(engine, optimizer)
        return value if attempt.search is None else attempt.search.evaluate(engine, value)

    return watched


def enforce(engine: Engine, optimizer: Optimizer, attempt: Attempt) -> None:
    """Project the movement."""
    if attempt.first is not None:
        engine.step.constraint, engine.latest = attempt.first
    # SAM evaluates twice, and is judged by the gradients before its step. A step of more evaluations, or of a line
    # search, belongs to many gradients: to project it by the first ones would throw most of it away.
    if attempt.search is not None or attempt.evaluations > 2:
        return
    if len(attempt.copies) and engine.step.constraint is not None:
        movement = engine.step.constraint.enforce(optimizer, attempt.copies)
        if engine.latest is not None and movement is not None:
            engine.latest = engine.latest.with_movement(movement)


def after_step(engine: Engine, optimizer: Optimizer) -> None:
    """Count the step, and drop the rows once all optimizers that share them have stepped."""
    if _only_builds_state(engine, optimizer):
        return
    _warn_of_unrun_totals(engine)
    _warn_of_no_losses(engine)
    engine.step.stepped.add(id(optimizer))
    if not all(id(other) in engine.step.stepped for other in engine.optimizers):
        return
    engine.passes.end_step(engine)
    if engine.options.rotate is not None:
        engine.rotation.end_step(engine.step.constraint)
    engine.checkpoint.end_step(engine.step.next_state)
    engine.step.stepped.clear()
    engine.forget()


def _only_builds_state(engine: Engine, optimizer: Optimizer) -> bool:
    """Tell whether a step had no task and no learning rate above 0.

    torch.distributed.checkpoint makes such a step to have an optimizer's state built, with plain SGD at every
    checkpoint. If it were counted, a run that is saved would draw other random numbers than one that is not.
    """
    if not all(_is_zero(group.get("lr")) for group in optimizer.param_groups):
        return False
    return engine.latest is None or engine.latest.step != engine.checkpoint.step


def _is_zero(rate: object) -> bool:
    # A rate on a device is not read, because reading it would wait for the device.
    if isinstance(rate, torch.Tensor):
        return rate.device.type == "cpu" and not rate.any()
    return rate == 0


def take_back(optimizer: Optimizer, attempt: Attempt, error: BaseException) -> None:
    """Undo what a failed step did to everything that was copied, and say so; rows stay for another try."""
    if attempt.snapshot is not None:
        attempt.snapshot.restore()
        _note(error, "step() did not finish: all parameters and the optimizer's state are as before it.")
        return
    if len(attempt.copies):
        _note(
            error,
            "step() did not finish: the parameters are as before it. The optimizer's own state, such as moments, may "
            "have moved on; wrap(..., atomic=True) puts it back too.",
        )
    with torch.no_grad():
        for p, old in attempt.copies.row.items():
            p.copy_(old)
    if attempt.first is not None and isinstance(optimizer, LBFGS):
        # It failed inside a line search, with its state half updated, from which torch's LBFGS cannot go on.
        optimizer.state.clear()


def _note(error: BaseException, text: str) -> None:
    if hasattr(error, "add_note"):  # Python 3.11 and later
        error.add_note(text)


def _warn_of_unrun_totals(engine: Engine) -> None:
    if engine.step.unrun:
        engine.step.unrun = 0
        warn(
            "total(losses) was built but its backward() never ran, or ran with inputs=, which leaves it out: this "
            "step has nothing of its tasks. Call optimizer.total(losses).backward()."
        )


def _warn_of_no_losses(engine: Engine) -> None:
    if engine.latest is not None or "no losses" in engine.told or engine.checkpoint.tasks:
        return
    if any(p.grad is not None for p in engine.parameters()):
        engine.told.add("no losses")
        warn(
            "this optimizer is wrapped, but has been given no task's loss yet: it steps on the gradients of a plain "
            "backward(), without surgery or guarantee. Call optimizer.total(losses).backward() with the losses apart."
        )


def _warn_of_what_is_reached(engine: Engine) -> None:
    """Look once, before the first step with rows, at what the tasks reach."""
    rows = engine.capture.rows
    if not len(rows):
        return
    engine.told.add("reached")
    if not any(len(rows[name]) for name in rows):
        warn(
            f"the losses of {engine.checkpoint.tasks} reach no parameter of this optimizer, so there is no surgery or "
            "guarantee: it steps on whatever else is in p.grad. If it trains copies of the parameters, as float32 "
            "master weights or a shared model of asynchronous workers, hand over gradients: "
            "optimizer.set_gradients({name: [one tensor per parameter]}). Else build the optimizer from the parameters "
            "that the losses depend on."
        )
    elif engine.options.shared is None and len(rows) > 1:
        names, shared = parameter_names(engine.optimizers), rows.shared(engine.parameters())
        flags = {names[id(p)]: flag for p in shared if (flag := is_apart(rows.of(p))) is not None}
        if all(flag.is_cpu for flag in flags.values()):
            _warn_of_apart(flags, len(shared))
        elif isinstance(engine.latest, DeferredReport):
            # On a device they are read with the report, which waits for it anyway.
            engine.latest = engine.latest.reading(partial(_warn_of_apart, flags, len(shared)))


def _warn_of_apart(flags: Mapping[str, Tensor], shared: int) -> None:
    apart = [name for name, flag in flags.items() if flag]
    # If nothing else is shared, there is nothing that these tensors could outweigh.
    if 0 < len(apart) < shared:
        warn(
            f"no two tasks touch the same number of {', '.join(apart)}, though each reaches the tensor: one output "
            "or one log-variance per task, kept in one tensor. Surgery counts it as shared, so these numbers weigh "
            "in all norms and cosines. Keep one tensor per task, or say what is shared: wrap(..., shared=trunk)."
        )


def _warn_of_unknown_names(engine: Engine) -> None:
    """Warn once that an option names an unknown task; task() learns the names one by one, so it cannot refuse."""
    if "names" in engine.told or not engine.options.names_tasks or not engine.checkpoint.tasks:
        return
    try:
        engine.check_names(())
    except ValueError as error:
        engine.told.add("names")
        warn(str(error))
