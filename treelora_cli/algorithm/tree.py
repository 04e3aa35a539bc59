"""The K-D tree over tasks: build, extend, ask, and turn into JSON and arrays.

Pure numpy: no files, no model, never torch. Tasks are integer indices; their names live elsewhere.

Symbols: `T` tasks, `D` adapted layers, `m` signature width.

The root splits its tasks on layer 0, deeper nodes on deeper layers, leaves hold tasks. Two rules:

- `principal-gap` (default): the widest gap near the middle of the direction in which the tasks vary
  most on the node's layer; two tasks that are each other's nearest over all layers are never parted
  while the node holds any other task, so they end in one leaf or under one parent.
- `median-l1` (published): the median of the L1 distances to the node's mean. Distance to the mean
  does not say in which direction a task lies: on unrelated groups it parts near-equal tasks about
  as often as chance, which is why it is not the default.

Source: TreeLoRA sections 3.1 and 3.3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from treelora_cli.algorithm.distances import Float32Array, FloatArray, l1_distance, nearest_neighbours
from treelora_cli.algorithm.nodes import (
    DraftNode,
    Node,
    check_keys,
    grow,
    node_to_dict,
    nodes_from_list,
    number,
    read_count,
)
from treelora_cli.algorithm.split import rule_named

__all__ = ["Node", "Tree", "build_tree", "extend_tree"]

FORMAT_VERSION = 1
_DICT_KEYS = ("version", "tree_depth", "split", "tasks_at_build", "nodes")
# Insertion regrows the smallest subtree of at least this many tasks around the newcomer: enough to
# seat it beside its nearest task without parting others, few enough to stay cheap.
_REGROWN_TASKS = 8
# Siblings are merged in preference to a pair that is nearer by less than this factor.
_SIBLING_MARGIN = 1.05


@dataclass(frozen=True, eq=False)
class Tree:
    """A binary tree over tasks; immutable, `insert` returns a new one.

    Attributes:
        signatures: float32 `(T, D, m)`, each layer of L2 norm 1 or all zero.
        nodes: in index order, parents before children; empty for no tasks.
        spreads: float64 `(nodes, D)`, a bound on the L1 distance of two of a node's tasks on
            *every* layer, since the search on one layer needs the spread on that layer.
        tree_depth: the depth asked for; nodes lie at `min(tree_depth, D)` or above.
        split: the rule that cut the nodes.
        tasks_at_build: `T` when the whole tree was last built.
    """

    signatures: Float32Array
    nodes: tuple[Node, ...]
    spreads: FloatArray
    tree_depth: int
    split: str
    tasks_at_build: int

    def __eq__(self, other: object) -> bool:
        """Exact equality of nodes and arrays."""
        if not isinstance(other, Tree):
            return NotImplemented
        return (
            self.nodes == other.nodes
            and (self.tree_depth, self.split) == (other.tree_depth, other.split)
            and self.tasks_at_build == other.tasks_at_build
            and np.array_equal(self.signatures, other.signatures)
            and np.array_equal(self.spreads, other.spreads)
        )

    __hash__ = None  # type: ignore[assignment]  # compared by content, which arrays cannot hash

    @property
    def task_count(self) -> int:
        """`T`."""
        return int(self.signatures.shape[0])

    @property
    def layer_count(self) -> int:
        """`D`."""
        return int(self.signatures.shape[1])

    @property
    def height(self) -> int:
        """Depth of the deepest leaf; 0 for at most one node."""
        return max((node.depth for node in self.nodes), default=0)

    @property
    def rebuild_due(self) -> bool:
        """Whether insertions have grown the tree by more than half since it was built.

        Insertion never revisits the cuts above the newcomer; waiting for half as many again keeps
        the builds' total cost in proportion to a single one.
        """
        return self.task_count > self.tasks_at_build + self.tasks_at_build // 2

    @cached_property
    def parents(self) -> tuple[int, ...]:
        """Parent of each node by index, -1 for the root."""
        parent = [-1] * len(self.nodes)
        for node in self.nodes:
            for child in node.children:
                parent[child] = node.index
        return tuple(parent)

    @cached_property
    def _leaf_of(self) -> dict[int, int]:
        return {task: n.index for n in self.nodes if n.is_leaf for task in n.members}

    def leaves(self) -> tuple[Node, ...]:
        """Nodes without children, in index order."""
        return tuple(node for node in self.nodes if node.is_leaf)

    def path_to(self, task: int) -> tuple[int, ...]:
        """Node indices from the root to the task's leaf.

        Raises:
            ValueError: the task is not in the tree.
        """
        if task not in self._leaf_of:
            raise ValueError(f"task {task} is not in the tree, which holds {self.task_count} tasks")
        path = [self._leaf_of[task]]
        while self.parents[path[-1]] >= 0:
            path.append(self.parents[path[-1]])
        return tuple(reversed(path))

    def lowest_common_ancestor(self, first: int, second: int) -> int:
        """Index of the deepest node that holds both tasks."""
        pairs = zip(self.path_to(first), self.path_to(second), strict=False)
        return max(a for a, b in pairs if a == b)

    def tree_distance(self, first: int, second: int) -> int:
        """Edges between the two tasks' leaves: 0 in one leaf, 2 for siblings."""
        depth = self.nodes[self.lowest_common_ancestor(first, second)].depth
        return len(self.path_to(first)) + len(self.path_to(second)) - 2 * (depth + 1)

    def nearest_leaves(self, groups: Sequence[int] | None = None) -> tuple[int, int, float]:
        """The two groups to merge when adapters exceed the storage budget.

        A group lies at the mean of its tasks' signatures. The pair of least L1 distance averaged
        over the layers is chosen, but a pair that shares a leaf or a parent is preferred to one
        that is nearer by less than five percent.

        Args:
            groups: one group label per task, equal labels sharing an adapter; each task its own
                group if not given.

        Returns:
            The two labels in the order of their first tasks, and their distance in [0, 1].

        Raises:
            ValueError: fewer than two groups, or not one label per task.
        """
        labels = list(range(self.task_count)) if groups is None else list(groups)
        if len(labels) != self.task_count:
            raise ValueError(f"groups: {len(labels)} labels for {self.task_count} tasks")
        members: dict[int, list[int]] = {}
        for task, label in enumerate(labels):
            members.setdefault(label, []).append(task)
        if len(members) < 2:
            raise ValueError(f"nearest leaves: need two groups, got {len(members)}")
        names = list(members)
        first_task = [tasks[0] for tasks in members.values()]
        means = np.stack([self.signatures[tasks].mean(axis=0) for tasks in members.values()])
        neighbour, distance = nearest_neighbours(means)
        near = np.flatnonzero(distance <= distance.min() * _SIBLING_MARGIN)

        def rank(group: int) -> tuple[bool, float, int]:
            tasks = first_task[group], first_task[int(neighbour[group])]
            return self.tree_distance(*tasks) > 2, float(distance[group]), group

        best = min((int(group) for group in near), key=rank)
        one, two = sorted((best, int(neighbour[best])))
        return names[one], names[two], float(distance[best])

    def insert(self, signature: NDArray[np.floating]) -> Tree:
        """Return a tree that also holds one new task, without building all of it again.

        The newcomer joins the smallest subtree of at least eight tasks around its nearest task (L1,
        averaged over the layers); only that subtree is cut again. The nodes above keep their cuts
        and get their exact spread. See `rebuild_due` for when to build anew.

        Args:
            signature: `(D, m)`; the new task's index is the old `T`.

        Raises:
            ValueError: the shape differs or a value is not finite.
        """
        row = np.asarray(signature, dtype=np.float32)[None]
        if row.shape[1:] != self.signatures.shape[1:]:
            expected = self.signatures.shape[1:]
            raise ValueError(f"signature: shape {row.shape[1:]}, expected {expected}")
        signatures = _checked_signatures(np.concatenate([self.signatures, row]))
        if self.task_count < _REGROWN_TASKS:
            return build_tree(signatures, self.tree_depth, split=self.split)
        distance = np.zeros(self.task_count)
        for layer in range(self.layer_count):
            distance += l1_distance(self.signatures[:, layer], row[0, layer])
        path = self.path_to(int(distance.argmin()))
        depth = max(d for d, i in enumerate(path) if len(self.nodes[i].members) >= _REGROWN_TASKS)
        region = self.nodes[path[depth]]
        limit = min(self.tree_depth, self.layer_count)
        members = np.array([*region.members, self.task_count])
        regrown = grow(signatures, members, region.depth, limit, self.split)
        shape = self._with_replaced(path[: depth + 1], regrown)
        nodes, spreads = number(shape, signatures)
        return replace(self, signatures=signatures, nodes=nodes, spreads=spreads)

    def _with_replaced(self, path: tuple[int, ...], regrown: DraftNode) -> DraftNode:
        """Copy the tree's shape with the last node of `path` replaced by a regrown subtree."""
        shapes: dict[int, DraftNode] = {}
        for node in reversed(self.nodes):  # children come after their parents
            below = [shapes.pop(child) for child in node.children]
            if node.index == path[-1]:
                shapes[node.index] = regrown
                continue
            grown = node.index in path
            members = np.array([*node.members, self.task_count] if grown else node.members)
            spread = None if grown else self.spreads[node.index]
            shapes[node.index] = DraftNode(members, node.depth, node.layer, node.threshold, below, spread)
        return shapes[0]

    def to_dict(self) -> dict[str, object]:
        """Everything but the arrays, as JSON types."""
        return {
            "version": FORMAT_VERSION,
            "tree_depth": self.tree_depth,
            "split": self.split,
            "tasks_at_build": self.tasks_at_build,
            "nodes": [node_to_dict(node) for node in self.nodes],
        }

    def to_arrays(self) -> dict[str, NDArray[np.generic]]:
        """The arrays to store beside `to_dict`: `signatures` and `spreads`."""
        return {"signatures": self.signatures, "spreads": self.spreads}

    @classmethod
    def from_state(cls, data: object, arrays: Mapping[str, NDArray[np.generic]]) -> Tree:
        """Inverse of `to_dict` and `to_arrays`: the tree returned equals the one stored.

        Args:
            data: what a JSON reader returned.
            arrays: `signatures` float32 `(T, D, m)` and `spreads` float64 `(nodes, D)`.

        Raises:
            ValueError: malformed input; the message names the node and what is wrong.
        """
        if not isinstance(data, dict):
            raise ValueError(f"tree: expected an object, got {type(data).__name__}")
        check_keys(data, _DICT_KEYS, "tree")
        if data["version"] != FORMAT_VERSION:
            raise ValueError(f"tree: version {data['version']!r}, expected {FORMAT_VERSION}")
        check_keys(dict(arrays), ("signatures", "spreads"), "tree arrays")
        signatures = _checked_signatures(arrays["signatures"])
        tasks, layers, _ = signatures.shape
        tree_depth = read_count(data["tree_depth"], "tree_depth")
        nodes = nodes_from_list(data["nodes"], tasks, layers, min(tree_depth, layers))
        return cls(
            signatures=signatures,
            nodes=nodes,
            spreads=_checked_spreads(arrays["spreads"], nodes, layers),
            tree_depth=tree_depth,
            split=_checked_rule(data["split"]),
            tasks_at_build=read_count(data["tasks_at_build"], "tasks_at_build"),
        )


