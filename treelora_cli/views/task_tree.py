"""The learned tree in the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text
from rich.tree import Tree as RichTree

from treelora_cli.algorithm.distances import l1_distance
from treelora_cli.algorithm.kinds import SAME_KIND
from treelora_cli.algorithm.tree import Tree

_MANY = 30
"""Tasks beyond which neither a line that names all of them nor a table with a column for each can be read."""
_NAMED = 8
_FIRST = 3
_LINE = 44
"""Characters of names on one line: beside the branches of a deep tree they fit into 80 columns."""


def tree_view(tree: Tree, names: Sequence[str], layers: Sequence[str], max_depth: int | None) -> RichTree:
    """Draw members, split layer, threshold and spread of every node."""
    root = RichTree(Text(_node_line(tree, 0, names, layers)))
    stack = [(0, root)]
    while stack:
        index, branch = stack.pop()
        node = tree.nodes[index]
        if max_depth is not None and node.depth >= max_depth:
            continue
        children = [(child, branch.add(Text(_node_line(tree, child, names, layers)))) for child in node.children]
        stack.extend(reversed(children))
    return root


def _node_line(tree: Tree, index: int, names: Sequence[str], layers: Sequence[str]) -> str:
    node = tree.nodes[index]
    members = _wrapped([names[task] for task in node.members])
    if not node.children:
        inside = "" if len(node.members) == 1 else f"  (spread {tree.spreads[index].mean():.3f})"
        return f"● {members}{inside}"
    if len(node.members) > _NAMED:  # the leaves below name them all
        members = _wrapped([*(names[task] for task in node.members[:_FIRST]), "..."])
    return (
        f"{len(node.members)} tasks: {members}\n"
        f"split on {layers[node.layer]} at {node.threshold:.3f}, spread {tree.spreads[index, node.layer]:.3f}"
    )


def _wrapped(names: Sequence[str]) -> str:
    """Join names, as many on a line as can be read beside the branches."""
    return "\n".join(textwrap.wrap(", ".join(names), _LINE, break_long_words=False, break_on_hyphens=False))


def tree_document(tree: Tree, names: Sequence[str], layers: Sequence[str]) -> dict[str, Any]:
    """The tree for ``--json``: nodes with named members and layers, and mean distances."""
    nodes = [
        {
            "index": node.index,
            "depth": node.depth,
            "layer": layers[node.layer] if node.children else None,
            "threshold": node.threshold if node.children else None,
            "spread": float(tree.spreads[node.index].mean()),
            "members": [names[task] for task in node.members],
            "children": list(node.children),
        }
        for node in tree.nodes
    ]
    return {"tasks": list(names), "height": tree.height, "nodes": nodes, "distances": distances(tree, None).tolist()}


def branch_document(records: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The branches for ``--json``: tasks of each, why the newest joined or opened one, how far kinds lie apart.

    Args:
        records: ``task.json`` of each task in order of arrival.

    Returns:
        ``None`` where tasks never share adapters.
    """
    if not records or records[-1].get("branch_reason") is None:
        return None
    members: dict[str, list[str]] = {}
    frozen: list[str] = []
    for record in records:
        branch = record["branch"]
        (frozen if branch is None else members.setdefault(branch, [])).append(record["name"])
    apart = {record["name"]: dict(record.get("kind_distances", {})) for record in records}
    return {
        "members": members,
        "frozen": frozen,
        "reason": records[-1]["branch_reason"],
        "kind_distances": apart,
        "same_kind": SAME_KIND,
    }


def branch_view(branches: Mapping[str, Any]) -> RichTree:
    """Draw the branches: tasks that share an adapter and a feature space."""
    count = len(branches["members"])
    root = RichTree(Text(f"{count} branch{'' if count == 1 else 'es'}: tasks that share an adapter"))
    for name, tasks in branches["members"].items():
        joined = ", ".join(task for task in tasks if task != name)
        root.add(Text(f"{name}" + (f", joined by {joined}" if joined else "")))
    if branches["frozen"]:
        root.add(Text(f"frozen features only: {', '.join(branches['frozen'])}"))
    return root


