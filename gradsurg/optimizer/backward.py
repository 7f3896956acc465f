"""How gradients come in: through losses, a block of ordinary backward calls, or rows that were computed elsewhere."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradsurg.errors import MultiTaskError, unknown_name
from gradsurg.gradients.compile import Watch, advise, anything_compiled, noticing_kept_graphs
from gradsurg.gradients.hooks import hooked_among, refusing_steps_in_backward
from gradsurg.gradients.losses import Compute, check_row, detached, seed_of, task_name
from gradsurg.gradients.total import Finish, at_once, pass_in_progress
from gradsurg.optimizer.cheap.batched import run_batched
from gradsurg.optimizer.cheap.features import run_on_features
from gradsurg.optimizer.cheap.reuse import reusable, run_reused
from gradsurg.optimizer.engine import refuse_nesting, refuse_scaled_sentinel
from gradsurg.surgery.priority import check_names

if TYPE_CHECKING:
    from gradsurg.optimizer.engine import Engine
from gradsurg.gradients.losses import check_scalar

__all__ = ["evaluate", "explain", "refuse_cheap", "run_backward", "set_rows", "task_block"]


Task = Tensor | Compute | None


def run_backward(
    engine: Engine,
    losses: Mapping[str, Task],
    plain: Tensor | None = None,
    features: list[Tensor] | None = None,
    gradient: Tensor | None = None,
    retain_graph: bool = False,
    finish: Finish | None = None,
) -> None:
    """Let gradients in by the way that the options and the step call for; arguments as for `_run`."""
    refuse_nesting(engine, "total() or backward()")
    if engine.bringing:
        raise MultiTaskError(
            "a loss that total() or backward() was given holds a total(losses) of the same optimizer: hand over the "
            "losses that it was made of"
        )
    engine.bringing = True
    try:
        _run_backward(engine, losses, plain, features, gradient, retain_graph, finish)
    finally:
        engine.bringing = False


def _run_backward(
    engine: Engine,
    losses: Mapping[str, Task],
    plain: Tensor | None,
    features: list[Tensor] | None,
    gradient: Tensor | None,
    retain_graph: bool,
    finish: Finish | None,
) -> None:
    tensors = {name: loss for name, loss in losses.items() if isinstance(loss, Tensor)}
    if features is not None:
        run_on_features(engine, tensors, features, plain, gradient, retain_graph, finish)
        return
    present = {name: loss for name, loss in tensors.items() if loss.requires_grad}
    reuse = reusable(engine, present)
    if reuse is None or not run_reused(engine, present, reuse, plain, gradient, retain_graph, finish):
        _run(engine, losses, plain, gradient, retain_graph, finish)


def _run(
    engine: Engine,
    losses: Mapping[str, Task],
    plain: Tensor | None = None,
    gradient: Tensor | None = None,
    retain_graph: bool = False,
    finish: Finish | None = None,
) -> None:
    """Run the tasks' backward passes into fresh rows, then surgery; on any error p.grad is as before.

    Args:
        engine: Whose rows they become.
        losses: Name -> loss, or a function that computes it; those that are None or do not require grad are absent.
        plain: A loss that takes no part in surgery.
        gradient: What to scale every loss by, as autograd hands it to a scaled total.
        retain_graph: Keep the graph for another run.
        finish: Called with (what to do when the enclosing backward pass is complete, what to do if it dies).
    """
    engine.lay_out()
    refuse_scaled_sentinel(engine)
    engine.introduce(losses)
    given = {
        name: task
        for name, task in losses.items()
        if task is not None and (not isinstance(task, Tensor) or task.requires_grad)
    }
    due = engine.rotation.choose(engine.turns(list(given)), gradient)
    passes: list[tuple[str | None, Tensor | Compute]] = [(name, given[name]) for name in due if name in given]
    if plain is not None and plain.requires_grad:
        passes.append((None, plain))
    known = {name: detached(loss) for name, loss in losses.items() if isinstance(loss, Tensor)}
    engine.unrun = 0
    joining = engine.capture.opened is not None and engine.outer_pass == pass_in_progress()
    if joining:  # a second total in one backward pass, while the first waits for its end
        engine.capture.take_plain()
    else:
        engine.abort()  # of a backward pass that died, where nobody told us
        engine.capture.open()
        engine.outer_pass = pass_in_progress()
    engine.joined = joining
    try:
        if not joining:
            engine.session.start([which for which, _ in passes if which is not None], engine.deferring > 0)
            if engine.batched.works is not False and _run_batched(engine, passes, gradient, retain_graph):
                passes = [(which, task) for which, task in passes if which is None]
        retained = retain_graph or sum(isinstance(task, Tensor) for _, task in passes) > 1
        watch = Watch([task for _, task in passes if isinstance(task, Tensor)] if retained else [])
        hooked = hooked_among(engine.capture.held)
        for i, (which, task) in enumerate(passes):
            if not isinstance(task, Tensor):
                known.update(_run_function(engine, str(which), task, retain_graph))
            else:
                keep = retain_graph or any(isinstance(later, Tensor) for _, later in passes[i + 1 :])
                with engine.session.layout.quiet(), advise(), refusing_steps_in_backward(hooked):
                    torch.autograd.backward(task, seed_of(gradient, task), retain_graph=keep)
                if keep:
                    watch.check(task, "plain=" if which is None else repr(which))
                if which is None:
                    engine.capture.take_plain()
                else:
                    engine.capture.take(which)
            if which is not None and not joining:
                engine.session.captured(which)
        if not known and plain is None and not engine.session.layout.several:
            raise ValueError(f"no function of {list(losses)} returned a loss that requires grad")
    except BaseException as error:
        engine.abort(error)
        raise
    engine.losses = known
    if not joining:
        (finish or at_once)(engine.finish, functools.partial(engine.abort, None, engine.capture.opened))


def _run_batched(
    engine: Engine, passes: Sequence[tuple[str | None, Tensor | Compute]], gradient: Tensor | None, retain_graph: bool
) -> bool:
    """Run the passes of all tasks as one where that can be done, and say whether it was."""
    losses = {which: task for which, task in passes if which is not None and isinstance(task, Tensor)}
    tasks = sum(which is not None for which, _ in passes)
    if len(losses) < tasks:
        engine.batched.give_up("functions are computed and run one by one")
        return False
    return run_batched(engine, losses, gradient, retain_graph or len(passes) > tasks)


def _run_function(engine: Engine, name: str, compute: Compute, retain_graph: bool) -> dict[str, Tensor]:
    """Compute a task's loss and run its backward pass; return the loss by name, or nothing where it is absent."""
    opened, engine.computing = engine.capture.opened, name
    try:
        with engine.session.layout.quiet():
            loss = evaluate(name, compute)
    finally:
        engine.computing = None
    if engine.capture.opened is not opened:
        raise MultiTaskError(f"the function of {name!r} called zero_grad() or step(): it must only compute a loss")
    if loss is None:
        return {}
    try:
        with engine.session.layout.quiet():
            torch.autograd.backward(loss, retain_graph=retain_graph)
    except RuntimeError as error:
        raise explain(name, error) from error
    engine.capture.take(name)
    return {name: detached(loss)}


