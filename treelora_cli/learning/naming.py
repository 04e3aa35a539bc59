"""What a task is called when nobody says."""

from __future__ import annotations

import re
from pathlib import Path

from treelora_cli.data.tables import table_stem
from treelora_cli.project import check_task_name


def task_name(given: str | None, data: Path) -> str:
    """Return ``given`` when it is a safe name, else a name made of the data's.

    Raises:
        UsageError: ``given`` is no safe name.
    """
    if given is not None:
        return check_task_name(given)
    stem = table_stem(data.absolute()) if data.suffix else data.absolute().name
    derived = re.sub(r"[^a-z0-9._-]+", "-", stem.lower()).strip("-._")[:64]
    return check_task_name(derived or "task")
