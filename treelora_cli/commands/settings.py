"""``treelora settings``: every setting with its meaning, default and range."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from treelora_cli.commands.context import Session, session_of
from treelora_cli.errors import ProjectError, UsageError

if TYPE_CHECKING:
    from treelora_cli.config import Config


def settings(
    context: typer.Context,
    matching: Annotated[
        str | None, typer.Argument(metavar="[TEXT]", help="Only settings whose name or meaning has it.")
    ] = None,
) -> None:
    """List every setting of treelora.yaml: meaning, default, range, and what this project's file says.

    Example: treelora settings train
    """
    from treelora_cli.config.by_name import all_settings

    session = session_of(context)
    wanted = (matching or "").lower()
    found = [one for one in all_settings() if wanted in f"{one.name} {one.meaning}".lower()]
    if not found:
        raise UsageError(f"No setting has '{matching}' in its name or meaning. List all: treelora settings")
    given = _given(session)
    table = Table(title="Settings; '-': the model family or the data decides")
    for heading in ("setting", "default", *(["here"] if given is not None else []), "allowed", "meaning"):
        table.add_column(heading, overflow="fold")
    document: list[dict[str, Any]] = []
    for one in found:
        here = None if given is None else _value(given, one.name)
        document.append({**dataclasses.asdict(one), **({} if given is None else {"here": here})})
        table.add_row(
            one.name, _shown(one.default), *([_shown(here)] if given is not None else []), one.allowed, one.meaning
        )
    session.output.result({"settings": document}, table)


def _given(session: Session) -> Config | None:
    """Return what ``treelora.yaml`` says, ``None`` outside a project."""
    from treelora_cli.project import Project

    try:
        root = Project.locate(session.directory or Path.cwd())
    except ProjectError:
        if session.directory is not None:
            raise
        return None
    return Project.open(root).config()


def _value(config: Config, name: str) -> Any:
    section, _, key = name.rpartition(".")
    return getattr(getattr(config, section) if section else config, key)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return "-" if value in (None, {}) else str(value)
