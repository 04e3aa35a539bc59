"""The head of one branch: tasks that share an adapter, seen through the frozen network and through the adapted one.

Frozen base and branch adapter no longer change once the branch's first task is learned, so the sums are exact whatever
the order of tasks. Symbols as in ``shared_head``; ``F`` features of one view, ``W`` of the head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from treelora_cli.heads.gram import Gram
from treelora_cli.heads.ridge import LinearHead, RidgeStatistics, ridge_share
from treelora_cli.heads.two_views import Tensors, TwoViews

if TYPE_CHECKING:
    from treelora_backends.vit.trunk import Trunk
    from treelora_cli.backend.runtime import Runtime
    from treelora_cli.backend.values import Memory
    from treelora_cli.config import Config

_FIRST_LOOK = 512
"""Images of a branch's first task by which features are standardised."""
DEFAULT_SHARPNESS = 16.0
"""Factor on scores before the softmax where no image was kept out to choose it by."""


@dataclass(frozen=True)
class BranchSettings:
    """What the sums of every branch of a project depend on.

    Attributes:
        widths: Columns P of the linear projection and R of the random features: half of what the shared head has, so
            that a branch's Gram matrix takes a quarter of its disk (recipes/RESULTS.md).
        ridge: As ``head.ridge``.
        seed: Of the projections.
    """

    widths: tuple[int, int]
    ridge: float
    seed: int

    @classmethod
    def of(cls, trunk: Trunk, config: Config) -> BranchSettings:
        """Return the settings that go with a network and a configuration."""
        assert config.head.width is not None and config.head.ridge is not None and config.seed is not None
        return cls((max(1, trunk.feature_width // 2), max(1, config.head.width // 2)), config.head.ridge, config.seed)

    @property
    def width(self) -> int:
        """W."""
        return sum(self.widths)

    def share(self, examples: float) -> float:
        """Return the penalty for so many examples."""
        return ridge_share(self.ridge, self.width, examples)


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
        self.views: TwoViews | None = None
        self.gram: Gram | None = None
        self.sharpness = DEFAULT_SHARPNESS
        self._sums: Tensor
        self._counts: Tensor

    @classmethod
    def restore(cls, tensors: Tensors, settings: BranchSettings, runtime: Runtime) -> BranchHead:
        """Rebuild the head from what its branch stores."""
        head = cls(settings, runtime)
        head.views = TwoViews.from_tensors(tensors, settings.widths, settings.seed, head.device)
        head.gram = Gram.read(tensors, "branch", settings.width, head.device)
        head.sharpness = float(tensors["branch.sharpness"])
        return head

    def standardise(self, features: Tensor) -> None:
        """Fix the standard by the first task's features, (n, 2F); with several processes, by all of theirs."""
        some = features[: self.runtime.smallest(min(len(features), _FIRST_LOOK))]
        self.views = TwoViews.fit(self.runtime.concatenate(some), self.settings.widths, self.settings.seed)

    def learn(self, features: Tensor, labels: Tensor, classes: int) -> None:
        """Count a task in: both views side by side (n, 2F), labels (n,) from 0."""
        assert self.views is not None
        alone = self.runtime.accelerator.num_processes == 1
        new = RidgeStatistics.empty(self.settings.width, classes, self.device, self.gram if alone else None)
        for rows in torch.arange(len(features), device=features.device).split(_FIRST_LOOK):
            new.add(self.views(features[rows]), labels[rows])
        total = new.over_processes(self.gram, self.runtime)
        self.gram, self._sums, self._counts = total.gram, total.sums, total.counts

    def to_tensors(self) -> Tensors:
        """Return what the branch stores."""
        assert self.views is not None and self.gram is not None
        sharpness = torch.tensor(self.sharpness, dtype=torch.float32)
        return {**self.views.to_tensors(), "branch.half_gram": self.gram.half(), "branch.sharpness": sharpness}

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
            self.settings.share(float(counts.sum())),
            lambda: Gram.read(memory.branch(name), "branch", width, device),
        )
