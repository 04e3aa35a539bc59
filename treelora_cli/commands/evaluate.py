"""``treelora eval``: score every seen task, no task identity given."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from treelora_cli.api import BASE
from treelora_cli.commands import options
from treelora_cli.commands.context import Session, parse_pairs, session_of
from treelora_cli.errors import CheckError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType

    from treelora_cli.api import Evaluation
    from treelora_cli.backend.values import Score
    from treelora_cli.project.metrics import WatchSet


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
    """Score the held-out data of every task, and every watch set, over everything learned so far.

    Example: treelora eval --per-class --top 5 --confusion confusion.csv
    """
    untouched = inference == BASE
    if untouched and max_forgetting is not None:
        raise UsageError("--max-forgetting says nothing of the untouched model. Leave it out with --inference base.")
    session = session_of(context)
    opened = session.opened(device)
    found = opened.evaluate(
        tasks=None if tasks is None else [name.strip() for name in tasks.split(",")],
        inference=inference,
        limit=limit,
        changed_data=changed_data,
        places={name: Path(path) for name, path in parse_pairs(data, "--data").items()},
    )
    standing, scores = found.standing, found.scores
    detail = _detail(scores, per_class, top)
    _show(session, found, opened.watch, detail)
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
    found: Evaluation,
    sets: Sequence[WatchSet],
    detail: tuple[dict[str, Any], list[RenderableType]],
) -> None:
    from treelora_cli.views.scores import (
        FORMULAS,
        beside_lines,
        route_lines,
        standing_table,
        untouched_table,
        watch_table,
    )

    standing, scores = found.standing, found.scores
    scored = [one for one in sets if one.name in found.watch]
    document = {**_document(found), "watch": {one.name: _watch_facts(one, found.watch[one.name]) for one in scored}}
    routed = {name: score.routed for name, score in scores.items()}
    untouched = found.inference == BASE
    shown = [untouched_table(standing)] if untouched else [standing_table(standing, routed), FORMULAS]
    lines = [*beside_lines(scores), *route_lines(scores)]
    watch = [watch_table([one.after("", found.watch[one.name].value) for one in scored])] if scored else []
    session.output.result(document | detail[0], f"Inference: {found.inference}", *shown, *lines, *watch, *detail[1])


def _document(found: Evaluation) -> dict[str, Any]:
    """Return what ``--json`` says of the tasks."""
    standing, untouched = found.standing, found.inference == BASE
    return {
        "inference": found.inference,
        "op": standing.overall(),
        "forgetting": None if untouched else standing.forgetting(),
        "bwt": None if untouched else standing.backward_transfer(),
        "tasks": {
            name: {
                "score": score.value,
                "examples": score.count,
                "routed": score.routed,
                "routes": dict(score.routes),
                "beside": dict(score.beside),
            }
            for name, score in found.scores.items()
        },
        "changed_data": {one.name: one.changed for one in found.held_out if one.changed},
        "not_scored": {one.name: one.problem for one in found.held_out if one.data is None},
    }


def _watch_facts(one: WatchSet, score: Score) -> dict[str, Any]:
    return {
        "score": score.value,
        "examples": score.count,
        "metric": one.metric,
        "untouched": one.untouched,
        "reference": one.reference,
        "routes": dict(score.routes),
    }


def _check(op: float | None, floor: float | None, forgetting: float | None, ceiling: float | None) -> None:
    if floor is not None and (op is None or 100 * op < floor):
        raise CheckError(f"OP {'-' if op is None else f'{100 * op:.2f}'} is below --fail-under {floor:g}.")
    if ceiling is not None and (forgetting is None or 100 * forgetting > ceiling):
        shown = "-" if forgetting is None else f"{100 * forgetting:.2f}"
        raise CheckError(f"Forgetting {shown} is above --max-forgetting {ceiling:g}.")
