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
from gradsurg.distributed.layout import ALONE
from gradsurg.distributed.session import Traffic
from gradsurg.errors import MultiTaskError
from gradsurg.gradients.capture import Capture
from gradsurg.gradients.param_groups import parameter_names, trained
from gradsurg.gradients.recycle import Spare
from gradsurg.gradients.rows import TaskRows
from gradsurg.gradients.total import pass_in_progress
from gradsurg.guarantee.constraint import Judgement
from gradsurg.guarantee.copies import Snapshot
from gradsurg.optimizer.checkpoint import Memory
from gradsurg.optimizer.direction import operate
from gradsurg.optimizer.inputs import Patient
from gradsurg.optimizer.options import Settings
from gradsurg.optimizer.report import LaterReport, Report
from gradsurg.optimizer.schedule import Batched, Refresh, Rotation
from gradsurg.surgery.margin import named
from gradsurg.surgery.priority import check_names

__all__ = ["Surgeon", "refuse_nesting", "refuse_scaled_mark"]


class Surgeon:
    """Makes of fresh rows what is in p.grad, and keeps what the step is judged by."""

    def __init__(self, settings: Settings, model: nn.Module | None = None) -> None:
        self.settings = settings
        self.optimizers: list[Optimizer] = []
        self.memory = Memory(self.optimizers)
        self.capture = Capture(self.parameters, settings.row_dtype)
        self.refresh = Refresh(settings.refresh_every, self.memory)
        self.batched = Batched(settings.batched)
        self.rotation = Rotation(settings.rotate, self.memory, settings.row_dtype)
        self.traffic = Traffic(self.capture, Ranks(model, whole_rows=settings.rotate is not None))
        self.latest: Report | LaterReport | None = None  # as the device left it
        self.deferring = 0  # depth of accumulate()
        self.in_task = False
        self.computing: str | None = None  # the task whose function is being called
        self.bringing = False  # whether gradients are on their way in
        self.spare = Spare()
        self.pending = False  # rows that no surgery has seen yet
        self.entered: set[str] = set()  # of the declared tasks, those that left task() since the last surgery
        self.unrun = 0  # totals built since the last step whose backward never came
        self.losses: dict[str, Tensor] = {}
        self.skipped: tuple[str, ...] = ()  # tasks that nonfinite="skip_task" left out of this step
        self.judgement: Judgement | None = None
        self.stepped: set[int] = set()  # of several optimizers, those that used this surgery
        self.next_state: Mapping[str, Any] | None = None
        self.first: tuple[Judgement | None, Report | LaterReport | None] | None = None  # of a closure's evaluations
        self.snapshot: Snapshot | None = None
        self.warned_of_names = self.warned_of_no_losses = False
        self.told_of_features = False
        self.enclosing_pass = -1  # of the run that is open: the backward pass that its total is part of
        self.joined = False  # whether a second total joined that run
        self.met: set[str] = set()  # tasks that had a block of their own in this process

    def __reduce__(self) -> Any:
        # Copies start with the same options and no rows, and look for a DDP or FSDP2 module of their own; several
        # optimizers copied together share one copy.
        return Surgeon, (self.settings,)

    @property
    def report(self) -> Report | None:
        """What the last surgery and step did; where that is still on a device, reading it waits."""
        if isinstance(self.latest, LaterReport):
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
        self.traffic.lay_out(self.parameters)
        if self.settings.rotate is not None and not self.traffic.layout.whole_rows:
            raise MultiTaskError(
                "rotate= does not go with sharded parameters: its averages of all tasks' gradients are part of the "
                "state dict, which no rank could hold whole. Use refresh_every=; docs/many-gpus.md says what a full "
                "step costs."
            )
        surgery = self.settings.pipeline.surgery
        if surgery.measures_excess and self.traffic.layout is not ALONE:
            raise MultiTaskError(
                f"surgery={surgery!r} needs whole rows, and over several ranks each holds a part of them: use "
                "curvature='task'"
            )

    def turns(self, names: list[str]) -> list[str]:
        """Return the tasks that could be due in this step: with rotate=, those of all ranks, in everybody's order."""
        return names if self.settings.rotate is None else self.traffic.agree_on(names)

    # -- before surgery, and beside it --------------------------------------------------------------------------

    def settle(self) -> None:
        """Finish what waits and drop what died, before something is added to p.grad beside the rows."""
        refuse_nesting(self, "total() or backward()")
        self.lay_out()
        refuse_scaled_mark(self)
        self.unrun = 0
        if self.capture.opened is None:
            self.finish_pending()
        elif self.enclosing_pass != pass_in_progress():
            self.abort()

    def record(self, report: Report, state: Mapping[str, Any] | None) -> None:
        """Note what was added to p.grad beside the rows: there is nothing to judge the update by."""
        self.latest, self.judgement, self.next_state = report, None, state
        self.stepped.clear()

    def introduce(self, names: Iterable[str]) -> None:
        """Check the names in the options against those declared or seen; a typo in `primary` must not pass silently."""
        pipeline, preferences = self.settings.pipeline, self.settings.preferences
        if pipeline.levels or preferences or pipeline.margin:
            known = {*self.memory.tasks, *(self.settings.tasks or ()), *names}
            check_names(pipeline.levels, known)
            check_names((tuple(preferences),), known, "preferences")
            check_names((tuple(named(pipeline.margin)),), known, "margin")
        self.learn(names)

    def learn(self, names: Iterable[str]) -> None:
        """Note the tasks that this process met."""
        if not self.traffic.layout.several:  # else they are learnt in the order that the ranks agree on
            self.memory.learn(names)

    # -- surgery ------------------------------------------------------------------------------------------------

    def finish(self, defer: bool | None = None) -> None:
        """Commit the fresh rows and operate, unless accumulation defers that; on any error p.grad is as before."""
        if self.capture.opened is None:  # something else came in between and settled it
            return
        waiting = self.deferring > 0 if defer is None else defer
        try:
            sent, losses, agreed = self.traffic.settle(waiting, self.losses, self.joined)
            self.losses = dict(losses)
            self.memory.learn(agreed)
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
            self._operate()
        except BaseException:
            # The fresh rows are part of the others by now; what those amounted to stands in p.grad.
            self.forget()
            self.capture.give_back(held)
            raise

    def _operate(self) -> None:
        outcome = operate(
            Patient(
                rows=self.rotation.completed(self.capture.rows),
                parameters=self.parameters(),
                groups=[group["params"] for optimizer in self.optimizers for group in optimizer.param_groups],
                losses=self.losses,
                settings=self.settings,
                step=self.memory.step,
                state=self.memory.state,
                skipped=self.skipped,
                names=parameter_names(self.optimizers) if self.settings.granularity == "tensor" else {},
                layout=self.traffic.layout,
                spare=self.spare,
            )
        )
        self.capture.write(self.traffic.layout.whole(outcome.gradients))
        self.latest = self.rotation.reported(outcome.report)
        self.judgement, self.next_state = outcome.judgement, outcome.state
        self.pending = False
        self.entered.clear()
        self.stepped.clear()

    def abort(self, error: BaseException | None = None, opened: object = None) -> None:
        """Give p.grad back as it was, and tell other ranks; `opened` limits this to the run of that token."""
        if opened is None or opened is self.capture.opened:
            self.capture.abort()
            self.traffic.fail(error)
            self.joined = False

    def screen(self, *parts: TaskRows) -> None:
        """Apply the `nonfinite` policy to rows with NaN or infinity, given as parts of the same tasks' rows."""
        if self.settings.nonfinite == "propagate":
            return
        found = list(dict.fromkeys(name for part in parts for name in part.nonfinite()))
        layout = self.traffic.layout
        # Rows that are not sent yet are this rank's alone, and others may have other tasks.
        names = layout.agreed(list(dict.fromkeys(name for part in parts for name in part)))
        bad = layout.on_any_rank(names, found) if layout.several else found
        if bad and self.settings.nonfinite == "raise":
            raise MultiTaskError(
                f"the gradients of {', '.join(map(repr, bad))} are not finite. Parameters, p.grad and optimizer state "
                "are as before. nonfinite='skip_task' leaves such a task out of the step."
            )
        for name in bad:
            for part in parts:
                if name in part:
                    part.drop(name)
            self.memory.count_skipped(name)
            if name not in self.skipped:
                self.skipped = (*self.skipped, name)

    def finish_pending(self) -> None:
        """Do the surgery that accumulation or a declared task that never came left undone."""
        if not self.pending:
            return
        refuse_scaled_mark(self)
        # Over several ranks, one that had no task in any micro-batch has nothing that could have been zeroed, and takes
        # part in what the others send.
        empty = self.traffic.layout.several and not self.capture.has_rows()
        if empty or self.capture.is_live():
            self.capture.open()
            self.finish(defer=False)
        else:  # zeroed since
            self.forget()

    def forget(self) -> None:
        """Drop rows and everything that belongs to them; the last report stays."""
        self.capture.clear()
        self.judgement, self.next_state = None, None
        self.pending, self.skipped, self.losses = False, (), {}
        self.rotation.forget()
        self.entered.clear()


def refuse_nesting(surgeon: Surgeon, what: str) -> None:
    """Refuse what would take gradients inside a task's function or block."""
    if surgeon.computing is not None:
        raise MultiTaskError(
            f"{what} was called inside the function of {surgeon.computing!r}: it must only compute a loss"
        )
    if surgeon.in_task:
        raise MultiTaskError(f"{what} was called inside `with optimizer.task(...)`: only loss.backward() belongs there")


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