def build_tree(signatures: NDArray[np.floating], tree_depth: int, *, split: str = "principal-gap") -> Tree:
    """Build the tree of all tasks.

    Args:
        signatures: float32 `(T, D, m)`, layers in network order; `T` may be 0 or 1.
        tree_depth: levels of splitting; leaves lie at depth `min(tree_depth, D)` or above.
        split: name of a rule in `split.RULES`.

    Returns:
        The tree; equal input gives an equal tree.

    Raises:
        ValueError: a wrong shape, a value that is not finite, a negative depth, an unknown rule.

    Source: TreeLoRA section 3.3, "practical implementation".
    """
    rows = _checked_signatures(signatures)
    depth = read_count(tree_depth, "tree_depth")
    rule = _checked_rule(split)
    tasks, layers, _ = rows.shape
    if tasks == 0:
        return Tree(rows, (), np.zeros((0, layers)), depth, rule, 0)
    shape = grow(rows, np.arange(tasks), 0, min(depth, layers), rule)
    nodes, spreads = number(shape, rows)
    return Tree(rows, nodes, spreads, depth, rule, tasks)


def extend_tree(tree: Tree | None, signature: NDArray[np.floating], tree_depth: int, *, split: str) -> Tree:
    """Return the tree with one more task: inserted, or built anew when that is due or the settings differ.

    Args:
        tree: the tree so far; `None` before the first task.
        signature: `(D, m)` of the new task.
        tree_depth: levels of splitting in force now.
        split: rule in force now.

    Raises:
        ValueError: the shape differs or a value is not finite.
    """
    row = np.asarray(signature)[None]
    if tree is None:
        return build_tree(row, tree_depth, split=split)
    if (tree.tree_depth, tree.split) == (tree_depth, split):
        grown = tree.insert(signature)
        if not grown.rebuild_due:
            return grown
    return build_tree(np.concatenate([tree.signatures, row]), tree_depth, split=split)


