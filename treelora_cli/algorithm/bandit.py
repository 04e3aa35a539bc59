"""Search for the nearest earlier task, per layer, by lower confidence bounds on the task tree.

Pure numpy. Symbols: `T` tasks, `D` adapted layers, `m` signature width, `N` search nodes, `t` the
step (1 for the first), `n_k` pulls of a node and of all below it, `mu_k` the mean distance they
returned, `delta_k` the node's spread on the layer searched, `sigma` the spread of one pull.

Every layer has its own statistics and its own walk. At each step and layer:

    own bound    b_k = mu_k - 2 sigma sqrt(log t / n_k) - delta_k     (-inf if n_k = 0)
    arm          LCB_k = b_k, with delta_k = 0
    inner node   LCB_k = max( min over children LCB_j , b_k )

and the walk goes from the root to the child of least LCB (the first of equals), pulls the arm it
ends at, which costs one L1 distance, and updates every node on the path.

What is approximated: the minimum over the children of a node off the path is not recomputed at
each step, which would cost time in proportion to `T`. Each node remembers its *witness*: the node
below it whose own bound was that minimum when the path last went through. The witness's bound is
evaluated with the current `t` and `sigma`, so bounds keep falling while a node is not visited: no
part of the tree is locked out. How often the walk is that of the exact
recursion is a test (`test_bandit.py`).

Source: TreeLoRA eq. 2, with the inner rule of Coquelin and Munos, "Bandit algorithms for tree
search", UAI 2007, mirrored from rewards to losses, since the published eq. 2 has a maximum over one
term. The published width has `sigma = 1` ("literal"); "observed" estimates it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias, cast, get_args

import numpy as np
from numpy.typing import NDArray

from treelora_cli.algorithm.arms import SearchArms, checked_array, search_arms
from treelora_cli.algorithm.distances import FloatArray, IntArray, distances_to_all, l1_distance
from treelora_cli.algorithm.layer_search import LayerSearch
from treelora_cli.algorithm.nodes import check_keys, read_count
from treelora_cli.algorithm.tree import Tree

Width: TypeAlias = Literal["observed", "literal"]
Search: TypeAlias = Literal["lcb", "cold", "flat", "exhaustive", "random"]
_ON_TREE = ("lcb", "cold")

FORMAT_VERSION = 1
# An arm counts as adequately pulled with a quarter of the pulls of the most pulled one.
_ADEQUATE_SHARE = 0.25
_COUNTERS = ("step_count", "distance_computations", "node_visits")
_META_KEYS = ("version", "width", "search", "smoothness", "rng", *_COUNTERS)


class TreeBandit:
    """One bandit per layer over the tasks of a tree.

    Attributes:
        tree: the tree searched.
        arms: its search nodes, see `search_arms`.
        step_count: steps made.
        distance_computations: L1 distances of one layer computed so far.
        node_visits: node bounds evaluated so far.
    """

    def __init__(
        self,
        tree: Tree,
        *,
        width: Width = "observed",
        search: Search = "lcb",
        smoothness: float = 1.0,
        seed: int | np.random.Generator = 0,
        arms: SearchArms | None = None,
    ) -> None:
        """Start a search with no pulls.

        Args:
            tree: at least one task.
            width: "observed" for the estimated sigma, "literal" for the paper's 1.
            search: "lcb" on the tree, to be begun by `begin_with`; "cold" the same from no pulls, as
                published; the ablations "flat" (LCB over all arms), "exhaustive" (every arm, every
                step) and "random" (a uniform arm).
            smoothness: factor on every node's spread; 1 is the rule of the paper.
            seed: for "random"; a passed generator is used as it is.
            arms: the tree's search nodes where they are known; made anew if not given.

        Raises:
            ValueError: no tasks, or an unknown choice.
        """
        if tree.task_count == 0:
            raise ValueError("bandit: the tree holds no tasks to search")
        _check_choices(width, search, smoothness)
        self.tree = tree
        self.width: Width = width
        self.search: Search = search
        self.smoothness = smoothness
        self.rng = np.random.default_rng(seed)
        self.step_count = 0
        self.distance_computations = 0
        self.node_visits = 0
        self.arms = search_arms(tree) if arms is None else arms
        layers, nodes = tree.layer_count, self.arms.tasks.size
        self._last = np.full(layers, -1)
        none = np.zeros((layers, nodes), dtype=np.int64)
        itself = np.tile(np.arange(nodes), (layers, 1))
        self._begin(none, np.zeros((layers, nodes)), itself, np.zeros(layers), np.zeros(layers, dtype=np.int64))

    def _begin(
        self, counts: IntArray, sums: FloatArray, witness: IntArray, squares: FloatArray, repeats: IntArray
    ) -> None:
        """Search every layer from these statistics, `(D, N)` and `(D,)`; the rows are worked on in place."""
        slack = np.ascontiguousarray(self.smoothness * self.arms.spreads.T)  # (D, N)
        literal = self.width == "literal"
        self._layers = [
            LayerSearch(self.arms, *row, literal=literal)
            for row in zip(slack, counts, sums, witness, squares.tolist(), repeats.tolist(), strict=True)
        ]

    def begin_with(self, queries: NDArray[np.floating]) -> None:
        """Give every arm its first pulls: the distances of the probe's mini-batches to every task.

        An arm that waits for its first pull may wait for as many steps as there are tasks, and the
        search of a thousand tasks then ends before it began. Signatures are small: all distances
        together cost about as much as the pulls of one epoch.

        Args:
            queries: `(n, D, m)`, n at least 1.

        Raises:
            ValueError: a wrong shape, or the search has begun.
        """
        if self.started:
            raise ValueError("begin_with: the search has begun")
        if queries.ndim != 3 or queries.shape[1:] != self.tree.signatures.shape[1:] or not len(queries):
            raise ValueError(f"queries: shape {queries.shape}, expected (n, {self.tree.signatures.shape[1:]})")
        found = distances_to_all(self.tree.signatures, queries)  # (n, T, D)
        self.distance_computations = found.size
        for index, layer in enumerate(self._layers):
            layer.begin_with(np.ascontiguousarray(found[:, :, index]), 1)
        self._last = np.asarray(self.mean_distances().argmin(axis=1))

    @property
    def started(self) -> bool:
        """Whether any arm was pulled."""
        return bool(self._layers[0].counts[0])

    def step(self, query: NDArray[np.floating]) -> IntArray:
        """Pull once in every layer and return the tasks pulled.

        Args:
            query: `(D, m)`, the current mini-batch's signature, each layer of L2 norm 1.

        Returns:
            int64 `(D,)`, the task selected in each layer.

        Raises:
            ValueError: a wrong shape or a value that is not finite.

        Source: TreeLoRA eq. 2 and section 3.2.
        """
        if query.shape != self.tree.signatures.shape[1:]:
            expected = self.tree.signatures.shape[1:]
            raise ValueError(f"query: shape {query.shape}, expected {expected}")
        if not np.isfinite(query).all():
            layer = int(np.argwhere(~np.isfinite(query))[0, 0])
            raise ValueError(f"query: layer {layer} is not finite")
        self.step_count += 1
        if self.search == "exhaustive":
            self._last = self._pull_all(query)
        else:
            self._last = self._pull(query, self._paths())
        return self._last.copy()

    def _paths(self) -> list[list[int]]:
        """Nodes from the root to the arm that the search chooses, for each layer."""
        if self.search in _ON_TREE:
            paths = [layer.walk(self.step_count) for layer in self._layers]
            self.node_visits += sum(4 * (len(path) - 1) for path in paths)  # two on the way down, two up
            return paths
        if self.search == "flat":
            bounds = self._own_bounds()[:, self.arms.arm_of]
            self.node_visits += bounds.size
            tasks = bounds.argmin(axis=1)  # the lower task of equals
        else:
            tasks = self.rng.integers(self.tree.task_count, size=len(self._layers))
        return [self.arms.path_to(int(task)) for task in tasks]

    def _pull(self, query: NDArray[np.floating], paths: list[list[int]]) -> IntArray:
        """Compare each layer with the arm its path ends at, update the paths, return the tasks."""
        tasks = self.arms.tasks[[path[-1] for path in paths]]
        distance = l1_distance(self.tree.signatures[tasks, np.arange(tasks.size)], query)  # (D,)
        self.distance_computations += distance.size
        for layer, path, found in zip(self._layers, paths, distance.tolist(), strict=True):
            layer.pull(path, found)
            if self.search in _ON_TREE:
                layer.refresh(path, self.step_count)
        return tasks

    def _pull_all(self, query: NDArray[np.floating]) -> IntArray:
        """Compare every task in every layer; return the task of least mean distance, `(D,)`."""
        distance = l1_distance(self.tree.signatures, query).T  # (T, D) -> (D, T)
        self.distance_computations += distance.size
        for layer, row in zip(self._layers, distance, strict=True):
            layer.pull_all(row)
        self.node_visits += self.arms.tasks.size * len(self._layers)
        return np.asarray(self.mean_distances().argmin(axis=1))

    def sigma(self) -> FloatArray:
        """Spread of one pull in each layer, float64 `(D,)`, in scaled distance.

        Observed: the standard deviation of pulls about their own arm's mean, pooled over the arms,
        with a weak prior and a floor of 0.01. Literal: 1.
        """
        return np.array([layer.sigma() for layer in self._layers])

    def _own_bounds(self) -> FloatArray:
        """Own bound of every search node at the present step, float64 `(D, N)`."""
        return np.stack([layer.own_bounds(self.step_count) for layer in self._layers])

    def pulls(self) -> IntArray:
        """Pulls of each task in each layer, int64 `(D, T)`."""
        return self._counts()[:, self.arms.arm_of]

    def _counts(self) -> IntArray:
        return np.stack([layer.counts for layer in self._layers])

    def mean_distances(self) -> FloatArray:
        """Mean distance of each task in each layer, float64 `(D, T)`, NaN where unpulled."""
        counts, sums = self.pulls(), np.stack([layer.sums[self.arms.arm_of] for layer in self._layers])
        return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)

    def selected(self) -> IntArray:
        """Best task of each layer so far, int64 `(D,)`; -1 before the first pull.

        The least mean distance among arms with at least a quarter of the pulls of the layer's most
        pulled one: one lucky pull does not win. For the "random" ablation, the tasks last drawn.
        """
        if self.search == "random" or not self.started:
            return self._last.copy()
        return np.asarray(np.nanargmin(_where_adequate(self.mean_distances(), self.pulls()), axis=1))

    def nearest(self) -> int:
        """The task nearest over all layers.

        Distances are first taken relative to the layer's average arm, since layers differ in level;
        a task's score is then its pull-weighted mean over the layers, and tasks with less than a
        quarter of the pulls of the most pulled one are passed over.

        Raises:
            ValueError: no step was made.
        """
        if not self.started:
            raise ValueError("nearest: no step was made")
        means, pulls = self.mean_distances(), self.pulls()
        relative = means - np.nanmean(means, axis=1, keepdims=True)
        total = pulls.sum(axis=0)  # (T,)
        score = np.nansum(relative * pulls, axis=0) / np.maximum(total, 1)
        return int(np.nanargmin(_where_adequate(score[None], total[None])[0]))

    def state_arrays(self) -> dict[str, NDArray[np.generic]]:
        """Statistics and search nodes as arrays."""
        layers = self._layers
        return self.arms.to_arrays() | {
            "counts": self._counts(),
            "sums": np.stack([layer.sums for layer in layers]),
            "squares": np.array([layer.squares for layer in layers]),
            "repeats": np.array([layer.repeats for layer in layers]),
            "witness": np.stack([layer.witness for layer in layers]),
            "last": self._last.copy(),
        }

    def state_meta(self) -> dict[str, object]:
        """Choices, counters and the generator's state as JSON types."""
        return {
            "version": FORMAT_VERSION,
            "width": self.width,
            "search": self.search,
            "smoothness": self.smoothness,
            "rng": self.rng.bit_generator.state,
        } | {name: getattr(self, name) for name in _COUNTERS}

    @classmethod
    def from_state(cls, tree: Tree, arrays: Mapping[str, NDArray[np.generic]], meta: object) -> TreeBandit:
        """Inverse of `state_arrays` and `state_meta`: the search goes on as if never stopped.

        Args:
            tree: the tree the state was made on.
            arrays: what `state_arrays` returned.
            meta: what `state_meta` returned, after a JSON round trip.

        Raises:
            ValueError: the state is malformed or does not belong to the tree.
        """
        if not isinstance(meta, dict):
            raise ValueError(f"bandit: expected an object, got {type(meta).__name__}")
        check_keys(meta, _META_KEYS, "bandit")
        if meta["version"] != FORMAT_VERSION:
            raise ValueError(f"bandit: version {meta['version']!r}, expected {FORMAT_VERSION}")
        choices = meta["width"], meta["search"], meta["smoothness"]
        _check_choices(*choices)
        arms = SearchArms.from_arrays(arrays, tree)
        bandit = cls(tree, width=choices[0], search=choices[1], smoothness=choices[2], arms=arms)
        bandit.rng = _generator(meta["rng"])
        for name in _COUNTERS:
            setattr(bandit, name, read_count(meta[name], f"bandit {name}"))
        bandit._restore(arrays)
        return bandit

    def _restore(self, arrays: Mapping[str, NDArray[np.generic]]) -> None:
        """Take over stored statistics after checking their shapes and ranges."""
        per_layer = self._last.shape
        per_node = *per_layer, self.arms.tasks.size
        ints, floats = np.int64, np.float64
        counts = checked_array(arrays, "counts", per_node, ints)
        witness = checked_array(arrays, "witness", per_node, ints)
        if witness.min() < 0 or witness.max() >= self.arms.tasks.size:
            raise ValueError("bandit witness: a node out of range")
        if counts.min() < 0:
            raise ValueError("bandit counts: a negative number of pulls")
        self._last = checked_array(arrays, "last", per_layer, ints)
        self._begin(
            counts,
            checked_array(arrays, "sums", per_node, floats),
            witness,
            checked_array(arrays, "squares", per_layer, floats),
            checked_array(arrays, "repeats", per_layer, ints),
        )


