"""What kind of data a task is made of, and which branch of the tree a new task joins.

A kind signature says how the frozen network sees a task's classes: the mean and the spread of their tokens after each
block. Two tasks are of one kind where their means differ no more than classes within a task do: the square of a
two-sample t statistic (Student, Biometrika 1908), channel by channel. The mean gradient of the probe finds tasks with
the same classes instead (recipes/RESULTS.md).

Pure numpy. Symbols: `T` tasks, `k` classes, `B` blocks, `C` width of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from treelora_cli.algorithm.distances import Float32Array, FloatArray

SAME_KIND = 2.0
"""Distance up to which two tasks are of one kind; such tasks lie about 1 apart. In 36 orders of 9 to 20 tasks of 6
kinds 8 joined wrongly, and 10 opened a branch that their kind had (recipes/RESULTS.md)."""
_MOST = 30.0
"""What one channel counts, at most: a few that hardly vary within one task would outweigh all others."""


@dataclass(frozen=True)
class KindSignature:
    """How the frozen network sees the classes of a task.

    Attributes:
        means: float32 `(2 B, C)`, over classes, of their mean tokens and of their tokens' deviations.
        variances: float32 `(2 B, C)`, between classes, unbiased; zeros for a single class.
        classes: k.
    """

    means: Float32Array
    variances: Float32Array
    classes: int


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

    def signature(self) -> KindSignature:
        """Return the kind signature; each class counts alike, each of its rows scaled to L2 norm 1."""
        per = np.maximum(self.counts, 1.0)[:, None, None]
        mean = self.sums / per  # (k, B, C)
        spread = np.sqrt(np.maximum(self.squares / per - mean**2, 0.0))
        rows = np.concatenate([mean, spread], axis=1)  # (k, 2B, C)
        rows /= np.maximum(np.linalg.norm(rows, axis=2, keepdims=True), np.finfo(np.float64).tiny)
        count = len(rows)
        variances = rows.var(axis=0, ddof=1) if count > 1 else np.zeros_like(rows[0])
        return KindSignature(rows.mean(axis=0).astype(np.float32), variances.astype(np.float32), count)


def kind_distance(first: KindSignature, second: KindSignature) -> float:
    """Return the mean over rows and channels of the squared t statistic `z / (1 + z / 30)`, in [0, 30].

    About 1 where the classes of both tasks are drawn alike; 30 where neither has two classes to measure by.
    """
    n, m = first.classes, second.classes
    pooled = ((n - 1) * first.variances.astype(np.float64) + (m - 1) * second.variances) / max(1, n + m - 2)
    apart = (first.means.astype(np.float64) - second.means) ** 2
    squared = apart / np.maximum(pooled * (1 / n + 1 / m), np.finfo(np.float64).tiny)
    return float((squared / (1 + squared / _MOST)).mean())


@dataclass(frozen=True)
class Kind:
    """One learned task as the choice of a branch sees it.

    Attributes:
        signature: Its kind.
        branch: Name of the branch it belongs to; `None` for the frozen features alone.
    """

    signature: KindSignature
    branch: str | None


@dataclass(frozen=True)
class BranchChoice:
    """What becomes of a new task.

    Attributes:
        joins: It trains nothing and belongs where `nearest` does.
        branch: The branch joined; `None` for the frozen features alone, and where it opens one.
        nearest: Index of the nearest task by kind; `None` for the first.
        distance: To it; `None` for the first.
        reason: `kind`, `first`, `always`, `bound` or `new`: why.
        apart: Distance to each earlier task, in order.
    """

    joins: bool
    branch: str | None
    nearest: int | None
    distance: float | None
    reason: str
    apart: tuple[float, ...] = ()


def choose_branch(
    new: KindSignature, earlier: Sequence[Kind], policy: str, most: int, drawn: np.random.Generator | None = None
) -> BranchChoice:
    """Decide whether a task joins a branch or tries to open one.

    It joins if the nearest task is of its kind. Of the branches that hold a task of its kind it joins the one whose
    first task is nearest, since from that task's images the branch's adapter was learned; frozen features, where no
    branch holds one.

    Args:
        new: The task's kind.
        earlier: Learned tasks.
        policy: `auto`, `first` (all join the first task's) or `always` (each opens its own).
        most: Most branches, 0 for no bound; beyond it a task joins the nearest whatever the distance.
        drawn: The ablation: whoever joins, joins a task drawn at random.
    """
    if not earlier:
        return BranchChoice(False, None, None, None, "new")
    apart = [kind_distance(new, one.signature) for one in earlier]
    nearest = int(np.argmin(apart))
    opened = {one.branch for one in earlier if one.branch is not None}
    if policy == "first":
        reason, joins, nearest = "first", True, 0
    elif most and len(opened) >= most:
        reason, joins = "bound", True
        nearest = min((i for i, one in enumerate(earlier) if one.branch is not None), key=apart.__getitem__)
    elif policy == "always":
        reason, joins = "always", False
    else:
        joins = apart[nearest] <= SAME_KIND
        reason = "kind" if joins else "new"
        if joins:
            nearest = _nearest_of_best_branch(apart, [one.branch for one in earlier])
    if joins and drawn is not None:
        nearest = int(drawn.integers(len(earlier)))
    branch = earlier[nearest].branch if joins else None
    return BranchChoice(joins, branch, nearest, apart[nearest], reason, tuple(apart))


def _nearest_of_best_branch(apart: Sequence[float], branches: Sequence[str | None]) -> int:
    """Return the nearest task of that branch, of those with a task of the same kind, whose first task is nearest.

    Frozen features are joined where no branch has one: an adapter that did not pay says nothing of another's.
    """
    first = {branch: branches.index(branch) for branch in branches}  # in order of arrival, so that ties have one winner
    close = {branch for branch, distance in zip(branches, apart, strict=True) if distance <= SAME_KIND}
    fitting = [index for branch, index in first.items() if branch is not None and branch in close]
    if not fitting:
        return int(np.argmin(apart))
    best = branches[min(fitting, key=apart.__getitem__)]
    return min((i for i, branch in enumerate(branches) if branch == best), key=apart.__getitem__)


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
        f" {gain[0]:+.3f} nats likelier, {gain[1]:.3f} or more is asked."
    )


def _why(choice: BranchChoice, names: Sequence[str]) -> str:
    if choice.nearest is None:
        return "it is the first task"
    figures = f"kind {choice.distance:.2f} from '{names[choice.nearest]}', limit {SAME_KIND:g}"
    return {
        "kind": f"{figures}: the same",
        "new": f"{figures}: another",
        "first": "all tasks use the first one's",
        "bound": f"no more branches may be opened, {figures}",
        "always": f"each task opens one ({figures})",
    }[choice.reason]
