"""Tell a project where the data of a learned task lies now."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from treelora_cli.backend.contract import Base
from treelora_cli.backend.values import DataRequest, Recorded
from treelora_cli.errors import DataError
from treelora_cli.locations import lasting
from treelora_cli.project import Project


def relocate(project: Project, base: Base, name: str, paths: Sequence[Path]) -> Project:
    """Record new places of a task's data, if its held-out examples are there; the caller holds the lock.

    Args:
        project: Holds the task.
        base: Its loaded base, which reads data of its kind.
        name: The task's.
        paths: Where its data lies now.

    Raises:
        DataError: Examples are missing there, or nothing can be read.
        UsageError: No such task.
    """
    record = project.task_record(name)
    old = DataRequest.from_json(record["data"])
    first, *more = map(lasting, paths)
    moved = dataclasses.replace(old, path=first, more=tuple(more), known_as=old.known_as or old.path)
    found = base.read_task(dataclasses.replace(moved, recorded=Recorded.from_task(record)))
    if found.change is not None and not found.change.scorable:
        shown = " ".join(map(str, paths))
        raise DataError(f"{shown} is not the data of task '{name}': {found.change.text}.")
    return project.with_record(name, {**record, "data": moved.to_json()})