def kind_table(branches: Mapping[str, Any]) -> Table | None:
    """Table of how far each task's kind of data lies from the earlier ones'; of many tasks, from the nearest."""
    apart, limit = branches["kind_distances"], branches["same_kind"]
    if not any(apart.values()):
        return None
    title = f"Distance of kinds of data to earlier tasks: {limit:g} or less is one kind"
    names = list(apart)
    if len(names) > _MANY:
        table = Table("task", "nearest earlier task", title=title)
        table.add_column("distance", justify="right")
        for name, row in apart.items():
            nearest = min(row, key=row.__getitem__, default=None)
            table.add_row(name, nearest or "-", "-" if nearest is None else f"{row[nearest]:.2f}")
        return table
    table = Table("task", title=title)
    for name in names[:-1]:
        table.add_column(name, justify="right")
    for name, row in apart.items():
        table.add_row(name, *(f"{row[one]:.2f}" if one in row else "" for one in names[:-1]))
    return table


def distances(tree: Tree, layer: int | None) -> np.ndarray[Any, Any]:
    """Scaled L1 distances between all tasks, (T, T): of one layer, or the mean over layers."""
    count = tree.task_count
    chosen = range(tree.layer_count) if layer is None else [layer]
    found = np.zeros((count, count))
    for one in chosen:
        rows = np.ascontiguousarray(tree.signatures[:, one])  # (T, m), small enough to stay in the cache
        for task in range(count - 1):  # the upper triangle; the lower one is its mirror
            found[task, task + 1 :] += l1_distance(rows[task + 1 :], rows[task])
    return (found + found.T) / len(chosen)


def distance_table(tree: Tree, names: Sequence[str], layer: int | None, layers: Sequence[str]) -> Table:
    """Table of ``distances``; of many tasks, each one's nearest."""
    where = "mean over layers" if layer is None else layers[layer]
    if len(names) > _MANY:
        return _nearest_table(tree, names, layer, where)
    table = Table(title=f"L1 distance of gradient signatures, {where}")
    table.add_column("task")
    for name in names:
        table.add_column(name, justify="right")
    for name, row in zip(names, distances(tree, layer), strict=True):
        table.add_row(name, *(f"{value:.3f}" for value in row))
    return table


def _nearest_table(tree: Tree, names: Sequence[str], layer: int | None, where: str) -> Table:
    """Table of each task's nearest other task."""
    table = Table(title=f"Nearest task by L1 distance of gradient signatures, {where}")
    for heading in ("task", "nearest", "distance"):
        table.add_column(heading, justify="right" if heading == "distance" else "left")
    pairs = distances(tree, layer)
    np.fill_diagonal(pairs, np.inf)
    for name, row in zip(names, pairs, strict=True):
        nearest = int(row.argmin())
        table.add_row(name, names[nearest], f"{row[nearest]:.3f}")
    return table


def bandit_table(names: Sequence[str], pulls: np.ndarray[Any, Any], means: np.ndarray[Any, Any], title: str) -> Table:
    """Pulls and mean distances of the earlier tasks, summed and averaged over layers."""
    table = Table(title=title)
    for heading in ("task", "pulls", "share", "mean distance"):
        table.add_column(heading, justify="left" if heading == "task" else "right")
    total = max(1, int(pulls.sum()))
    with np.errstate(invalid="ignore"):
        mean = np.nansum(means * pulls, axis=0) / np.maximum(pulls.sum(axis=0), 1)
    for index, name in enumerate(names):
        count = int(pulls[:, index].sum())
        distance = f"{mean[index]:.3f}" if count else "-"
        table.add_row(name, str(count), f"{100 * count / total:.1f} %", distance)
    return table
