"""Brings gradients in: from losses, from ordinary backward calls in a with block, or as rows computed elsewhere."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from gradsurg.distributed.layout import ALONE
from gradsurg.errors import MultiTaskError, unknown_name
from gradsurg.gradients.compile import Watch, advise, anything_compiled, noticing_kept_graphs
from gradsurg.gradients.hooks import refusing_steps_in_backward
from gradsurg.gradients.losses import Compute, check_row, check_scalar, detached, seed_of, task_name
from gradsurg.optimizer.cheap.features import run_on_features
from gradsurg.optimizer.engine import Engine
from gradsurg.optimizer.run import Run, refuse_nesting
from gradsurg.surgery.pipeline import check_mapping
from gradsurg.surgery.priority import check_names

__all__ = ["OneByOne", "run_backward", "set_rows", "task_block"]


def run_backward(engine: Engine, run: Run, gradient: Tensor | None = None) -> None:
    """Run the tasks' backward passes and the surgery, in the way that wrap() chose; on any error p.grad is as before.

    `gradient` is what autograd scales every loss by, if the total was scaled; None is 1.
    """
    refuse_nesting(engine.busy, "total() or backward()")
    run.begin(gradient)
    try:
        with engine.doing("total"):
            engine.lay_out()
            engine.learn(run.losses)
            passing = engine.passes.run if run.features is None else run_on_features
            passing(engine, run)
    except BaseException:
        # Ctrl-C may have come while the block above was left.
        engine.busy = None
        raise
    run.end()


class OneByOne:
    """One ordinary backward pass per task, in the order of the losses."""

    def run(self, engine: Engine, run: Run) -> None:
        """Fill one row per task; the surgery follows when the backward pass around it is complete."""
        # If another total of this backward pass opened a run, its surgery takes these rows too.
        passes = engine.open_or_join(run)
        with undoing(engine, run):
            if not run.joins:
                if engine.session.layout is not ALONE:
                    engine.session.start([name for name, _ in passes if name is not None], engine.deferring > 0)
                passes = self.together(engine, run, passes)
            tensors = [task for _, task in passes if isinstance(task, Tensor)]
            watch = Watch(tensors if run.retain_graph or len(tensors) > 1 else [])
            left = len(tensors)
            for name, task in passes:
                if isinstance(task, Tensor):
                    left -= 1
                    # Another loss may need what this loss's graph shares with it.
                    keep = run.retain_graph or left > 0
                    torch.autograd.backward(task, seed_of(run.gradient, task), retain_graph=keep)
                    if keep and watch.active:
                        watch.check(task, "plain=" if name is None else repr(name))
                else:
                    run.known.update(_run_function(engine, run, str(name), task))
                # The plain loss is no task: nothing protects it, and it is added after surgery.
                if name is None:
                    engine.capture.take_plain()
                    continue
                # A task is absent if its function returned no loss.
                if isinstance(task, Tensor) or name in run.known:
                    engine.capture.take(name)
                # Its row travels to the other ranks while the next task runs backward.
                if engine.session.layout is not ALONE and not run.joins:
                    engine.session.captured(name)
            if not run.known and run.plain is None and not engine.session.layout.several:
                raise ValueError(f"no function of {list(run.losses)} returned a loss that requires grad")
        if run.joins and engine.run is not None:
            engine.run.known.update(run.known)
        else:
            run.when_done(engine.finish, functools.partial(engine.abort, None, run))

    def together(
        self, engine: Engine, run: Run, passes: list[tuple[str | None, Tensor | Compute]]
    ) -> list[tuple[str | None, Tensor | Compute]]:
        """Run as many of the passes as can be run as one; return the others, here all."""
        return passes

    def end_step(self, engine: Engine) -> None:
        """Do nothing: passes of one step do not depend on the last."""


@contextmanager
def undoing(engine: Engine, run: Run) -> Iterator[None]:
    """One guard around all backward passes of a run: on any error the run is dropped, and p.grad is as before."""
    layout = engine.session.layout
    try:
        with (
            nullcontext() if layout is ALONE else layout.quiet(),
            advise(),
            refusing_steps_in_backward(run.parameters),
        ):
            yield
    except BaseException as error:
        engine.abort(error)
        raise


def _run_function(engine: Engine, run: Run, name: str, compute: Compute) -> dict[str, Tensor]:
    """Compute a task's loss and run its backward pass; return the loss by name, or nothing if it is absent."""
    # The user's function may call anything, even what drops the run that it is part of.
    opened = engine.run
    with engine.doing("function", name), torch.enable_grad():
        found = compute()
    loss = None if found is None else check_scalar(f"losses[{name!r}]()", found)
    if engine.run is not opened:
        raise MultiTaskError(f"the function of {name!r} called zero_grad() or step(): it must only compute a loss")
    if loss is None or not loss.requires_grad:
        return {}
    try:
        torch.autograd.backward(loss, retain_graph=run.retain_graph)
    except RuntimeError as error:
        if "backward through the graph a second time" not in str(error):
            raise
        raise MultiTaskError(
            f"the function of {name!r} reads tensors that another function's backward pass went through already: "
            "compute them anew inside of each function, or pass retain_graph=True to keep what they share"
        ) from error
    return {name: detached(loss)}


