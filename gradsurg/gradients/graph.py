"""Reading the graph that a forward pass left: which leaves a loss reaches by which way, and where tasks meet.

A node is visited once or twice per step, about a microsecond each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

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
]

Edge = tuple[Node, int]  # a node, and which of its outputs
Edges = Sequence[tuple["Node | None", int]]


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


def _root_edge(tensor: Tensor) -> Edge:
    node, output = past_sink(edge_of(tensor))
    assert node is not None
    return node, output


def _after(node: Node) -> Edges:
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


def leaves_after(nodes: Iterable[Node]) -> list[Tensor]:
    """Return the leaves that gradients at these nodes reach."""
    seen = set(nodes)
    waiting, leaves = list(seen), []
    while waiting:
        node = waiting.pop()
        leaf = leaf_of(node)
        if leaf is not None:
            leaves.append(leaf)
        for after, _ in node.next_functions:
            if after is not None and after not in seen:
                seen.add(after)
                waiting.append(after)
    return leaves


@dataclass(frozen=True)
class Map:
    """Who reaches what.

    Attributes:
        borders: Where each loss's own nodes lead into those that several losses reach.
        common: The nodes that several losses reach.
        own: The accumulators of the leaves that each loss reaches alone.
        leaves: The leaves that several losses reach.
        roots: Where each loss's graph begins, inside of DDP's forward pass or outside of any.
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
    roots = [_root_edge(loss) for loss in losses]
    owner, after, common = _owners(roots, _edges)
    kinds = {type(node).__name__ for node in owner}
    if SINK in kinds:  # looked for once, and not at every edge
        owner, after, common = _owners(roots, _after)
    common.update(edge_of(leaf)[0] for leaf in declared)
    waiting = list(common)
    while waiting:  # whatever comes after a node that several losses reach is reached by several too
        for other, _ in after.get(waiting.pop(), ()):
            if other is not None and other not in common:
                common.add(other)
                waiting.append(other)
    borders, hidden, entered = [], False, set()
    own: list[list[Node]] = [[] for _ in losses]
    leaves = []
    for node, task in owner.items():
        leaf = leaf_of(node)
        if node in common:
            if leaf is not None:
                leaves.append(leaf)
            continue
        across = tuple([k for k, (other, _) in enumerate(after[node]) if other in common])
        if across:
            borders.append(Border(node, task, across))
            entered.update([after[node][k][0] for k in across])
        hidden = hidden or type(node).__name__ == REENTRANT
        if leaf is not None:
            own[task].append(node)
    nested = len(entered) > 1 and any(other in entered for node in common for other, _ in after.get(node, ()))
    return Map(borders, common, own, leaves, roots, kinds, nested, hidden)


def _owners(
    roots: Sequence[Edge], edges_of: Callable[[Node], Edges]
) -> tuple[dict[Node, int], dict[Node, Edges], set[Node]]:
    """Return the first task to reach each node, where each leads, and the nodes where another task came upon one."""
    owner: dict[Node, int] = {}
    after: dict[Node, Edges] = {}
    met = set()
    for task, (root, _) in enumerate(roots):
        waiting = [root]
        while waiting:
            node = waiting.pop()
            if owner.setdefault(node, task) != task:
                met.add(node)
            elif node not in after:
                after[node] = edges = edges_of(node)
                for other, _ in edges:
                    if other is not None:
                        waiting.append(other)  # one by one: a list for every node takes twice the time of the walk
    return owner, after, met


def _edges(node: Node) -> Edges:
    return node.next_functions


def leaf_of(node: Node) -> Tensor | None:
    """Return the leaf whose gradient a node accumulates; None for every other node."""
    return node.variable if type(node).__name__ == "AccumulateGrad" else None  # type: ignore[attr-defined]


def blocking(edge: Edge) -> RemovableHandle:
    """Let no gradient pass one output of a node; torch captures it before this hook."""
    node, output = edge

    def blocked(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        return tuple(None if k == output else g for k, g in enumerate(gradients))

    return node.register_prehook(blocked)
