"""P(class | image) = P(branch | image) P(class | branch, image): the second factor, from solved heads.

The shared head says how likely each branch is. The heads of the likeliest say which of their classes it is, with
adapter; the shared head's own opinion inside the branch is multiplied in. Tasks without a branch are the caller's.

Symbols: ``B`` images, ``K`` columns, ``F`` features of a view.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from treelora_backends.vit.branch import BranchHead, BranchSettings
from treelora_backends.vit.images import filled
from treelora_backends.vit.trunk import Entering
from treelora_cli.backend import adapters
from treelora_cli.heads.ridge import FeatureMap, LinearHead
from treelora_cli.heads.two_views import fused

if TYPE_CHECKING:
    from treelora_backends.vit.loaded import LoadedVit
    from treelora_cli.backend.values import Memory

BRANCHES_ASKED = 2
"""Branches whose adapters run for an image, at most; none less likely than the likeliest class so far: it cannot hold
the answer."""


@dataclass(frozen=True)
class Seen:
    """One view of images through the frozen network: tokens before the cut, and features (B, F)."""

    cut: Entering
    layered: Tensor


@dataclass(frozen=True)
class _Solved:
    adapter: adapters.AdapterWeights
    features: FeatureMap
    head: LinearHead
    sharpness: float


class BranchAnswers:
    """Heads of every branch in a memory, solved when first asked.

    Args:
        base: The loaded network.
        memory: Everything learned.
        task_of: Task of each column, (K,).
    """

    def __init__(self, base: LoadedVit, memory: Memory, task_of: Tensor) -> None:
        self.base = base
        self.memory = memory
        self.names = list(dict.fromkeys(task.branch for task in memory.tasks))
        place = torch.tensor([self.names.index(task.branch) for task in memory.tasks], device=task_of.device)
        self.group_of = place[task_of]
        self.settings = BranchSettings.of(base.trunk, base.config, task_of.device)
        self.solved = lru_cache(maxsize=None)(self._solve)

    def _solve(self, name: str) -> _Solved:
        """Solve a branch's head and take its adapter."""
        head = BranchHead.restore(self.memory.branch(name), self.settings, self.base.runtime)
        assert head.features is not None
        opener = next(task for task in self.memory.tasks if task.branch == name)
        return _Solved(opener.adapter(), head.features, head.solve_(self.memory, name), head.sharpness)

    def refine_(self, log_columns: Tensor, log_branches: Tensor, seen: tuple[Seen, ...]) -> None:
        """Put the branches' opinions in place of the shared head's.

        Args:
            log_columns: Log-probabilities of the shared head, (B, K); changed in place.
            log_branches: Theirs summed by branch, (B, len(names)).
            seen: The views of the images.
        """
        top = log_branches.topk(min(BRANCHES_ASKED, len(self.names)), dim=1)
        for sure, place in zip(top.values.T, top.indices.T, strict=True):
            open_still = sure >= log_columns.max(dim=1).values
            for index in place[open_still].unique().tolist():
                if self.names[index] is not None:
                    rows = (open_still & (place == index)).nonzero().squeeze(1)
                    self._refine_branch_(index, rows, log_columns, log_branches, seen)

    def _refine_branch_(
        self, index: int, rows: Tensor, log_columns: Tensor, log_branches: Tensor, seen: tuple[Seen, ...]
    ) -> None:
        """Put in what the branch of an index in ``names`` says of some images, (n,)."""
        name = self.names[index]
        assert name is not None
        own = (self.group_of == index).nonzero().squeeze(1)
        inside = log_columns[rows][:, own] - log_branches[rows, index][:, None]
        opinion = fused(*self._scores(name, rows, seen), inside)
        log_columns[rows[:, None], own[None, :]] = opinion + log_branches[rows, index][:, None]

    def _scores(self, name: str, rows: Tensor, seen: tuple[Seen, ...]) -> tuple[Tensor, float]:
        """Return scores of a branch's classes for some images, (n, classes), and the factor on them."""
        solved, trunk = self.solved(name), self.base.trunk
        adapters.write_slot(self.base.network, solved.adapter)
        chosen = filled(rows)
        scores = torch.zeros(len(rows), len(solved.head.bias), device=rows.device)
        for view in seen:
            with self.base.runtime.autocast():
                adapted = trunk.after(Entering(view.cut.tokens[chosen], view.cut.early[chosen])).layered
            both = self.settings.views(view.layered[chosen], adapted)
            scores += solved.head(solved.features(both))[: len(rows)] / len(seen)
        return scores, solved.sharpness
