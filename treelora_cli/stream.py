"""Run a whole recipe: make the project, learn every task in order."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from treelora_cli.config import Config, TrainConfig, load_config, overlay
from treelora_cli.errors import ConfigError
from treelora_cli.learn import TaskReport, learn_task
from treelora_cli.project import Project, check_task_name
from treelora_cli.recipes import stream_data, stream_tasks, task_request
from treelora_cli.runtime import Runtime
from treelora_cli.workspace import make_project, open_base, project_config


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
    """

    recipe: Path
    root: Path
    data: Path | None
    flags: Config
    limit: int | None
    resume: bool


def run_stream(request: StreamRequest, runtime: Runtime, learned: Callable[[TaskReport], None]) -> Project:
    """Run the recipe; ``learned`` is called after every task. Returns the project at its last commit.

    Raises:
        TreeLoraError: Whatever a task raises; the tasks before it stay committed.
    """
    recipe = load_config(request.recipe)
    data = stream_data(recipe.stream, request.data, request.recipe)
    seed = overlay(request.flags, recipe).seed or 0
    tasks = stream_tasks(recipe.stream, data, seed, request.recipe.name)
    for number, task in enumerate(tasks):
        check_task_name(task.name)
        if task.name in {earlier.name for earlier in tasks[:number]}:
            raise ConfigError(f"{request.recipe.name}: task '{task.name}' is listed twice.")
    project = _open_or_make(request, runtime)
    config = project_config(project, request.flags)
    base = open_base(project, config, runtime)
    with project.lock(f"run {request.recipe.name}") as project:
        for number, task in enumerate(tasks, start=1):
            if request.resume and project.state.task(task.name) is not None:
                continue
            runtime.reporter.note(f"Task {number} of {len(tasks)}: {task.name}")
            own = overlay(request.flags, Config(train=TrainConfig(epochs=task.epochs)))
            interrupted = project.checkpoint.facts() if request.resume else None
            report = learn_task(
                project,
                base,
                task_request(task, recipe.stream, data, seed=seed, limit=request.limit),
                task.name,
                overlay(own, config),
                runtime,
                evaluate=True,
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
