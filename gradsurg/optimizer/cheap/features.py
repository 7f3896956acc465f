"""features=: surgery on the gradients with respect to shared features, then one backward pass through what made them.

For h = f(x; θ), ‖Σ w_i ∂L_i/∂θ‖ ≤ ‖∂h/∂θ‖ · ‖Σ w_i ∂L_i/∂h‖. So weights found on ∂L_i/∂h bound what happens in θ, but
do not decide it. The promise about u then holds for the features: a small move of h along Σ w_i ∂L_i/∂h hurts no task.
A guarantee of the update would need the gradient of each task with respect to θ, which is the cost that is saved here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import isnan

import torch
from torch import Tensor

from gradsurg.distributed.averaging import Averaged
from gradsurg.distributed.collectives import RanksError, fingerprint
from gradsurg.distributed.layout import Layout
from gradsurg.errors import MultiTaskError, warn
from gradsurg.gradients.compile import Watch, advise, anything_compiled
from gradsurg.gradients.graph import blocking, edge_of, leaves_past
from gradsurg.gradients.losses import detached, seed_of
from gradsurg.gradients.recycle import Recycler
from gradsurg.gradients.rows import HeldGradients, Row, TaskRows
from gradsurg.linalg.sparse import added
from gradsurg.optimizer.direction import compute_direction
from gradsurg.optimizer.engine import Engine
from gradsurg.optimizer.options import Options
from gradsurg.optimizer.report import settled
from gradsurg.optimizer.run import Run

__all__ = ["check_features", "run_on_features"]


def check_features(features: Tensor | Sequence[Tensor], options: Options) -> list[Tensor]:
    """Return the features as a list, or raise a ValueError that says which of them cannot be used and why."""
    if options.refresh_every > 1 or options.rotate is not None:
        option = "rotate" if options.refresh_every == 1 else "refresh_every"
        raise ValueError(f"features= and wrap(..., {option}=...) both save backward passes: choose one")
    if options.granularity != "model":
        raise ValueError(f"features= needs granularity='model', and it is {options.granularity!r}")
    given: object = [features] if isinstance(features, Tensor) else features
    if not isinstance(given, Sequence) or not given or not all(isinstance(h, Tensor) for h in given):
        raise ValueError(f"features={features!r}: pass the tensor that the heads read, or a list of such tensors")
    for i, h in enumerate(given):
        if h.grad_fn is None:
            what = "a leaf" if h.requires_grad else "detached"
            raise ValueError(
                f"features[{i}] is {what}: pass the very tensor that the shared part of the model returned and the "
                "heads read, with its graph"
            )
        if h._backward_hooks:
            raise ValueError(
                f"features[{i}] has a gradient hook, which would act twice, once on every task's gradient and once on "
                "the sum: register it on what the heads make of the features"
            )
        if any(h is other for other in given[:i]):
            raise ValueError(f"features has the same tensor twice, at {i}: pass each once")
    return list(given)


def run_on_features(engine: Engine, run: Run) -> None:
    """Run the heads' backward passes, surgery on the features, and one pass before them; add the result to p.grad.

    On any error p.grad is as before. Each micro-batch has features and a surgery of its own, and the results add up in
    p.grad. Under DDP the ranks' Gramians are added up, and p.grad is averaged at the end.
    """
    engine.settle()
    _warn_of_update(engine)
    losses, features = run.tensors, run.features
    assert features is not None
    preferences = {**engine.step.preferences, **run.preferences}
    options, layout = _options(engine.options.preferring(preferences), features), engine.session.layout
    spread = layout.of_features()
    known = {name: detached(loss) for name, loss in losses.items()}
    present = {name: loss for name, loss in losses.items() if loss.requires_grad}
    with Averaged(engine.parameters(), layout) as averaged:
        held_gradients = averaged.held_gradients
        with _on_all_ranks(layout, known, preferences) as done:
            watch, penalty = run.run_plain(held_gradients, present.values())
            rows, own = _heads(engine, present, features, held_gradients, run.gradient, watch)
            done.extend(rows)
        if rows.overflowed:
            run.excuse(rows)
        averaged.begin()
        known = layout.mean_losses(known)
        engine.screen(known, rows, own)
        if len(rows) == 1 < len(own):  # its task shares nothing, and is not alone in the step: its gradient stays plain
            options = replace(options, preferences={})
        inputs = engine.inputs(rows, features)
        found = compute_direction(
            replace(inputs, groups=[features], losses=known, options=options, layout=spread, recycled=Recycler())
        )
        reached = list(found.gradients.items())
        if reached:
            torch.autograd.backward([h for h, _ in reached], [u for _, u in reached], retain_graph=run.retain_graph)
        report = settled(found.report)
        weights: dict[str, float] = dict(zip(report.tasks, report.weights[0].tolist(), strict=True))
        # As in every other step, a task that is alone has its preference for a weight.
        if len(weights) == 1:
            weights = {name: options.preferences.get(name, 1.0) for name in weights}
        result = _joined(held_gradients.lift(), own, rows, weights, engine.options.shared)
        averaged.add(penalty, result)

    def end() -> None:
        averaged.complete()
        engine.step.unaveraged = not layout.sends(False)
        engine.checkpoint.learn(report.tasks if layout.several else ())
        engine.record(replace(report, level="features"), found.state)

    run.when_done(end, averaged.drop)


@contextmanager
def _on_all_ranks(layout: Layout, losses: Iterable[str], preferences: Mapping[str, float]) -> Iterator[list[str]]:
    """Compare, at the end of this block, what all ranks put into the list; if one raised, all do."""
    done: list[str] = []
    try:
        yield done
    except Exception:
        layout.agree(0)
        raise
    if not layout.agree(fingerprint([*losses, "rows", *done, sorted(preferences.items())])):
        raise RanksError(
            "with features=, every rank needs the same tasks in the same order, with the same preferences=, and each "
            "has to reach the features: a rank has others in this step, or raised (see its own error). Parameters, "
            "p.grad and optimizer state are as before."
        )


def _options(options: Options, features: list[Tensor]) -> Options:
    """Return the options for surgery on the features: the guarantee holds for the direction, not for the update."""
    guarantee = "gradient" if options.guarantee == "update" else options.guarantee
    pipeline = replace(options.pipeline, guarantee=guarantee)
    return replace(options, pipeline=pipeline, guarantee=guarantee, shared=tuple(features))


def _heads(
    engine: Engine,
    losses: Mapping[str, Tensor],
    features: list[Tensor],
    held_gradients: HeldGradients,
    gradient: Tensor | None,
    watch: Watch,
) -> tuple[TaskRows, TaskRows]:
    """Return each task's gradient with respect to the features, and to the leaves that it reaches past them."""
    rows, own = TaskRows(engine.options.row_dtype), TaskRows()
    edges = [edge_of(h) for h in features]
    # A loss may also reach leaves before the features on a way past them, and one feature may be made from another.
    # Only the part of the gradient that passes no feature counts here.
    blocks = [blocking(edge) for edge in edges]
    try:
        for name, loss in losses.items():
            leaves = leaves_past(loss, edges)
            # backward(inputs=...) would run the node of a feature too, which may be a whole compiled trunk.
            with advise():
                found = _gradients(name, loss, [*features, *leaves], seed_of(gradient, loss))
            watch.check(loss, repr(name))
            rows.add(name, Row((h, g) for h, g in zip(features, found, strict=False) if g is not None))
            past = held_gradients.sorted(zip(leaves, found[len(features) :], strict=True))
            if anything_compiled():
                engine.capture.reach.sift(name, past)
            own.add(name, past)
    finally:
        for block in blocks:
            block.remove()
    for name in [name for name in rows if not len(rows[name])]:
        rows.drop(name)
    if not len(rows):
        raise ValueError(
            f"none of the losses {list(losses)} depends on the features: pass the very tensor that the heads read, as "
            "the forward pass made it (not a copy, and not changed in place since)"
        )
    return rows, own


