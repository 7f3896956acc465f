"""batched=True: one backward pass through the shared part, over the gradients of all tasks at once (torch's vmap).

If most of a step's time goes into starting operations, m passes cost m times the starts. The heads run first, in one
pass that ends at the border of what several losses reach. The gradients that cross the border are stacked, one entry
per task, and go through the rest in one batched pass. The rows are those of m passes up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from gradsurg.distributed.layout import ALONE, Layout
from gradsurg.errors import MultiTaskError, warn
from gradsurg.gradients.compile import in_compiled_autograd
from gradsurg.gradients.graph import REENTRANT, SINK, Edge, Map, blocking, leaf_of, leaves_after, map_of
from gradsurg.gradients.hooks import hooked_among
from gradsurg.gradients.losses import Compute, seed_of
from gradsurg.gradients.rows import Row, deposit, laid_out
from gradsurg.optimizer.backward import OneByOne
from gradsurg.optimizer.engine import Engine
from gradsurg.optimizer.run import Run

__all__ = ["Batched"]

Pass = tuple["str | None", "Tensor | Compute"]
Sent = tuple["Tensor | None", ...]

# Kind of graph node -> why it cannot be batched.
OBSTACLES = {
    REENTRANT: "torch.utils.checkpoint runs with use_reentrant=True (use_reentrant=False can be batched)",
    "CompiledFunctionBackward": "compiled backward code takes one gradient at a time",
    SINK: "the model is wrapped in DistributedDataParallel",
}


class Batched(OneByOne):
    """Runs the passes of all tasks as one, or one by one if the first attempt fails."""

    def run(self, engine: Engine, run: Run) -> None:
        """Fill the rows; if only passes one by one went through, leave it at these from now on."""
        super().run(engine, run)
        if run.unbatched:
            self.give_up(engine, run.unbatched)

    def together(self, engine: Engine, run: Run, passes: list[Pass]) -> list[Pass]:
        """Run the passes of all tasks, and return those that are left."""
        losses = {name: task for name, task in passes if name is not None and isinstance(task, Tensor)}
        tasks = sum(name is not None for name, _ in passes)
        if len(losses) < tasks:
            # Losses of another step can be batched.
            self.give_up(engine, "functions are computed and run one by one", "batched functions")
        elif self.fill(engine, losses, run.gradient, run.retain_graph or len(passes) > tasks):
            return [(name, task) for name, task in passes if name is None]
        return passes

    def fill(self, engine: Engine, losses: Mapping[str, Tensor], gradient: Tensor | None, keep: bool) -> bool:
        """Fill the rows of these tasks; return False, with nothing changed, if they have to run one by one.

        If the pass fails although earlier ones worked, the graph is used up, and that is an error.
        """
        if "batched fails" in engine.told or len(losses) < 2:
            return False
        parameters = engine.parameters() if engine.run is None else engine.run.parameters
        seeds = [seed_of(gradient, loss) for loss in losses.values()]
        graph = map_of(list(losses.values()))
        obstacle = _obstacle(engine.session.layout, parameters, graph)
        if obstacle is not None:
            self.give_up(engine, obstacle)
            return False
        first = "batched works" not in engine.told
        try:
            # The graph is kept the first time: if the batched pass fails, passes one by one still need it.
            rows = _rows(list(losses.values()), seeds, graph, keep or first)
            if any(p.grad is not None for p in parameters):
                raise MultiTaskError("a backward pass within the backward pass wrote to p.grad")
        except Exception as error:
            if not first:
                raise MultiTaskError(
                    f"batched=True: the pass over all tasks failed where earlier ones went through "
                    f"({_first_line(error)}). p.grad is as before. Leave out batched= to run the tasks one by one."
                ) from error
            engine.capture.lift()
            # If the passes one by one fail too, it was not the batching.
            if engine.run is not None:
                engine.run.unbatched = _first_line(error)
            return False
        engine.told.add("batched works")
        ours = set(map(id, parameters))
        for name, row in zip(losses, rows, strict=True):
            # A leaf that the optimizer does not train gets its gradient as from an ordinary pass.
            for leaf, g in [pair for pair in row.items() if id(pair[0]) not in ours]:
                deposit(leaf, g)
                row.pop(leaf)
            engine.capture.fresh.add(name, row)
        return True

    def give_up(self, engine: Engine, reason: str, what: str = "batched fails") -> None:
        """Run passes one by one, from now on if batching fails, and say why."""
        if what in engine.told:
            return
        engine.told.add(what)
        warn(
            f"batched=True has no effect: {reason}. The tasks' backward passes run one after the other; leave out "
            "batched= to ask for that."
        )


def _obstacle(layout: Layout, parameters: Sequence[Tensor], graph: Map) -> str | None:
    if layout is not ALONE:
        return "the model is trained by several ranks, which exchange rows as each pass ends"
    if hooked_among(parameters):
        return "hooks of register_post_accumulate_grad_hook run once per task"
    if in_compiled_autograd():
        return "compiled autograd traces passes one by one"
    return next((OBSTACLES[kind] for kind in graph.kinds if kind in OBSTACLES), None)


def _rows(losses: Sequence[Tensor], seeds: Sequence[Tensor], graph: Map, keep: bool) -> list[Row]:
    """Return one row per task: its own part from the pass over the heads, the rest from the batched pass."""
    rows, crossing = _heads(losses, seeds, graph, keep)
    tasks = [i for i, edges in enumerate(crossing) if edges]
    if not tasks:
        return rows
    edges = list(dict.fromkeys(edge for i in tasks for edge in crossing[i]))
    stacked = []
    for edge in edges:
        # One entry per task, zeros for tasks that send nothing along this edge.
        some = next(crossing[i][edge] for i in tasks if edge in crossing[i])
        parts = [crossing[i][edge] if edge in crossing[i] else torch.zeros_like(some) for i in tasks]
        stacked.append(torch.stack(parts))
    found = torch.autograd.grad(
        [GradientEdge(*edge) for edge in edges],
        graph.leaves,
        stacked,
        retain_graph=keep,
        allow_unused=True,
        is_grads_batched=True,
    )
    gradients = [_parts(leaf, g) for leaf, g in zip(graph.leaves, _owned(found), strict=True)]
    entries = [frozenset(node for node, _ in crossing[i]) for i in tasks]
    # If all tasks enter at the same nodes, all reach every leaf; else zeros of the batched pass have to be told from
    # gradients.
    alike = len(set(entries)) == 1
    for k, i in enumerate(tasks):
        row = Row((leaf, each[k]) for leaf, each in zip(graph.leaves, gradients, strict=True) if each)
        if not alike:
            reached = set(map(id, leaves_after(entries[k])))
            row = Row(pair for pair in row.items() if id(pair[0]) in reached)
        rows[i].update(row)
    return rows


def _heads(
    losses: Sequence[Tensor], seeds: Sequence[Tensor], graph: Map, keep: bool
) -> tuple[list[Row], list[dict[Edge, Tensor]]]:
    """Return each task's gradients of the leaves that it alone reaches, and what it sends across each border edge."""
    rows = [Row() for _ in losses]
    crossing: list[dict[Edge, Tensor]] = [{} for _ in losses]
    parts: list[tuple[int, Edge, list[Tensor]]] = []
    hooks = []
    for border in graph.borders:
        slots: dict[int, list[Tensor]] = {k: [] for k in border.edges}
        # This hook reads the gradient before the hooks of the tensor at the border act. Those run once, in the batched
        # pass.
        hooks.append(border.node.register_hook(_reading(slots)))
        for k, slot in slots.items():
            node, output = border.node.next_functions[k]
            assert node is not None
            parts.append((border.task, (node, output), slot))
    edges = list(dict.fromkeys(edge for _, edge, _ in parts))
    # On its way to one border torch would otherwise run on through another.
    if graph.nested:
        hooks += [blocking(edge) for edge in edges if leaf_of(edge[0]) is None]
        keep = True
    alone = [i for i, (node, _) in enumerate(graph.roots) if node not in graph.common]
    own = [(i, node) for i in alone for node in graph.own[i]]
    inputs = [*((node, 0) for _, node in own), *edges]
    try:
        found: Sequence[Tensor | None] = ()
        if inputs:
            found = torch.autograd.grad(
                [losses[i] for i in alone],
                [GradientEdge(*edge) for edge in inputs],
                [seeds[i] for i in alone],
                retain_graph=keep,
                allow_unused=True,
            )
    finally:
        for hook in hooks:
            hook.remove()
    for (i, node), g in zip(own, found, strict=False):
        if g is not None and (leaf := leaf_of(node)) is not None:
            # The tensor may be expanded, or the same one for several leaves.
            rows[i][leaf] = laid_out(leaf, g.clone())
    for i, root in enumerate(graph.roots):
        if i not in alone:
            crossing[i][root] = seeds[i]
    for i, edge, slot in parts:
        for g in slot:
            have = crossing[i].get(edge)
            crossing[i][edge] = g if have is None else have + g
    return rows, crossing


def _parts(leaf: Tensor, g: Tensor | None) -> Sequence[Tensor]:
    """Return the gradients of all tasks, with the strides that autograd gives them."""
    parts = () if g is None else g.unbind(0)
    # All have the same strides.
    usual = not parts or parts[0].stride() == leaf.stride()
    return parts if usual else [laid_out(leaf, each) for each in parts]


def _reading(slots: Mapping[int, list[Tensor]]) -> Callable[[Sent, Sent], None]:
    def read(sent: Sent, _: Sent) -> None:
        for k, slot in slots.items():
            if (g := sent[k]) is not None:
                slot.append(g)

    return read


def _owned(found: Sequence[Tensor | None]) -> Iterator[Tensor | None]:
    """Yield tensors that rows may add to in place: autograd's may be expanded, or one tensor for several leaves."""
    seen: set[int] = set()
    for g in found:
        if g is not None:
            g = g.clone() if g.data_ptr() in seen else g.contiguous()
            seen.add(g.data_ptr())
        yield g


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