def _check_choices(width: object, search: object, smoothness: object) -> None:
    """Raise ValueError for an unknown width, search or smoothness."""
    for name, value, known in (("width", width, Width), ("search", search, Search)):
        if value not in get_args(known):
            options = ", ".join(get_args(known))
            raise ValueError(f"bandit {name}: unknown {value!r}, expected one of {options}")
    if not isinstance(smoothness, int | float) or not 0 <= smoothness < np.inf:
        raise ValueError(f"bandit smoothness: expected 0 or more, got {smoothness!r}")


def _where_adequate(values: FloatArray, pulls: IntArray) -> FloatArray:
    """Values `(k, T)` with NaN for arms pulled less than a quarter of the row's most pulled."""
    return np.where(pulls >= _ADEQUATE_SHARE * pulls.max(axis=1, keepdims=True), values, np.nan)


def _generator(state: object) -> np.random.Generator:
    """A generator that goes on from a stored state."""
    generator = np.random.default_rng()
    try:
        generator.bit_generator.state = cast("Mapping[str, object]", state)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"bandit rng: not a generator's state: {error}") from error
    return generator


def pull_summary(arrays: Mapping[str, NDArray[np.generic]]) -> tuple[IntArray, FloatArray]:
    """Read a saved state for display, without its tree.

    Args:
        arrays: what `TreeBandit.state_arrays` returned.

    Returns:
        Pulls, int64 `(D, T)`, and mean distances, float64 `(D, T)`, NaN where unpulled.
    """
    tasks = np.asarray(arrays["tasks"], dtype=np.int64)
    arms = np.flatnonzero(tasks >= 0)
    arm_of = arms[np.argsort(tasks[arms])]
    counts = np.asarray(arrays["counts"], dtype=np.int64)[:, arm_of]
    sums = np.asarray(arrays["sums"], dtype=np.float64)[:, arm_of]
    return counts, np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
