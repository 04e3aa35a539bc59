"""Signatures of tasks that tests draw, and searches over them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from treelora_cli.algorithm.bandit import TreeBandit
from treelora_cli.algorithm.tree import Tree, build_tree

Signatures = NDArray[np.float32]


def normalised(values: NDArray[np.floating]) -> Signatures:
    """L2-normalise the last axis."""
    unit = values / np.linalg.norm(values, axis=-1, keepdims=True)
    return np.asarray(unit, dtype=np.float32)


def random_signatures(tasks: int, layers: int = 3, width: int = 16, seed: int = 0) -> Signatures:
    """Unrelated tasks."""
    return normalised(np.random.default_rng(seed).standard_normal((tasks, layers, width)))


def noisy_queries(target: Signatures, steps: int, noise: float, seed: int) -> list[Signatures]:
    """Mini-batch signatures around one `(D, m)` target."""
    rng = np.random.default_rng(seed)
    parts = rng.standard_normal((steps, *target.shape))
    return list(normalised(target + noise * normalised(parts)))


def line_tree() -> Tree:
    """Tasks at 0, 1, 8, 9 on a line: one layer of width 1, distances are half the gaps."""
    return build_tree(np.array([0, 1, 8, 9], dtype=np.float32)[:, None, None], 1)


def run(bandit: TreeBandit, queries: list[Signatures]) -> list[list[int]]:
    """All selections."""
    return [bandit.step(query).tolist() for query in queries]
