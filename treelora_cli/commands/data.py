"""``treelora data``: say where a task's data lies now."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from treelora_cli.commands import options
from treelora_cli.commands.context import session_of


def data(
    context: typer.Context,
    task: Annotated[str, typer.Argument(metavar="TASK", help="A learned task.")],
    paths: Annotated[list[Path], typer.Argument(metavar="DATA...", help="Where its data lies now.")],
    val: options.Val = None,
    device: options.Device = None,
) -> None:
    """Point TASK to the new place of its data, if the same held-out examples are there.

    Example: treelora data gulls /mnt/archive/gulls
    """
    from treelora_cli.config import Config
    from treelora_cli.data.paths import existing
    from treelora_cli.learning.opening import open_base, project_config
    from treelora_cli.learning.relocating import relocate

    session = session_of(context)
    project = session.project()
    project.entry(task)
    project.check_decided()
    project.check_uninterrupted()
    for path in (*paths, *([] if val is None else [val])):
        existing(path)
    runtime = session.runtime(device)
    with session.writer(runtime, f"data {task}") as project:
        base = open_base(project, project_config(project, Config()), runtime)
        relocate(project, base, task, paths, val)
    places = [str(path) for path in paths]
    session.output.result({"task": task, "data": places}, f"The data of '{task}' lies in {' '.join(places)} now.")
