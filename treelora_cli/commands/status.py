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


def status(context: typer.Context) -> None:
    """Show the project: base, tasks, scores, what was interrupted, what to do next."""
    session = session_of(context)
    project = session.project()
    state, matrix = project.state, project.matrix()
    standing = matrix.standing()
    interrupted, resumable = _interrupted(project)
    reach = project.history.reach(state)
    waiting = project.pending.of(state)
    undone = [entry for entry, _ in trash(project)]
    sizes = project.task_bytes()
    records = [project.task_record(task.name) for task in state.tasks]
    tasks = [
        {
            "name": record["name"],
            "labels": len(project.labels(record["name"])),
            "train_examples": record["train_examples"],
            "nearest": record["nearest"],
            "adapter": entry.adapter,
            "branch": record.get("branch"),
            "branch_reason": record.get("branch_reason"),
            "learned": learned,
            "now": now,
            "bytes": sizes[entry.name],
        }
        for record, entry, learned, now in zip(records, state.tasks, standing.learned, standing.now, strict=True)
    ]
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
        "rollback": reach,
        "trash": [list(entry.tasks) for entry in undone],
        "waiting": None if waiting is None else {"task": waiting.task, "reason": waiting.reason},
        "interrupted": None if interrupted is None else {**interrupted, "resumable": resumable},
    }
    table = Table(title=f"{project.root}: {state.backend} on {state.base['resolved']['model']}")
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
    lines = [str(tasks[-1]["branch_reason"])] if tasks and tasks[-1]["branch_reason"] else []
    if tasks:
        table.caption = summary(standing)
    step = "treelora train-task DATA"
    if interrupted is not None and resumable:
        step = f"treelora train-task --resume   ('{interrupted['task']}' stopped after step {interrupted['step']})"
    if waiting is not None:
        step = "treelora train-task --accept, or --drop"
    kept = f"{history_bytes(project) / 2**20:.1f} MiB"
    size = (
        f"{disk_bytes(project) / 2**20:.1f} MiB (this state {project.total_bytes() / 2**20:.1f}, of it adapters"
        f" {project.adapter_bytes() / 2**20:.2f}; earlier states {history_bytes(project) / 2**20:.1f})"
    )
    lines += [f"Can be rolled back: {', '.join(reach)} (earlier states: {kept})."] if reach else []
    if waiting is not None:
        lines.append(f"Learned but not committed: '{waiting.task}', for {waiting.reason}.")
    if undone:
        lines.append(f"Rolled back: {'; '.join(', '.join(entry.tasks) for entry in undone)}. See treelora doctor.")
    if interrupted is not None and not resumable:
        lines.append(f"'{interrupted['task']}' was interrupted at another state of this project, to which it belongs.")
    session.output.result(document, table, *lines, f"On disk: {size}. Next: {step}")


def _interrupted(project: Project) -> tuple[dict[str, Any] | None, bool]:
    """Return task and step of the checkpoint and whether ``--resume`` continues it; a damaged one is doctor's."""
    try:
        facts = project.checkpoint.facts()
    except DamagedError:
        return None, False
    if facts is None:
        return None, False
    return {"task": facts["task"], "step": facts["step"]}, project.checkpoint.fits(project.state)
