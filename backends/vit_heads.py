"""The heads of the vit backend: what each needs is kept with the project, never an image.

Symbols: ``K`` columns, one per (task, class) in order of arrival; ``C`` width; ``F`` layered features;
``W`` expanded features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from treelora_cli.backend import Memory
from treelora_cli.config import Config
from treelora_cli.heads import FeatureMap, LinearHead, RidgeStatistics, pack_symmetric, ridge_share, unpack_symmetric
from treelora_cli.runtime import Runtime

_CHUNK = 2048


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
    """Return the distinct class names in order of first arrival."""
    return list(dict.fromkeys(column.label for column in columns))


def class_of_column(columns: Sequence[Column]) -> Tensor:
    """Return the index into ``class_names`` of each column, (K,)."""
    index = {name: position for position, name in enumerate(class_names(columns))}
    return torch.tensor([index[column.label] for column in columns])


class SharedHead:
    """The anchor: one ridge head over frozen features of the last blocks and all classes ever seen."""

    def __init__(self, config: Config, device: torch.device) -> None:
        assert config.head.width is not None and config.seed is not None and config.head.ridge is not None
        self.random: int = config.head.width
        self.seed: int = config.seed
        self.ridge: float = config.head.ridge
        self.device = device
        self.map: FeatureMap | None = None
        self.gram: Tensor | None = None
        self._new_sums: Tensor
        self._new_counts: Tensor

    @classmethod
    def restore(cls, memory: Memory, config: Config, device: torch.device) -> SharedHead:
        """Rebuild the head's shared part from the project's memory."""
        head = cls(config, device)
        if memory.tasks:
            tensors = memory.shared()
            head.map = FeatureMap.from_tensors(tensors, head.random, head.seed, device)
            head.gram = unpack_symmetric(tensors["anchor.gram"], head.map.width, device)
        return head

    def add_task(self, features: Tensor, labels: Tensor, classes: int, runtime: Runtime) -> None:
        """Add one task's frozen features (n, F) with labels from 0 to ``classes`` - 1."""
        if self.map is None:
            self.map = self._fit(features, runtime)
        rows = torch.arange(len(features)).split(_CHUNK)
        parts = ((self.map(features[some]), labels[some]) for some in rows)
        new = RidgeStatistics.extended(self.gram, parts, classes, runtime, self.map.width, self.device)
        self.gram, self._new_sums, self._new_counts = new.gram, new.sums, new.counts

    def _fit(self, features: Tensor, runtime: Runtime) -> FeatureMap:
        """Standardise by all processes' features of the first task."""
        count = runtime.sum(torch.tensor([float(len(features))], device=self.device))
        mean = runtime.sum(features.sum(dim=0)) / count
        variance = runtime.sum((features - mean).square().sum(dim=0)) / count
        return FeatureMap.of_moments(mean, variance.sqrt(), self.random, self.seed)

    def to_tensors(self) -> dict[str, Tensor]:
        """Return the part that all tasks share."""
        assert self.map is not None and self.gram is not None
        return {**self.map.to_tensors(), "anchor.gram": pack_symmetric(self.gram)}

    def task_tensors(self) -> dict[str, Tensor]:
        """Return the new task's columns."""
        return {"anchor.sums": self._new_sums.cpu(), "anchor.counts": self._new_counts.cpu()}

    def solve(self, memory: Memory) -> LinearHead:
        """Solve for the columns of every task in ``memory``."""
        assert self.gram is not None
        sums = torch.cat([task.tensors()["anchor.sums"] for task in memory.tasks]).to(self.device)
        counts = torch.cat([task.tensors()["anchor.counts"] for task in memory.tasks]).to(self.device)
        share = ridge_share(self.ridge, self.gram.shape[0], float(counts.sum()))
        return RidgeStatistics(self.gram, sums, counts).solve(share)
