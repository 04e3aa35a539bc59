"""Does the search find the nearest earlier task, and what does it cost, in worlds where the answer is planted.

    python tests/benchmarks/planted_worlds.py --seeds 20

A world has T earlier tasks in groups of five and a new task in one of the groups: 12 layers, signatures of width 512,
12 mini-batches of the probe. Excess is how much further the task pulled lies than the nearest, averaged over layers and
steps: 0 is the nearest, 1 a task at random. Cost is all that a task pays: laying out the arms, first distances, and 96
steps while training, in processor time (set OMP_NUM_THREADS=1). The last column compares one query with every task,
which no search undercuts.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass

import numpy as np
from charts import table
from numpy.typing import NDArray

from treelora_cli.algorithm.bandit import Search, TreeBandit
from treelora_cli.algorithm.distances import distances_to_all
from treelora_cli.algorithm.tree import Tree, build_tree

LAYERS, WIDTH, GROUP, BATCHES, STEPS = 12, 512, 5, 12, 96
_COLD_STEPS = 48
"""Steps that a search without first distances makes before the training."""


@dataclass(frozen=True)
class World:
    """Earlier tasks, the tree over them, the new task's mini-batches (n, D, m) and its true distances (T, D)."""

    tree: Tree
    queries: NDArray[np.float32]
    distances: NDArray[np.float64]


def planted(tasks: int, seed: int) -> World:
    """Return a world; groups share 0.7 of a task's signature, a task and its mini-batches 0.8 of its own."""
    rng = np.random.default_rng([seed, tasks])
    centres = _unit(rng.standard_normal((-(-tasks // GROUP), LAYERS, WIDTH)))
    signatures = _unit(0.7 * np.repeat(centres, GROUP, axis=0)[:tasks] + 0.7 * _noise(rng, tasks))
    new = 0.7 * centres[rng.integers(len(centres))] + 0.7 * _noise(rng, 1)[0]
    queries = _unit(0.8 * new + 0.6 * _noise(rng, BATCHES))
    return World(build_tree(signatures, 5), queries, distances_to_all(signatures, queries).mean(axis=0))


def _noise(rng: np.random.Generator, count: int) -> NDArray[np.float32]:
    return _unit(rng.standard_normal((count, LAYERS, WIDTH)))


def _unit(values: NDArray[np.floating]) -> NDArray[np.float32]:
    return np.asarray(values / np.linalg.norm(values, axis=-1, keepdims=True), dtype=np.float32)


def searched(world: World, search: Search, seed: int) -> tuple[bool, float, float, float]:
    """Return whether the nearest was found before training, the excess of its first step and of all, and seconds."""
    start = time.process_time()
    bandit = TreeBandit(world.tree, search=search, seed=seed)
    if search in ("lcb", "flat"):
        bandit.begin_with(world.queries)
    else:
        for step in range(_COLD_STEPS):
            bandit.step(world.queries[step % BATCHES])
    found = bandit.nearest()
    pulled = np.stack([bandit.step(world.queries[step % BATCHES]) for step in range(STEPS)])  # (STEPS, D)
    seconds = time.process_time() - start
    least, mean = world.distances.min(axis=0), world.distances.mean(axis=0)  # (D,)
    excess = (world.distances[pulled, np.arange(LAYERS)] - least) / (mean - least)  # (STEPS, D)
    right = found == int(world.distances.mean(axis=1).argmin())
    return right, float(excess[0].mean()), float(excess.mean()), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--seeds", type=int, default=20)
    options = parser.parse_args()
    rows = []
    searches: tuple[Search, ...] = ("lcb", "flat", "cold", "random")
    for tasks in options.tasks:
        results: dict[Search, list[tuple[bool, float, float, float]]] = {search: [] for search in searches}
        once = []
        for seed in range(options.seeds):
            world = planted(tasks, seed)
            start = time.process_time()
            distances_to_all(world.tree.signatures, world.queries[:1])
            once.append(time.process_time() - start)
            for search, found in results.items():
                found.append(searched(world, search, seed))
        for search, runs in results.items():
            nearest = f"{sum(one[0] for one in runs)} of {len(runs)}"
            first, all_steps, worst, seconds = (
                statistics.mean(one[1] for one in runs),
                statistics.mean(one[2] for one in runs),
                max(one[1] for one in runs),
                statistics.median(one[3] for one in runs),
            )
            row = [f"{tasks:,}", search, nearest, f"{first:.3f}", f"{worst:.3f}", f"{all_steps:.3f}"]
            rows.append([*row, f"{1000 * seconds:.0f}", f"{1000 * statistics.median(once):.1f}"])
    heads = ["tasks", "search", "nearest found", "excess, first step", "worst seed", "all steps"]
    print(table([*heads, "search ms", "all distances of one query, ms"], rows))


if __name__ == "__main__":
    main()
