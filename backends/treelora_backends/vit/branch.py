"""The head of one branch: tasks that share an adapter, seen through the frozen network and through the adapted one.

Of each view the head reads mean patches and class token: the patches' spread, which the shared head reads too, adds
nothing to what both views say (recipes/RESULTS.md). Frozen base and branch adapter no longer change once the branch's
first task is learned, so the sums are exact whatever the order of tasks.

Symbols as in ``shared_head``; ``M`` features read of one view, ``W = 2 M + R`` of the head, ``R`` of them random.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from treelora_cli.heads.gram import Gram
from treelora_cli.heads.ridge import FeatureMap, LinearHead, RidgeStatistics, Tensors, ridge_share
from treelora_cli.heads.two_views import LEAST_SHARP, MOST_SHARP

if TYPE_CHECKING:
    from treelora_backends.vit.trunk import Trunk
    from treelora_cli.backend.runtime import Runtime
    from treelora_cli.backend.values import Memory
    from treelora_cli.config import Config

FIRST_LOOK = 512
"""Images of a branch's first task by which features are standardised."""
_DEFAULT_SHARPNESS = (LEAST_SHARP * MOST_SHARP) ** 0.5
"""Factor on scores before the softmax where no image was kept out to choose it by."""


@dataclass(frozen=True)
class BranchSettings:
    """What the sums of every branch of a project depend on.

    Attributes:
        columns: Which of a view's features are read, (M,).
        random: R, a third of the shared head's: with both views a Gram matrix no larger than its.
        ridge: As ``head.ridge``.
        per_image: How many views of an image are counted in, ``head.views``.
        seed: Of the random features.
    """

    columns: Tensor
    random: int
    ridge: float
    per_image: int
    seed: int

    @classmethod
    def of(cls, trunk: Trunk, config: Config, device: torch.device) -> BranchSettings:
        """Return the settings that go with a network and a configuration."""
        head, seed = config.head, config.seed
        assert head.width is not None and head.ridge is not None and head.views is not None and seed is not None
        columns = torch.tensor(trunk.mean_columns, device=device)
        return cls(columns, max(1, head.width // 3), head.ridge, head.views, seed)

    @property
    def width(self) -> int:
        """W."""
        return 2 * len(self.columns) + self.random

    def views(self, frozen: Tensor, adapted: Tensor) -> Tensor:
        """Put what is read of both views' features, (n, F) each, side by side: (n, 2 M)."""
        return torch.cat([frozen[:, self.columns], adapted[:, self.columns]], dim=1)

    def share(self, examples: float, views: int = 1) -> float:
        """Return the penalty for so many examples, ``views`` of each image."""
        return ridge_share(self.ridge, self.width, examples, views)


class BranchHead:
    """Sums over the tasks of one branch.

    Args:
        settings: Of the project's branches.
        runtime: Device and processes.
    """

    def __init__(self, settings: BranchSettings, runtime: Runtime) -> None:
        self.settings = settings
        self.runtime = runtime
        self.device = runtime.device
        self.features: FeatureMap | None = None
        self.gram: Gram | None = None
        self.sharpness = _DEFAULT_SHARPNESS
        self._sums: Tensor
        self._counts: Tensor

    @classmethod
    def restore(cls, tensors: Tensors, settings: BranchSettings, runtime: Runtime) -> BranchHead:
        """Rebuild the head from what its branch stores."""
        head = cls(settings, runtime)
        head.features = FeatureMap.from_tensors(tensors, settings.random, settings.seed, head.device)
        head.gram = Gram.read(tensors, "branch", settings.width, head.device)
        head.sharpness = float(tensors["branch.sharpness"])
        return head

    def standardise(self, views: Tensor) -> None:
        """Fix the standard by both views of the first task's images, (n, 2 M); of all processes."""
        some = views[: self.runtime.smallest(min(len(views), FIRST_LOOK))]
        self.features = FeatureMap.fit(some, self.settings.random, self.settings.seed, self.runtime.sum)

    def learn(self, seen: Iterable[tuple[Tensor, Tensor]], classes: int, weights: Tensor | None = None) -> None:
        """Count a task in.

        Args:
            seen: Both views side by side, (n, 2 M), and labels from 0, (n,); some images at a time.
            classes: Of the task.
            weights: What each class counts, (classes,).
        """
        assert self.features is not None
        alone = self.runtime.accelerator.num_processes == 1
        new = RidgeStatistics.empty(self.settings.width, classes, self.device, self.gram if alone else None)
        for views, labels in seen:
            new.add(self.features(views), labels, None if weights is None else weights[labels])
        total = new.over_processes(self.gram, self.runtime)
        self.gram, self._sums, self._counts = total.gram, total.sums, total.counts

    def to_tensors(self) -> Tensors:
        """Return what the branch stores."""
        assert self.features is not None and self.gram is not None
        sharpness = torch.tensor(self.sharpness, dtype=torch.float32)
        return {**self.features.to_tensors(), "branch.half_gram": self.gram.half(), "branch.sharpness": sharpness}

    def task_tensors(self) -> Tensors:
        """Return the columns of the task counted in last."""
        return {"branch.sums": self._sums.cpu(), "branch.counts": self._counts.cpu()}

    def solve_(self, memory: Memory, name: str) -> LinearHead:
        """Solve for the columns of the branch's tasks in ``memory``, in order; uses up the Gram matrix."""
        assert self.gram is not None
        own = [task.tensors() for task in memory.tasks if task.branch == name]
        sums = torch.cat([one["branch.sums"] for one in own]).to(self.device)
        counts = torch.cat([one["branch.counts"] for one in own]).to(self.device)
        statistics, width, device = RidgeStatistics(self.gram, sums, counts), self.settings.width, self.device
        self.gram = None
        return statistics.solve_(
            self.settings.share(float(counts.sum()), self.settings.per_image),
            lambda: Gram.read(memory.branch(name), "branch", width, device),
        )
