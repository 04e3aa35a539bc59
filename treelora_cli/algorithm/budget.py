"""Keep the number of adapters within the storage budget by merging the nearest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from treelora_cli.algorithm.tree import Tree

W = TypeVar("W")
"""An adapter; what it is made of is the business of ``merge``."""


@dataclass(frozen=True)
class MergedGroup(Generic[W]):
    """Tasks that share one adapter from now on.

    Attributes:
        members: Task indices in order of arrival.
        adapter: The rank-r adapter nearest to the mean of their updates.
    """

    members: tuple[int, ...]
    adapter: W


def merge_to_budget(
    tree: Tree,
    homes: Sequence[str],
    adapter_of: Callable[[int], W],
    budget: int,
    merge: Callable[[Sequence[W], Sequence[float]], W],
) -> list[MergedGroup[W]]:
    """Merge the two nearest groups until at most ``budget`` adapters are left.

    Args:
        tree: Tree over all tasks.
        homes: Per task, where its adapter is kept; equal homes share an adapter.
        adapter_of: Returns the adapter of a task.
        budget: Most adapters; 0 means no limit.
        merge: Returns the adapter that stands for some with such weights.

    Returns:
        The groups that changed; empty when the budget is kept already.
    """
    labels = [homes.index(home) for home in homes]
    fresh: dict[int, W] = {}
    while budget and len(set(labels)) > budget:
        first, second, _ = tree.nearest_leaves(labels)
        pair = [fresh.get(label) or adapter_of(label) for label in (first, second)]
        sizes = [labels.count(first), labels.count(second)]
        fresh.pop(second, None)
        fresh[first] = merge(pair, [float(size) for size in sizes])
        labels = [first if label == second else label for label in labels]
    return [
        MergedGroup(tuple(task for task, own in enumerate(labels) if own == label), adapter)
        for label, adapter in fresh.items()
    ]