def _gradients(name: str, loss: Tensor, inputs: list[Tensor], seed: Tensor) -> Sequence[Tensor | None]:
    """Return ∂L/∂inputs, or raise an error that names the task if its head cannot be run up to the features."""
    try:
        return torch.autograd.grad(loss, inputs, seed, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise MultiTaskError(
            f"the head of {name!r} uses torch.utils.checkpoint with use_reentrant=True, which cannot be run up to the "
            "features alone: checkpoint it with use_reentrant=False"
        ) from error


def _joined(
    trunk: Row, own: TaskRows, rows: TaskRows, weights: Mapping[str, float], shared: Sequence[Tensor] | None
) -> Row:
    """Add the gradients of leaves past the features: weighted if several tasks reach a leaf, else plain.

    With shared=, those that it names are weighted, and what lies before the features has to be among them.
    """
    declared = None if shared is None else set(map(id, shared))
    if declared is not None and (strangers := [p for p in trunk if id(p) not in declared]):
        raise MultiTaskError(
            f"{len(strangers)} parameters before the features are not in shared= (one has shape "
            f"{tuple(strangers[0].shape)}): the one pass through them has the weighted sum, and they should get the "
            "plain one. Add them to shared=, or leave out features= or shared="
        )
    result = Row(trunk.items())
    # As in every other step, a single task has its preference as a weight on all that it reaches.
    alone = len(own) == 1
    holders = Counter(id(p) for name in own for p, _ in own[name].items())
    for name in own:
        for p, g in own[name].items():
            common = p in trunk or holders[id(p)] > 1 if declared is None else id(p) in declared
            if common and name not in rows:
                raise ValueError(
                    f"losses[{name!r}] depends on none of the features, yet reaches parameters that other tasks reach: "
                    "add the tensor that it reads to features=, or pass this loss as plain="
                )
            weight = weights[name] if common or (alone and name in weights) else 1.0
            if isnan(weight):
                raise ValueError(
                    f"losses[{name!r}] reaches parameters past the features that other tasks reach too, and this "
                    "surgery decides number by number, so there is no weight for them: use surgery='cone', or list "
                    "features that all tasks pass"
                )
            part = g if weight == 1 else g * weight
            result[p] = added(result.get(p), part)
    return result


def _warn_of_update(engine: Engine) -> None:
    if engine.options.guarantee != "update" or not engine.options.guarantee_asked or "features" in engine.told:
        return
    engine.told.add("features")
    warn(
        "guarantee='update' was asked for, and a step with features= cannot hold the update to it: that takes each "
        "task's gradient of every parameter. It holds for the direction in the features instead; the report says so."
    )
