"""Tell a project where the data of a learned task lies now."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from treelora_cli.backend.contract import Base
from treelora_cli.backend.values import DataRequest, Recorded
from treelora_cli.errors import DataError
from treelora_cli.locations import lasting
from treelora_cli.project import Project


def moved(request: DataRequest, paths: Sequence[Path], val: Path | None = None) -> DataRequest:
    """Return a request whose data lies elsewhere.

    Held-out data and names of labels in files of their own are looked for where they lay beside the data; ``val`` says
    it of the former.
    """
    first, *more = map(lasting, paths)
    beside = request.val if val is None else lasting(val)
    return dataclasses.replace(
        request,
        path=first,
        more=tuple(more),
        val=_along(beside, request.path, first),
        label_names=_along(request.label_names, request.path, first),
        known_as=request.known_as or request.path,
    )


def _along(other: Path | None, before: Path, now: Path) -> Path | None:
    """Return where a file lies that went with the data from ``before`` to ``now``; itself where it is still there."""
    if other is None or other.exists():
        return other
    if other == before:
        return now
    for old, new in ((before, now), (before.parent, now.parent)):
        found = Path(os.path.normpath(new / os.path.relpath(other, old)))
        if found.exists():
            return found
    return other


def relocate(project: Project, base: Base, name: str, paths: Sequence[Path], val: Path | None = None) -> Project:
    """Record new places of a task's data, if its held-out examples are there; the caller holds the lock.

    Args:
        project: Holds the task.
        base: Its loaded base, which reads data of its kind.
        name: The task's.
        paths: Where its data lies now.
        val: Where its held-out data lies now, if that is apart.

    Raises:
        DataError: Examples are missing there, or nothing can be read.
        UsageError: No such task.
    """
    record = project.task_record(name)
    request = moved(DataRequest.from_json(record["data"]), paths, val)
    if request.val is not None and not request.val.exists():
        raise DataError(f"{request.val}, the held-out data of '{name}', not found. Say where it is now: --val PATH")
    found = base.read_task(dataclasses.replace(request, recorded=Recorded.from_task(record)))
    if found.change is not None and not found.change.scorable:
        shown = " ".join(map(str, paths))
        raise DataError(f"{shown} is not the data of task '{name}': {found.change.text}.")
    return project.with_record(name, {**record, "data": request.to_json()})
