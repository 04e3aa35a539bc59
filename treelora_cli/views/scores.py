"""Tables of scores, with the formulas where definitions differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from treelora_cli.score_matrix import ScoreMatrix, Standing

if TYPE_CHECKING:
    from treelora_cli.backend.values import Score
    from treelora_cli.project.metrics import WatchSet

_SAME = 5e-4
FORMULAS = (
    "OP = mean of a[N][j];  forgetting = mean of a[j][j] - a[N][j] (lower is better);"
    "  BWT = mean over j < N of a[N][j] - a[j][j]"
)


def percent(value: float | None) -> str:
    """Return a score in percent, ``-`` when there is none."""
    return "-" if value is None else f"{100 * value:.1f}"


def standing_table(standing: Standing, routed: Mapping[str, float | None]) -> Table:
    """Each task when it was learned, before the last task, and now."""
    table = Table(title="Scores in percent, no task identity given")
    for heading in ("task", "when learned", "before", "now", "change", "routed to it"):
        table.add_column(heading, justify="left" if heading == "task" else "right")
    rows = zip(standing.tasks, standing.learned, standing.before, standing.now, strict=True)
    for task, learned, before, now in rows:
        change = "-" if now is None or learned is None else f"{100 * (now - learned):+.1f}"
        table.add_row(task, percent(learned), percent(before), percent(now), change, percent(routed.get(task)))
    table.caption = summary(standing)
    return table


def untouched_table(standing: Standing) -> Table:
    """What the base model alone scores on each task, and what the task's training added when it was learned."""
    table = Table(title="Scores of the untouched base model in percent, same prompts")
    for heading in ("task", "untouched", "when learned", "gain"):
        table.add_column(heading, justify="left" if heading == "task" else "right")
    for task, learned, now in zip(standing.tasks, standing.learned, standing.now, strict=True):
        gain = "-" if now is None or learned is None else f"{100 * (learned - now):+.1f}"
        table.add_row(task, percent(now), percent(learned), gain)
    table.caption = f"Mean {percent(standing.overall())}"
    return table


def watch_table(sets: Sequence[WatchSet]) -> Table:
    """Each watch set: what it is measured against, before the last task, and now."""
    table = Table(title="Watch sets in percent, never learned from")
    for heading in ("watch set", "examples", "reference", "before", "now", "change"):
        table.add_column(heading, justify="left" if heading == "watch set" else "right")
    for one in sets:
        scores = list(one.scores.values())
        known = one.reference is not None and one.now is not None
        change = f"{100 * (one.now - one.reference):+.1f}" if known else "-"  # type: ignore[operator]
        before = scores[-2] if len(scores) > 1 else None
        told = [percent(one.reference), percent(before), percent(one.now)]
        table.add_row(one.name, str(one.examples), *told, change)
    table.caption = "Reference: the untouched base where it can answer, else the first score."
    return table


def beside_lines(scores: Mapping[str, Score]) -> list[str]:
    """Say what the same answers score under other definitions, where that differs."""
    lines = []
    for task, score in scores.items():
        told = [f"{name} {percent(value)}" for name, value in score.beside.items() if abs(value - score.value) > _SAME]
        if told:
            lines.append(f"{task} by other definitions: {', '.join(told)}")
    return lines


def route_lines(scores: Mapping[str, Score]) -> list[str]:
    """Name the tasks that answered another's inputs, and how many."""
    lines = []
    for task, score in scores.items():
        away = sorted(((count, name) for name, count in score.routes.items() if name != task), reverse=True)
        if away:
            told = ", ".join(f"{count} by {name}" for count, name in away)
            lines.append(f"Of {score.count} inputs of {task}, {told}")
    return lines


def summary(standing: Standing) -> str:
    """One line of the figures read off the scores."""
    return (
        f"OP {percent(standing.overall())}   forgetting {percent(standing.forgetting())}"
        f"   BWT {percent(standing.backward_transfer())}"
    )


def matrix_table(matrix: ScoreMatrix, watch: Sequence[WatchSet] = ()) -> Table:
    """The accuracy matrix: after row's task, on column's task, and on each watch set."""
    table = Table(title="Accuracy matrix: after task (row), on task (column), percent")
    table.add_column("after")
    for task in matrix.tasks:
        table.add_column(task, justify="right")
    for one in watch:
        table.add_column(f"watch: {one.name}", justify="right")
    for task, row in zip(matrix.tasks, matrix.rows, strict=True):
        cells = [*(percent(value) for value in row), *[""] * (len(matrix.tasks) - len(row))]
        table.add_row(task, *cells, *(percent(one.scores.get(task)) for one in watch))
    table.caption = Text(f"{summary(matrix.standing())}\n{FORMULAS}")
    return table


def seconds_line(seconds: Mapping[str, float], phases: Sequence[str] = ()) -> str:
    """Time by phase on one line."""
    shown = phases or list(seconds)
    total = sum(seconds.values())
    return f"{total:.1f} s: " + ", ".join(f"{name} {seconds[name]:.1f}" for name in shown if name in seconds)
