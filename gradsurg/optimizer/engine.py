"""The state of one wrapped optimizer, or of several that share their rows, and the surgery at the end of a run.

Everything mutable is in one Engine that is changed and never replaced: Lightning copies an optimizer's __dict__, and
both copies must go on seeing the same rows. backward.py brings gradients in, step.py does the optimizer's step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from gradsurg.distributed.detect import Ranks
from gradsurg.distributed.layout import ALONE
from gradsurg.distributed.session import Session
from gradsurg.errors import MultiTaskError
from gradsurg.gradients.capture import Capture
from gradsurg.gradients.losses import Compute, detached
from gradsurg.gradients.param_groups import parameter_names, trained
from gradsurg.gradients.rows import HeldGradients, TaskRows, is_finite
from gradsurg.gradients.total import pass_in_progress
from gradsurg.optimizer.cheap.rotation import Rotation
from gradsurg.optimizer.checkpoint import Checkpoint
from gradsurg.optimizer.direction import compute_direction, whole_direction_again
from gradsurg.optimizer.inputs import StepInputs
from gradsurg.optimizer.options import Options
from gradsurg.optimizer.report import DeferredReport, Report
from gradsurg.optimizer.run import Passes, Run, Step, several_processes

__all__ = ["Engine"]


class Engine:
    """Holds all mutable state of a wrapped optimizer.

    It turns the gradients of one backward pass into p.grad, and keeps what step() needs to enforce the guarantee.
    """

    def __init__(self, options: Options, passes: Passes, model: nn.Module | None = None) -> None:
        self.options, self.passes = options, passes
        self.checkpoint = Checkpoint()
        # Nothing in here refers to the engine or to an optimizer: in a circle, the model would outlive its last user.
        make = partial(TaskRows, options.row_dtype, options.shared)
        self.capture = Capture(partial(_parameters, self.checkpoint), make)
        self.rotation = Rotation(options.rotate, self.checkpoint, make)
        ranks = Ranks(model, whole_rows=options.rotate is not None, options=options.agreed)
        self.session = Session(self.capture, ranks)
        self.latest: Report | DeferredReport | None = None
        self.run: Run | None = None
        self.step = Step()
        # What a call in progress does: ("task", name), ("function", name) or ("total", ""); else None.
        self.busy: tuple[str, str] | None = None
        # Depth of accumulate().
        self.deferring = 0
        # What happened once: warnings given, "batched works", and "task " + name for each task() block met.
        self.told: set[str] = set()

    def __reduce__(self) -> Any:
        # A copy starts with the same options and no rows, and looks for its own DDP or FSDP2 module. Optimizers that
        # are copied together share one copied engine.
        return Engine, (self.options, self.passes)

    @property
    def optimizers(self) -> list[Optimizer]:
        """The wrapped optimizers that share the rows."""
        return _alive(self.checkpoint)

    @property
    def report(self) -> Report | None:
        """What the last surgery and step did; reading it waits if it is still on a device."""
        if isinstance(self.latest, DeferredReport):
            self.latest = self.latest.read()
        return self.latest

    def parameters(self) -> list[Tensor]:
        """Return what the optimizers train; never kept, because trainers replace it inside param_groups."""
        return _parameters(self.checkpoint)

    # -- before a run -------------------------------------------------------------------------------------------

    @contextmanager
    def doing(self, kind: str, name: str = "") -> Iterator[None]:
        """Note what is in progress, as long as the block lasts."""
        before = self.busy
        try:
            self.busy = (kind, name)
            yield
        finally:
            self.busy = before

    def lay_out(self) -> None:
        """Find out how the parameters are spread over ranks; see Session."""
        if self.session.layout is ALONE and not several_processes():
            return
        self.session.lay_out(self.parameters)
        if self.options.rotate is not None and not self.session.layout.whole_rows:
            raise MultiTaskError(
                "rotate= does not go with sharded parameters: its averages of all tasks' gradients are part of the "
                "state dict, which no rank could hold whole. Use refresh_every=; docs/many-gpus.md says what a full "
                "step costs."
            )

    def check_names(self, names: Iterable[str], preferences: Iterable[str] = ()) -> None:
        """Check the task names in the options against those declared, seen or given: a typo must not pass silently."""
        if self.options.names_tasks or preferences:
            self.options.check_names({*self.checkpoint.tasks, *(self.options.tasks or ()), *names}, preferences)

    def learn(self, names: Iterable[str]) -> None:
        """Note the tasks that this process met; over several ranks they are learnt in the order agreed on."""
        if not self.session.layout.several:
            self.checkpoint.learn(names)

    def refuse_changes(self) -> None:
        """Refuse to go on if p.grad was changed while surgery waits, because the rows cannot know."""
        if not self.step.pending:
            return
        handed_scale = any(getattr(optimizer, "grad_scale", None) is not None for optimizer in self.optimizers)
        if handed_scale or self.capture.sentinels_were_changed():
            absent = [name for name in self.options.tasks or () if name not in self.capture.rows]
            raise MultiTaskError(
                "p.grad was clipped, unscaled, masked, written to twice or zeroed in part while surgery was waiting, "
                "which would undo it. It waits inside accumulate() and no_sync(), and for declared tasks that have not "
                f"come (now: {absent}): do it after a backward outside. optimizer.zero_grad() starts afresh."
            )

    # -- a run --------------------------------------------------------------------------------------------------

    def open(self, run: Run) -> None:
        """Take p.grad away for a run; one whose backward pass died without telling us is dropped first."""
        self.abort()
        run.parameters, run.outer_pass = self.parameters(), pass_in_progress()
        if not self.capture.open(run.parameters, run.on_live_rows) and self.capture.has_rows():
            self.step.losses, self.step.skipped = {}, self.capture.still_nonfinite()
        self.run, self.session.preferences = run, {**self.step.preferences, **run.preferences}

    def open_or_join(self, run: Run) -> list[tuple[str | None, Tensor | Compute]]:
        """Open a run, or join the one that another total of this backward pass opened; return the passes to run."""
        self.refuse_changes()
        present = run.present
        due = list(present)
        if self.options.rotate is not None:
            due = self.rotation.choose(self.session.agree_on(due), run.gradient)
        passes: list[tuple[str | None, Tensor | Compute]] = [(name, present[name]) for name in due if name in present]
        if run.plain is not None and run.plain.requires_grad:
            passes.append((None, run.plain))
        run.known = {name: detached(loss) for name, loss in run.tensors.items()}
        # Other totals of this backward pass may have a part of the graph in common with this one.
        run.others, self.step.unrun = self.step.unrun - run.nested, 0
        if self.run is not None and self.run.outer_pass == pass_in_progress():
            run.joins = self.run.joined = True
            run.others = self.run.others = self.run.others - 1
            self.run.preferences.update(run.preferences)
            run.parameters = self.run.parameters
            self.capture.take_plain()
        else:
            self.open(run)
        run.retain_graph |= run.others > 0
        return passes

    def finish(self, defer: bool | None = None) -> None:
        """Turn the rows of the open run into p.grad, unless surgery has to wait; on any error p.grad is as before."""
        if (run := self.run) is None:  # another call came in between, and finished or dropped it
            return
        # gradients/ and distributed/: what each task wants, over all ranks.
        rows, held = self._commit(run, self.deferring > 0 if defer is None else defer)
        if rows is None:
            self.capture.write_pending()
            return
        try:
            # linalg/ for the Gramian, normalize/, surgery/ and solvers/ for the weights, linalg/ for their sum.
            inputs = self.inputs(rows, run.parameters)
            result = compute_direction(inputs)
            whole = result.gradients if self.session.layout is ALONE else self.session.layout.whole(result.gradients)
            self.capture.write(whole, partial(whole_direction_again, inputs))
        except BaseException:
            # The fresh rows are merged into the older ones by now, so all rows go. p.grad is what it was before.
            self.forget()
            held.restore()
            raise
        self.latest = result.report if self.options.rotate is None else self.rotation.reported(result.report)
        kept = self.step.losses, self.step.skipped, self.step.preferences
        self.step = Step(*kept, constraint=result.constraint, next_state=result.state)

    def _commit(self, run: Run, waiting: bool) -> tuple[TaskRows | None, HeldGradients]:
        """Make the fresh rows, over all ranks, part of the rows; return None for these if surgery has to wait."""
        sent: bool | None = None
        losses: Mapping[str, Tensor] = {**self.step.losses, **run.known}
        try:
            if self.session.layout.several:
                sent, losses, agreed = self.session.settle(waiting, losses, run.joined)
                self.checkpoint.learn(agreed)
            bad = self.screen(losses, self.capture.fresh)
            held = self.capture.commit(sent)
            if self.capture.rows.overflowed:
                run.excuse(self.capture.rows)
        except BaseException as error:
            self.abort(error)
            raise
        # A task left out of this run may have rows of earlier ones, to which its earlier loss belongs.
        self.step.losses = {**losses, **{name: loss for name, loss in self.step.losses.items() if name in bad}}
        self.step.preferences.update(run.preferences)
        self.run, self.step.pending = None, True
        return (None if waiting or sent is False else self.capture.rows), held

    def inputs(self, rows: TaskRows, parameters: list[Tensor]) -> StepInputs:
        """Return what a surgery on these rows of these parameters has to know."""
        options = self.options if not self.step.preferences else self.options.preferring(self.step.preferences)
        return StepInputs(
            rows=rows if options.rotate is None else self.rotation.completed(rows, self.step.skipped),
            parameters=parameters,
            groups=[group["params"] for optimizer in self.optimizers for group in optimizer.param_groups],
            losses=self.step.losses,
            options=options,
            step=self.checkpoint.step,
            state=self.checkpoint.state,
            skipped=self.step.skipped,
            names=parameter_names(self.optimizers) if options.granularity == "tensor" else {},
            layout=self.session.layout,
            recycled=self.capture.recycled,
        )

    def abort(self, error: BaseException | None = None, run: Run | None = None) -> None:
        """Give p.grad back as it was, and tell other ranks; `run` limits this to that run."""
        if self.run is not None and (run is None or run is self.run):
            self.capture.abort()
            if self.session.layout is not ALONE:
                self.session.fail(error)
            self.run = None

    def screen(self, losses: Mapping[str, Tensor], *parts: TaskRows) -> list[str]:
        """Apply the `nonfinite` policy to the losses and the parts of the tasks' rows; return the tasks left out."""
        if self.options.nonfinite == "propagate":
            return []
        layout, infinite = self.session.layout, {name for part in parts for name in part.nonfinite()}
        # With rotate=, a task that is not due has a loss and no row of this run.
        here = dict.fromkeys(name for part in (losses if self.options.rotate else (), *parts) for name in part)
        found = [name for name in here if name in infinite or (name in losses and not is_finite(losses[name]))]
        # Rows that are not sent yet belong to this rank alone, and others may have other tasks.
        bad = layout.on_any_rank(layout.agreed(list(here)), found) if layout.several else found
        if bad and self.options.nonfinite == "raise":
            raise MultiTaskError(
                f"the losses or gradients of {', '.join(map(repr, bad))} are not finite. Parameters, p.grad and "
                "optimizer state are as before. nonfinite='skip_task' leaves such a task out of the step."
            )
        for name in bad:
            for part in parts:
                if name in part:
                    part.drop(name)
            self.checkpoint.count_skipped(name)
        self.step.skipped = tuple(dict.fromkeys((*self.step.skipped, *bad)))
        return bad

    # -- between runs -------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Do surgery that waits, and drop a run that died, before a result that has no rows is added to p.grad."""
        self.refuse_changes()
        self.step.unrun = 0
        if self.run is None:
            self.finish_pending()
        elif self.run.outer_pass != pass_in_progress():
            self.abort()

    def record(self, report: Report, state: Mapping[str, Any] | None) -> None:
        """Note a result that was added to p.grad and has no rows: nothing constrains its update."""
        self.latest, self.step.constraint, self.step.next_state = report, None, state
        self.step.stepped.clear()

    def finish_pending(self) -> None:
        """Do the surgery that accumulation, or a declared task that never came, left undone."""
        if not self.step.pending:
            return
        self.refuse_changes()
        # A rank that had no task in any micro-batch has no rows that could have been zeroed. It takes part in what the
        # others send.
        if (self.session.layout.several and not self.capture.has_rows()) or self.capture.is_live():
            self.open(Run())
            self.finish(defer=False)
        else:  # zeroed since
            self.forget()

    def forget(self) -> None:
        """Drop rows and everything that belongs to them; the last report stays."""
        self.capture.clear()
        if self.options.rotate is not None:
            self.rotation.forget()
        self.run, self.step = None, Step(stepped=self.step.stepped, unrun=self.step.unrun)


def _alive(checkpoint: Checkpoint) -> list[Optimizer]:
    return [optimizer for each in checkpoint.references if (optimizer := each()) is not None]


def _parameters(checkpoint: Checkpoint) -> list[Tensor]:
    parameters = [p for optimizer in _alive(checkpoint) for p in trained(optimizer)]
    return list(dict(zip(map(id, parameters), parameters, strict=True)).values())  # each once
