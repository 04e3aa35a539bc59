"""``treelora eval``: score every seen task, no task identity given."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from treelora_cli.commands import options
from treelora_cli.commands.context import Session, parse_pairs, session_of
from treelora_cli.errors import CheckError, DataError, UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from treelora_cli.backend.contract import Score
    from treelora_cli.learning.evaluation import HeldOut
    from treelora_cli.score_matrix import Standing


BASE = "base"
"""Names the model without any adapter, as a way to answer that only scoring offers."""


def evaluate(
    context: typer.Context,
    tasks: Annotated[str | None, typer.Option(help="Only these tasks, comma-separated.")] = None,
    inference: Annotated[
        str | None,
        typer.Option(help="routed, latest or merged; base: the untouched model on the same prompts (language models)."),
    ] = None,
    limit: options.Limit = None,
    changed_data: Annotated[
        bool,
        typer.Option("--changed-data", help="Also score tasks whose held-out data changed, on what is there."),
    ] = False,
    data: Annotated[
        list[str] | None, typer.Option("--data", metavar="TASK=PATH", help="Where a task's data lies now.")
    ] = None,
    fail_under: Annotated[
        float | None, typer.Option(min=0, max=100, help="Exit with 7 when OP, in percent, is below this.")
    ] = None,
    max_forgetting: Annotated[
        float | None, typer.Option(help="Exit with 7 when forgetting, in points, is above this.")
    ] = None,
    per_class: Annotated[
        bool, typer.Option("--per-class", help="Also show each class: accuracy, count, what it is confused with.")
    ] = False,
    top: Annotated[
        int | None, typer.Option(min=1, max=10, help="Also show how often the right answer is among so many likeliest.")
    ] = None,
    confusion: Annotated[
        Path | None, typer.Option(metavar="FILE.csv", help="Write the confusion matrix, in examples, to this file.")
    ] = None,
    device: options.Device = None,
) -> None:
    """Score the held-out data of every task over everything learned so far.

    Example: treelora eval --per-class --top 5 --confusion confusion.csv
    """
    from treelora_cli.config import from_flags
    from treelora_cli.learning.evaluation import read_held_out, score_tasks
    from treelora_cli.learning.opening import open_base, project_config

    untouched = inference == BASE
    if untouched and max_forgetting is not None:
        raise UsageError("--max-forgetting says nothing of the untouched model. Leave it out with --inference base.")
    session = session_of(context)
    project = session.project()
    if not project.state.tasks:
        raise UsageError("Nothing is learned yet. Run: treelora train-task DATA")
    wanted = [task.name for task in project.state.tasks]
    if tasks is not None:
        wanted = [project.entry(name.strip()).name for name in tasks.split(",")]
    places = {name: Path(path) for name, path in parse_pairs(data, "--data").items()}
    for name in places:
        project.entry(name)
    config = project_config(project, from_flags(inference=None if untouched else inference))
    runtime = session.runtime(device)
    base = open_base(project, config, runtime)
    runtime.compute_as(project.task_record(project.state.tasks[-1].name))
    records = {name: project.task_record(name) for name in wanted}
    held_out = list(read_held_out(base, records, limit, changed_data=changed_data, places=places))
    for one in held_out:
        if one.data is None:
            session.output.note(f"Task '{one.name}' is not scored: {one.problem}")
        elif one.changed:
            session.output.note(f"Task '{one.name}': {one.changed}.")
    if not any(one.data for one in held_out):
        raise DataError(f"No task can be scored. {held_out[0].name}: {held_out[0].problem}")
    scores = score_tasks(base, project.memory(), BASE if untouched else str(config.inference), held_out)
    now = {name: score.value for name, score in scores.items()}
    compared = {one.name for one in held_out if not one.changed or not changed_data}
    standing = project.matrix().standing(now, wanted, compared)
    detail = _detail(scores, per_class, top)
    _show(session, BASE if untouched else str(config.inference), standing, scores, held_out, detail)
    if confusion is not None:
        _write_confusion(confusion, scores)
    _check(standing.overall(), fail_under, standing.forgetting(), max_forgetting)


def _detail(scores: dict[str, Score], per_class: bool, top: int | None) -> tuple[dict[str, Any], list[RenderableType]]:
    """Return what --per-class and --top add to the document and to the views."""
    from treelora_cli.views.answers import class_scores, class_table, summed, within, within_line

    answers = [score.answers for score in scores.values()]
    document: dict[str, Any] = {}
    views: list[RenderableType] = []
    if per_class:
        classes = class_scores(summed(answers))
        document["classes"] = [one.to_json() for one in classes]
        views.append(class_table(classes) if classes else "No classes: the answers are free text.")
    if top is not None:
        share, count = within(top, answers)
        document["top"] = {"k": top, "share": share, "examples": count}
        views.append(within_line(top, share, count))
    return document, views


def _write_confusion(path: Path, scores: dict[str, Score]) -> None:
    from treelora_cli.views.answers import confusion_csv, summed

    confusion = summed(score.answers for score in scores.values())
    if not confusion:
        raise UsageError("--confusion: these tasks' answers are free text; there is nothing to confuse.")
    try:
        path.write_text(confusion_csv(confusion), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--confusion {path}: {error.strerror}.") from error


def _show(
    session: Session,
    inference: str,
    standing: Standing,
    scores: dict[str, Score],
    held_out: list[HeldOut],
    detail: tuple[dict[str, Any], list[RenderableType]],
) -> None:
    from treelora_cli.views.scores import FORMULAS, standing_table, untouched_table

    untouched = inference == BASE
    document = {
        "inference": inference,
        "op": standing.overall(),
        "forgetting": None if untouched else standing.forgetting(),
        "bwt": None if untouched else standing.backward_transfer(),
        "tasks": {
            name: {"score": score.value, "examples": score.count, "routed": score.routed}
            for name, score in scores.items()
        },
        "changed_data": {one.name: one.changed for one in held_out if one.changed},
        "not_scored": {one.name: one.problem for one in held_out if one.data is None},
        **detail[0],
    }
    routed = {name: score.routed for name, score in scores.items()}
    shown = [untouched_table(standing)] if untouched else [standing_table(standing, routed), FORMULAS]
    session.output.result(document, f"Inference: {inference}", *shown, *detail[1])


def _check(op: float | None, floor: float | None, forgetting: float | None, ceiling: float | None) -> None:
    if floor is not None and (op is None or 100 * op < floor):
        raise CheckError(f"OP {'-' if op is None else f'{100 * op:.2f}'} is below --fail-under {floor:g}.")
    if ceiling is not None and (forgetting is None or 100 * forgetting > ceiling):
        shown = "-" if forgetting is None else f"{100 * forgetting:.2f}"
        raise CheckError(f"Forgetting {shown} is above --max-forgetting {ceiling:g}.")
