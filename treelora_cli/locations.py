"""Paths that are kept: they mean the same from any directory, and after a directory on the way was renamed."""

from __future__ import annotations

from pathlib import Path


def lasting(path: Path) -> Path:
    """Return ``path`` absolute and without ``..``.

    ``project/../data`` is gone once ``project`` is renamed; ``data`` is not. Links are followed only where a ``..``
    comes after them, since what is above depends on where they lead; others stay as the user named them.
    """
    full = path.absolute()
    if ".." not in full.parts:
        return full
    after = len(full.parts) - full.parts[::-1].index("..")
    return Path(*full.parts[:after]).resolve().joinpath(*full.parts[after:])
