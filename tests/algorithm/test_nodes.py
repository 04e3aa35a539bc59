"""What is refused of stored nodes, and the line that says so."""

from __future__ import annotations

import copy
import re
from typing import Any

import numpy as np
import pytest

from treelora_cli.algorithm.nodes import nodes_from_list
from treelora_cli.algorithm.tree import build_tree

TREE = build_tree(np.array([0, 1, 8, 9], dtype=np.float32)[:, None, None], 1)
"""A root, and leaves of tasks 0 and 1, 2 and 3."""


def records(*edits: tuple[int, str, Any]) -> Any:
    """The nodes as stored, with some fields set: node, name, value."""
    nodes: Any = copy.deepcopy(TREE.to_dict()["nodes"])
    for node, name, value in edits:
        nodes[node][name] = value
    return nodes


def refused(stored: Any, line: str, tasks: int = 4, max_depth: int = 1) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(line)}$"):
        nodes_from_list(stored, tasks, 1, max_depth)


def test_nodes_as_stored_are_read() -> None:
    assert nodes_from_list(records(), 4, 1, 1) == TREE.nodes
    assert nodes_from_list(records((1, "spread", 1)), 4, 1, 1)[1].spread == 1.0
    assert nodes_from_list([], 0, 1, 1) == ()


@pytest.mark.parametrize(
    ("node", "name", "value", "line"),
    [
        (0, "index", False, "tree node 0: index is False"),
        (2, "index", 1, "tree node 2: index is 1"),
        (1, "members", 3, "tree node 1 members: expected a list, got int"),
        (1, "members", [0, "1"], "tree node 1 members: expected an integer of 0 or more, got '1'"),
        (1, "members", [1, 0], "tree node 1 members: expected distinct tasks, ascending, at least one"),
        (1, "members", [], "tree node 1 members: expected distinct tasks, ascending, at least one"),
        (0, "children", "x", "tree node 0 children: expected a list, got str"),
        (0, "children", [1], "tree node 0 children: expected none or two, got 1"),
        (0, "children", [1, -2], "tree node 0 children: expected an integer of 0 or more, got -2"),
        (1, "depth", 1.0, "tree node 1 depth: expected an integer of 0 or more, got 1.0"),
        (1, "layer", None, "tree node 1 layer: expected an integer of 0 or more, got None"),
        (1, "spread", True, "tree node 1 spread: expected a finite number, got True"),
        (1, "spread", "x", "tree node 1 spread: expected a finite number, got 'x'"),
        (1, "spread", float("inf"), "tree node 1 spread: expected a finite number, got inf"),
        (1, "spread", -0.5, "tree node 1 spread: -0.5 is negative"),
        (0, "threshold", True, "tree node 0 threshold: expected a finite number, got True"),
        (1, "more", 1, "tree node 1: unknown key more"),
        (0, "children", [1, 3], "tree node 0: child 3 does not exist"),
        (0, "children", [0, 2], "tree node 0: child 0 makes a cycle"),
        (0, "children", [2, 2], "tree node 2: parents 0 and 0"),
        (2, "depth", 2, "tree node 2: depth is not its parent's plus one"),
        (0, "children", [], "tree node 1: no parent"),
        (0, "members", [0, 1, 2], "tree node 0: members differ from its children's"),
        (2, "members", [1, 3], "tree: task 1 is in two leaves, 1 and 2"),
        (1, "layer", 1, "tree node 1: layer 1, but 1 layers"),
        (1, "threshold", 0.5, "tree node 1: a threshold belongs to a node with children"),
        (0, "threshold", None, "tree node 0: a threshold belongs to a node with children"),
    ],
)
def test_a_field_that_cannot_be_is_named(node: int, name: str, value: Any, line: str) -> None:
    refused(records((node, name, value)), line)


def test_what_is_wrong_with_all_nodes_is_named() -> None:
    refused(7, "tree nodes: expected a list, got int")
    refused([*records()[:2], []], "tree node 2: expected an object, got list")
    without = records()
    del without[1]["layer"], without[1]["depth"]
    refused(without, "tree node 1: missing depth, layer")
    refused(records((1, "more", 1), (1, "other", 2)), "tree node 1: unknown key more, other")
    refused([], "tree: no nodes, but 4 tasks")
    refused(
        records((0, "depth", 1), (1, "depth", 2), (2, "depth", 2)), "tree node 0: the root's depth is 1, expected 0"
    )
    refused(records(), "tree node 1: depth 1 exceeds 0", max_depth=0)
    refused(records(), "tree node 2: task 3, but 3 tasks", tasks=3)
    refused(records(), "tree: task 4 is in no leaf", tasks=5)
