"""TreeLoRA: warm start and eq. 3's pull, both towards tasks found by bandit search on the tree.

Source: TreeLoRA section 3, eq. 2 and 3; the deviations are those of ``bandit``, ``tree`` and ``regularizer``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from treelora_cli.algorithm import pull as regularizer
from treelora_cli.algorithm.bandit import Search, TreeBandit, Width
from treelora_cli.methods.base import Entry, Found, Unprotected

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from treelora_cli.backend.adapters import AdapterWeights
    from treelora_cli.config import Config
    from treelora_cli.methods.base import Past, State, StepView, TaskContext

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

    @classmethod
    def of(cls, config: Config, seed: int) -> TreeLoraSettings:
        """Return the settings of a complete configuration."""
        train, tree = config.train, config.tree
        assert train.reg is not None
        return cls(
            reg=train.reg,
            update=str(train.update),
            warm_start=str(train.warm_start),
            search=cast("Search", tree.search),
            width=cast("Width", tree.width),
            seed=seed,
        )


class TreeLora(Unprotected):
    """The strategy of one task; ``begin`` searches, and every step searches on."""

    def __init__(self) -> None:
        self.settings: TreeLoraSettings
        self.past: Past
        self.bandit: TreeBandit | None = None
        self._parent: int | None = None
        self._on_device: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._norms: dict[tuple[int, int], Tensor] = {}
        self._selected: dict[int, np.ndarray[Any, Any]] = {}
        self._behind: State | None = None

    def begin(self, task: TaskContext) -> AdapterWeights:
        """Search; return the parent's adapter (a copy: adapters never stack), or the reference."""
        assert task.past is not None
        self.settings, self.past = TreeLoraSettings.of(task.config, task.seed), task.past
        if self.past.tree is None:
            return task.fresh
        settings = self.settings
        self.bandit = TreeBandit(self.past.tree, width=settings.width, search=settings.search, seed=settings.seed)
        queries = self.past.queries
        if settings.search in _BEGUN_BY_DISTANCES:
            self.bandit.begin_with(queries)
        for index in range(self._steps_before):
            self.bandit.step(queries[index % len(queries)])
        parent = self._warm_start(self.past.tree.task_count, self.bandit)
        if parent is None:
            return task.fresh
        start = self.past.adapter(parent)
        if settings.warm_start == "better" and self.past.loss_from(start) >= self.past.loss_from(task.fresh):
            return task.fresh
        self._parent = parent
        return start

    @property
    def _steps_before(self) -> int:
        """Steps of the search before the training."""
        return 0 if self.settings.search in _BEGUN_BY_DISTANCES else _SEARCH_ROUNDS * len(self.past.queries)

    def _warm_start(self, earlier: int, bandit: TreeBandit) -> int | None:
        """Return the earlier task whose adapter the new one starts from."""
        if self.settings.warm_start == "none":
            return None
        return earlier - 1 if self.settings.warm_start == "latest" else int(bandit.nearest())

    def penalty(self, view: StepView, loss: Tensor) -> Tensor | None:
        """Return eq. 3's term towards the tasks that the search selects at this step, layer by layer."""
        if self.bandit is None:
            return None
        chosen = self.selected(self.bandit, view)  # without a pull too: the record shows what the search found
        if self.settings.reg == 0 or self.settings.update != "penalty":
            return None
        targets = self._targets(chosen, view)
        norms = [self._norms[int(task), layer] for layer, task in enumerate(chosen)]
        return regularizer.penalty(view.slot, targets, loss, self.settings.reg, _ramp(view), norms)

    def after_step(self, view: StepView) -> None:
        """With ``update = prox``: draw entries that hardly moved back onto the selected task's, exactly."""
        if self.bandit is None or self.settings.reg == 0 or self.settings.update != "prox":
            return
        targets = self._targets(self.selected(self.bandit, view), view)
        threshold = self.settings.reg * _ramp(view) * view.lr
        with torch.no_grad():
            for pair, target in zip(view.slot, targets, strict=True):
                regularizer.soft_threshold_(pair, target, threshold)

    def selected(self, bandit: TreeBandit, view: StepView) -> np.ndarray[Any, Any]:
        """Return the tasks selected at a step, (D,), however often it is asked.

        The search runs ahead, for its queries are known.
        """
        queries = self.past.queries
        before = self._steps_before
        made = bandit.step_count - before
        if made <= view.step:
            self._behind = bandit.state_arrays(), bandit.state_meta()
            end = min(max(made + _AHEAD, view.step + 1), view.total)
            self._selected = {step: bandit.step(queries[step % len(queries)]) for step in range(made, end)}
        if bandit.step_count == before + view.step + 1:
            self._behind = None
        return self._selected[view.step]

    def chosen(self, step: int) -> tuple[int, ...]:
        """Return the tasks selected at a step just taken."""
        found = self._selected.get(step)
        return () if found is None else tuple(int(task) for task in found)

    def _targets(self, chosen: np.ndarray[Any, Any], view: StepView) -> list[tuple[Tensor, Tensor]]:
        device = view.slot[0][0].device
        return [self._target(int(task), layer, device) for layer, task in enumerate(chosen)]

    def _target(self, task: int, layer: int, device: torch.device) -> tuple[Tensor, Tensor]:
        key = (task, layer)
        if key not in self._on_device:
            weights = self.past.adapter(task)
            self._on_device[key] = (weights.down[layer].to(device), weights.up[layer].to(device))
            self._norms[key] = regularizer.normaliser(self._on_device[key])
        return self._on_device[key]

    def found(self) -> Found:
        """Return the task found nearest over all layers, the one started from, and the search."""
        if self.bandit is None:
            return Found()
        return Found(int(self.bandit.nearest()), self._parent, (self.bandit.state_arrays(), self.bandit.state_meta()))

    def state(self) -> State:
        """Return the bandit's statistics; where the search is ahead of the training, those before it went ahead."""
        if self.bandit is None:
            return {}, {}
        if self._behind is not None:
            return self._behind
        return self.bandit.state_arrays(), self.bandit.state_meta()

    def load_state(self, arrays: dict[str, np.ndarray[Any, Any]], facts: dict[str, Any]) -> None:
        """Continue the search where it stopped."""
        if self.past.tree is not None:
            self.bandit = TreeBandit.from_state(self.past.tree, arrays, facts)
            self._selected, self._behind = {}, None


def _ramp(view: StepView) -> float:
    return regularizer.ramp(view.step % view.steps_per_epoch, view.steps_per_epoch)


TREELORA = Entry(TreeLora, in_project=True, heads=())
