"""``treelora status``: what is here and what to do next."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table

from treelora_cli.commands.context import session_of
from treelora_cli.errors import DamagedError
from treelora_cli.project import disk_bytes, history_bytes, trash
from treelora_cli.views.scores import percent, summary

if TYPE_CHECKING:
    from treelora_cli.project import Project
    from treelora_cli.score_matrix import Standing


def status(context: typer.Context) -> None:
    """Show the project: base, tasks, scores, what was interrupted, what to do next.

    Example: treelora -C birds status
    """
    session = session_of(context)
    project = session.project()
    state, matrix = project.state, project.matrix()
    standing = matrix.standing()
    tasks = _tasks(project, standing)
    interrupted, resumable = _interrupted(project)
    waiting = project.pending.of(state)
    document = {
        "project": str(project.root),
        "backend": state.backend,
        "base": {key: state.base[key] for key in ("resolved", "fingerprint", "facts")},
        "tasks": tasks,
        "op": matrix.overall(),
        "forgetting": matrix.forgetting(),
        "adapter_bytes": project.adapter_bytes(),
        "project_bytes": project.total_bytes(),
        "history_bytes": history_bytes(project),
        "disk_bytes": disk_bytes(project),
        "rollback": project.history.reach(state),
        "trash": [list(entry.tasks) for entry, _ in trash(project)],
        "waiting": None if waiting is None else {"task": waiting.task, "reason": waiting.reason},
        "interrupted": None if interrupted is None else {**interrupted, "resumable": resumable},
    }
    table = _table(f"{project.root}: {state.backend} on {state.base['resolved']['model']}", tasks)
    if tasks:
        table.caption = summary(standing)
    session.output.result(
        document, table, *_lines(document), f"On disk: {_size(document)}. Next: {_next_step(document)}"
    )


def _tasks(project: Project, standing: Standing) -> list[dict[str, Any]]:
    """Return what is shown of each task."""
    sizes, found = project.task_bytes(), []
    for entry, learned, now in zip(project.state.tasks, standing.learned, standing.now, strict=True):
        record = project.task_record(entry.name)
        found.append(
            {
                "name": record["name"],
                "labels": len(project.labels(entry.name)),
                "train_examples": record["train_examples"],
                "nearest": record["nearest"],
                "adapter": entry.adapter,
                "branch": record.get("branch"),
                "branch_reason": record.get("branch_reason"),
                "learned": learned,
                "now": now,
                "bytes": sizes[entry.name],
            }
        )
    return found


def _table(title: str, tasks: list[dict[str, Any]]) -> Table:
    table = Table(title=title)
    for heading in ("task", "labels", "examples", "nearest", "learned", "now", "KiB"):
        table.add_column(heading, justify="left" if heading in ("task", "nearest") else "right")
    for task in tasks:
        table.add_row(
            str(task["name"]),
            str(task["labels"]),
            str(task["train_examples"]),
            str(task["nearest"] or "-"),
            percent(task["learned"]),
            percent(task["now"]),
            f"{task['bytes'] / 1024:.1f}",
        )
    return table


def _lines(shown: dict[str, Any]) -> list[str]:
    """Return what stands below the table: the newest branch, what can be undone, what waits or was interrupted."""
    tasks, waiting, interrupted = shown["tasks"], shown["waiting"], shown["interrupted"]
    lines = [str(tasks[-1]["branch_reason"])] if tasks and tasks[-1]["branch_reason"] else []
    if shown["rollback"]:
        kept = f"{shown['history_bytes'] / 2**20:.1f} MiB"
        lines.append(f"Can be rolled back: {', '.join(shown['rollback'])} (earlier states: {kept}).")
    if waiting is not None:
        lines.append(f"Learned but not committed: '{waiting['task']}', for {waiting['reason']}.")
    if shown["trash"]:
        lines.append(f"Rolled back: {'; '.join(', '.join(names) for names in shown['trash'])}. See treelora doctor.")
    if interrupted is not None and not interrupted["resumable"]:
        lines.append(f"'{interrupted['task']}' was interrupted at another state of this project, to which it belongs.")
    return lines


def _size(shown: dict[str, Any]) -> str:
    mib = {key: shown[key] / 2**20 for key in ("disk_bytes", "project_bytes", "adapter_bytes", "history_bytes")}
    return (
        f"{mib['disk_bytes']:.1f} MiB (this state {mib['project_bytes']:.1f}, of it adapters"
        f" {mib['adapter_bytes']:.2f}; earlier states {mib['history_bytes']:.1f})"
    )


def _next_step(shown: dict[str, Any]) -> str:
    interrupted = shown["interrupted"]
    if shown["waiting"] is not None:
        return "treelora train-task --accept, or --drop"
    if interrupted is not None and interrupted["resumable"]:
        return f"treelora train-task --resume   ('{interrupted['task']}' stopped after step {interrupted['step']})"
    return "treelora train-task DATA"


def _interrupted(project: Project) -> tuple[dict[str, Any] | None, bool]:
    """Return task and step of the checkpoint and whether ``--resume`` continues it; a damaged one is doctor's."""
    try:
        facts = project.checkpoint.facts()
    except DamagedError:
        return None, False
    if facts is None:
        return None, False
    return {"task": facts["task"], "step": facts["step"]}, project.checkpoint.fits(project.state)
