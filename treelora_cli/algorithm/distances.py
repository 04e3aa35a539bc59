"""Distances between gradient signatures: L1, scaled, by layer.

Pure numpy. Symbols: `T` tasks, `D` adapted layers, `m` signature width, `n` tasks in one node.

Scaling: every layer of a signature has L2 norm 1 (or is all zero), so by Cauchy-Schwarz and the
triangle inequality two layers differ by at most `2 * sqrt(m)` in L1. Distances are divided by that
bound, which puts them in [0, 1] for any input: 0 for equal layers, 1 only for opposite vectors of
constant magnitude, and `1 / sqrt(pi)`, about 0.56, for independent random directions.

Source: TreeLoRA section 3.1 (the L1 distance); the scaling is this project's.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Float32Array: TypeAlias = NDArray[np.float32]


FloatArray: TypeAlias = NDArray[np.float64]


IntArray: TypeAlias = NDArray[np.int64]


_CANDIDATES = 8


_CHUNK_ROWS = 256


_BLOCK_ENTRIES = 1 << 16


def l1_distance(first: NDArray[np.floating], second: NDArray[np.floating]) -> FloatArray:
    """Scaled L1 distance over the last axis.

    Args:
        first: `(..., m)` signature layers.
        second: `(..., m)`, broadcast against `first`.

    Returns:
        float64 `(...)`, in [0, 1] for L2-normalised layers.

    Source: TreeLoRA section 3.1; divided by `2 * sqrt(m)`, see the module's text.
    """
    width = first.shape[-1]
    gap = np.abs(first - second).sum(axis=-1, dtype=np.float64)  # (..., m) -> (...)
    return np.asarray(gap / (2.0 * math.sqrt(width)))


def spread_by_layer(signatures: Float32Array) -> FloatArray:
    """A bound, for every layer, on how far two of a set's tasks lie apart: no two lie further.

    By the triangle inequality two tasks are at most the sum of their distances to the mean apart, so
    the sum of the two largest such distances bounds every pair. For two tasks it is their distance.
    The radius alone is no bound: two tasks on opposite sides lie up to twice as far apart.

    Args:
        signatures: float32 `(n, D, m)`.

    Returns:
        float64 `(D,)`; exactly 0 for one task.
    """
    tasks, layers, _ = signatures.shape
    if tasks <= 1:
        return np.zeros(layers)
    if tasks <= _CHUNK_ROWS:
        mean = signatures.mean(axis=0, dtype=np.float64)  # (D, m)
        return _two_largest(distances_to_all(signatures, mean[None])[0])
    # Layer by layer, so that a large node needs no second copy of all its signatures.
    return np.array([_two_largest(distances_to_mean(signatures[:, layer])) for layer in range(layers)])


def _two_largest(distances: FloatArray) -> FloatArray:
    """Sum of the two largest values along the first axis: `(n, ...) -> (...)`, with n at least 2."""
    last = distances.shape[0] - 2
    return np.asarray(np.partition(distances, last, axis=0)[last:].sum(axis=0))


def nearest_neighbours(signatures: Float32Array) -> tuple[IntArray, FloatArray]:
    """Each task's nearest other task by L1 distance averaged over the layers.

    The eight nearest by L2 distance (a matrix product) are compared by L1: exact up to nine tasks,
    and beyond that wrong only where a task's L1 neighbour is not among its eight L2 neighbours.

    Args:
        signatures: float32 `(T, D, m)` with `T >= 2`.

    Returns:
        int64 `(T,)` neighbours (the lower index wins a tie) and float64 `(T,)` distances in [0, 1].
    """
    tasks = signatures.shape[0]
    flat = signatures.reshape(tasks, -1)  # (T, D * m)
    squares = np.einsum("ij,ij->i", flat, flat)  # (T,)
    neighbour = np.empty(tasks, dtype=np.int64)
    distance = np.empty(tasks)
    keep = min(_CANDIDATES, tasks - 1)
    for start in range(0, tasks, _CHUNK_ROWS):
        rows = np.arange(start, min(start + _CHUNK_ROWS, tasks))
        squared_l2 = squares - 2.0 * (flat[rows] @ flat.T)  # (rows, T), less a constant per row
        squared_l2[np.arange(rows.size), rows] = np.inf
        close = np.sort(np.argpartition(squared_l2, keep - 1)[:, :keep])
        for row, candidates in zip(rows, close, strict=True):
            exact = l1_distance(signatures[row], signatures[candidates]).mean(axis=1)
            best = int(exact.argmin())
            neighbour[row], distance[row] = candidates[best], exact[best]
    return neighbour, distance


def mutual_pairs(signatures: Float32Array) -> IntArray:
    """Label tasks so that two tasks that are each other's nearest share a label.

    Args:
        signatures: float32 `(T, D, m)`.

    Returns:
        int64 `(T,)`: the lower index of the pair, or the task's own index.
    """
    tasks = signatures.shape[0]
    own = np.arange(tasks)
    if tasks < 2:
        return own
    neighbour, _ = nearest_neighbours(signatures)
    mutual = neighbour[neighbour] == own
    return np.where(mutual, np.minimum(own, neighbour), own)


def distances_to_mean(rows: Float32Array) -> FloatArray:
    """L1 distance of each row to the rows' mean: `(n, m) -> (n,)`."""
    return l1_distance(rows, rows.mean(axis=0, dtype=np.float64))


def distances_to_all(signatures: Float32Array, queries: NDArray[np.floating]) -> FloatArray:
    """Scaled L1 distance of every query to every task, by layer.

    Block by block, so that what is subtracted stays in the processor's caches: a thousand tasks
    take a few milliseconds a query.

    Args:
        signatures: float32 `(T, D, m)`.
        queries: `(n, D, m)`.

    Returns:
        float64 `(n, T, D)`, in [0, 1] for L2-normalised layers.
    """
    tasks, layers, width = signatures.shape
    found = np.empty((len(queries), tasks, layers))
    block = max(1, _BLOCK_ENTRIES // (layers * width))
    gap = np.empty((block, layers, width), dtype=np.float32)
    ones = np.full(width, 1.0 / (2.0 * math.sqrt(width)), dtype=np.float32)
    rows = np.asarray(queries, dtype=np.float32)
    for start in range(0, tasks, block):
        some = signatures[start : start + block]
        part = gap[: len(some)]
        for index, query in enumerate(rows):
            np.subtract(some, query, out=part)
            np.abs(part, out=part)
            found[index, start : start + block] = part @ ones
    return found