@contextmanager
def task_block(engine: Engine, name: str) -> Iterator[None]:
    """Send what happens to p.grad inside this block to one task's row."""
    refuse_nesting(engine, "task()")
    refuse_cheap(engine, "task()")
    engine.lay_out()
    refuse_scaled_sentinel(engine)
    name = task_name("task()", name)
    declared = engine.options.tasks
    if declared is not None and name not in declared:
        raise unknown_name("task()", name, declared)
    engine.abort()
    engine.capture.open()
    engine.in_task = True
    # Until something is compiled, only a task's first block is watched: there the first compilation may happen.
    watched = engine.parameters() if anything_compiled() or name not in engine.met else []
    engine.met.add(name)
    try:
        with (
            engine.session.layout.quiet(),
            advise(),
            noticing_kept_graphs(watched),
            refusing_steps_in_backward(hooked_among(engine.parameters())),
        ):
            yield
    except BaseException as error:
        engine.abort(error)
        raise
    finally:
        engine.in_task = False
    engine.learn([name])
    engine.capture.take(name)
    waiting = declared is not None and not {*engine.entered, name}.issuperset(declared)
    engine.finish(defer=waiting or engine.deferring > 0)
    if engine.pending:
        engine.entered.add(name)


def set_rows(engine: Engine, gradients: Mapping[str, Sequence[Tensor | None]]) -> None:
    """Take rows that were computed elsewhere."""
    refuse_nesting(engine, "set_gradients()")
    refuse_cheap(engine, "set_gradients()")
    refuse_scaled_sentinel(engine)
    if not isinstance(gradients, Mapping) or not gradients:
        raise ValueError("gradients must be a dict from task name to a list of tensors, with at least one task")
    gradients = {task_name("gradients", name): tensors for name, tensors in gradients.items()}
    if engine.options.tasks is not None:
        check_names((tuple(gradients),), engine.options.tasks, "gradients")
    parameters = engine.parameters() if engine.options.shared is None else list(engine.options.shared)
    rows = {name: check_row(name, tensors, parameters) for name, tensors in gradients.items()}
    engine.introduce(rows)
    engine.lay_out()
    engine.capture.open()
    for name, row in rows.items():
        engine.capture.give(name, row)
    engine.losses = {}
    engine.finish()


def refuse_cheap(engine: Engine, what: str) -> None:
    """Refuse rows from outside in the modes that save backward passes: these choose which ones run."""
    for option, value, off in (
        ("refresh_every", engine.options.refresh_every, 1),
        ("rotate", engine.options.rotate, None),
    ):
        if value != off:
            raise MultiTaskError(
                f"{what} brings gradients that are computed already, so {option}={value} could save nothing: use "
                f"total() or backward(), or wrap without {option}="
            )


def evaluate(name: str, compute: Compute) -> Tensor | None:
    """Return the loss that a function computes now; None where the task is absent from this step.

    Raises:
        ValueError: What it returns is no real scalar tensor.
    """
    with torch.enable_grad():
        loss = compute()
    loss = None if loss is None else check_scalar(f"losses[{name!r}]()", loss)
    return loss if loss is not None and loss.requires_grad else None


def explain(name: str, error: RuntimeError) -> BaseException:
    """Return what to raise where a function's backward pass found its graph used up."""
    if "backward through the graph a second time" not in str(error):
        return error
    return MultiTaskError(
        f"the function of {name!r} reads tensors that another function's backward pass went through already: compute "
        "them anew inside of each function, or pass retain_graph=True to keep what they share"
    )