def _checked_signatures(signatures: NDArray[np.generic]) -> Float32Array:
    """Return the array if it is floating, finite and `(T, D, m)` with `D, m >= 1`."""
    if signatures.ndim != 3 or 0 in signatures.shape[1:]:
        raise ValueError(f"signatures: expected shape (T, D, m), got {signatures.shape}")
    if not np.issubdtype(signatures.dtype, np.floating):
        raise ValueError(f"signatures: expected floats, got {signatures.dtype}")
    rows = np.ascontiguousarray(signatures, dtype=np.float32)
    if not np.isfinite(rows).all():
        task, layer, _ = np.argwhere(~np.isfinite(rows))[0]
        raise ValueError(f"signatures: task {task}, layer {layer} is not finite")
    return rows


def _checked_spreads(spreads: NDArray[np.generic], nodes: tuple[Node, ...], layers: int) -> FloatArray:
    """Return the array if it matches the nodes and their own spreads."""
    if spreads.shape != (len(nodes), layers) or spreads.dtype != np.float64:
        got = f"{spreads.dtype} {spreads.shape}"
        raise ValueError(f"spreads: expected float64 {(len(nodes), layers)}, got {got}")
    values = np.asarray(spreads, dtype=np.float64)
    for node in nodes:
        if values[node.index, node.layer] != node.spread:
            raise ValueError(f"spreads: node {node.index} differs from its spread {node.spread}")
    return values


def _checked_rule(rule: object) -> str:
    """Return the rule's name if it is known."""
    rule_named(rule)
    return str(rule)
