"""refresh_every=k: new weights in every k-th step, and in the others one backward pass of the weighted sum.

Weights apply to the shared part alone. At the edge where the graph of a loss enters that part, its gradient is
multiplied by the task's weight. The head, on the loss's side of that edge, gets its plain gradient from the same pass,
equal to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from gradsurg.distributed.averaging import Averaged
from gradsurg.distributed.collectives import fingerprint
from gradsurg.errors import MultiTaskError
from gradsurg.gradients.compile import advise
from gradsurg.gradients.dtensor import local_of
from gradsurg.gradients.graph import Border, Map, leaf_of, map_of
from gradsurg.gradients.losses import detached, seed_of
from gradsurg.gradients.rows import is_finite
from gradsurg.optimizer.backward import OneByOne
from gradsurg.optimizer.engine import Engine
from gradsurg.optimizer.recording import REUSED, of_reused_weights
from gradsurg.optimizer.run import Run

__all__ = ["Reused"]

# Key of the checkpoint's entry, which keeps the weights and their age: a resumed run goes on as if uninterrupted.
KEY = "refresh"
Gradients = tuple["Tensor | None", ...]


class Reused:
    """Uses the weights of an earlier step in all steps but every k-th, whose passes run in the way `full`."""

    def __init__(self, every: int, full: OneByOne) -> None:
        self.every, self.full = every, full

    def run(self, engine: Engine, run: Run) -> None:
        """Run one pass of the weighted sum, or a full step if new weights have to be found."""
        losses = {name: loss for name, loss in run.tensors.items() if loss.requires_grad}
        graph = self._reusable(engine, losses, {**engine.step.preferences, **run.preferences})
        if graph is None or not self._run_weighted(engine, run, losses, graph):
            self.full.run(engine, run)

    def end_step(self, engine: Engine) -> None:
        """Keep the weights of a full step, or count that they were used once more."""
        report = engine.report
        if report is None or report.step != engine.checkpoint.step:  # the report of an earlier step
            return
        if report.level == REUSED:
            kept = engine.checkpoint.recall(KEY)
            engine.checkpoint.keep(KEY, **{**kept, "age": kept["age"] + 1})
        elif engine.step.constraint is not None and len(report.tasks) > 1 and not report.nonfinite:
            weights = dict(zip(report.tasks, report.weights[0].tolist(), strict=True))
            engine.checkpoint.keep(KEY, weights=weights, age=1, preferences=dict(engine.step.preferences))

    def _reusable(self, engine: Engine, losses: Mapping[str, Tensor], preferences: Mapping[str, float]) -> Map | None:
        """Return where the losses' graphs meet; None if this step has to find new weights, on any rank.

        Weights belong to the preferences that they were found with, so a step with others of its own needs new ones.
        Over several ranks, each needs the very tasks that the weights belong to: a rank that lacks one could not tell
        what is shared.
        """
        graph = None
        kept = engine.checkpoint.recall(KEY)
        usable = bool(kept) and kept["age"] < self.every and kept["weights"].keys() == set(losses)
        usable = usable and kept.get("preferences", {}) == preferences
        if usable and not engine.capture.is_live():
            graph = map_of(list(losses.values()), engine.options.shared or ())
            _check_can_tell(graph, engine)
            if not _knows_compiled(graph, engine, losses):
                graph = None
        return graph if engine.session.layout.agree(0 if graph is None else fingerprint(sorted(losses))) else None

    def _run_weighted(self, engine: Engine, run: Run, losses: Mapping[str, Tensor], graph: Map) -> bool:
        """Run one backward pass with the weights of an earlier step, and add its result to p.grad.

        Under DDP all of p.grad is averaged when the backward pass around it is complete, as DDP itself would do.
        Return False if the result is not finite and `nonfinite` asks which task it was: p.grad and the graph are then
        as before.
        """
        engine.settle()
        weights: Mapping[str, float] = engine.checkpoint.recall(KEY)["weights"]
        layout = engine.session.layout
        watchful = engine.options.nonfinite != "propagate"
        with Averaged(engine.parameters(), layout).begin() as averaged:
            # With a single pass and no plain loss, no graph runs twice, and there is nothing to watch.
            _, penalty = run.run_plain(averaged.held_gradients, losses.values() if run.plain is not None else ())
            with advise():
                _weighted_backward(losses, weights, run.gradient, graph, run.retain_graph or watchful)
            result = averaged.held_gradients.lift()
            numbers = (*losses.values(), *map(local_of, result.values())) if watchful else ()
            broken = [] if all(map(is_finite, numbers)) else [KEY]
            if watchful and layout.on_any_rank([KEY], broken):
                averaged.drop()
                return False
            averaged.add(penalty, result)
        known = {name: detached(loss) for name, loss in losses.items()}

        def end() -> None:
            averaged.complete()
            engine.step.unaveraged = not layout.sends(False)
            engine.record(of_reused_weights(engine.checkpoint.step, layout.mean_losses(known), weights), None)

        run.when_done(end, averaged.drop)
        return True


def _weighted_backward(
    losses: Mapping[str, Tensor],
    weights: Mapping[str, float],
    gradient: Tensor | None,
    graph: Map,
    retain_graph: bool,
) -> None:
    """Leave Σ w_i g_i in p.grad of parameters that several losses reach, and plain gradients in the others."""
    in_order = [weights[name] for name in losses]
    seeds = []
    for loss, weight, (node, _) in zip(losses.values(), in_order, graph.roots, strict=True):
        seed = seed_of(gradient, loss)
        seeds.append(seed * weight if node in graph.common else seed)
    hooks = [border.node.register_hook(_scaling(border, in_order[border.task])) for border in graph.borders]
    try:
        torch.autograd.backward(list(losses.values()), seeds, retain_graph=retain_graph)
    finally:
        for hook in hooks:
            hook.remove()


def _scaling(border: Border, weight: float) -> Callable[[Gradients, Gradients], Gradients]:
    def scaled(into: Gradients, _: Gradients) -> Gradients:
        return tuple(g * weight if k in border.edges and g is not None else g for k, g in enumerate(into))

    return scaled


def _check_can_tell(graph: Map, engine: Engine) -> None:
    """Refuse graphs in which one pass cannot tell shared parameters from others."""
    if graph.hidden:
        raise MultiTaskError(
            "a head uses torch.utils.checkpoint with use_reentrant=True, which hides the parameters it reaches, so "
            "refresh_every= cannot tell whether they are shared: checkpoint it with use_reentrant=False"
        )
    declared = engine.options.shared
    if declared is None:
        return
    members, ours = set(map(id, declared)), set(map(id, engine.parameters()))
    strangers = [leaf for leaf in graph.leaves if id(leaf) in ours and id(leaf) not in members]
    if strangers:
        raise MultiTaskError(
            f"several tasks reach {len(strangers)} parameters that are not in shared= (one has shape "
            f"{tuple(strangers[0].shape)}): these take the plain sum, the others the weighted one, and that is two "
            "backward passes. Leave out shared=, or refresh_every="
        )


def _knows_compiled(graph: Map, engine: Engine, losses: Mapping[str, Tensor]) -> bool:
    """Whether it is known which tasks reach the parameters inside compiled graphs that several losses enter.

    A parameter there that a single task reaches is refused: the one pass would weigh it as if it were shared.
    """
    ours = set(map(id, engine.parameters()))
    for node in graph.common:
        if type(node).__name__ != "CompiledFunctionBackward":
            continue
        for after, _ in node.next_functions:
            leaf = None if after is None else leaf_of(after)
            if leaf is None or id(leaf) not in ours:
                continue
            known = engine.capture.reach.count(leaf, losses)
            # A resumed program has not learnt it before its first surgery.
            if known == 0:
                return False
            if known == 1:
                raise MultiTaskError(
                    f"a parameter of shape {tuple(leaf.shape)} that one task alone reaches lies inside one compiled "
                    "graph with what tasks share, where refresh_every= cannot leave it its plain gradient: compile "
                    "the shared part and the heads apart, or leave out refresh_every="
                )
    return True
