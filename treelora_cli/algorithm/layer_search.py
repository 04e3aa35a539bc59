"""The search of one layer: its statistics, its bounds, and the walk from node to node.

Symbols and rules as in ``bandit``. The own bound of a node is kept in two parts, so that a step
evaluates it with one product, `b_k = centre_k - scale reach_k` with `scale = 2 sigma sqrt(log t)`:

    centre_k = mu_k - delta_k     (-inf if n_k = 0)
    reach_k  = 1 / sqrt(n_k)      (1 if n_k = 0)

A walk touches a few dozen nodes, one after the other. For so few, a call into numpy costs more than
the arithmetic, so the walk reads the arrays through memoryviews, in plain Python.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

import numpy as np

if TYPE_CHECKING:
    from treelora_cli.algorithm.arms import SearchArms
    from treelora_cli.algorithm.distances import FloatArray, IntArray

# The estimate of sigma starts as if this many pulls had shown this spread, in scaled distance: a
# few early pulls that happen to agree must not end the search.
_PRIOR_SIGMA = 0.05
_PRIOR_PULLS = 2.0
_SIGMA_FLOOR = 0.01


def pooled_sigma(squares: float, repeats: int, *, literal: bool) -> float:
    """Spread of one pull in a layer, in scaled distance, from the pooled squares of so many repeated pulls."""
    if literal:
        return 1.0
    return max(math.sqrt((_PRIOR_PULLS * _PRIOR_SIGMA**2 + squares) / (_PRIOR_PULLS + repeats)), _SIGMA_FLOOR)


class LayerSearch:
    """The bandit of one layer over `N` search nodes.

    Attributes:
        counts: int64 `(N,)`, pulls at or below each node.
        sums: float64 `(N,)`, the distances they returned.
        witness: int64 `(N,)`, the node below whose own bound was the least of the children's; an arm is its own.
        squares: of pulls about their arm's mean, summed over arms.
        repeats: pulls beyond each arm's first.
    """

    def __init__(
        self,
        arms: SearchArms,
        slack: FloatArray,
        counts: IntArray,
        sums: FloatArray,
        witness: IntArray,
        squares: float,
        repeats: int,
        *,
        literal: bool,
    ) -> None:
        """Go on from given statistics; the arrays are kept and worked on.

        Args:
            arms: the search nodes.
            slack: `delta` of each node on this layer, float64 `(N,)`.
            counts: as the attribute; so are sums, witness, squares and repeats.
            sums: at first 0.
            witness: at first each node itself.
            squares: at first 0.
            repeats: at first 0.
            literal: sigma is 1, as published.
        """
        self.counts, self.sums, self.witness = counts, sums, witness
        self.squares, self.repeats = squares, repeats
        self._arms = arms
        self._literal = literal
        self._slack = slack
        self._centre = np.empty(counts.size)
        self._reach = np.empty(counts.size)
        self._measure_bounds()

    def _measure_bounds(self) -> None:
        """Centre and reach of every node anew."""
        pulled = np.maximum(self.counts, 1)
        self._centre[:] = np.where(self.counts > 0, self.sums / pulled - self._slack, -np.inf)
        self._reach[:] = 1.0 / np.sqrt(pulled)

    def sigma(self) -> float:
        """Spread of one pull, in scaled distance; see ``TreeBandit.sigma``."""
        return pooled_sigma(self.squares, self.repeats, literal=self._literal)

    def own_bounds(self, step: int) -> FloatArray:
        """Own bound `b_k` of every node at a step, float64 `(N,)`."""
        return self._centre - self._scale(step) * self._reach

    def _scale(self, step: int) -> float:
        return 2.0 * self.sigma() * math.sqrt(math.log(max(step, 1)))

    def walk(self, step: int) -> list[int]:
        """Nodes from the root to the arm chosen: at each node the child of least bound, the first of equals."""
        scale = self._scale(step)
        children, witness = self._arms.child_pairs, self.witness.data
        centre, reach = _floats(self._centre), _floats(self._reach)
        node, path = 0, [0]
        while pair := children[node]:
            first, second = pair
            below = witness[first]
            value, other = centre[first] - scale * reach[first], centre[below] - scale * reach[below]
            least = value if value > other else other
            below = witness[second]
            value, other = centre[second] - scale * reach[second], centre[below] - scale * reach[below]
            node = second if (value if value > other else other) < least else first
            path.append(node)
        return path

    def pull(self, path: list[int], distance: float) -> None:
        """Add one pull of the arm at the end of a path to every node on it."""
        counts, sums, slack = self.counts.data, _floats(self.sums), _floats(self._slack)
        centre, reach = _floats(self._centre), _floats(self._reach)
        arm = path[-1]
        if before := counts[arm]:  # a pull x after n of mean mu adds (x - mu)^2 n / (n + 1) (Welford)
            self.squares += (distance - sums[arm] / before) ** 2 * before / (before + 1)
            self.repeats += 1
        for node in path:
            counts[node] = count = counts[node] + 1
            sums[node] = total = sums[node] + distance
            centre[node] = total / count - slack[node]
            reach[node] = 1.0 / math.sqrt(count)

    def refresh(self, path: list[int], step: int) -> None:
        """Give a path's inner nodes their witnesses, from the arm up; the first child wins a tie."""
        scale = self._scale(step)
        children, witness = self._arms.child_pairs, self.witness.data
        centre, reach = _floats(self._centre), _floats(self._reach)
        chosen = attained = path[-1]
        value = centre[chosen] - scale * reach[chosen]
        for parent in path[-2::-1]:
            first, second = cast("tuple[int, int]", children[parent])
            other = first if chosen == second else second
            below = witness[other]
            rival, rival_below = centre[other] - scale * reach[other], centre[below] - scale * reach[below]
            if rival_below > rival:
                rival, other = rival_below, below
            if rival < value or (rival == value and chosen == second):
                value, attained = rival, other
            witness[parent] = attained
            own = centre[parent] - scale * reach[parent]
            if own >= value:
                value, attained = own, parent
            chosen = parent

    def begin_with(self, distances: FloatArray, step: int) -> None:
        """Take first pulls of every arm, `(n, T)` in the order of the tasks; there was none before.

        Counts and sums are pooled upwards, and every node gets the witness that the exact recursion gives.
        """
        arms, rounds = self._arms.arm_of, len(distances)
        self.counts[arms] = rounds
        self.sums[arms] = distances.sum(axis=0)
        self.squares = float(np.square(distances - distances.mean(axis=0)).sum())
        self.repeats = (rounds - 1) * distances.shape[1]
        self._pool()
        own, attained = self.own_bounds(step), np.arange(self.counts.size)
        bound = own.copy()
        for level in self._arms.levels:
            below = self._arms.children[level]  # (k, 2)
            least = below[np.arange(level.size), bound[below].argmin(axis=1)]  # the first child wins a tie
            self.witness[level] = attained[least]
            held = bound[least] > own[level]
            bound[level] = np.where(held, bound[least], own[level])
            attained[level] = np.where(held, attained[least], level)

    def pull_all(self, distances: FloatArray) -> None:
        """Add one pull of every arm; `distances` `(T,)` in the order of the tasks."""
        arms = self._arms.arm_of
        before = self.counts[arms]
        off_mean = distances - self.sums[arms] / np.maximum(before, 1)
        self.squares += float((off_mean**2 * before / (before + 1)).sum())
        self.repeats += int((before > 0).sum())
        self.counts[arms] += 1
        self.sums[arms] += distances
        self._pool()

    def _pool(self) -> None:
        """Pool the arms' pulls upwards and measure every bound anew."""
        for level in self._arms.levels:
            below = self._arms.children[level]  # (k, 2)
            self.counts[level] = self.counts[below].sum(axis=1)
            self.sums[level] = self.sums[below].sum(axis=1)
        self._measure_bounds()


def _floats(array: FloatArray) -> memoryview[float]:
    """A window on an array that reads and writes Python floats."""
    return cast("memoryview[float]", array.data)
