"""refresh_every=k: new weights every k-th step; between, one backward pass of the weighted sum.

The weights of a step reach only what several tasks share. Where the graph of a loss enters that part, its gradient is
multiplied by the task's weight; what lies on the loss's own side of that border, its head, gets its plain gradient to
the bit, from the same pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradsurg.distributed.averaging import Averaged
from gradsurg.distributed.collectives import fingerprint
from gradsurg.errors import MultiTaskError
from gradsurg.gradients.compile import Watch, advise
from gradsurg.gradients.dtensor import local_of
from gradsurg.gradients.graph import Border, Map, leaf_of, map_of
from gradsurg.gradients.losses import seed_of
from gradsurg.gradients.rows import Row, is_finite
from gradsurg.gradients.total import Finish, at_once
from gradsurg.optimizer.recording import of_reused_weights

if TYPE_CHECKING:
    from gradsurg.optimizer.engine import Engine

__all__ = ["Reuse", "reusable", "run_reused"]


KEY = "refresh"


Gradients = tuple["Tensor | None", ...]


@dataclass(frozen=True)
class Reuse:
    """What a step without surgery goes by.

    Attributes:
        weights: Task -> weight.
        graph: Where the losses' graphs meet.
    """

    weights: Mapping[str, float]
    graph: Map


def reusable(engine: Engine, losses: Mapping[str, Tensor]) -> Reuse | None:
    """Return what this step may go by, or None where it, on any rank, has to find new weights.

    Over several ranks, all need the very tasks that the weights are of: a rank that lacks one could not tell what is
    shared.
    """
    if engine.refresh.every == 1:
        return None
    engine.lay_out()
    engine.introduce(losses)
    weights = None if engine.capture.is_live() else engine.refresh.weights(losses)
    reuse = None
    if weights is not None:
        graph = map_of(list(losses.values()), engine.options.shared or ())
        _check_can_tell(graph, engine)
        reuse = Reuse(weights, graph) if _knows_compiled(graph, engine, losses) else None
    return reuse if engine.session.layout.agree(0 if reuse is None else fingerprint(sorted(losses))) else None


def run_reused(
    engine: Engine,
    losses: Mapping[str, Tensor],
    reuse: Reuse,
    plain: Tensor | None = None,
    gradient: Tensor | None = None,
    retain_graph: bool = False,
    finish: Finish | None = None,
) -> bool:
    """Run one backward pass with the weights of an earlier step, and add its result to p.grad.

    Under DDP all of p.grad is averaged when the enclosing backward pass is complete, as DDP itself would do.

    Returns:
        Whether that was enough. False where the result is not finite and `nonfinite` wants to know by whose fault:
        p.grad and the graph are then as before.
    """
    engine.settle()
    layout = engine.session.layout
    watchful = engine.options.nonfinite != "propagate"
    with Averaged(engine.parameters(), layout).begin() as averaged:
        held_gradients = averaged.held_gradients
        penalty = Row()
        if plain is not None and plain.requires_grad:
            watch = Watch([plain, *losses.values()])
            with advise():
                torch.autograd.backward(plain, seed_of(gradient, plain), retain_graph=True)
            watch.check(plain, "plain=")
            penalty = held_gradients.lift()
        with advise():
            _weighted_backward(losses, reuse.weights, gradient, reuse.graph, retain_graph or watchful)
        result = held_gradients.lift()
        broken = [KEY] if watchful and not all(is_finite(local_of(g)) for g in result.values()) else []
        if watchful and layout.on_any_rank([KEY], broken):
            averaged.drop()
            return False
        averaged.add(penalty, result)
    detached = {name: loss.detach().reshape(()) for name, loss in losses.items()}

    def end() -> None:
        averaged.complete()
        engine.refresh.note_reuse()
        engine.record(of_reused_weights(engine.checkpoint.step, layout.mean_losses(detached), reuse.weights), None)

    (finish or at_once)(end, averaged.drop)
    return True


def _weighted_backward(
    losses: Mapping[str, Tensor],
    weights: Mapping[str, float],
    gradient: Tensor | None,
    graph: Map,
    retain_graph: bool,
) -> None:
    """Leave Σ w_i g_i in p.grad of what several losses reach, and plain gradients elsewhere."""
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
    """Refuse graphs in which one pass cannot treat shared parameters and others apart."""
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
    """Return whether it is known who reaches the parameters inside compiled graphs that several losses reach.

    Raises:
        MultiTaskError: One of them is a head's, which the one pass would weigh like what is shared.
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
            if known == 0:  # a resumed program, before its first surgery
                return False
            if known == 1:
                raise MultiTaskError(
                    f"a parameter of shape {tuple(leaf.shape)} that one task alone reaches lies inside one compiled "
                    "graph with what tasks share, where refresh_every= cannot leave it its plain gradient: compile "
                    "the shared part and the heads apart, or leave out refresh_every="
                )
    return True
