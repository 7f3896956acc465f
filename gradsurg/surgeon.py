"""The state of one wrapped optimizer (or several that share their rows), and the flow of a step through it.

Everything mutable lives in one Surgeon that is mutated and never rebound: Lightning copies an optimizer's __dict__, and
both copies must go on seeing the same rows.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from gradsurg.capture import Capture, pass_in_progress
from gradsurg.compiled import Watch, advise, anything_compiled, noticing_kept_graphs
from gradsurg.distributed import Ranks, Traffic
from gradsurg.errors import MultiTaskError, unknown_name
from gradsurg.features import run_on_features
from gradsurg.hooks import refusing_steps_in_backward
from gradsurg.judgement import Judgement, trained
from gradsurg.losses import Compute, check_row, seed_of
from gradsurg.margin import named
from gradsurg.memory import Memory
from gradsurg.naming import parameter_names
from gradsurg.onboard.report import LaterReport
from gradsurg.operation import Patient, operate
from gradsurg.priority import check_names
from gradsurg.recompute import evaluate, explain
from gradsurg.refresh import Refresh, run_reused
from gradsurg.report import Report
from gradsurg.rotation import Rotation
from gradsurg.rows import Row, TaskRows
from gradsurg.settings import Settings
from gradsurg.snapshot import Snapshot

__all__ = ["Surgeon"]

Task = Tensor | Compute | None
Finish = Callable[[Callable[[], None], Callable[[], None]], None]


class Surgeon:
    """Takes rows, writes p.grad, guards the update."""

    def __init__(self, settings: Settings, model: nn.Module | None = None) -> None:
        self.settings = settings
        self.optimizers: list[Optimizer] = []
        self.memory = Memory(self.optimizers)
        self.capture = Capture(self.parameters, settings.row_dtype)
        self.refresh = Refresh(settings.refresh_every, self.memory)
        self.rotation = Rotation(settings.rotate, self.memory, settings.row_dtype)
        self.traffic = Traffic(self.capture, Ranks(model))
        self.latest: Report | LaterReport | None = None  # as the device left it
        self.deferring = 0  # depth of accumulate()
        self.in_task = False
        self.computing: str | None = None  # the task whose function is being called
        self.pending = False  # rows that no surgery has seen yet
        self.entered: set[str] = set()  # of the declared tasks, those that left task() since the last surgery
        self.unrun = 0  # totals built since the last step whose backward never came
        self.losses: dict[str, Tensor] = {}
        self.skipped: tuple[str, ...] = ()  # tasks that nonfinite="skip_task" left out of this step
        self.judgement: Judgement | None = None
        self.stepped: set[int] = set()  # of several optimizers, those that used this surgery
        self._next_state: Mapping[str, Any] | None = None
        self._first: tuple[Judgement | None, Report | LaterReport | None] | None = None  # of a closure's evaluations
        self._snapshot: Snapshot | None = None
        self._warned_of_names = False
        self.told_of_features = False
        self._joined = False  # whether a second total joined that run
        self._met: set[str] = set()  # tasks that had a block of their own in this process
        self._pass = -1  # the enclosing backward pass of the run that is open

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
        return list(dict(zip(map(id, parameters), parameters, strict=True)).values())  # each once

    def lay_out(self) -> None:
        """Find out how the parameters are spread over ranks; see Traffic."""
        self.traffic.lay_out(self.parameters())
        if self.traffic.layout.several and (self.settings.refresh_every > 1 or self.settings.rotate is not None):
            raise MultiTaskError(
                "refresh_every= and rotate= work in one process only: ranks would have to agree on whose turn it is. "
                "Leave them out; docs/many-gpus.md says what a full step costs."
            )

    # -- gradients come in --------------------------------------------------------------------------------------

    def bring(
        self,
        losses: Mapping[str, Task],
        plain: Tensor | None = None,
        features: list[Tensor] | None = None,
        gradient: Tensor | None = None,
        retain_graph: bool = False,
        finish: Finish | None = None,
    ) -> None:
        """Let gradients in by the way that the options and the step call for; arguments as for `run`."""
        tensors = {name: loss for name, loss in losses.items() if isinstance(loss, Tensor)}
        if features is not None:
            self.lay_out()
            if self.traffic.layout.several:
                raise MultiTaskError(
                    "features= works in one process only: each rank has features of its own part of the batch. Leave "
                    "it out; docs/many-gpus.md says what a full step costs."
                )
            run_on_features(self, tensors, features, plain, gradient, retain_graph)
            return
        present = {name: loss for name, loss in tensors.items() if loss.requires_grad}
        weights = None if self.capture.is_live() else self.refresh.weights(present)
        if weights is None or not run_reused(self, present, weights, plain, gradient, retain_graph):
            self.run(losses, plain, gradient, retain_graph, finish)

    def run(
        self,
        losses: Mapping[str, Task],
        plain: Tensor | None = None,
        gradient: Tensor | None = None,
        retain_graph: bool = False,
        finish: Finish | None = None,
    ) -> None:
        """Run the tasks' backward passes into fresh rows, then surgery; on any error p.grad is as before.

        Args:
            losses: Name -> loss, or a function that computes it; those that are None or do not require grad are absent.
            plain: A loss that takes no part in surgery.
            gradient: What to scale every loss by, as autograd hands it to a scaled total.
            retain_graph: Keep the graph for another run.
            finish: Called with (what to do when the enclosing backward pass is complete, what to do if it dies).
        """
        self._refuse_nesting("total() or backward()")
        self.lay_out()
        self._refuse_scaled_mark()
        self.introduce(losses)
        given = {
            name: task
            for name, task in losses.items()
            if task is not None and (not isinstance(task, Tensor) or task.requires_grad)
        }
        due = self.rotation.choose(list(given), gradient)
        passes: list[tuple[str | None, Tensor | Compute]] = [(name, given[name]) for name in due]
        if plain is not None and plain.requires_grad:
            passes.append((None, plain))
        known = {name: loss.detach().reshape(()) for name, loss in losses.items() if isinstance(loss, Tensor)}
        self.unrun = 0
        joining = self.capture.opened is not None and self._pass == pass_in_progress()
        if joining:  # a second total in one backward pass, while the first waits for its end
            self.capture.take_plain()
        else:
            self._abort()  # of a backward pass that died, where nobody told us
            self.capture.open()
            self._pass = pass_in_progress()
        self._joined = joining
        try:
            if not joining:
                self.traffic.start([which for which, _ in passes if which is not None], self.deferring > 0)
            retained = retain_graph or sum(isinstance(task, Tensor) for _, task in passes) > 1
            watch = Watch([task for _, task in passes if isinstance(task, Tensor)] if retained else [])
            parameters = self.parameters()
            for i, (which, task) in enumerate(passes):
                if not isinstance(task, Tensor):
                    known.update(self._run_function(str(which), task, retain_graph))
                else:
                    keep = retain_graph or any(isinstance(later, Tensor) for _, later in passes[i + 1 :])
                    with self.traffic.layout.quiet(), advise(), refusing_steps_in_backward(parameters):
                        torch.autograd.backward(task, seed_of(gradient, task), retain_graph=keep)
                    if keep:
                        watch.check(task, "plain=" if which is None else repr(which))
                    if which is None:
                        self.capture.take_plain()
                    else:
                        self.capture.take(which)
                if which is not None and not joining:
                    self.traffic.captured(which)
            if not known and plain is None:
                raise ValueError(f"no function of {list(losses)} returned a loss that requires grad")
        except BaseException as error:
            self._abort(error)
            raise
        self.losses = known
        if not joining:
            (finish or _now)(self.finish, functools.partial(self._abort, None, self.capture.opened))

    def settle(self) -> None:
        """Finish what waits and drop what died, before something is added to p.grad beside the rows."""
        self._refuse_nesting("total() or backward()")
        self.lay_out()
        self._refuse_scaled_mark()
        self.unrun = 0
        if self.capture.opened is None:
            self._finish_pending()
        elif self._pass != pass_in_progress():
            self._abort()

    def record(self, report: Report, state: Mapping[str, Any] | None) -> None:
        """Note what was added to p.grad beside the rows: there is nothing to judge the update by."""
        self.latest, self.judgement, self._next_state = report, None, state
        self.stepped.clear()

    def _run_function(self, name: str, compute: Compute, retain_graph: bool) -> dict[str, Tensor]:
        """Compute a task's loss and run its backward pass; return the loss by name, or nothing where it is absent."""
        opened, self.computing = self.capture.opened, name
        try:
            with self.traffic.layout.quiet():
                loss = evaluate(name, compute)
        finally:
            self.computing = None
        if self.capture.opened is not opened:
            raise MultiTaskError(f"the function of {name!r} called zero_grad(): it must only compute a loss")
        if loss is None:
            return {}
        try:
            with self.traffic.layout.quiet():
                torch.autograd.backward(loss, retain_graph=retain_graph)
        except RuntimeError as error:
            raise explain(name, error) from error
        self.capture.take(name)
        return {name: loss.detach().reshape(())}

    @contextmanager
    def entering(self, name: str) -> Iterator[None]:
        """Send what happens to p.grad inside this block to one task's row."""
        self._refuse_nesting("task()")
        self._refuse_cheap("task()")
        self.lay_out()
        self._refuse_scaled_mark()
        declared = self.settings.tasks
        if declared is not None and name not in declared:
            raise unknown_name("task()", name, declared)
        self._abort()
        self.capture.open()
        self.in_task = True
        # Until something is compiled, only a task's first block is watched: there the first compilation may happen.
        watched = self.parameters() if anything_compiled() or name not in self._met else []
        self._met.add(name)
        try:
            with (
                self.traffic.layout.quiet(),
                advise(),
                noticing_kept_graphs(watched),
                refusing_steps_in_backward(self.parameters()),
            ):
                yield
        except BaseException as error:
            self._abort(error)
            raise
        finally:
            self.in_task = False
        self._learn([name])
        self.capture.take(name)
        waiting = declared is not None and not {*self.entered, name}.issuperset(declared)
        self.finish(defer=waiting or self.deferring > 0)
        if self.pending:
            self.entered.add(name)

    def receive(self, gradients: Mapping[str, Sequence[Tensor | None]]) -> None:
        """Take rows that were computed elsewhere."""
        self._refuse_nesting("set_gradients()")
        self._refuse_cheap("set_gradients()")
        self._refuse_scaled_mark()
        if not isinstance(gradients, Mapping) or not gradients:
            raise ValueError("gradients must be a dict from task name to a list of tensors, with at least one task")
        if self.settings.tasks is not None:
            check_names((tuple(gradients),), self.settings.tasks, "gradients")
        parameters = self.parameters() if self.settings.shared is None else list(self.settings.shared)
        rows = {name: check_row(name, tensors, parameters) for name, tensors in gradients.items()}
        self.introduce(rows)
        self.lay_out()
        self.capture.open()
        for name, row in rows.items():
            self.capture.give(name, row)
        self.losses = {}
        self.finish()

    def introduce(self, names: Iterable[str]) -> None:
        """Check the names in the options against those declared or seen; a typo in `primary` must not pass silently."""
        known = {*self.memory.tasks, *(self.settings.tasks or ()), *names}
        check_names(self.settings.pipeline.levels, known)
        check_names((tuple(self.settings.preferences),), known, "preferences")
        check_names((tuple(named(self.settings.pipeline.margin)),), known, "margin")
        self._learn(names)

    def _learn(self, names: Iterable[str]) -> None:
        if not self.traffic.layout.several:  # else they are learnt in the order that the ranks agree on
            self.memory.learn(names)

    # -- surgery ------------------------------------------------------------------------------------------------

    def finish(self, defer: bool | None = None) -> None:
        """Commit the fresh rows and operate, unless accumulation defers that; on any error p.grad is as before."""
        if self.capture.opened is None:  # something else came in between and settled it
            return
        waiting = self.deferring > 0 if defer is None else defer
        try:
            sent, losses, agreed = self.traffic.settle(waiting, self.losses, self._joined)
            self.losses = dict(losses)
            self.memory.learn(agreed)
            self._screen()
        except BaseException as error:
            self._abort(error)
            raise
        held = self.capture.commit(sent)
        self.pending, self._joined = True, False
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
            )
        )
        self.capture.write(self.traffic.layout.whole(outcome.gradients))
        self.latest = self.rotation.reported(outcome.report)
        self.judgement, self._next_state = outcome.judgement, outcome.state
        self.pending = False
        self.entered.clear()
        self.stepped.clear()

    def _abort(self, error: BaseException | None = None, opened: object = None) -> None:
        """Give p.grad back as it was, and tell other ranks; `opened` limits this to the run of that token."""
        if opened is None or opened is self.capture.opened:
            self.capture.abort()
            self.traffic.fail(error)
            self._joined = False

    def _screen(self) -> None:
        """Apply the `nonfinite` policy to fresh rows with NaN or infinity, before they touch anything."""
        self.screen(self.capture.fresh)

    def screen(self, *parts: TaskRows) -> None:
        """Apply the `nonfinite` policy to parts of the same tasks' rows."""
        if self.settings.nonfinite == "propagate":
            return
        found = list(dict.fromkeys(name for part in parts for name in part.nonfinite()))
        bad = self.traffic.layout.on_any_rank(self.capture.fresh, found) if self.traffic.layout.several else found
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

    def _finish_pending(self) -> None:
        """Do the surgery that accumulation or a declared task that never came left undone."""
        if not self.pending:
            return
        self._refuse_scaled_mark()
        if self.capture.is_live():
            self.capture.open()
            self.finish(defer=False)
        else:  # zeroed since
            self.forget()

    # -- the step -----------------------------------------------------------------------------------------------

    def before_step(self, optimizer: Optimizer, closure: bool) -> Row:
        """Finish what is pending and return copies of the parameters, by which the step is judged or undone."""
        if self.in_task:
            raise MultiTaskError("step() was called inside `with optimizer.task(...)`: leave the block first")
        self._abort()  # of a backward pass that died, where nobody told us
        self._finish_pending()
        if not closure:
            self._warn_of_unrun_totals()
        self._warn_of_unknown_names()
        self._first = None
        before = self._copies(optimizer, closure)
        self._snapshot = Snapshot(optimizer, before) if self.settings.atomic else None
        return before

    def _copies(self, optimizer: Optimizer, closure: bool) -> Row:
        if self.settings.guarantee != "update":
            return Row()
        if closure:  # which parameters are shared is known only once the closure has run
            return Row((p, p.detach().clone()) for p in trained(optimizer))
        if self.judgement is None or not any(map(self.capture.still_ours, self.judgement.parameters(optimizer))):
            return Row()
        return Row((p, p.detach().clone()) for p in trained(optimizer) if p.grad is not None)

    def watch(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Return a closure that keeps the rows of its first evaluation, by which the whole step is judged."""

        def watched() -> Any:
            if self._first is not None:  # an optimizer that evaluates again: this evaluation gets rows of its own
                self.capture.part_with_rows()
            value = closure()
            self._finish_pending()
            if self._first is None:
                self._first = (self.judgement, self.latest)
            else:
                self._evaluated_again = True
            return value

        self._evaluated_again = False
        return watched

    def after_step(self, optimizer: Optimizer, before: Row) -> None:
        """Project the movement, then let the rows go."""
        self._snapshot = None
        self._warn_of_unrun_totals()
        if self._first is not None:
            self.judgement, self.latest = self._first
            self._first = None
        if len(before) and self.judgement is not None:
            movement = self.judgement.hold(optimizer, before)
            if self.latest is not None and movement is not None:
                self.latest = self.latest.with_movement(movement)
        self.stepped.add(id(optimizer))
        if all(id(other) in self.stepped for other in self.optimizers):
            self._end_of_step()

    def take_back(self, optimizer: Optimizer, before: Row) -> None:
        """Undo what a failed step did to that of which there is a copy; rows stay for another try."""
        if self._snapshot is not None:
            self._snapshot.restore()
            self._snapshot = self._first = None
            return
        with torch.no_grad():
            for p, old in before.items():
                p.copy_(old)
        if self._first is not None and isinstance(optimizer, LBFGS):
            # It was in the middle of a line search, and its state half way to the next: torch's own cannot go on.
            optimizer.state.clear()
        self._first = None

    def _end_of_step(self) -> None:
        if self.settings.refresh_every > 1:
            self.refresh.end_step(self.report if self.judgement is not None else None)
        self.rotation.end_step(self.judgement)
        self.memory.end_step(self._next_state)
        self.stepped.clear()
        self.forget()

    def forget(self) -> None:
        """Drop rows and everything that belongs to them; the last report stays."""
        self.capture.clear()
        self.judgement, self._next_state = None, None
        self.pending, self.skipped, self.losses = False, (), {}
        self.rotation.forget()
        self.entered.clear()

    # -- warnings and refusals ----------------------------------------------------------------------------------

    def _warn_of_unrun_totals(self) -> None:
        if self.unrun:
            self.unrun = 0
            warnings.warn(
                "total(losses) was built but its backward() never ran, or ran with inputs=, which leaves it out: this "
                "step has nothing of its tasks. Call optimizer.total(losses).backward().",
                UserWarning,
                stacklevel=5,
            )

    def _warn_of_unknown_names(self) -> None:
        """Say once that an option names nobody: task() learns names one by one, and so cannot refuse."""
        if self._warned_of_names or not self.memory.tasks:
            return
        try:
            self.introduce(())
        except ValueError as error:
            self._warned_of_names = True
            warnings.warn(str(error), UserWarning, stacklevel=5)

    def _refuse_nesting(self, what: str) -> None:
        if self.computing is not None:
            raise MultiTaskError(
                f"{what} was called inside the function of {self.computing!r}: it must only compute a loss"
            )
        if self.in_task:
            raise MultiTaskError(
                f"{what} was called inside `with optimizer.task(...)`: only loss.backward() belongs there"
            )

    def _refuse_cheap(self, what: str) -> None:
        """The modes that save backward passes choose which ones run; here the user runs them."""
        for option, value, off in (
            ("refresh_every", self.settings.refresh_every, 1),
            ("rotate", self.settings.rotate, None),
        ):
            if value != off:
                raise MultiTaskError(
                    f"{what} brings gradients that are computed already, so {option}={value} could save nothing: use "
                    f"total() or backward(), or wrap without {option}="
                )

    def _refuse_scaled_mark(self) -> None:
        if not self.pending:
            return
        handed_scale = any(getattr(optimizer, "grad_scale", None) is not None for optimizer in self.optimizers)
        if handed_scale or self.capture.mark_was_scaled():
            absent = [name for name in self.settings.tasks or () if name not in self.capture.rows]
            raise MultiTaskError(
                "p.grad was clipped, unscaled or zeroed in place while surgery was waiting, which would undo it. It "
                f"waits inside accumulate(), and for declared tasks that have not come (now: {absent}): run the last "
                "backward outside accumulate(), or wrap without tasks=. optimizer.zero_grad() starts afresh."
            )


def _now(callback: Callable[[], None], _: Callable[[], None]) -> None:
    callback()
