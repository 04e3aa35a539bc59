"""Paths that are kept: they mean the same from any directory, and after a directory on the way was renamed."""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


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


def along(path: str, before: str, now: Path) -> str:
    """Return where a file lies that moved together with a directory; itself where it is still there, or nowhere else.

    Args:
        path: Absolute, or a pattern.
        before: Where the directory was.
        now: Where it is.
    """
    if _there(path) or not os.path.isabs(path) or before == str(now):
        return path
    other = os.path.normpath(os.path.join(now, os.path.relpath(path, before)))
    return other if _there(other) else path


def followed(kept: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """Return what a project keeps of its data's places, after both moved together; ``DataRequest.to_json`` both.

    Args:
        kept: As it was written; ``kept_in`` says where the project was then.
        root: Where it is now.
    """
    root = root.absolute()
    before = kept.get("kept_in")
    if before is None or before == str(root):
        return dict(kept)
    new = {key: kept[key] and along(kept[key], before, root) for key in ("path", "val", "label_names") if key in kept}
    known_as = kept.get("known_as") or (kept["path"] if new["path"] != kept["path"] else None)
    named = {} if known_as is None else {"known_as": known_as}
    more = [along(path, before, root) for path in kept.get("more", ())]
    return {**kept, **new, **named, "more": more, "kept_in": str(root)}


def _there(path: str) -> bool:
    return os.path.exists(path) or (glob.has_magic(path) and any(glob.iglob(path)))
