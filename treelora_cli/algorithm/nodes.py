"""Nodes of the task tree: the strict reading of their JSON form, how they grow and how they are numbered.

Symbols: `T` tasks, `D` adapted layers, `m` signature width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields

import numpy as np

from treelora_cli.algorithm.distances import Float32Array, FloatArray, IntArray, spread_by_layer
from treelora_cli.algorithm.split import rule_named


@dataclass(frozen=True, slots=True)
class Node:
    """One node of the tree.

    Attributes:
        index: position in `Tree.nodes`; the root is 0 and a parent comes before its children.
        depth: edges from the root.
        layer: adapted layer, 0-based, on which the node splits and its spread is measured. It
            equals the depth, unless the tasks do not differ there: then the next layer on which
            they do. A leaf at depth `D` has no layer of its own and keeps the last one.
        members: tasks below this node, ascending.
        children: indices of the two children, or empty for a leaf.
        threshold: where the members were cut (see `split.Cut`), None for a leaf.
        spread: a bound on the scaled L1 distance of two members on `layer`, see `distances.spread_by_layer`.
    """

    index: int
    depth: int
    layer: int
    members: tuple[int, ...]
    children: tuple[int, ...]
    threshold: float | None
    spread: float

    @property
    def is_leaf(self) -> bool:
        """Whether the node has no children."""
        return not self.children


_NODE_KEYS = tuple(field.name for field in fields(Node))


def node_to_dict(node: Node) -> dict[str, object]:
    """Return the node as a dictionary of JSON types."""
    record: dict[str, object] = asdict(node)
    record["members"] = list(node.members)
    record["children"] = list(node.children)
    return record


def nodes_from_list(records: object, tasks: int, layers: int, max_depth: int) -> tuple[Node, ...]:
    """Read and check a list of node dictionaries.

    Args:
        records: what a JSON reader returned.
        tasks: `T`, how many tasks the nodes must hold.
        layers: `D`, how many layers there are.
        max_depth: the deepest a node may lie.

    Returns:
        The nodes in index order; empty for no tasks.

    Raises:
        ValueError: a wrong type, an unknown or missing key, a cycle, a node with no or two parents,
            a task that is missing or in two leaves, a depth or layer out of range.
    """
    if not isinstance(records, list):
        raise ValueError(f"tree nodes: expected a list, got {type(records).__name__}")
    nodes = tuple(_node_from_dict(record, place) for place, record in enumerate(records))
    if not nodes:
        if tasks:
            raise ValueError(f"tree: no nodes, but {tasks} tasks")
        return nodes
    _check_links(nodes)
    _check_tasks(nodes, tasks)
    for node in nodes:
        if node.layer >= layers:
            raise ValueError(f"tree node {node.index}: layer {node.layer}, but {layers} layers")
        if node.depth > max_depth:
            raise ValueError(f"tree node {node.index}: depth {node.depth} exceeds {max_depth}")
        if node.is_leaf != (node.threshold is None):
            raise ValueError(f"tree node {node.index}: a threshold belongs to a node with children")
    return nodes


def check_keys(record: Mapping[str, object], expected: Sequence[str], where: str) -> None:
    """Raise ValueError unless the record's keys are exactly the expected ones."""
    missing = [key for key in expected if key not in record]
    unknown = [str(key) for key in record if key not in expected]
    if missing:
        raise ValueError(f"{where}: missing {', '.join(missing)}")
    if unknown:
        raise ValueError(f"{where}: unknown key {', '.join(unknown)}")


def read_count(value: object, where: str) -> int:
    """Return a non-negative integer, or raise ValueError naming where it stood."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{where}: expected an integer of 0 or more, got {value!r}")
    return value


def _read_counts(value: object, where: str) -> tuple[int, ...]:
    """Return a tuple of non-negative integers from a JSON list."""
    if not isinstance(value, list):
        raise ValueError(f"{where}: expected a list, got {type(value).__name__}")
    return tuple(read_count(entry, where) for entry in value)


def _read_number(value: object, where: str) -> float:
    """Return a finite float."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{where}: expected a finite number, got {value!r}")
    return float(value)


