"""Paths that a user names."""

from __future__ import annotations

from pathlib import Path

from treelora_cli.errors import DataError, suggest


def existing(path: Path) -> Path:
    """Return ``path`` made absolute.

    Raises:
        DataError: It does not exist; the nearest existing name beside it is suggested.
    """
    if path.exists():
        return path.absolute()
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = suggest(path.name, siblings)
    if near:
        name = near.split("'")[1]
        raise DataError(f"{path} not found. Did you mean {path.parent / name}?")
    raise DataError(f"{path} not found.")
