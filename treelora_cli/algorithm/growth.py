"""Growing the shape of a task tree: which tasks part where, and the numbering of the nodes.

Pure numpy. Symbols: `T` tasks, `D` adapted layers, `m` signature width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from treelora_cli.algorithm.distances import Float32Array, FloatArray, IntArray, spread_by_layer
from treelora_cli.algorithm.nodes import Node
from treelora_cli.algorithm.split import rule_named


@dataclass
class Shape:
    """A node before it has an index; `spread` None where it must be computed."""

    members: IntArray
    depth: int
    layer: int
    threshold: float | None = None
    children: list[Shape] = field(default_factory=list)
    spread: FloatArray | None = None


def grow(signatures: Float32Array, members: IntArray, depth: int, limit: int, split: str) -> Shape:
    """Cut `members` from `depth` down to `limit` by the named rule, without recursion."""
    rule = rule_named(split)
    labels = np.arange(signatures.shape[0])
    if rule.label is not None:
        labels[members] = members[rule.label(signatures[members])]
    last_layer = signatures.shape[1] - 1
    root = Shape(members, depth, min(depth, last_layer))
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
                shape.children = [Shape(shape.members[side], below, start) for side in (cut.left, cut.right)]
                pending.extend(shape.children)
                break
    return root


def number(root: Shape, signatures: Float32Array) -> tuple[tuple[Node, ...], FloatArray]:
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
