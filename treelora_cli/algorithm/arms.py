"""The arms of the search as flat arrays: the task tree carried down to single tasks.

A tree of capped depth has leaves with many tasks. Trying them one by one would make a step's cost
grow with the number of tasks, so such a leaf is halved further, for the search alone, along the
direction in which its tasks vary most on the leaf's layer (equal signatures in index order). Every
node added has its own measured spread, so the bounds hold there as they do in the tree.

Pure numpy. Symbols: `T` tasks, `D` adapted layers, `N` search nodes, `2 T - 1` of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treelora_cli.algorithm.distances import FloatArray, IntArray, spread_by_layer
from treelora_cli.algorithm.split import halve
from treelora_cli.algorithm.tree import Tree


@dataclass(frozen=True, eq=False)
class SearchArms:
    """A full binary tree whose leaves are single tasks.

    Attributes:
        children: int64 `(N, 2)`, -1 for an arm; a parent comes before its children, the root is 0.
        tasks: int64 `(N,)`, the arm's task, -1 for an inner node.
        spreads: float64 `(N, D)`, the smoothness of each node on each layer; 0 for an arm.
    """

    children: IntArray
    tasks: IntArray
    spreads: FloatArray

    @cached_property
    def arm_of(self) -> IntArray:
        """Search node of each task, int64 `(T,)`."""
        arms = np.flatnonzero(self.tasks >= 0)
        return arms[np.argsort(self.tasks[arms])]

    @cached_property
    def child_pairs(self) -> list[tuple[int, int] | None]:
        """The two children of each node in Python's integers, ``None`` for an arm."""
        rows = zip(self.children.tolist(), self.tasks.tolist(), strict=True)
        return [(pair[0], pair[1]) if task < 0 else None for pair, task in rows]

    @cached_property
    def parents(self) -> IntArray:
        """Parent of each node, int64 `(N,)`; the root is its own."""
        parent = np.zeros(self.tasks.size, dtype=np.int64)
        inner = np.flatnonzero(self.tasks < 0)
        parent[self.children[inner]] = inner[:, None]
        return parent

    def path_to(self, task: int) -> list[int]:
        """Nodes from the root to a task's arm."""
        path = [int(self.arm_of[task])]
        while path[-1]:
            path.append(int(self.parents[path[-1]]))
        return path[::-1]

    @cached_property
    def levels(self) -> list[IntArray]:
        """Inner nodes by depth, deepest first: children are settled before their parents."""
        levels = []
        level = np.zeros(1, dtype=np.int64)
        while (inner := level[self.tasks[level] < 0]).size:
            levels.append(inner)
            level = self.children[inner].ravel()
        return levels[::-1]

    @property
    def height(self) -> int:
        """Depth of the deepest arm."""
        return len(self.levels)

    def to_arrays(self) -> dict[str, NDArray[np.generic]]:
        """The arrays to store; a round trip keeps the halves of a leaf as they were."""
        return {"children": self.children, "tasks": self.tasks, "node_spreads": self.spreads}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[np.generic]], tree: Tree) -> SearchArms:
        """Inverse of `to_arrays`.

        Raises:
            ValueError: the arrays are not a full binary tree over the tree's tasks.
        """
        nodes = 2 * tree.task_count - 1
        children = checked_array(arrays, "children", (nodes, 2), np.int64)
        tasks = checked_array(arrays, "tasks", (nodes,), np.int64)
        spreads = checked_array(arrays, "node_spreads", (nodes, tree.layer_count), np.float64)
        inner = tasks < 0
        below = children[inner]
        if not np.array_equal(np.sort(tasks[~inner]), np.arange(tree.task_count)):
            raise ValueError("bandit tasks: expected every task of the tree on one arm")
        once = np.array_equal(np.sort(below.ravel()), np.arange(1, nodes))
        if not once or (below <= np.flatnonzero(inner)[:, None]).any():
            raise ValueError("bandit children: not a binary tree with parents before children")
        return cls(children, tasks, spreads)


def search_arms(tree: Tree) -> SearchArms:
    """Carry the tree down to single tasks.

    Args:
        tree: at least one task.
    """
    children = [list(node.children) or [-1, -1] for node in tree.nodes]
    spreads = [tree.spreads[node.index] for node in tree.nodes]
    tasks = [-1] * len(children)
    pending = [(leaf.index, np.array(leaf.members), leaf.layer) for leaf in tree.leaves()]
    while pending:
        node, members, layer = pending.pop()
        if members.size == 1:
            tasks[node] = int(members[0])
            continue
        cut = halve(tree.signatures[members, layer])
        children[node] = [len(children), len(children) + 1]
        for side in (cut.left, cut.right):
            pending.append((len(children), members[side], layer))
            children.append([-1, -1])
            tasks.append(-1)
            spreads.append(spread_by_layer(tree.signatures[members[side]]))
    return SearchArms(np.array(children), np.array(tasks), np.stack(spreads))


def checked_array(
    arrays: Mapping[str, NDArray[np.generic]],
    name: str,
    shape: tuple[int, ...],
    kind: type[np.generic],
) -> NDArray[Any]:
    """Return a copy of the named array, or raise ValueError if its shape or type differs."""
    if name not in arrays:
        raise ValueError(f"bandit {name}: missing")
    array = arrays[name]
    if array.shape != shape or array.dtype != kind:
        expected = f"{np.dtype(kind)} {shape}"
        raise ValueError(f"bandit {name}: expected {expected}, got {array.dtype} {array.shape}")
    return array.copy()
