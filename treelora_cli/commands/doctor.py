"""``treelora doctor``: versions, devices, space, and whether every file of the project is whole; mends what can be."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from treelora_cli.commands import options
from treelora_cli.commands.check_backend import check_backend
from treelora_cli.commands.context import Session, session_of
from treelora_cli.errors import DamagedError, ProjectError, UsageError

if TYPE_CHECKING:
    from treelora_cli.project import Project, Repair


def doctor(
    context: typer.Context,
    mend: Annotated[bool, typer.Option("--repair", help="Restore or rebuild what the rest determines.")] = False,
    empty_trash: Annotated[bool, typer.Option("--empty-trash", help="Delete for good what was rolled back.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before the trash is emptied.")] = False,
    backend: Annotated[
        str | None, typer.Option(help="Check instead that this backend meets the contract; exit with 7 when not.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="With --backend: a task's data to learn and answer.")] = None,
    settings: options.Set = None,
    device: options.Device = None,
) -> None:
    """Check versions, devices, disk, lock and the hash of every file; exit with 3 when something is damaged.

    Example: treelora doctor --repair
    """
    from treelora_cli.project import Project

    session = session_of(context)
    if backend is not None:
        check_backend(session, backend, data, settings, device)
        return
    if data is not None or settings or device is not None:
        raise UsageError("--data, --set and --device of doctor go with --backend NAME.")
    facts = _machine()
    notes = _find_state(session, mend)
    try:
        Project.locate(session.directory or Path.cwd())
    except ProjectError:
        if mend or empty_trash:
            raise
        session.output.result({"machine": facts, "project": None}, _table(facts), "No project here or above.")
        return
    project, report = session.project(), None
    if mend:
        project, report = _mend(project)
    if empty_trash:
        notes += _empty_trash(project, yes)
    facts["free disk GiB"] = round(shutil.disk_usage(project.root).free / 2**30, 1)
    facts["lock"] = project.lock_holder() or "free"
    _show(session, project, facts, report, notes)


def _show(session: Session, project: Project, facts: dict[str, Any], report: Repair | None, notes: list[str]) -> None:
    from treelora_cli.project import damage_of_the_past, trash, whole_tasks, works

    damaged = project.damage()
    usable, thrown, past = works(project, damaged), trash(project), damage_of_the_past(project)
    document: dict[str, Any] = {
        "machine": facts,
        "project": str(project.root),
        "files": len(project.state.files),
        "damaged": damaged,
        "tasks_whole": whole_tasks(project.state, damaged),
        "works": usable,
        "trash": [{"tasks": list(e.tasks), "since": e.since, "bytes": size} for e, size in thrown],
        "damaged_past": past,
        "repair": None if report is None else {k: v for k, v in vars(report).items() if k != "notes"},
        "notes": notes + ([] if report is None else report.notes),
    }
    lines = [*document["notes"]]
    if report is not None:
        parts = {"Restored": report.restored, "Rebuilt": report.rebuilt, "Dropped": report.dropped}
        lines += [f"{verb}: {', '.join(names)}" for verb, names in parts.items() if names] or ["Nothing to repair."]
    lines += [f"{name}: {problem}" for name, problem in damaged.items()] or ["Every file is whole."]
    if past:
        lines.append(
            "Damaged or missing, but needed only to undo or to resume, and dropped as further tasks are learned:"
        )
        lines += [f"  {name}: {problem}" for name, problem in past.items()]
    for entry, size in thrown:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.since))
        lines.append(f"In the trash since {when}: {', '.join(entry.tasks)} ({size / 2**20:.1f} MiB).")
    if damaged:
        lines += _still_works(usable)
    session.output.result(document, _table(facts), f"{len(project.state.files)} files in {project.root}.", *lines)
    if damaged:
        hint = "Restore them from a copy" if report is not None else "Run treelora doctor --repair"
        hint += f", or treelora rollback {usable['rollback'][-1]}." if usable["rollback"] else "."
        raise DamagedError(f"{len(damaged)} of {len(project.state.files)} files are damaged or missing. {hint}")


def _still_works(works: dict[str, Any]) -> list[str]:
    """Say what can be relied on although files are damaged."""
    return [
        f"Predictions over all tasks: {'still work' if works['predict'] else 'do not work'}.",
        f"Adapters that can still be exported: {', '.join(works['export']) or 'none'}.",
        f"The tree: {'can' if works['inspect'] else 'cannot'} be shown.",
        f"Tasks that can be rolled back to a whole state: {', '.join(works['rollback']) or 'none'}.",
    ]


def _find_state(session: Session, mend: bool) -> list[str]:
    """Bring back a lost ``state.json`` from its copy, or say that this can be done."""
    from treelora_cli.project import find_lost_state, restore_state

    root = find_lost_state(session.directory or Path.cwd())
    if root is None:
        return []
    if not mend:
        raise DamagedError(
            f"{root / 'state.json'} is damaged or missing; a copy is kept. Run treelora doctor --repair."
        )
    state = restore_state(root)
    names = ", ".join(task.name for task in state.tasks) or "no task"
    return [f"state.json is restored from the copy of commit {state.generation}: {names}."]


def _mend(project: Project) -> tuple[Project, Repair]:
    from treelora_cli.project import repair

    with project.lock("doctor --repair") as project:
        return repair(project)


def _empty_trash(project: Project, yes: bool) -> list[str]:
    from treelora_cli.project import trash

    thrown = trash(project)
    if not thrown:
        return ["The trash is empty."]
    size = sum(size for _, size in thrown)
    names = "; ".join(", ".join(entry.tasks) for entry, _ in thrown)
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError(f"Emptying the trash deletes for good what was rolled back: {names}. Pass --yes.")
        typer.confirm(f"Delete for good what was rolled back: {names}?", abort=True, err=True)
    with project.lock("doctor --empty-trash") as project:
        project.empty_trash()
    return [f"Deleted from the trash: {names}. Freed {size / 2**20:.1f} MiB."]


def _machine() -> dict[str, Any]:
    import os
    import platform
    from importlib import metadata

    import torch

    names = ("treelora", "torch", "timm", "transformers", "peft", "accelerate", "safetensors")
    devices = ["cpu"] + [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    devices += ["mps"] if torch.backends.mps.is_available() else []
    page = os.sysconf("SC_PAGE_SIZE")
    return {
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in names},
        "devices": ", ".join(devices),
        "processors": os.cpu_count(),
        "memory GiB": round(os.sysconf("SC_PHYS_PAGES") * page / 2**30, 1),
        "free memory GiB": _free_memory(page),
    }


def _free_memory(page: int) -> float | None:
    """Return what programs can still get, in GiB; ``None`` where the system does not say."""
    import os

    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        found = os.sysconf("SC_AVPHYS_PAGES") * page if "SC_AVPHYS_PAGES" in os.sysconf_names else 0
    return round(found / 2**30, 1) or None


def _table(facts: dict[str, Any]) -> Table:
    table = Table(show_header=False)
    for name, value in facts.items():
        table.add_row(name, str(value))
    return table
