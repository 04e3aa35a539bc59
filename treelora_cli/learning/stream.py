"""Run a whole recipe: make the project, learn every task in order."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from treelora_cli.backend.contract import Base
from treelora_cli.backend.runtime import Runtime
from treelora_cli.backend.values import DataRequest
from treelora_cli.config import Config, StreamTask, TrainConfig, load_config, overlay
from treelora_cli.errors import ConfigError
from treelora_cli.learning.evaluation import Scored
from treelora_cli.learning.gate import check_gate, register
from treelora_cli.learning.opening import make_project, open_base, project_config
from treelora_cli.learning.recipes import stream_data, stream_tasks, task_request
from treelora_cli.learning.task import TaskReport, learn_task
from treelora_cli.project import Project, check_task_name


@dataclasses.dataclass(frozen=True)
class StreamRequest:
    """A recipe and where to run it.

    Attributes:
        recipe: Recipe file.
        root: Project directory.
        data: Replaces the recipe's data directory.
        flags: Settings over the recipe's.
        limit: Most training and held-out examples per class or task.
        resume: Continue a run: tasks already learned are left alone.
        ends: Score a task when it is learned and all in the end, in place of all after each task.
    """

    recipe: Path
    root: Path
    data: Path | None
    flags: Config
    limit: int | None
    resume: bool
    ends: bool = False


@dataclasses.dataclass(frozen=True)
class PlannedTask:
    """One task of a stream: what to read, and how many epochs the recipe gives it.

    Attributes:
        name: The task's name.
        data: What to read.
        epochs: The recipe's own for this task; ``None`` for the stream's.
    """

    name: str
    data: DataRequest
    epochs: int | None

    def config(self, flags: Config, config: Config) -> Config:
        """Return the task's settings: flags over its own epochs over the stream's ``config``."""
        return overlay(overlay(flags, Config(train=TrainConfig(epochs=self.epochs))), config)


def plan_stream(request: StreamRequest) -> tuple[PlannedTask, ...]:
    """Return the tasks of the recipe in order, without reading their data.

    Raises:
        ConfigError: The recipe is malformed, or names a task twice.
        DataError: The data directory does not exist.
        UsageError: There is a gate, which wants all scores after each task, and ``ends`` leaves them out.
    """
    recipe = load_config(request.recipe)
    check_gate(overlay(request.flags, recipe).gate, Scored.OWN if request.ends else Scored.ALL)
    data = stream_data(recipe.stream, request.data, request.recipe)
    seed = overlay(request.flags, recipe).seed or 0
    tasks = stream_tasks(recipe.stream, data, seed, request.recipe.name)
    for number, task in enumerate(tasks):
        check_task_name(task.name)
        if task.name.lower() in {earlier.name.lower() for earlier in tasks[:number]}:
            raise ConfigError(f"{request.recipe.name}: task '{task.name}' is listed twice.")

    def planned(task: StreamTask) -> PlannedTask:
        wanted = task_request(task, recipe.stream, data, seed=seed, limit=request.limit)
        return PlannedTask(task.name, wanted, task.epochs)

    return tuple(planned(task) for task in tasks)


def plan_watch(request: StreamRequest) -> dict[str, DataRequest]:
    """Return what to read for the recipe's watch sets, by name.

    Raises:
        ConfigError: The recipe is malformed, or names a set twice.
        DataError: The data directory does not exist.
    """
    recipe = load_config(request.recipe)
    sets = recipe.stream.watch
    if not sets:
        return {}
    data = stream_data(recipe.stream, request.data, request.recipe)
    seed = overlay(request.flags, recipe).seed or 0
    found: dict[str, DataRequest] = {}
    for one in sets:
        check_task_name(one.name)
        if one.name in found:
            raise ConfigError(f"{request.recipe.name}: watch set '{one.name}' is listed twice.")
        found[one.name] = task_request(one, recipe.stream, data, seed=seed, limit=request.limit)
    return found


def _watch(project: Project, base: Base, request: StreamRequest, inference: str) -> Project:
    """Register the recipe's watch sets that the project does not have yet; returns the project with them."""
    known = {one.name for one in project.watch()}
    for name, data in plan_watch(request).items():
        if name not in known:
            data = dataclasses.replace(data, kept_in=project.root.absolute())
            new = register(base, project.memory(), name, data, inference)
            project = project.set_watch((*project.watch(), new))
    return project


def run_stream(
    request: StreamRequest,
    runtime: Runtime,
    learned: Callable[[TaskReport], None],
    loaded: Callable[[], None] | None = None,
) -> Project:
    """Run the recipe. Returns the project at its last commit.

    Args:
        request: The recipe and where to run it.
        runtime: Device and reporter.
        learned: Called after every task.
        loaded: Called once the base is in memory, before the first task.

    Raises:
        TreeLoraError: Whatever a task raises; the tasks before it stay committed.
    """
    tasks = plan_stream(request)
    project = _open_or_make(request, runtime)
    config = project_config(project, request.flags)
    base = open_base(project, config, runtime)
    if loaded is not None:
        loaded()
    with project.lock(f"run {request.recipe.name}") as project:
        project = _watch(project, base, request, str(config.inference))
        for number, task in enumerate(tasks, start=1):
            if request.resume and project.state.task(task.name) is not None:
                continue
            runtime.reporter.note(f"Task {number} of {len(tasks)}: {task.name}")
            fits = request.resume and project.checkpoint.fits(project.state)
            interrupted = project.checkpoint.facts() if fits else None
            report = learn_task(
                project,
                base,
                task.data,
                task.name,
                task.config(request.flags, config),
                runtime,
                evaluate=Scored.OWN if request.ends and number < len(tasks) else Scored.ALL,
                resume=interrupted is not None and interrupted["task"] == task.name,
            )
            project = Project.open(project.root)
            learned(report)
    return project


def _open_or_make(request: StreamRequest, runtime: Runtime) -> Project:
    if request.resume and (request.root / "state.json").exists():
        return Project.open(request.root)
    text = request.recipe.read_text(encoding="utf-8")
    return make_project(request.root, request.flags, text, request.recipe.name, runtime)
