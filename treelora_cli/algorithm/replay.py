"""Pulls and lower bounds of a finished search, step by step, from its end and the tasks it selected.

A stored search holds pulls, sums and the spread of a pull as they were in the end. Which task each layer pulled at each
step is logged, so that earlier numbers of pulls follow by taking the later ones away. The means do not: bounds are told
with each arm's mean and each layer's sigma of the end.

Symbols: ``S`` steps, ``D`` layers, ``T`` tasks, ``k`` arms asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treelora_cli.algorithm.bandit import pull_summary
from treelora_cli.algorithm.layer_search import pooled_sigma


@dataclass(frozen=True)
class Replay:
    """One arm of a finished search.

    Attributes:
        task: Its index.
        pulls: Over all layers, after each step, int64 (S,).
        bounds: Lower confidence bound after each step, mean of the layers that have pulled it, (S,); NaN before.
        mean: Mean distance in the end, mean of the layers that have pulled it.
    """

    task: int
    pulls: NDArray[np.int64]
    bounds: NDArray[np.float64]
    mean: float


def replay(
    arrays: Mapping[str, NDArray[np.generic]], selected: NDArray[np.int64], tasks: Sequence[int], *, literal: bool
) -> list[Replay]:
    """Return what is known of some arms at every step.

    Args:
        arrays: What ``TreeBandit.state_arrays`` returned.
        selected: Task pulled at each step in each layer, (S, D).
        tasks: The arms asked for, (k,).
        literal: Whether the width is the paper's, sigma = 1.

    Raises:
        ValueError: The steps are not those of this search.
    """
    counts, means = pull_summary(arrays)  # (D, T)
    if selected.ndim != 2 or not len(selected) or selected.shape[1] != len(counts):
        raise ValueError(f"selected: shape {selected.shape}, expected (S, {len(counts)})")
    squares, repeats = (np.asarray(arrays[name]).tolist() for name in ("squares", "repeats"))
    sigma = np.array([pooled_sigma(*pair, literal=literal) for pair in zip(squares, repeats, strict=True)])  # (D,)
    scale = 2 * sigma * np.sqrt(np.log(np.arange(1, len(selected) + 1)))[:, None]  # (S, D)
    return [_arm(task, counts[:, task], means[:, task], selected == task, scale) for task in tasks]


def _arm(
    task: int, total: NDArray[np.int64], means: NDArray[np.float64], hits: NDArray[np.bool_], scale: NDArray[np.float64]
) -> Replay:
    later: Any = hits.sum(axis=0) - hits.cumsum(axis=0)  # (S, D)
    pulls = total - later
    if (pulls < 0).any():
        raise ValueError(f"selected: task {task} was pulled more often than the search counted")
    bounds = np.where(pulls > 0, means - scale / np.sqrt(np.maximum(pulls, 1)), np.nan)  # (S, D)
    known = (pulls > 0).sum(axis=1)
    mean_bound = np.where(known > 0, np.nansum(bounds, axis=1) / np.maximum(known, 1), np.nan)
    pulled = means[total > 0]
    return Replay(task, pulls.sum(axis=1), mean_bound, float(pulled.mean()) if pulled.size else math.nan)
