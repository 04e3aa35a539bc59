"""The heads of the vit backend: what each needs is kept with the project, never an image.

Symbols: ``K`` columns, one per (task, class) in order of arrival; ``C`` width; ``F`` layered features;
``W`` features of the head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from treelora_backends.kept import Aside
from treelora_backends.vit.solved import SolvedFeatures, fits, grow, solved_statistics
from treelora_backends.vit.trunk import Features, Trunk
from treelora_cli.backend.runtime import Runtime
from treelora_cli.backend.values import Memory
from treelora_cli.config import Config
from treelora_cli.data.names import label_key
from treelora_cli.heads.familiarity import Familiarity
from treelora_cli.heads.gram import Gram
from treelora_cli.heads.ridge import FeatureMap, LinearHead, RidgeStatistics, Tensors, ridge_share

_FIRST_LOOK = 512
"""Images, drawn at random from a project's first task, by which features are standardised."""


@dataclass(frozen=True)
class Column:
    """One class of one task.

    Attributes:
        task: Index of the task.
        label: Class name; the same name may come back in a later task.
    """

    task: int
    label: str


def columns_of(memory: Memory) -> list[Column]:
    """Return every (task, class) in order of arrival."""
    return [Column(index, label) for index, task in enumerate(memory.tasks) for label in task.labels]


def class_names(columns: Sequence[Column]) -> list[str]:
    """Return the distinct class names in order of first arrival, each as it was first spelt (``label_key``)."""
    first: dict[str, str] = {}
    for column in columns:
        first.setdefault(label_key(column.label), column.label)
    return list(first.values())


def class_of_column(columns: Sequence[Column]) -> Tensor:
    """Return the index into ``class_names`` of each column, (K,)."""
    index = {label_key(name): position for position, name in enumerate(class_names(columns))}
    return torch.tensor([index[label_key(column.label)] for column in columns])


class HeadFeatures:
    """What the shared head sees of an image, (n, W): standardised tokens of the last blocks, then random features.

    Where the architecture can carry solved blocks (``solved.py``), the random features are those of the blocks, so
    that one set of sums serves the shared head and the merged network. Elsewhere they are projections of all tokens.

    Attributes:
        plain: Standardises; draws the random features where ``solved`` is ``None``.
        solved: Random features of the class token.
        size: Width C of the network.
    """

    def __init__(self, plain: FeatureMap, solved: SolvedFeatures | None, size: int) -> None:
        self.plain = plain
        self.solved = solved
        self.size = size

    @property
    def width(self) -> int:
        """W."""
        return self.plain.width + (0 if self.solved is None else self.solved.projection.shape[0])

    @property
    def last(self) -> slice:
        """Where in phi the last of the standardised features lie: of most models the class token's, C of them."""
        end = self.plain.mean.shape[0]
        return slice(max(0, end - self.size), end)

    def __call__(self, features: Features) -> Tensor:
        """Return phi, (n, W)."""
        seen = self.plain(features.layered)
        return seen if self.solved is None else torch.cat([seen, self.solved(features.token)], dim=1)