@contextmanager
def task_block(engine: Engine, name: str, preferences: Mapping[str, float] | None = None) -> Iterator[None]:
    """Send what happens to p.grad inside this block to one task's row."""
    _refuse_computed(engine, "task()")
    engine.lay_out()
    engine.refuse_changes()
    name = task_name("task()", name)
    declared = engine.options.tasks
    if declared is not None and name not in declared:
        raise unknown_name("task()", name, declared)
    # A preference may be for a task whose block comes later, if its name was met or declared.
    own = check_mapping("preferences", preferences, zero=True)
    check_names((tuple(own),), {name, *engine.checkpoint.tasks, *(declared or ())}, "preferences")
    run = Run(preferences=own)
    engine.open(run)
    # Until something is compiled, only a task's first block is watched: there the first compilation may happen.
    key = f"task {name}"
    watched = run.parameters if anything_compiled() or key not in engine.told else []
    engine.told.add(key)
    with engine.doing("task", name), undoing(engine, run), noticing_kept_graphs(watched):
        yield
        if any(p.grad is not None and p.grad.requires_grad for p in run.parameters):
            raise MultiTaskError(
                f"backward(create_graph=True) ran inside `with optimizer.task({name!r})`: surgery is not "
                "differentiable. Call backward() there without create_graph; a penalty on gradients can take them from "
                "torch.autograd.grad(..., create_graph=True)."
            )
    engine.learn([name])
    engine.capture.take(name)
    waiting = declared is not None and not {*engine.step.entered, name}.issuperset(declared)
    engine.finish(defer=waiting or engine.deferring > 0)
    if engine.step.pending:
        engine.step.entered.add(name)


def set_rows(
    engine: Engine, gradients: Mapping[str, Sequence[Tensor | None]], preferences: Mapping[str, float] | None = None
) -> None:
    """Take rows that were computed elsewhere."""
    _refuse_computed(engine, "set_gradients()")
    if torch.is_inference_mode_enabled():
        raise MultiTaskError(
            "set_gradients() was called under torch.inference_mode(), where p.grad would be a tensor that nothing may "
            "write to later: call it outside. The gradients may come from inside; under torch.no_grad() it works."
        )
    engine.refuse_changes()
    if not isinstance(gradients, Mapping) or not gradients:
        raise ValueError("gradients must be a dict from task name to a list of tensors, with at least one task")
    gradients = {task_name("gradients", name): tensors for name, tensors in gradients.items()}
    if engine.options.tasks is not None:
        check_names((tuple(gradients),), engine.options.tasks, "gradients")
    parameters = engine.parameters() if engine.options.shared is None else list(engine.options.shared)
    # All rows are checked before p.grad is taken away.
    rows = {name: check_row(name, tensors, parameters) for name, tensors in gradients.items()}
    own = check_mapping("preferences", preferences, zero=True)
    engine.lay_out()
    if not engine.session.layout.several:
        engine.check_names(rows, own)
    engine.learn(rows)
    engine.open(Run(preferences=own))
    for name, row in rows.items():
        engine.capture.fresh.add(name, row)
    engine.finish()


def _refuse_computed(engine: Engine, what: str) -> None:
    """Refuse gradients that are computed already, if they come at a wrong time or an option chooses the passes."""
    refuse_nesting(engine.busy, what)
    for option, off in (("refresh_every", 1), ("rotate", None)):
        if (value := getattr(engine.options, option)) != off:
            raise MultiTaskError(
                f"{what} brings gradients that are computed already, so {option}={value} could save nothing: use "
                f"total() or backward(), or wrap without {option}="
            )