def _node_from_dict(record: object, place: int) -> Node:
    """Read one node's own fields; links between nodes are checked later."""
    where = f"tree node {place}"
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected an object, got {type(record).__name__}")
    check_keys(record, _NODE_KEYS, where)
    if record["index"] != place or isinstance(record["index"], bool):
        raise ValueError(f"{where}: index is {record['index']!r}")
    members = _read_counts(record["members"], f"{where} members")
    if not members or list(members) != sorted(set(members)):
        raise ValueError(f"{where} members: expected distinct tasks, ascending, at least one")
    children = _read_counts(record["children"], f"{where} children")
    if len(children) not in (0, 2):
        raise ValueError(f"{where} children: expected none or two, got {len(children)}")
    threshold = record["threshold"]
    spread = _read_number(record["spread"], f"{where} spread")
    if spread < 0:
        raise ValueError(f"{where} spread: {spread} is negative")
    return Node(
        index=place,
        depth=read_count(record["depth"], f"{where} depth"),
        layer=read_count(record["layer"], f"{where} layer"),
        members=members,
        children=children,
        threshold=None if threshold is None else _read_number(threshold, f"{where} threshold"),
        spread=spread,
    )


def _check_links(nodes: tuple[Node, ...]) -> None:
    """Every node but the root has one parent, which comes before it: no cycle is possible."""
    parent: dict[int, int] = {}
    for node in nodes:
        for child in node.children:
            if child >= len(nodes):
                raise ValueError(f"tree node {node.index}: child {child} does not exist")
            if child <= node.index:
                raise ValueError(f"tree node {node.index}: child {child} makes a cycle")
            if child in parent:
                raise ValueError(f"tree node {child}: parents {parent[child]} and {node.index}")
            if nodes[child].depth != node.depth + 1:
                raise ValueError(f"tree node {child}: depth is not its parent's plus one")
            parent[child] = node.index
    orphans = [node.index for node in nodes[1:] if node.index not in parent]
    if orphans:
        raise ValueError(f"tree node {orphans[0]}: no parent")
    if nodes[0].depth != 0:
        raise ValueError(f"tree node 0: the root's depth is {nodes[0].depth}, expected 0")


def _check_tasks(nodes: tuple[Node, ...], tasks: int) -> None:
    """The leaves hold every task once, and each inner node what its children hold."""
    leaf_of: dict[int, int] = {}
    for node in nodes:
        if not node.is_leaf:
            below = sorted(task for child in node.children for task in nodes[child].members)
            if len(set(below)) == len(below) and below != list(node.members):
                raise ValueError(f"tree node {node.index}: members differ from its children's")
            continue
        for task in node.members:
            if task >= tasks:
                raise ValueError(f"tree node {node.index}: task {task}, but {tasks} tasks")
            if task in leaf_of:
                leaves = f"{leaf_of[task]} and {node.index}"
                raise ValueError(f"tree: task {task} is in two leaves, {leaves}")
            leaf_of[task] = node.index
    missing = [task for task in range(tasks) if task not in leaf_of]
    if missing:
        raise ValueError(f"tree: task {missing[0]} is in no leaf")


@dataclass
class DraftNode:
    """A node before it has an index; `spread` None where it must be computed."""

    members: IntArray
    depth: int
    layer: int
    threshold: float | None = None
    children: list[DraftNode] = field(default_factory=list)
    spread: FloatArray | None = None


def grow(signatures: Float32Array, members: IntArray, depth: int, limit: int, split: str) -> DraftNode:
    """Cut `members` from `depth` down to `limit` by the named rule, without recursion."""
    rule = rule_named(split)
    labels = np.arange(signatures.shape[0])
    if rule.label is not None:
        labels[members] = members[rule.label(signatures[members])]
    last_layer = signatures.shape[1] - 1
    root = DraftNode(members, depth, min(depth, last_layer))
    pending = [root]
    while pending:
        shape = pending.pop()
        if shape.members.size < 2 or shape.depth >= limit:
            continue
        for layer in range(shape.depth, signatures.shape[1]):
            cut = rule.cut(signatures[shape.members, layer], labels[shape.members])
            if cut is not None:
                shape.layer, shape.threshold = layer, cut.threshold
                below, start = shape.depth + 1, min(shape.depth + 1, last_layer)
                shape.children = [DraftNode(shape.members[side], below, start) for side in (cut.left, cut.right)]
                pending.extend(shape.children)
                break
    return root


def number(root: DraftNode, signatures: Float32Array) -> tuple[tuple[Node, ...], FloatArray]:
    """Give every shape an index, parents first, and its spread on every layer."""
    order = [root]
    first_child: list[int] = []
    for shape in order:  # grows while it runs: breadth first
        first_child.append(len(order))
        order.extend(shape.children)
    spreads = np.zeros((len(order), signatures.shape[1]))
    nodes = []
    for index, shape in enumerate(order):
        spread = shape.spread
        spreads[index] = spread_by_layer(signatures[shape.members]) if spread is None else spread
        children = tuple(range(first_child[index], first_child[index] + len(shape.children)))
        members = tuple(int(task) for task in shape.members)
        own = float(spreads[index, shape.layer])
        nodes.append(Node(index, shape.depth, shape.layer, members, children, shape.threshold, own))
    return tuple(nodes), spreads
