"""The state of one wrapped optimizer (or several that share their rows), and the surgery on it.

Everything mutable lives in one Surgeon that is mutated and never rebound: Lightning copies an optimizer's __dict__, and
both copies must go on seeing the same rows. What a step does to it around the surgery is in functions that take it:
incoming.py (gradients come in; features.py and refresh.py for the cheap ways), stepping.py (the step and its guard),
refusals.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from gradsurg.distributed.detect import Ranks
from gradsurg.distributed.session import Session
from gradsurg.errors import MultiTaskError
from gradsurg.gradients.capture import Capture
from gradsurg.gradients.param_groups import parameter_names, trained
from gradsurg.gradients.recycle import Recycler
from gradsurg.gradients.rows import TaskRows
from gradsurg.gradients.total import pass_in_progress
from gradsurg.guarantee.constraint import UpdateConstraint
from gradsurg.guarantee.copies import Snapshot
from gradsurg.optimizer.checkpoint import Checkpoint
from gradsurg.optimizer.direction import compute_direction
from gradsurg.optimizer.inputs import StepInputs
from gradsurg.optimizer.options import Options
from gradsurg.optimizer.report import DeferredReport, Report
from gradsurg.optimizer.schedule import Batched, Refresh, Rotation
from gradsurg.surgery.margin import named
from gradsurg.surgery.priority import check_names

__all__ = ["Engine", "refuse_nesting", "refuse_scaled_sentinel"]


class Engine:
    """Makes of fresh rows what is in p.grad, and keeps what the step is judged by."""

    def __init__(self, options: Options, model: nn.Module | None = None) -> None:
        self.options = options
        self.optimizers: list[Optimizer] = []
        self.checkpoint = Checkpoint(self.optimizers)
        self.capture = Capture(self.parameters, options.row_dtype)
        self.refresh = Refresh(options.refresh_every, self.checkpoint)
        self.batched = Batched(options.batched)
        self.rotation = Rotation(options.rotate, self.checkpoint, options.row_dtype)
        self.session = Session(self.capture, Ranks(model, whole_rows=options.rotate is not None))
        self.latest: Report | DeferredReport | None = None  # as the device left it
        self.deferring = 0  # depth of accumulate()
        self.in_task = False
        self.computing: str | None = None  # the task whose function is being called
        self.bringing = False  # whether gradients are on their way in
        self.spare = Recycler()
        self.pending = False  # rows that no surgery has seen yet
        self.entered: set[str] = set()  # of the declared tasks, those that left task() since the last surgery
        self.unrun = 0  # totals built since the last step whose backward never came
        self.losses: dict[str, Tensor] = {}
        self.skipped: tuple[str, ...] = ()  # tasks that nonfinite="skip_task" left out of this step
        self.constraint: UpdateConstraint | None = None
        self.stepped: set[int] = set()  # of several optimizers, those that used this surgery
        self.next_state: Mapping[str, Any] | None = None
        self.first: tuple[UpdateConstraint | None, Report | DeferredReport | None] | None = (
            None  # of a closure's evaluations
        )
        self.snapshot: Snapshot | None = None
        self.warned_of_names = self.warned_of_no_losses = False
        self.told_of_features = False
        self.outer_pass = -1  # of the run that is open: the backward pass that its total is part of
        self.joined = False  # whether a second total joined that run
        self.met: set[str] = set()  # tasks that had a block of their own in this process

    def __reduce__(self) -> Any:
        # Copies start with the same options and no rows, and look for a DDP or FSDP2 module of their own; several
        # optimizers copied together share one copy.
        return Engine, (self.options,)

    @property
    def report(self) -> Report | None:
        """What the last surgery and step did; where that is still on a device, reading it waits."""
        if isinstance(self.latest, DeferredReport):
            self.latest = self.latest.read()
        return self.latest

    # -- what the optimizers hold -------------------------------------------------------------------------------

    def parameters(self) -> list[Tensor]:
        """Return what the optimizers train; never cached, because trainers replace it inside param_groups."""
        parameters = [p for optimizer in self.optimizers for p in trained(optimizer)]
        if len(set(map(id, parameters))) == len(parameters):
            return parameters
        return list(dict(zip(map(id, parameters), parameters, strict=True)).values())  # each once

    def lay_out(self) -> None:
        """Find out how the parameters are spread over ranks; see Traffic."""
        self.session.lay_out(self.parameters)
        if self.options.rotate is not None and not self.session.layout.whole_rows:
            raise MultiTaskError(
                "rotate= does not go with sharded parameters: its averages of all tasks' gradients are part of the "
                "state dict, which no rank could hold whole. Use refresh_every=; docs/many-gpus.md says what a full "
                "step costs."
            )

    def turns(self, names: list[str]) -> list[str]:
        """Return the tasks that could be due in this step: with rotate=, those of all ranks, in everybody's order."""
        return names if self.options.rotate is None else self.session.agree_on(names)

    # -- before surgery, and beside it --------------------------------------------------------------------------

    def settle(self) -> None:
        """Finish what waits and drop what died, before something is added to p.grad beside the rows."""
        refuse_nesting(self, "total() or backward()")
        self.lay_out()
        refuse_scaled_sentinel(self)
        self.unrun = 0
        if self.capture.opened is None:
            self.finish_pending()
        elif self.outer_pass != pass_in_progress():
            self.abort()

    def record(self, report: Report, state: Mapping[str, Any] | None) -> None:
        """Note what was added to p.grad beside the rows: there is nothing to judge the update by."""
        self.latest, self.constraint, self.next_state = report, None, state
        self.stepped.clear()

    def introduce(self, names: Iterable[str]) -> None:
        """Check the names in the options against those declared or seen; a typo in `primary` must not pass silently."""
        pipeline, preferences = self.options.pipeline, self.options.preferences
        if pipeline.levels or preferences or pipeline.margin:
            known = {*self.checkpoint.tasks, *(self.options.tasks or ()), *names}
            check_names(pipeline.levels, known)
            check_names((tuple(preferences),), known, "preferences")
            check_names((tuple(named(pipeline.margin)),), known, "margin")
        self.learn(names)

    def learn(self, names: Iterable[str]) -> None:
        """Note the tasks that this process met."""
        if not self.session.layout.several:  # else they are learnt in the order that the ranks agree on
            self.checkpoint.learn(names)

    # -- surgery ------------------------------------------------------------------------------------------------

    def finish(self, defer: bool | None = None) -> None:
        """Commit the fresh rows and operate, unless accumulation defers that; on any error p.grad is as before."""
        if self.capture.opened is None:  # something else came in between and settled it
            return
        waiting = self.deferring > 0 if defer is None else defer
        try:
            sent, losses, agreed = self.session.settle(waiting, self.losses, self.joined)
            self.losses = dict(losses)
            self.checkpoint.learn(agreed)
            self.screen(self.capture.fresh)
        except BaseException as error:
            self.abort(error)
            raise
        held = self.capture.commit(sent)
        self.pending, self.joined = True, False
        if waiting or sent is False:
            self.capture.write_pending()
            return
        try:
            self._compute()
        except BaseException:
            # The fresh rows are part of the others by now; what those amounted to stands in p.grad.
            self.forget()
            self.capture.give_back(held)
            raise

    def _compute(self) -> None:
        outcome = compute_direction(
            StepInputs(
                rows=self.rotation.completed(self.capture.rows),
                parameters=self.parameters(),
                groups=[group["params"] for optimizer in self.optimizers for group in optimizer.param_groups],
                losses=self.losses,
                options=self.options,
                step=self.checkpoint.step,
                state=self.checkpoint.state,
                skipped=self.skipped,
                names=parameter_names(self.optimizers) if self.options.granularity == "tensor" else {},
                layout=self.session.layout,
                spare=self.spare,
            )
        )
        self.capture.write(self.session.layout.whole(outcome.gradients))
        self.latest = self.rotation.reported(outcome.report)
        self.constraint, self.next_state = outcome.constraint, outcome.state
        self.pending = False
        self.entered.clear()
        self.stepped.clear()

    def abort(self, error: BaseException | None = None, opened: object = None) -> None:
        """Give p.grad back as it was, and tell other ranks; `opened` limits this to the run of that token."""
        if opened is None or opened is self.capture.opened:
            self.capture.abort()
            self.session.fail(error)
            self.joined = False

    def screen(self, *parts: TaskRows) -> None:
        """Apply the `nonfinite` policy to rows with NaN or infinity, given as parts of the same tasks' rows."""
        if self.options.nonfinite == "propagate":
            return
        found = list(dict.fromkeys(name for part in parts for name in part.nonfinite()))
        layout = self.session.layout
        # Rows that are not sent yet are this rank's alone, and others may have other tasks.
        names = layout.agreed(list(dict.fromkeys(name for part in parts for name in part)))
        bad = layout.on_any_rank(names, found) if layout.several else found
        if bad and self.options.nonfinite == "raise":
            raise MultiTaskError(
                f"the gradients of {', '.join(map(repr, bad))} are not finite. Parameters, p.grad and optimizer state "
                "are as before. nonfinite='skip_task' leaves such a task out of the step."
            )
        for name in bad:
            for part in parts:
                if name in part:
                    part.drop(name)
            self.checkpoint.count_skipped(name)
            if name not in self.skipped:
                self.skipped = (*self.skipped, name)

    def finish_pending(self) -> None:
        """Do the surgery that accumulation or a declared task that never came left undone."""
        if not self.pending:
            return
        refuse_scaled_sentinel(self)
        # Over several ranks, one that had no task in any micro-batch has nothing that could have been zeroed, and takes
        # part in what the others send.
        empty = self.session.layout.several and not self.capture.has_rows()
        if empty or self.capture.is_live():
            self.capture.open()
            self.finish(defer=False)
        else:  # zeroed since
            self.forget()

    def forget(self) -> None:
        """Drop rows and everything that belongs to them; the last report stays."""
        self.capture.clear()
        self.constraint, self.next_state = None, None
        self.pending, self.skipped, self.losses = False, (), {}
        self.rotation.forget()
        self.entered.clear()


def refuse_nesting(engine: Engine, what: str) -> None:
    """Refuse what would take gradients inside a task's function or block."""
    if engine.computing is not None:
        raise MultiTaskError(
            f"{what} was called inside the function of {engine.computing!r}: it must only compute a loss"
        )
    if engine.in_task:
        raise MultiTaskError(f"{what} was called inside `with optimizer.task(...)`: only loss.backward() belongs there")


def refuse_scaled_sentinel(engine: Engine) -> None:
    """Refuse to go on where p.grad was changed while surgery waits, and the rows cannot know."""
    if not engine.pending:
        return
    handed_scale = any(getattr(optimizer, "grad_scale", None) is not None for optimizer in engine.optimizers)
    if handed_scale or engine.capture.sentinel_was_scaled():
        absent = [name for name in engine.options.tasks or () if name not in engine.capture.rows]
        raise MultiTaskError(
            "p.grad was clipped, unscaled or zeroed in place while surgery was waiting, which would undo it. It "
            f"waits inside accumulate(), and for declared tasks that have not come (now: {absent}): run the last "
            "backward outside accumulate(), or wrap without tasks=. optimizer.zero_grad() starts afresh."
        )
