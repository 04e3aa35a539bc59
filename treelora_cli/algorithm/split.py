"""The rules that split a set of tasks in two.

Pure numpy: no tree, no files, no model.

Symbols: `T` tasks, `D` adapted layers, `m` signature width, `n` tasks in one node.

Source: TreeLoRA section 3.3, "practical implementation".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from treelora_cli.algorithm.distances import Float32Array, FloatArray, IntArray, distances_to_mean, mutual_pairs

# A cut must leave each side at least this share of the tasks where the data allow it: it bounds the
# depth by log(n) / log(4 / 3), about 2.4 log2(n), while leaving room to avoid cutting a group.
_SMALLEST_SHARE = 0.25
# Positions closer than this share of their whole range are equal up to rounding.
_TIE = 1e-9
_POWER_ITERATIONS = 8


class Cut(NamedTuple):
    """One set of tasks cut in two.

    Attributes:
        left: positions within the set, int64, ascending.
        right: the other positions, int64, ascending.
        threshold: the cut's value, in the rule's own terms; shown, never computed with.
    """

    left: IntArray
    right: IntArray
    threshold: float


def median_l1_cut(layer: Float32Array, _labels: IntArray | None = None) -> Cut | None:
    """The published split: the median of the L1 distances to the mean.

    Two tasks are always equally far from their mean, so ties are common: a tie at the median goes
    left, a set in which every distance ties is halved in index order, equal signatures stay
    together.

    Args:
        layer: float32 `(n, m)`, one layer of the set's signatures.

    Returns:
        The cut, its threshold an L1 distance to the mean in [0, 1]; None where all signatures are equal.

    Source: TreeLoRA section 3.3.
    """
    if _all_equal(layer):
        return None
    distance = distances_to_mean(layer)
    threshold = float(np.median(distance))
    tolerance = _TIE * float(distance.max())
    right = distance > threshold + tolerance
    if not right.any():
        right = distance >= threshold - tolerance
    if right.all():
        right = np.arange(layer.shape[0]) >= (layer.shape[0] + 1) // 2
    return Cut(np.flatnonzero(~right), np.flatnonzero(right), threshold)


def principal_gap_cut(layer: Float32Array, labels: IntArray) -> Cut | None:
    """Cut at the widest gap near the middle of the principal direction.

    Being equally far from the mean says nothing about two tasks being alike, and a cut at the
    median may fall inside a group. Tasks are laid along the direction in which they vary most,
    tasks that share a label move as one, and the cut goes to the widest gap that leaves each side
    at least a quarter of the tasks (the widest of all where none of those is open).

    Args:
        layer: float32 `(n, m)`, one layer of the set's signatures.
        labels: int64 `(n,)`; equal labels are not parted unless the set holds no other label.

    Returns:
        The cut, its threshold a position on the principal direction; None where nothing tells the labels
        apart on this layer.
    """
    _, unit = np.unique(labels, return_inverse=True)  # (n,) -> units 0..u-1
    if unit.max() == 0:
        unit = np.arange(layer.shape[0])
    sizes = np.bincount(unit)  # (u,)
    position = _principal_positions(_unit_means(layer, unit, sizes), sizes)
    if position is None:
        return None
    order = np.argsort(position, kind="stable")
    placed = position[order]
    gaps = np.diff(placed)  # (u - 1,)
    left_tasks = np.cumsum(sizes[order])[:-1]
    smaller_side = np.minimum(left_tasks, layer.shape[0] - left_tasks)
    open_gaps = gaps > _TIE * (placed[-1] - placed[0])
    balanced = open_gaps & (smaller_side >= _SMALLEST_SHARE * layer.shape[0])
    at = int(np.where(balanced if balanced.any() else open_gaps, gaps, -1.0).argmax())
    right = np.isin(unit, order[at + 1 :])
    threshold = float((placed[at] + placed[at + 1]) / 2.0)
    return Cut(np.flatnonzero(~right), np.flatnonzero(right), threshold)


@dataclass(frozen=True)
class SplitRule:
    """One way to divide a node's tasks.

    Attributes:
        cut: cuts one layer of a set: float32 `(n, m)` and int64 `(n,)` labels to the cut, None where
            this layer tells nothing apart and the next one is tried.
        label: labels all tasks before the first cut: float32 `(n, D, m)` to int64 `(n,)`, equal for
            those to be kept together; each task has a label of its own where it is None.
    """

    cut: Callable[[Float32Array, IntArray], Cut | None]
    label: Callable[[Float32Array], IntArray] | None = None


RULES: Mapping[str, SplitRule] = {
    "principal-gap": SplitRule(principal_gap_cut, mutual_pairs),
    "median-l1": SplitRule(median_l1_cut),
}
"""Every split rule by its name in `tree.split`; a new one is a line here, and nothing anywhere else."""


def rule_named(name: object) -> SplitRule:
    """The rule of a name.

    Raises:
        ValueError: no such rule; the known ones are listed.
    """
    rule = RULES.get(name) if isinstance(name, str) else None
    if rule is None:
        raise ValueError(f"split: unknown rule {name!r}, expected one of {', '.join(RULES)}")
    return rule


def halve(layer: Float32Array) -> Cut:
    """Cut a set in two equal halves along the direction in which it varies most, whatever the ties.

    The direction is found by a few power iterations: halving a thousand tasks down to single ones
    solves hundreds of eigenproblems otherwise, which takes longer than all of the search.

    Args:
        layer: float32 `(n, m)` with `n >= 2`.

    Returns:
        The cut, `n // 2` tasks on the right; in index order where all signatures are equal.
    """
    count = layer.shape[0]
    position = _leading_positions(layer.astype(np.float64))
    order = np.arange(count) if position is None else np.argsort(position, kind="stable")
    middle = (count + 1) // 2
    threshold = 0.0 if position is None else float(position[order[middle - 1 : middle + 1]].mean())
    return Cut(np.sort(order[:middle]), np.sort(order[middle:]), threshold)


def _all_equal(rows: NDArray[np.floating]) -> bool:
    """Whether all rows of an `(n, m)` array are exactly equal."""
    return bool((rows == rows[0]).all())


def _unit_means(layer: Float32Array, unit: IntArray, sizes: IntArray) -> FloatArray:
    """Mean row of each unit: `(n, m)` and unit numbers `(n,)` to `(u, m)`."""
    total = np.zeros((sizes.size, layer.shape[1]))
    np.add.at(total, unit, layer)
    return np.asarray(total / sizes[:, None])


def _leading_positions(rows: FloatArray) -> FloatArray | None:
    """Coordinates `(n,)` of rows `(n, m)` along nearly their first principal direction, None where all are equal."""
    centred = rows - rows.mean(axis=0)
    gram = centred @ centred.T  # (n, n)
    farthest = int(gram.diagonal().argmax())
    if gram[farthest, farthest] == 0.0:
        return None
    position = gram[farthest]
    for _ in range(_POWER_ITERATIONS):
        position = gram @ (position / np.abs(position).max())
    direction = position @ centred  # (m,)
    return np.asarray(-position if direction[np.abs(direction).argmax()] < 0 else position)


def _principal_positions(rows: FloatArray, weights: IntArray) -> FloatArray | None:
    """Coordinates along the weighted first principal direction.

    Args:
        rows: float64 `(u, m)`.
        weights: int64 `(u,)`, tasks behind each row.

    Returns:
        float64 `(u,)`, its sign fixed so that the largest entry of the direction is positive; None
        where all rows are equal.
    """
    if _all_equal(rows):
        return None
    centred = rows - np.average(rows, axis=0, weights=weights)
    scaled = centred * np.sqrt(weights)[:, None]
    if rows.shape[0] <= rows.shape[1]:
        direction = scaled.T @ np.linalg.eigh(scaled @ scaled.T)[1][:, -1]  # (m,)
    else:
        direction = np.linalg.eigh(scaled.T @ scaled)[1][:, -1]  # (m,)
    norm = float(np.linalg.norm(direction))
    if norm == 0.0:  # differences too small for their squares to be told from zero
        return None
    direction = direction / norm
    if direction[np.abs(direction).argmax()] < 0:
        direction = -direction
    return np.asarray(centred @ direction)
