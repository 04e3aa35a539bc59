"""Everything a report tells, read once from a project; nothing of the model is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from treelora_cli.algorithm.bandit import pull_summary
from treelora_cli.errors import UsageError

if TYPE_CHECKING:
    from treelora_cli.algorithm.tree import Tree
    from treelora_cli.project import Project
    from treelora_cli.project.metrics import TaskAnswers, WatchSet
    from treelora_cli.project.unfinished import Step
    from treelora_cli.score_matrix import ScoreMatrix


_LOSSES = 8
"""Tasks, the last ones, whose training steps are drawn."""


@dataclass(frozen=True)
class TaskFacts:
    """One learned task.

    Attributes:
        name: Its name.
        labels: Number of classes or answers; 0 for free text.
        record: Its ``task.json``.
        disk_bytes: Bytes of its records, adapter included.
    """

    name: str
    labels: int
    record: Mapping[str, Any]
    disk_bytes: int

    @property
    def seconds(self) -> dict[str, float]:
        """Time by phase; empty in records that have none."""
        found = self.record.get("seconds")
        return {str(key): float(value) for key, value in found.items()} if isinstance(found, dict) else {}


@dataclass(frozen=True)
class Pulls:
    """What the last task's search pulled.

    Attributes:
        task: The task searched for.
        tasks: The earlier tasks.
        counts: Pulls by layer and task, (D, T).
        distances: Mean distance seen by layer and task, (D, T); NaN where unpulled.
        search: Its settings and length, in words.
    """

    task: str
    tasks: tuple[str, ...]
    counts: np.ndarray[Any, Any]
    distances: np.ndarray[Any, Any]
    search: str


@dataclass(frozen=True)
class ReportFacts:
    """A project as the report shows it.

    Attributes:
        title: Name of the project's directory.
        backend: Model family.
        model: The base.
        layers: Adapted layers, (D,).
        tasks: In order of arrival.
        matrix: Scores of every task after every task.
        tree: Tree over all tasks.
        pulls: The last search; ``None`` after the first task.
        answers: What was answered when tasks were last scored, by task; empty in older projects.
        watch: Watch sets and their scores.
        steps: Training steps of the last tasks, by task; empty in older projects.
        project_bytes: Bytes of all recorded files.
        written_by: Version that committed last.
    """

    title: str
    backend: str
    model: str
    layers: tuple[str, ...]
    tasks: tuple[TaskFacts, ...]
    matrix: ScoreMatrix
    tree: Tree
    pulls: Pulls | None
    answers: Mapping[str, TaskAnswers]
    watch: tuple[WatchSet, ...]
    steps: Mapping[str, tuple[Step, ...]]
    project_bytes: int
    written_by: str


def read_facts(project: Project) -> ReportFacts:
    """Read what a report tells.

    Raises:
        UsageError: Nothing is learned yet.
        DamagedError: A file is damaged.
    """
    state, tree = project.state, project.tree()
    if tree is None:
        raise UsageError("Nothing to report: no task is learned yet. Run: treelora train-task DATA")
    sizes = project.task_bytes()
    tasks = tuple(
        TaskFacts(one.name, len(project.labels(one.name)), project.task_record(one.name), sizes[one.name])
        for one in state.tasks
    )
    return ReportFacts(
        title=project.root.absolute().name,
        backend=state.backend,
        model=str(state.base["resolved"].get("model") or "the embedded model"),
        layers=tuple(state.base["layers"]),
        tasks=tasks,
        matrix=project.matrix(),
        tree=tree,
        pulls=_pulls(project),
        answers=project.answers(),
        watch=project.watch(),
        steps={one.name: steps for one in state.tasks[-_LOSSES:] if (steps := project.steps(one.name))},
        project_bytes=project.total_bytes(),
        written_by=state.written_by,
    )


def _pulls(project: Project) -> Pulls | None:
    saved = project.bandit()
    if saved is None:
        return None
    arrays, facts = saved
    counts, distances = pull_summary(arrays)
    state = facts["state"]
    told = f"{state['search']}, {state['step_count']} steps, width {state['width']}"
    return Pulls(str(facts["task"]), tuple(facts["tasks"]), counts, distances, told)
