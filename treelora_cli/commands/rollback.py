"""``treelora rollback``: undo the newest tasks, and undo that."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from treelora_cli.commands.context import session_of
from treelora_cli.errors import UsageError


def rollback(
    context: typer.Context,
    task: Annotated[str | None, typer.Argument(metavar="TASK", help="Return to before this task was learned.")] = None,
    undo: Annotated[bool, typer.Option("--undo", help="Bring back what the last rollback (of TASK) undid.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask when later tasks go too.")] = False,
) -> None:
    """Return to the exact state before TASK was learned. Later tasks go with it; all of it can be brought back.

    Example: treelora rollback gulls
    """
    session = session_of(context)
    project = session.project()
    if task is None and not undo:
        reach = project.history.reach(project.state)
        known = f"Can be rolled back: {', '.join(reach)}." if reach else "No task can be rolled back."
        raise UsageError(f"rollback needs TASK. {known}")
    if undo:
        with project.lock("rollback --undo") as project:
            before = {entry.name for entry in project.state.tasks}
            project = project.undo_rollback(task)
        names = [entry.name for entry in project.state.tasks]
        back = [name for name in names if name not in before]
        session.output.result({"brought_back": back, "tasks": names}, f"Brought back: {', '.join(back)}.")
        return
    assert task is not None
    with project.lock(f"rollback {task}") as project:
        task = project.entry(task).name
        names = [entry.name for entry in project.state.tasks]
        gone = names[names.index(project.entry(task).name) :]
        project.history.before(project.state, task)
        if len(gone) > 1 and not yes:
            _confirm(gone)
        project = project.rollback(task)
    left = [entry.name for entry in project.state.tasks]
    session.output.result(
        {"undone": gone, "tasks": left},
        f"Undone: {', '.join(gone)}. Learned now: {', '.join(left) or 'nothing'}.",
        "Bring it back: treelora rollback --undo. Free its space: treelora doctor --empty-trash.",
    )


def _confirm(gone: list[str]) -> None:
    """Ask before later tasks go too; where nobody can answer, ``--yes`` has to say so."""
    later = ", ".join(gone[1:])
    if not sys.stdin.isatty():
        raise UsageError(f"Rolling back '{gone[0]}' also undoes what was learned after it: {later}. Pass --yes.")
    typer.confirm(f"This also undoes what was learned after '{gone[0]}': {later}. Go on?", abort=True, err=True)
