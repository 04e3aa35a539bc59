"""Which branch a task belongs to, from the choice before its training to what is committed of it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from treelora_cli.algorithm.kinds import BranchChoice, Kind, KindSignature, choose_branch, explain
from treelora_cli.backend.contract import BranchSession
from treelora_cli.errors import ProjectError, UsageError

if TYPE_CHECKING:
    from treelora_cli.backend.contract import TaskSession, Tensors
    from treelora_cli.backend.values import BranchLearned, Learned, Memory
    from treelora_cli.config import Config

_MEANS, _VARIANCES, _CLASSES = "kind.means", "kind.variances", "kind.classes"


class BranchPlan:
    """The branch of one task while it is learned.

    Args:
        config: The settings in force.
        task: Name of the task.
        memory: Everything learned before.
    """

    def __init__(self, config: Config, task: str, memory: Memory) -> None:
        self.policy = str(config.tree.branch)
        self.config = config
        self.task = task
        self.names = [one.name for one in memory.tasks]
        self._memory: Memory | None = memory
        self._kind: KindSignature
        self._choice: BranchChoice
        self._learned: BranchLearned | None = None

    def choose(self, session: TaskSession, seed: int) -> None:
        """Decide by the kind of data, and tell the session.

        Raises:
            UsageError: The backend knows no branches.
        """
        if not isinstance(session, BranchSession):
            raise UsageError(f"tree.branch: {self.policy} is for images; set it to never.")
        assert self._memory is not None
        self._kind = session.token_moments().signature()
        drawn = np.random.default_rng(seed) if self.config.tree.search == "random" else None
        earlier, most = _kinds(self._memory), self.config.budget or 0
        self._choice = choose_branch(self._kind, earlier, self.policy, most, drawn)
        self._memory = None  # it holds every task's tensors
        self.config = self._config_of_training()
        if self.joins:
            session.join_branch(self._choice.branch)
        else:
            session.open_branch(self.task, ask=self.policy == "auto")

    def _config_of_training(self) -> Config:
        """Return the settings under which the task is trained: not at all, or, another kind of data, from nothing."""
        train = self.config.train
        if self.joins:
            train = replace(train, epochs=0)
        elif self.policy != "always":
            train = replace(train, reg=0.0, warm_start="none")
        return replace(self.config, train=train)

    @property
    def draws_adapter(self) -> bool:
        """Whether a random adapter takes the trained one's place, as a control."""
        return self.config.tree.branch_adapter == "random" and not self.joins

    @property
    def joins(self) -> bool:
        """Whether the task trains nothing."""
        return self._choice.joins

    def home_index(self) -> int:
        """Return the index of an earlier task with the adapter that a task which joins uses."""
        assert self._choice.nearest is not None
        if self._choice.branch is None:
            return self._choice.nearest
        return self.names.index(self._choice.branch)

    def settle(self, learned: Learned) -> None:
        """Note what came of it."""
        self._learned = learned.branch

    @property
    def name(self) -> str | None:
        """The branch that the task belongs to."""
        return None if self._learned is None else self._learned.name

    def sentence(self) -> str:
        """Say why the task joined or opened a branch."""
        trial = None if self._learned is None else self._learned.trial
        gain = None if trial is None else (trial.gain, trial.asked)
        return explain(self._choice, self.task, self.names, gain, opened=self.name is not None)

    def with_kind(self, tensors: Tensors) -> Tensors:
        """Return what is kept with the task, its kind included."""
        kind = self._kind
        means, variances = torch.from_numpy(kind.means), torch.from_numpy(kind.variances)
        return {**tensors, _MEANS: means, _VARIANCES: variances, _CLASSES: torch.tensor(kind.classes)}

    def record(self) -> dict[str, Any]:
        """Return what `task.json` keeps."""
        apart = {name: round(one, 4) for name, one in zip(self.names, self._choice.apart, strict=False)}
        return {"branch": self.name, "branch_reason": self.sentence(), "kind_distances": apart}

    def commit_part(self, learned: Learned) -> dict[str, Any]:
        """Return what a commit holds of it: the branch's statistics, and whose adapter the task uses."""
        branch = learned.branch
        branches = {} if branch is None or branch.name is None else {branch.name: branch.tensors()}
        return {"branches": branches, "home": self.names[self.home_index()] if self.joins else None}


def _kinds(memory: Memory) -> list[Kind]:
    kinds = []
    for task in memory.tasks:
        own = task.tensors()
        if not {_MEANS, _VARIANCES, _CLASSES} <= own.keys():
            raise ProjectError(f"Task '{task.name}' does not say what kind of data it is. Run treelora doctor.")
        signature = KindSignature(own[_MEANS].numpy(), own[_VARIANCES].numpy(), int(own[_CLASSES]))
        kinds.append(Kind(signature, task.branch))
    return kinds
