"""TreeLoRA: warm start and eq. 3's pull, both towards tasks found by bandit search on the tree.

Source: TreeLoRA section 3, eq. 2 and 3; the deviations are those of ``bandit``, ``tree`` and ``regularizer``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from treelora_cli.algorithm import pull as regularizer
from treelora_cli.algorithm.bandit import Search, TreeBandit, Width

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from treelora_cli.algorithm.tree import Tree
    from treelora_cli.backend.adapters import AdapterWeights
    from treelora_cli.methods.base import StepView

_BEGUN_BY_DISTANCES = ("lcb", "flat")
"""Searches that start from the probe's distances to every earlier task instead of from nothing."""
_SEARCH_ROUNDS = 4
"""Times the probe's sketches are walked down the tree before training by the others; a comparison costs no gradient."""

_AHEAD = 32
"""Training steps searched for at once: in between two of them a search finds nothing it reads in the processor's caches
and takes several times as long."""


@dataclass(frozen=True)
class TreeLoraSettings:
    """The method's own settings; see ``config.TrainConfig`` and ``config.TreeConfig``."""

    reg: float
    update: str
    warm_start: str
    search: Search
    width: Width
    seed: int


class TreeLora:
    """The strategy of one task.

    Args:
        settings: The method's settings.
        tree: Tree over the earlier tasks, ``None`` for the first task.
        queries: Sketched mini-batch gradients of the new task at the reference point, (n, D, m).
        reference: The shared seeded adapter, where a cold start begins.
        earlier: Returns earlier task ``i``'s adapter.
    """

    def __init__(
        self,
        settings: TreeLoraSettings,
        tree: Tree | None,
        queries: np.ndarray[Any, Any],
        reference: AdapterWeights,
        earlier: Callable[[int], AdapterWeights],
    ) -> None:
        self.settings = settings
        self.tree = tree
        self.queries = queries
        self.reference = reference
        self._earlier = earlier
        self._on_device: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._targets: list[tuple[Tensor, Tensor]] | None = None
        self.bandit = None
        if tree is not None:
            self.bandit = TreeBandit(tree, width=settings.width, search=settings.search, seed=settings.seed)
            if settings.search in _BEGUN_BY_DISTANCES:
                self.bandit.begin_with(queries)
            for index in range(self._steps_before):
                self.bandit.step(queries[index % len(queries)])
        self._selected: dict[int, np.ndarray[Any, Any]] = {}
        self._behind: tuple[dict[str, np.ndarray[Any, Any]], dict[str, Any]] | None = None

    @property
    def _steps_before(self) -> int:
        """Steps of the search before the training."""
        return 0 if self.settings.search in _BEGUN_BY_DISTANCES else _SEARCH_ROUNDS * len(self.queries)

    def nearest(self) -> int | None:
        """Return the earlier task that the search finds nearest over all layers."""
        return None if self.bandit is None else int(self.bandit.nearest())

    def parent(self) -> int | None:
        """Return the earlier task whose adapter the new one starts from."""
        if self.tree is None or self.settings.warm_start == "none":
            return None
        return self.tree.task_count - 1 if self.settings.warm_start == "latest" else self.nearest()

    def initial_adapter(self) -> AdapterWeights:
        """Return the parent's adapter (a copy: adapters never stack), or the reference."""
        parent = self.parent()
        return self.reference if parent is None else self._earlier(parent)

    def penalty(self, view: StepView, loss: Tensor) -> Tensor | None:
        """Return eq. 3's term towards the tasks that the search selects at this step, layer by layer."""
        if self.bandit is None:
            return None
        chosen = self._select(self.bandit, view)
        if self.settings.reg == 0:
            return None
        device = view.slot[0][0].device
        self._targets = [self._target(int(task), layer, device) for layer, task in enumerate(chosen)]
        if self.settings.update != "penalty":
            return None
        ramp = regularizer.ramp(view.step % view.steps_per_epoch, view.steps_per_epoch)
        return regularizer.penalty(view.slot, self._targets, loss, self.settings.reg, ramp)

    def _select(self, bandit: TreeBandit, view: StepView) -> np.ndarray[Any, Any]:
        """Return the tasks selected at this step, (D,); the search runs ahead, for its queries are known."""
        before = self._steps_before
        made = bandit.step_count - before
        if made <= view.step:
            self._behind = bandit.state_arrays(), bandit.state_meta()
            end = min(max(made + _AHEAD, view.step + 1), view.total)
            self._selected = {step: bandit.step(self.queries[step % len(self.queries)]) for step in range(made, end)}
        if bandit.step_count == before + view.step + 1:
            self._behind = None
        return self._selected[view.step]

    def before_step(self, view: StepView) -> None:
        """Leave the gradients as they are."""

    def after_step(self, view: StepView) -> None:
        """With ``update = prox``: draw entries that hardly moved back onto the selected task's, exactly."""
        if self.settings.update != "prox" or self._targets is None:
            return
        ramp = regularizer.ramp(view.step % view.steps_per_epoch, view.steps_per_epoch)
        threshold = self.settings.reg * ramp * view.lr
        with torch.no_grad():
            for pair, target in zip(view.slot, self._targets, strict=True):
                regularizer.soft_threshold_(pair, target, threshold)

    def _target(self, task: int, layer: int, device: torch.device) -> tuple[Tensor, Tensor]:
        key = (task, layer)
        if key not in self._on_device:
            weights = self._earlier(task)
            self._on_device[key] = (weights.down[layer].to(device), weights.up[layer].to(device))
        return self._on_device[key]

    def state(self) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, Any]]:
        """Return the bandit's statistics; where the search is ahead of the training, those before it went ahead."""
        if self.bandit is None:
            return {}, {}
        if self._behind is not None:
            return self._behind
        return self.bandit.state_arrays(), self.bandit.state_meta()

    def load_state(self, arrays: dict[str, np.ndarray[Any, Any]], facts: dict[str, Any]) -> None:
        """Continue the search where it stopped."""
        if self.tree is not None:
            self.bandit = TreeBandit.from_state(self.tree, arrays, facts)
            self._selected, self._behind = {}, None
