"""What kind of data a task is made of, and which branch of the tree a new task joins.

A kind signature says how the frozen network sees a task's data as a whole: the mean and the spread of its tokens
after each block. Classes differ in it less than kinds do, where the mean gradient of the probe, which tells classes
apart, does the opposite (recipes/RESULTS.md).

Pure numpy. Symbols: `T` tasks, `k` classes, `B` blocks, `C` width of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from treelora_cli.algorithm.distances import Float32Array, FloatArray, l1_distance

_PARTITIONS = 10
"""Ways of halving a task's classes that are averaged."""
_MARGIN = 0.8
"""A task is of a branch's kind within so much of what halves of its tasks differ by. Halves hold half the classes, so
that two whole tasks of one kind differ by 0.71 of it; 0.8 made no wrong join in 80 tasks of 6 kinds, and 5 branches
that one kind had already, 0.9 made 6 wrong joins."""


@dataclass(frozen=True)
class TokenMoments:
    """Sums over a task's tokens, by class.

    Attributes:
        sums: float64 `(k, B, C)`.
        squares: float64 `(k, B, C)`.
        counts: float64 `(k,)`, tokens of each class.
    """

    sums: FloatArray
    squares: FloatArray
    counts: FloatArray

    def signature(self, classes: Sequence[int] | None = None) -> Float32Array:
        """Return the kind signature, float32 `(2 B, C)`: means, then deviations, each row of L2 norm 1.

        Args:
            classes: Only these; each counts alike, however many its images.
        """
        rows = np.arange(len(self.counts)) if classes is None else np.asarray(classes)
        per = np.maximum(self.counts[rows], 1.0)[:, None, None]
        mean = (self.sums[rows] / per).mean(axis=0)  # (B, C)
        spread = np.sqrt(np.maximum((self.squares[rows] / per).mean(axis=0) - mean**2, 0.0))
        both = np.concatenate([mean, spread])
        norm = np.linalg.norm(both, axis=1, keepdims=True)
        return np.asarray(both / np.maximum(norm, np.finfo(np.float64).tiny), dtype=np.float32)

    def half_distance(self, seed: int) -> float:
        """Return how far two halves of the task's classes lie apart, on average; 0 for a single class."""
        count = len(self.counts)
        if count < 2:
            return 0.0
        rng = np.random.default_rng(seed)
        apart = []
        for _ in range(_PARTITIONS):
            order = rng.permutation(count)
            halves = [self.signature(order[: count // 2].tolist()), self.signature(order[count // 2 :].tolist())]
            apart.append(kind_distance(*halves))
        return float(np.mean(apart))


def kind_distance(first: NDArray[np.floating], second: NDArray[np.floating]) -> float:
    """Scaled L1 distance of two kind signatures, averaged over their rows, in [0, 1]."""
    return float(l1_distance(first, second).mean())


@dataclass(frozen=True)
class Kind:
    """One learned task as the choice of a branch sees it.

    Attributes:
        signature: float32 `(2 B, C)`.
        half_distance: What two halves of its classes differ by.
        branch: Name of the branch it belongs to; `None` for the frozen features alone.
    """

    signature: Float32Array
    half_distance: float
    branch: str | None


@dataclass(frozen=True)
class BranchChoice:
    """What becomes of a new task.

    Attributes:
        joins: It trains nothing and belongs where `nearest` does.
        branch: The branch joined; `None` for the frozen features alone, and where it opens one.
        nearest: Index of the nearest task by kind; `None` for the first.
        distance: To it; `None` for the first.
        limit: Distance up to which a task is of the same kind; `None` for the first.
        reason: `kind`, `first`, `always`, `bound` or `new`: why.
    """

    joins: bool
    branch: str | None
    nearest: int | None
    distance: float | None
    limit: float | None
    reason: str


def choose_branch(
    new: Kind, earlier: Sequence[Kind], policy: str, most: int, drawn: np.random.Generator | None = None
) -> BranchChoice:
    """Decide whether a task joins a branch or tries to open one.

    It joins that of the nearest task if their distance is within what halves of that branch's tasks, or of its own
    classes, differ by.

    Args:
        new: The task; its branch means nothing.
        earlier: Learned tasks.
        policy: `auto`, `first` (all join the first task's) or `always` (each opens its own).
        most: Most branches, 0 for no bound; beyond it a task joins the nearest whatever the distance.
        drawn: The ablation: whoever joins, joins a task drawn at random.
    """
    if not earlier:
        return BranchChoice(False, None, None, None, None, "new")
    apart = [kind_distance(new.signature, one.signature) for one in earlier]
    nearest = int(np.argmin(apart))
    branch = earlier[nearest].branch
    members = [one.half_distance for one in earlier if one.branch == branch]
    limit = _MARGIN * max(float(np.mean(members)), new.half_distance)
    opened = {one.branch for one in earlier if one.branch is not None}
    if policy == "first":
        reason, joins, nearest = "first", True, 0
    elif most and len(opened) >= most:
        reason, joins = "bound", True
        nearest = min((i for i, one in enumerate(earlier) if one.branch is not None), key=apart.__getitem__)
    elif policy == "always":
        reason, joins = "always", False
    else:
        joins = apart[nearest] <= limit
        reason = "kind" if joins else "new"
    if joins and drawn is not None:
        nearest = int(drawn.integers(len(earlier)))
    return BranchChoice(joins, earlier[nearest].branch if joins else None, nearest, apart[nearest], limit, reason)


def explain(
    choice: BranchChoice, name: str, names: Sequence[str], gain: tuple[float, float] | None, *, opened: bool
) -> str:
    """Say in one sentence why a task joined or opened a branch.

    Args:
        choice: What was decided.
        name: The task.
        names: Of the earlier tasks.
        gain: Where an adapter was tried and judged: what images kept out of its training gained, and what was asked.
        opened: Whether the adapter that was tried became a branch.
    """
    if choice.joins:
        where = f"branch '{choice.branch}'" if choice.branch is not None else "the frozen features"
        return f"'{name}' joined {where}: {_why(choice, names)}."
    verb = "opened a branch" if opened else "opened no branch"
    if gain is None:
        doubt = "" if opened else "; too few images could be kept out to say that an adapter pays"
        return f"'{name}' {verb}: {_why(choice, names)}{doubt}."
    return (
        f"'{name}' {verb}: {_why(choice, names)}; with its adapter images kept out of the training are"
        f" {gain[0]:+.3f} nats likelier, {gain[1]:.3f} or more pays."
    )


def _why(choice: BranchChoice, names: Sequence[str]) -> str:
    if choice.nearest is None or choice.distance is None or choice.limit is None:
        return "it is the first task"
    figures = f"kind {choice.distance:.3f} from '{names[choice.nearest]}', limit {choice.limit:.3f}"
    return {
        "kind": f"{figures}: the same",
        "new": f"{figures}: another",
        "first": "all tasks use the first one's",
        "bound": f"no more branches may be opened, {figures}",
        "always": f"each task opens one ({figures})",
    }[choice.reason]
