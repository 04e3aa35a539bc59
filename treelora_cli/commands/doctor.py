"""``treelora doctor``: versions, devices, space, and whether every file of the project is whole."""

from __future__ import annotations

import shutil
from typing import Any

import typer
from rich.table import Table

from treelora_cli.commands.context import session_of
from treelora_cli.errors import DamagedError, ProjectError


def doctor(context: typer.Context) -> None:
    """Check versions, devices, disk, lock and the hash of every file; exit with 3 when something is damaged."""
    from treelora_cli.project import Project

    session = session_of(context)
    facts = _machine()
    try:
        project = session.project()
    except DamagedError:
        raise
    except ProjectError:
        session.output.result({"machine": facts, "project": None}, _table(facts), "No project here or above.")
        return
    facts["free disk GiB"] = round(shutil.disk_usage(project.root).free / 2**30, 1)
    facts["lock"] = project.lock_holder() or "free"
    damaged = project.damage()
    document = {
        "machine": facts,
        "project": str(project.root),
        "files": len(project.state.files),
        "damaged": damaged,
        "tasks_whole": Project.whole_tasks(project.state, damaged),
    }
    lines = [f"{name}: {problem}" for name, problem in damaged.items()] or ["Every file is whole."]
    session.output.result(document, _table(facts), f"{len(project.state.files)} files in {project.root}.", *lines)
    if damaged:
        raise DamagedError(
            f"{len(damaged)} of {len(project.state.files)} files are damaged or missing. Restore them from a copy."
        )


def _machine() -> dict[str, Any]:
    import os
    import platform
    from importlib import metadata

    import torch

    names = ("treelora", "torch", "timm", "transformers", "peft", "accelerate", "safetensors")
    devices = ["cpu"] + [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    devices += ["mps"] if torch.backends.mps.is_available() else []
    return {
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in names},
        "devices": ", ".join(devices),
        "processors": os.cpu_count(),
    }


def _table(facts: dict[str, Any]) -> Table:
    table = Table(show_header=False)
    for name, value in facts.items():
        table.add_row(name, str(value))
    return table
