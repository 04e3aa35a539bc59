"""Everything a report tells, read once from a project; nothing of the model is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from treelora_cli.algorithm.bandit import pull_summary
from treelora_cli.algorithm.replay import Replay, replay
from treelora_cli.errors import UsageError

if TYPE_CHECKING:
    from treelora_cli.algorithm.tree import Tree
    from treelora_cli.project import Project
    from treelora_cli.project.metrics import TaskAnswers, WatchSet
    from treelora_cli.project.unfinished import Step
    from treelora_cli.score_matrix import ScoreMatrix


_LOSSES = 8
"""Tasks, the last ones, whose training steps are drawn."""
_ARMS = 6
"""Earlier tasks whose bounds are drawn: those that the last search pulled most."""


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
    def peak_bytes(self) -> int | None:
        """Largest memory of the process that learned it, on the GPU where there was one; ``None`` in older records."""
        found = self.record.get("cuda_peak_bytes") or self.record.get("peak_bytes")
        return found if isinstance(found, int) and found > 0 else None

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
        arms: The arms pulled most, step by step; empty where steps or bounds are not known.
    """

    task: str
    tasks: tuple[str, ...]
    counts: np.ndarray[Any, Any]
    distances: np.ndarray[Any, Any]
    search: str
    arms: tuple[Replay, ...] = ()


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
    task, names = str(facts["task"]), tuple(facts["tasks"])
    return Pulls(task, names, counts, distances, told, _replayed(arrays, state, counts, project.steps(task)))


def _replayed(
    arrays: Mapping[str, Any], state: Mapping[str, Any], counts: np.ndarray[Any, Any], steps: Sequence[Step]
) -> tuple[Replay, ...]:
    """Return the arms pulled most at every step; none for a search without bounds, or whose steps are not all there."""
    selected = [one.selected for one in steps]
    whole = len(steps) == state["step_count"] and all(len(one) == len(counts) for one in selected)
    if state["search"] not in ("lcb", "cold", "flat") or not steps or not whole:
        return ()
    in_training = np.bincount(np.ravel(selected), minlength=counts.shape[1])
    most = np.lexsort((-counts.sum(axis=0), -in_training))[:_ARMS]
    try:
        return tuple(replay(arrays, np.array(selected), most.tolist(), literal=state["width"] == "literal"))
    except ValueError:  # steps of another search: nothing is told rather than something wrong
        return ()
