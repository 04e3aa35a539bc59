"""The task that is learned, from its name to what training leaves: the values that the steps of ``task.py`` pass on."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from treelora_cli.algorithm.tree import Tree
from treelora_cli.backend.contract import Base, TaskData
from treelora_cli.backend.runtime import Runtime, return_free_memory
from treelora_cli.backend.values import DataRequest, Learned, Memory
from treelora_cli.config import Config
from treelora_cli.data.tables import table_stem
from treelora_cli.learning.branches import BranchPlan
from treelora_cli.learning.tracking import Tracking
from treelora_cli.learning.trainer import TrainReport
from treelora_cli.methods.base import Found
from treelora_cli.project import Project, check_task_name

if TYPE_CHECKING:
    from treelora_cli.backend.adapters import AdapterWeights


def task_name(given: str | None, data: Path) -> str:
    """Return ``given`` when it is a safe name, else a name made of the data's.

    Raises:
        UsageError: ``given`` is no safe name.
    """
    if given is not None:
        return check_task_name(given)
    stem = table_stem(data.absolute()) if data.suffix else data.absolute().name
    derived = re.sub(r"[^a-z0-9._-]+", "-", stem.lower()).strip("-._")[:64]
    return check_task_name(derived or "task")


class Clock:
    """Seconds and processor seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}
        self._last = time.perf_counter(), time.process_time()

    def lap(self, phase: str) -> None:
        """End a phase: give back the memory it freed, and note its time."""
        return_free_memory()
        now = time.perf_counter(), time.process_time()
        for total, before, after in zip((self.seconds, self.cpu_seconds), self._last, now, strict=True):
            total[phase] = round(total.get(phase, 0.0) + after - before, 3)
        self._last = now


@dataclass(frozen=True)
class NewTask:
    """A task about to be learned, and all that is known before; every step takes it, none changes it.

    Attributes:
        name: As the user gave it.
        request: Where its data lies.
        data: Its examples.
        project: The project as it is, under the writer's lock.
        base: The loaded base.
        config: Settings in force, complete.
        runtime: Device, arithmetic and reporter.
        memory: The tasks before.
        tree: Over the tasks before; ``None`` for the first.
        tracking: The experiment tracker that gets its figures.
    """

    name: str
    request: DataRequest
    data: TaskData
    project: Project
    base: Base
    config: Config
    runtime: Runtime
    memory: Memory
    tree: Tree | None
    tracking: Tracking

    @property
    def seed(self) -> int:
        """The project's seed."""
        assert self.config.seed is not None
        return self.config.seed


@dataclass(frozen=True)
class Probe:
    """The new task's gradients at the reference point.

    Attributes:
        queries: Each mini-batch's sketch, (n, D, m).
        signature: Their mean, of unit length in each layer, (D, m).
    """

    queries: np.ndarray[Any, Any]
    signature: np.ndarray[Any, Any]


@dataclass(frozen=True)
class Trained:
    """What training leaves.

    Attributes:
        adapter: The trained adapter.
        signature: The task's, for the tree.
        learned: What later predictions need.
        found: What the method found out about the earlier tasks.
        report: What the loop did.
        branches: Its branch; ``None`` where tasks never share adapters.
    """

    adapter: AdapterWeights
    signature: np.ndarray[Any, Any]
    learned: Learned
    found: Found
    report: TrainReport
    branches: BranchPlan | None

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """What is kept with the task."""
        return self.learned.tensors if self.branches is None else self.branches.with_kind(self.learned.tensors)
