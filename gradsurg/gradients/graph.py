"""Reads the autograd graph of the losses: which leaves a loss reaches, and where the losses' graphs meet.

For the cheap ways through the backward passes, and for compile.py. Each visit of a node takes about a microsecond.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge
from torch.utils.hooks import RemovableHandle

__all__ = [
    "REENTRANT",
    "SINK",
    "Border",
    "Edge",
    "Map",
    "blocking",
    "edge_of",
    "leaf_of",
    "leaves_after",
    "leaves_past",
    "map_of",
    "past_sink",
    "walk",
]

# A node, and which of its outputs.
Edge = tuple[Node, int]
Edges = Sequence[tuple["Node | None", int]]

# The node that use_reentrant=True leaves: it runs a backward pass of its own, over a graph that it rebuilds.
REENTRANT = "CheckpointFunctionBackward"
# The node that DDP puts behind all outputs of forward() at once (find_unused_parameters, static_graph). Its k-th output
# is its k-th input, so it is looked through. Taken as one node, it would let every loss reach every head.
SINK = "_DDPSinkBackward"


def walk(
    roots: Iterable[Node | None], edges_of: Callable[[Node], Edges] | None = None, known: Collection[Node] = ()
) -> tuple[dict[Node, Edges], set[Node]]:
    """Walk over all nodes after some roots, each once, in depth-first order, and turn back at `known` nodes.

    `edges_of` returns the edges by which to leave a node; None takes all. Return the visited nodes with the edges of
    each, and the known nodes that the walk came upon.
    """
    visited: dict[Node, Edges] = {}
    met: set[Node] = set()
    waiting = [root for root in roots if root is not None]
    while waiting:
        node = waiting.pop()
        if node in known:
            # What comes after it was walked before.
            met.add(node)
        elif node not in visited:
            visited[node] = edges = node.next_functions if edges_of is None else edges_of(node)
            # One by one: a list for every node would double the time of the walk.
            for after, _ in edges:
                if after is not None:
                    waiting.append(after)
    return visited, met


def edge_of(tensor: Tensor) -> Edge:
    """Return the node that made a tensor (its accumulator, for a leaf), and which output of it the tensor is."""
    edge = get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def past_sink(edge: tuple[Node | None, int]) -> tuple[Node | None, int]:
    """Return the edge before DDP's sink if this edge leads into it, else the edge itself."""
    node, output = edge
    while node is not None and type(node).__name__ == SINK:
        node, output = node.next_functions[output]
    return node, output


def leaf_of(node: Node) -> Tensor | None:
    """Return the leaf whose gradient a node accumulates; None for every other node."""
    return node.variable if type(node).__name__ == "AccumulateGrad" else None  # type: ignore[attr-defined]


def leaves_past(loss: Tensor, stops: Iterable[Edge]) -> list[Tensor]:
    """Return the leaves that a loss reaches without crossing any of the edges `stops`."""
    ends = set(map(past_sink, stops))
    root = past_sink(edge_of(loss))
    nodes, _ = walk([] if root in ends else [root[0]], lambda node: [edge for edge in _after(node) if edge not in ends])
    return _leaves(nodes)


def leaves_after(nodes: Iterable[Node]) -> list[Tensor]:
    """Return the leaves that gradients at these nodes reach."""
    return _leaves(walk(nodes)[0])


def _leaves(nodes: Iterable[Node]) -> list[Tensor]:
    return [leaf for node in nodes if (leaf := leaf_of(node)) is not None]


def _after(node: Node) -> Edges:
    return [past_sink(edge) for edge in node.next_functions]


@dataclass(frozen=True)
class Border:
    """A node that only one task reaches, by its number, and which of its edges lead to nodes that several reach."""

    node: Node
    task: int
    edges: tuple[int, ...]


@dataclass(frozen=True)
class Map:
    """Which loss reaches which nodes.

    Attributes:
        borders: Where each loss's own nodes lead to those that several losses reach.
        common: The nodes that several losses reach.
        own: The accumulators of the leaves that only one loss reaches, for each loss.
        leaves: The leaves that several losses reach.
        roots: Where each loss's graph begins, past DDP's sink.
        kinds: The names of all kinds of nodes.
        nested: Whether a border leads to a node that is also reached past another border.
        hidden: Whether a loss's own nodes include one that hides what it reaches.
    """

    borders: list[Border]
    common: set[Node]
    own: list[list[Node]]
    leaves: list[Tensor]
    roots: list[Edge]
    kinds: set[str]
    nested: bool
    hidden: bool


def map_of(losses: Sequence[Tensor], declared: Iterable[Tensor] = ()) -> Map:
    """Return what one loss reaches alone and what several reach; `declared` are leaves that count as the latter."""
    roots = [cast(Edge, past_sink(edge_of(loss))) for loss in losses]
    owner, after, met = _owners(roots)
    kinds = {type(node).__name__ for node in owner}
    # Looked for once, instead of at every edge.
    if SINK in kinds:
        owner, after, met = _owners(roots, _after)
    met.update(edge_of(leaf)[0] for leaf in declared if leaf.requires_grad)
    # Whatever comes after a node that several losses reach is reached by several too.
    common = set(walk(met, lambda node: after.get(node, ()))[0])
    borders, hidden, entered = [], False, set()
    own: list[list[Node]] = [[] for _ in losses]
    for node, task in owner.items():
        if node in common:
            continue
        across = tuple([k for k, (other, _) in enumerate(after[node]) if other in common])
        if across:
            borders.append(Border(node, task, across))
            entered.update([after[node][k][0] for k in across])
        hidden = hidden or type(node).__name__ == REENTRANT
        if leaf_of(node) is not None:
            own[task].append(node)
    leaves = _leaves(node for node in owner if node in common)
    nested = len(entered) > 1 and any(other in entered for node in common for other, _ in after.get(node, ()))
    return Map(borders, common, own, leaves, roots, kinds, nested, hidden)


def _owners(
    roots: Sequence[Edge], edges_of: Callable[[Node], Edges] | None = None
) -> tuple[dict[Node, int], dict[Node, Edges], set[Node]]:
    """Return the first task to reach each node, the edges of each node, and the nodes that another task came upon."""
    owner: dict[Node, int] = {}
    after: dict[Node, Edges] = {}
    common: set[Node] = set()
    for task, (root, _) in enumerate(roots):
        visited, met = walk([root], edges_of, known=after)
        owner.update(dict.fromkeys(visited, task))
        after.update(visited)
        common |= met
    return owner, after, common


def blocking(edge: Edge) -> RemovableHandle:
    """Let no gradient pass one output of a node; torch captures it before this hook."""
    node, output = edge

    def blocked(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        return tuple(None if k == output else g for k, g in enumerate(gradients))

    return node.register_prehook(blocked)