class SharedHead:
    """The anchor: one ridge head over frozen features of the last blocks and all classes ever seen.

    Args:
        trunk: The network.
        config: Settings.
        runtime: Device and processes.
    """

    def __init__(self, trunk: Trunk, config: Config, runtime: Runtime) -> None:
        assert config.head.width is not None and config.seed is not None
        assert config.head.ridge is not None and config.head.views is not None
        self.trunk = trunk
        self.random: int = config.head.width
        self.seed: int = config.seed
        self.ridge: float = config.head.ridge
        self.views: int = config.head.views
        self.runtime = runtime
        self.device = runtime.device
        self.carries_blocks = config.head.merged == "solved" and fits(trunk)
        self.features: HeadFeatures | None = None
        self.gram: Gram | None = None
        self._waiting: list[tuple[Features, Tensor]] = []
        self._classes = 0
        self._weights: Tensor | None = None
        self._new: RidgeStatistics
        self._half: Aside
        self._sums: Tensor
        self._counts: Tensor

    @classmethod
    def restore(cls, tensors: Tensors, trunk: Trunk, config: Config, runtime: Runtime) -> SharedHead:
        """Rebuild the head's shared part from what all tasks share; of nothing before the first task."""
        head = cls(trunk, config, runtime)
        if tensors:
            solved = None
            if head.carries_blocks:
                solved = SolvedFeatures.restore(tensors, trunk, head.random, head.seed)
            plain = FeatureMap.from_tensors(tensors, head._drawn, head.seed, head.device)
            head.features = HeadFeatures(plain, solved, trunk.width)
            head.gram = Gram.read(tensors, "anchor", head.features.width, head.device)
        return head

    @property
    def _drawn(self) -> int:
        return 0 if self.carries_blocks else self.random

    # -- a new task -----------------------------------------------------------------------------------

    def open_task(self, classes: int, weights: Tensor | None = None) -> None:
        """Begin a task of so many classes; an image of each counts ``weights``, (classes,), by default 1."""
        self._classes, self._weights = classes, weights
        self._begin_sums()

    def _begin_sums(self) -> None:
        if self.features is not None:
            alone = self.runtime.accelerator.num_processes == 1
            self._new = RidgeStatistics.empty(
                self.features.width, self._classes, self.device, self.gram if alone else None
            )

    def add(self, features: Features, labels: Tensor) -> None:
        """Count images in, (n,) labels from 0; the project's first images, in random order, fix the standard."""
        if self.features is not None:
            self._count(features, labels)
            return
        self._waiting.append((features, labels))
        if sum(len(some) for _, some in self._waiting) >= _FIRST_LOOK:
            self._settle()

    def _count(self, features: Features, labels: Tensor) -> None:
        assert self.features is not None
        self._new.add(self.features(features), labels, None if self._weights is None else self._weights[labels])

    def close_task(self) -> None:
        """Sum over processes; the Gram matrix then waits aside."""
        if self.features is None:
            self._settle()
        new = self._new.over_processes(self.gram, self.runtime)
        self._sums, self._counts = new.sums, new.counts
        self._half = Aside(new.gram.half())
        self.gram = None
        del self._new  # it holds the Gram matrix too

    def _settle(self) -> None:
        """Standardise by all processes' first images, and count them in."""
        layered = torch.cat([one.layered for one, _ in self._waiting])
        tokens = torch.cat([one.token for one, _ in self._waiting])
        plain = FeatureMap.fit(layered, self._drawn, self.seed, self.runtime.sum)
        solved = None
        if self.carries_blocks:
            seen = self.runtime.concatenate(tokens[: self.runtime.smallest(len(tokens))])
            solved = SolvedFeatures.fit(seen, self.trunk, self.random, self.seed)
        self.features = HeadFeatures(plain, solved, self.trunk.width)
        self._begin_sums()
        for one, labels in self._waiting:
            self._count(one, labels)
        self._waiting.clear()

    def to_tensors(self) -> dict[str, Tensor]:
        """Return a copy of the part that all tasks share, after ``close_task``."""
        assert self.features is not None
        solved = {} if self.features.solved is None else self.features.solved.to_tensors()
        return {**self.features.plain.to_tensors(), **solved, "anchor.half_gram": self._half.read()}

    def task_tensors(self) -> dict[str, Tensor]:
        """Return the new task's columns."""
        return {"anchor.sums": self._sums.cpu(), "anchor.counts": self._counts.cpu()}

    # -- answers --------------------------------------------------------------------------------------

    def _statistics(self, memory: Memory) -> RidgeStatistics:
        assert self.gram is not None
        sums = torch.cat([task.tensors()["anchor.sums"] for task in memory.tasks]).to(self.device)
        counts = torch.cat([task.tensors()["anchor.counts"] for task in memory.tasks]).to(self.device)
        return RidgeStatistics(self.gram, sums, counts)

    def _share(self, statistics: RidgeStatistics) -> float:
        return ridge_share(self.ridge, statistics.gram.width, float(statistics.counts.sum()), self.views)

    def familiarity(self, memory: Memory) -> Familiarity:
        """Return what tells images of no learned kind; asked before ``solve_``."""
        assert self.features is not None
        statistics, last = self._statistics(memory), self.features.last
        return Familiarity.of_sums(statistics.gram.block(last), statistics.sums[:, last], statistics.counts)

    def solve_(self, memory: Memory) -> LinearHead:
        """Solve for the columns of every task in ``memory``; uses up the Gram matrix."""
        statistics = self._statistics(memory)
        share, width, device = self._share(statistics), statistics.gram.width, self.device
        self.gram = None
        return statistics.solve_(share, lambda: Gram.read(memory.shared(), "anchor", width, device))

    def grow_blocks(self, vit: nn.Module, memory: Memory, class_of: Tensor, classes: int) -> None:
        """Append blocks that hold every task in ``memory`` to a frozen ``vit``, see ``solved.grow``."""
        assert self.features is not None and self.features.solved is not None
        plain, solved, width = self.features.plain, self.features.solved, self.trunk.width
        statistics = solved_statistics(self._statistics(memory), solved, plain.scale[-width:])
        grow(vit, solved, statistics, self._share(statistics), plain.mean[-width:], class_of, classes)
