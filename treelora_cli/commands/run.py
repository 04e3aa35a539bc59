"""``treelora run``: a whole stream, from init to the last task's scores."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from treelora_cli.commands import options
from treelora_cli.commands.context import Session, session_of

if TYPE_CHECKING:
    from treelora_cli.learning.task import TaskReport
    from treelora_cli.project import Project


def run(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Recipe file, or the name of a shipped one.")],
    directory: Annotated[
        Path | None, typer.Argument(metavar="[DIR]", help="Project to make; by default named like the recipe.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Directory of the stream's data.")] = None,
    model: Annotated[str | None, typer.Option(help="Base model, instead of the recipe's.")] = None,
    weights: options.Weights = None,
    limit: Annotated[int | None, typer.Option(min=2, help="Most examples per class or task: a quick trial.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue where an earlier run stopped.")] = False,
    epochs: options.Epochs = None,
    lr: options.LearningRate = None,
    batch_size: options.BatchSize = None,
    blocks: Annotated[int | None, typer.Option(help="Adapt only the last so many blocks; 0 for all.")] = None,
    reg: options.Reg = None,
    warm_start: options.WarmStart = None,
    search: options.Search = None,
    branch: options.Branch = None,
    update: options.Update = None,
    inference: options.Inference = None,
    budget: options.Budget = None,
    precision: options.Precision = None,
    track: options.Track = None,
    max_forgetting: options.MaxForgetting = None,
    fail_under: options.FailUnder = None,
    task_under: options.TaskUnder = None,
    seed: options.Seed = None,
    settings: options.Set = None,
    score_ends: options.ScoreEnds = False,
    device: options.Device = None,
) -> None:
    """Make a project and learn every task of RECIPE in order.

    Example: treelora run cifar100_50classes --data ~/cifar100_50classes --limit 40
    """
    from treelora_cli.config import from_flags
    from treelora_cli.config.by_name import add_set
    from treelora_cli.learning.recipes import find_recipe
    from treelora_cli.learning.stream import StreamRequest

    session = session_of(context)
    path = find_recipe(recipe)
    flags = from_flags(
        seed=seed,
        inference=inference,
        budget=budget,
        base__model=model,
        base__weights=None if weights is None else str(weights),
        adapter__blocks=blocks,
        tree__search=search,
        track=track,
        gate__max_forgetting=max_forgetting,
        gate__fail_under=fail_under,
        gate__task_under=task_under,
        tree__branch=branch,
        train__epochs=epochs,
        train__lr=lr,
        train__batch_size=batch_size,
        train__reg=reg,
        train__warm_start=warm_start,
        train__update=update,
        train__precision=precision,
    )
    flags = add_set(flags, settings)
    root = directory or session.directory or Path(path.stem)
    request = StreamRequest(path, root, data, flags, limit, resume, score_ends)
    project, reports = run_and_report(session, request, device)
    show_stream(session, project, reports)


def run_and_report(session: Session, request: Any, device: str | None) -> tuple[Project, list[TaskReport]]:
    """Run a stream, noting each task as it is learned."""
    from treelora_cli.learning.stream import run_stream
    from treelora_cli.views.scores import percent, summary

    reports: list[TaskReport] = []

    def learned(report: TaskReport) -> None:
        reports.append(report)
        origin = f"from '{report.parent}'" if report.parent else "anew"
        total = sum(report.seconds.values())
        scored = f"score {percent(report.matrix.rows[-1][-1])}" if request.ends else summary(report.matrix.standing())
        session.output.note(f"  {report.name}: {origin}, {total:.1f} s, {scored}")
        if report.branch_reason is not None:
            session.output.note(f"  {report.branch_reason}")

    return run_stream(request, session.runtime(device), learned), reports


def show_stream(session: Session, project: Project, reports: list[TaskReport], *more: Any, **facts: Any) -> None:
    """Render the accuracy matrix of a finished stream."""
    from treelora_cli.views.scores import matrix_table

    matrix = project.matrix()
    document = {
        "project": str(project.root),
        **matrix.to_json(),
        "tasks_learned": [
            {
                "task": report.name,
                "warm_start_from": report.parent,
                "nearest": report.nearest,
                "branch": report.branch,
                "branch_reason": report.branch_reason,
                "seconds": report.seconds,
            }
            for report in reports
        ],
        "train_seconds": round(sum(r.seconds.get("train", 0.0) for r in reports), 2),
        "seconds": round(sum(sum(r.seconds.values()) for r in reports), 2),
        "peak_mib": max((round(report.peak_bytes / 2**20) for report in reports), default=None),
        **facts,
    }
    line = f"{len(project.state.tasks)} tasks in {project.root}; {document['seconds']} s in all."
    session.output.result(document, matrix_table(matrix, project.watch()), line, *more)
