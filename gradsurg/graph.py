"""Reading the graph that a forward pass left: which leaves a loss reaches by which way, and where tasks meet.

Nothing here changes the graph. A node is visited once or twice per step, about a microsecond each.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

__all__ = ["Border", "Edge", "Map", "edge_of", "leaf_of", "leaves_past", "map_of", "past_sink", "root_of"]

Edge = tuple[Node, int]  # a node, and which of its outputs


# The node that use_reentrant=True leaves: it runs a backward pass of its own, over a graph that it rebuilds.
REENTRANT = "CheckpointFunctionBackward"
# The node that DDP puts behind all outputs of forward() at once (find_unused_parameters, static_graph): its k-th output
# is its k-th input, so it is looked through. Taken as one node, it would have every loss reach every other's head.
SINK = "_DDPSinkBackward"


@dataclass(frozen=True)
class Border:
    """A node that one task alone reaches, with edges into what several reach.

    Attributes:
        node: The node.
        task: The number of the task.
        edges: Which of its edges lead across.
    """

    node: Node
    task: int
    edges: tuple[int, ...]


def edge_of(tensor: Tensor) -> Edge:
    """Return the node that made a tensor (its accumulator, for a leaf), and which output of it the tensor is."""
    edge = get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def past_sink(edge: tuple[Node | None, int]) -> tuple[Node | None, int]:
    """Return the edge before DDP's sink where one leads into it, else the edge itself."""
    node, output = edge
    while node is not None and type(node).__name__ == SINK:
        node, output = node.next_functions[output]
    return node, output


def root_of(tensor: Tensor) -> Node:
    """Return the node that made a tensor inside of DDP's forward pass, or outside of any."""
    node, _ = past_sink(edge_of(tensor))
    assert node is not None
    return node


def _after(node: Node) -> list[tuple[Node | None, int]]:
    return [past_sink(edge) for edge in node.next_functions]


def leaves_past(loss: Tensor, stops: Iterable[Edge]) -> list[Tensor]:
    """Return the leaves that a loss reaches without crossing any of the edges `stops`."""
    ends = set(map(past_sink, stops))
    root = past_sink(edge_of(loss))
    waiting = [] if root in ends or root[0] is None else [root[0]]
    seen: set[Node] = set(waiting)
    leaves = []
    while waiting:
        node = waiting.pop()
        leaf = leaf_of(node)
        if leaf is not None:
            leaves.append(leaf)
        for after, output in _after(node):
            if after is not None and after not in seen and (after, output) not in ends:
                seen.add(after)
                waiting.append(after)
    return leaves


@dataclass(frozen=True)
class Map:
    """Who reaches what.

    Attributes:
        borders: Where each loss's own nodes lead into those that several losses reach.
        common: The nodes that several losses reach.
        hidden: Whether a loss's own nodes include one that hides what it reaches.
    """

    borders: list[Border]
    common: set[Node]
    hidden: bool


def map_of(losses: Sequence[Tensor], declared: Iterable[Tensor] = ()) -> Map:
    """Return what one loss reaches alone and what several reach; `declared` are leaves that count as the latter."""
    owner: dict[Node, int] = {}
    common = {edge_of(leaf)[0] for leaf in declared}
    for task, loss in enumerate(losses):
        waiting = [root_of(loss)]
        while waiting:
            node = waiting.pop()
            if node not in owner:
                owner[node] = task
                waiting += [after for after, _ in _after(node) if after is not None]
            elif owner[node] != task:
                common.add(node)
    waiting = list(common)
    while waiting:  # whatever comes after a node that several losses reach is reached by several too
        new = {after for after, _ in _after(waiting.pop()) if after is not None and after not in common}
        common |= new
        waiting += new
    borders, hidden = [], False
    for node, task in owner.items():
        if node not in common:
            across = tuple(k for k, (after, _) in enumerate(_after(node)) if after in common)
            borders += [Border(node, task, across)] if across else []
            hidden = hidden or type(node).__name__ == REENTRANT
    return Map(borders, common, hidden)


def leaf_of(node: Node) -> Tensor | None:
    """Return the leaf whose gradient a node accumulates; None for every other node."""
    return node.variable if type(node).__name__ == "AccumulateGrad" else None  # type: ignore[attr-defined]
