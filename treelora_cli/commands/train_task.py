"""``treelora train-task``: learn one more task and commit it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from treelora_cli.commands import options
from treelora_cli.commands.context import Session, parse_pairs, session_of
from treelora_cli.errors import DamagedError, DataError, ProjectError, UsageError
from treelora_cli.locations import followed, lasting

if TYPE_CHECKING:
    from treelora_cli.backend.contract import Base, TaskData
    from treelora_cli.backend.values import DataRequest
    from treelora_cli.config import Config
    from treelora_cli.learning.task import TaskReport
    from treelora_cli.project import Project


def train_task(
    context: typer.Context,
    data: Annotated[
        list[Path] | None,
        typer.Argument(metavar="DATA...", help="Image folder, manifest or table; several files or a pattern."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Task name; by default the data's name.")] = None,
    val: options.Val = None,
    data_format: Annotated[str | None, typer.Option("--format", help="csv, tsv, jsonl, json, parquet or text.")] = None,
    columns: options.Mapping = None,
    classes: Annotated[str | None, typer.Option(help="Only these classes, comma-separated.")] = None,
    label_names: Annotated[
        Path | None, typer.Option(help="Class names of labels that are numbers: a JSON list, or one a line.")
    ] = None,
    label_prefix: Annotated[
        str | None, typer.Option(help="Put before each class name; '' where bare numbers mean what they meant before.")
    ] = None,
    metric: Annotated[str | None, typer.Option(help="Score of the task; chosen from the data by default.")] = None,
    train_limit: Annotated[int | None, typer.Option(min=1, help="Most training examples per class or task.")] = None,
    test_limit: Annotated[int | None, typer.Option(min=1, help="Most held-out examples per class or task.")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Count and skip unreadable examples.")] = False,
    epochs: options.Epochs = None,
    lr: options.LearningRate = None,
    batch_size: options.BatchSize = None,
    max_length: Annotated[int | None, typer.Option(help="Longest input, in tokens.")] = None,
    learn: Annotated[str | None, typer.Option(help="Turns of the assistant that are learned: all or last.")] = None,
    reg: options.Reg = None,
    warm_start: options.WarmStart = None,
    search: options.Search = None,
    update: options.Update = None,
    budget: options.Budget = None,
    precision: options.Precision = None,
    track: options.Track = None,
    grad_checkpointing: Annotated[
        bool | None, typer.Option("--grad-checkpointing", help="Recompute activations to save memory.")
    ] = None,
    keep_mib: Annotated[
        int | None, typer.Option(min=0, help="Most memory for activations kept over epochs; beyond, a file.")
    ] = None,
    max_forgetting: options.MaxForgetting = None,
    fail_under: options.FailUnder = None,
    task_under: options.TaskUnder = None,
    device: options.Device = None,
    settings: options.Set = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the interrupted task.")] = False,
    abandon: Annotated[
        bool, typer.Option("--abandon", help="Give up the task that was interrupted; with DATA learn that instead.")
    ] = False,
    accept: Annotated[bool, typer.Option("--accept", help="Commit the task that its gate refused.")] = False,
    drop: Annotated[bool, typer.Option("--drop", help="Delete the task that its gate refused.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show plan and sample; learn nothing.")] = False,
    evaluate: Annotated[bool, typer.Option("--eval/--no-eval", help="Score every task afterwards.")] = True,
) -> None:
    """Learn one more task from DATA and commit it. The earlier tasks' data is not needed.

    Example: treelora train-task ~/data/gulls --max-forgetting 2 --fail-under 80
    """
    from treelora_cli.backend.values import DataRequest
    from treelora_cli.config import BaseConfig, from_flags
    from treelora_cli.config.by_name import add_set
    from treelora_cli.data.paths import existing, paths_of
    from treelora_cli.learning.evaluation import Scored
    from treelora_cli.learning.new_task import task_name
    from treelora_cli.learning.opening import open_base, project_config
    from treelora_cli.learning.task import learn_task

    session = session_of(context)
    if accept or drop:
        if data is not None or resume or accept == drop:
            raise UsageError("--accept or --drop stands alone: it decides on the task that waits.")
        _decide(session, accept=accept)
        return
    if abandon and not (data or resume or dry_run):
        with session.project().lock("train-task --abandon") as project:
            gone = project.abandon()
        session.output.result({"abandoned": gone}, f"Given up: '{gone}'.")
        return
    flags = from_flags(
        budget=budget,
        track=track,
        train__epochs=epochs,
        train__lr=lr,
        train__batch_size=batch_size,
        train__max_length=max_length,
        train__learn=learn,
        train__reg=reg,
        train__warm_start=warm_start,
        train__update=update,
        train__precision=precision,
        train__grad_checkpointing=grad_checkpointing,
        train__keep_mib=keep_mib,
        tree__search=search,
        gate__max_forgetting=max_forgetting,
        gate__fail_under=fail_under,
        gate__task_under=task_under,
    )
    flags = add_set(flags, settings)
    if flags.base != BaseConfig():
        raise UsageError("The base model is chosen when a project is made. Make another: treelora init DIR --model ...")
    project = session.project()
    about = {
        "label_names": None if label_names is None else lasting(label_names),
        "label_prefix": label_prefix,
        "val": None if val is None else lasting(val),
        "classes": None if classes is None else tuple(part.strip() for part in classes.split(",")),
        "data_format": data_format,
        "columns": parse_pairs(columns, "--map"),
        "metric": metric,
        "train_limit": train_limit,
        "test_limit": test_limit,
        "skip_bad": skip_bad,
    }
    if resume and abandon:
        raise UsageError("--resume goes on with the interrupted task, --abandon gives it up. Leave one of them out.")
    if resume:
        chosen, request, flags = _interrupted(project, data or [], name, about, flags)
    else:
        if not data:
            raise UsageError("train-task needs DATA: an image folder, a manifest or a table.")
        chosen = task_name(name, data[0])
        request = DataRequest(
            path=lasting(data[0]),
            more=tuple(lasting(path) for path in data[1:]),
            seed=project.state.fixed["seed"],
            **cast("dict[str, Any]", about),
        )
        for path in (*paths_of(request), *(one for one in (request.val, request.label_names) if one is not None)):
            existing(path)  # before anything is loaded
    project.check_free(chosen)
    if not dry_run:
        project.check_decided()
        if not (abandon or resume) and project.lock_holder() is None:  # else it is in training, which the lock says
            project.check_uninterrupted()
    runtime = session.runtime(device)
    config = project_config(project, flags, runtime.device.type)
    if dry_run:
        _show_plan(session, open_base(project, config, runtime), request, chosen, config)
        return
    with session.writer(runtime, f"train-task {chosen}") as project:
        base = open_base(project, config, runtime)
        wanted = Scored.ALL if evaluate else Scored.NONE
        report = learn_task(
            project, base, request, chosen, config, runtime, evaluate=wanted, resume=resume, abandon=abandon
        )
    show_report(session, report)


def _decide(session: Session, *, accept: bool) -> None:
    """Accept or drop the task that waits."""
    from treelora_cli.views.scores import standing_table, watch_table

    project = session.project()
    if not accept:
        with project.lock("train-task --drop") as project:
            gone = project.drop()
        session.output.result({"dropped": gone}, f"Dropped: {gone or 'a task that could not be read'}.")
        return
    with project.lock("train-task --accept") as project:
        project = project.accept()
    name, matrix = project.state.tasks[-1].name, project.matrix()
    document = {"task": name, "accepted": True, "op": matrix.overall(), "forgetting": matrix.forgetting()}
    routed = {task: one.routed_to(task) for task, one in project.answers().items()}
    watch = project.watch()
    session.output.result(
        document,
        f"Task '{name}' is committed.",
        standing_table(matrix.standing(), routed),
        *([watch_table(watch)] if watch else []),
    )


def _interrupted(
    project: Project, data: list[Path], name: str | None, about: dict[str, Any], flags: Config
) -> tuple[str, DataRequest, Config]:
    """Return name, data and settings of the interrupted task; what is given again must agree with them."""
    from dataclasses import replace

    from treelora_cli.backend.values import DataRequest
    from treelora_cli.learning.resuming import begun_with, check_request

    facts = project.checkpoint.facts()
    if facts is None:
        raise ProjectError("No interrupted task to resume. Run: treelora train-task DATA")
    if name is not None and name.lower() != str(facts["task"]).lower():
        raise UsageError(f"The interrupted task is '{facts['task']}', not '{name}'.")
    try:
        request = replace(DataRequest.from_json(followed(facts["request"], project.root)), test_only=False)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DamagedError(".treelora/run/checkpoint.json is malformed. Train the task anew.") from error
    request = _still_there(request, data)
    check_request(request, about)
    return str(facts["task"]), request, begun_with(facts, flags)


def _still_there(request: DataRequest, data: list[Path]) -> DataRequest:
    """Return the interrupted task's request, with the place of its data that is given where the old one is empty.

    Raises:
        UsageError: Another place is given, and the old one still holds it.
        DataError: It is gone, and no place is given.
    """
    from treelora_cli.data.paths import existing, paths_of
    from treelora_cli.learning.relocating import moved

    given, known = [lasting(path) for path in data], [request.path, *request.more]
    try:
        for path in paths_of(request):
            existing(path)
    except DataError as error:
        if given and given != known:
            return moved(request, given)
        raise DataError(f"{error} If it has moved, say where it is now: treelora train-task --resume DATA") from error
    if given and [os.path.realpath(path) for path in given] != [os.path.realpath(path) for path in known]:
        shown = " ".join(map(str, known))
        raise UsageError(f"The interrupted task's data is {shown}, not {' '.join(map(str, data))}.")
    return request


def _kept(base: Base, task: TaskData, config: Config) -> dict[str, Any]:
    """Return what the backend says of activations that it would keep, if it says anything."""
    plan: dict[str, Any] = getattr(base, "kept_plan", lambda _task, _config: {})(task, config)
    return {f"kept_activations_{key}": value for key, value in plan.items()}


def _show_plan(session: Session, base: Base, request: DataRequest, name: str, config: Config) -> None:
    from treelora_cli.learning.task import check_numbers

    task = base.read_task(request)
    check_numbers(task, session.project().labels_by_task())
    train = config.train
    assert train.batch_size is not None and train.epochs is not None
    trained = sum(parameter.numel() for parameter in base.network.parameters() if parameter.requires_grad)
    document: dict[str, Any] = {
        "task": name,
        "train_examples": task.train_size,
        "held_out_examples": task.test_size,
        "labels": list(task.labels),
        "metric": task.metric,
        "steps": -(-task.train_size // (train.batch_size * (train.accumulate or 1))) * train.epochs,
        "adapter_parameters": trained,
        **_kept(base, task, config),
        "sample": task.sample,
        "notes": list(task.notes),
    }
    said = {key: value for key, value in document.items() if key != "notes" and value not in ([], "")}
    lines = [*task.notes, *(f"{key.replace('_', ' ')}: {value}" for key, value in said.items())]
    if session.verbose and task.tokens:
        document["tokens"] = [{"text": text, "learned": learned} for text, learned in task.tokens]
        lines.append("Token by token, what is learned marked with *:")
        lines += [f"{'*' if learned else ' '} {text!r}" for text, learned in task.tokens]
    session.output.result(document, *lines, "Nothing was learned (--dry-run).")


def show_report(session: Session, report: TaskReport) -> None:
    """Render what a learned task reports."""
    from treelora_cli.views.scores import seconds_line, standing_table, watch_table

    document = {
        "task": report.name,
        "nearest": report.nearest,
        "warm_start_from": report.parent,
        "branch": report.branch,
        "branch_reason": report.branch_reason,
        "steps": report.steps,
        "seconds": report.seconds,
        "peak_mib": round(report.peak_bytes / 2**20),
        "scores": {
            name: {"score": s.value, "examples": s.count, "routed": s.routed} for name, s in report.scores.items()
        },
        **{key: value for key, value in report.matrix.to_json().items() if key in ("op", "forgetting", "bwt")},
        "watch": {one.name: {"now": one.now, "reference": one.reference} for one in report.watch},
        "notes": list(report.notes),
    }
    origin = f"started from '{report.parent}'" if report.parent else "started anew"
    nearest = f", nearest task '{report.nearest}'" if report.nearest else ""
    session.output.result(
        document,
        f"Task '{report.name}' is committed: {report.steps} steps, {origin}{nearest}.",
        *([] if report.branch_reason is None else [report.branch_reason]),
        seconds_line(report.seconds),
        standing_table(report.matrix.standing(), {name: score.routed for name, score in report.scores.items()}),
        *([watch_table(report.watch)] if report.watch else []),
    )
