"""Paths that a user names."""

from __future__ import annotations

import functools
import glob
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import unquote

from treelora_cli.backend.values import DataRequest
from treelora_cli.data.names import TEST, TRAIN, VAL, is_text, parts_among
from treelora_cli.errors import DataError, nearest

_ADDRESS = re.compile(r"(?:^|/)(https?|s3|gs|hf|ftp):/{1,2}(.*)", re.IGNORECASE)
"""An address, also after it was taken for a path, which leaves one of its slashes."""


def existing(path: Path) -> Path:
    """Return ``path`` made absolute.

    Raises:
        DataError: It does not exist; the nearest existing name beside it is suggested.
    """
    if not is_text(str(path)):
        raise DataError(f"{str(path)!a}: a path that is no text (UTF-8). Rename it.")
    if os.path.exists(path):  # a name that is too long is one that is not there
        if not (path.is_file() or path.is_dir()):
            raise DataError(f"{path} is a pipe or device; data is read more than once. Write it to a file first.")
        return path.absolute()
    address = _ADDRESS.search(str(path))
    if address is not None:
        raise DataError(f"{address[1]}://{address[2]} is not a local file; download it first.")
    if os.path.islink(path):
        raise DataError(f"{path} is a link to {os.readlink(path)}, which is not there.")
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = nearest(path.name, siblings)
    if near is not None:
        raise DataError(f"{path} not found. Did you mean {path.parent / near}?")
    raise DataError(f"{path} not found.")


def once(paths: Sequence[Path], notes: list[str]) -> list[Path]:
    """Return paths without those that lead where an earlier one does, which are said."""
    kept: dict[str, Path] = {}
    for path in paths:
        real = os.path.realpath(path)
        if real in kept:
            notes.append(f"{path} is named twice, and read once.")
        else:
            kept[real] = path
    return list(kept.values())


def parts_given(paths: Sequence[Path], notes: list[str]) -> dict[Path, str]:
    """Return which of several paths are held-out parts by their names, where another one is the training part.

    So ``data/*`` means what ``data`` does where that holds ``train`` and ``test``. What is held out is said.
    """
    meant = parts_among({path.name.split(".")[0] for path in paths})
    by_path = {path: meant[path.name.split(".")[0]] for path in paths}
    held_out = {path: part for path, part in by_path.items() if part in (TEST, VAL)}
    if not held_out or TRAIN not in by_path.values():
        return {}
    notes.append(f"Held out, as {'their names say' if len(held_out) > 1 else 'its name says'}: {_listed(held_out)}.")
    return held_out


def _listed(paths: Iterable[Path]) -> str:
    return ", ".join(path.name for path in paths)


def is_address(name: str) -> bool:
    """Return whether a name is that of something elsewhere, as ``https://...``."""
    return _ADDRESS.match(name) is not None


def without_scheme(name: str) -> str:
    """Return the path in a ``file://`` address, its signs written out; other names as they are."""
    return unquote(name.removeprefix("file://")) if name.startswith("file://") else name


def is_pattern(name: str) -> bool:
    """Return whether a name is a pattern such as ``*.png``, and no file is called so."""
    return glob.has_magic(name) and not os.path.exists(name)  # which no name is too long for


def shown(name: str) -> str:
    """Return a path as short as it can be said from here, without ``..`` in its middle; other names as they are."""
    if not os.path.isabs(name):
        return name
    return min(os.path.relpath(name), os.path.normpath(name), key=len)


def paths_of(request: DataRequest) -> list[Path]:
    """Return the files and folders a request names, patterns such as ``part-*.jsonl`` written out in order.

    Raises:
        DataError: One of them does not exist, or a pattern fits nothing.
    """
    return [path for named in (request.path, *request.more) for path in expanded(named)]


def expanded(path: Path) -> list[Path]:
    """Return the path itself, made absolute, or the paths that fit it when it is a pattern.

    Raises:
        DataError: There is none.
    """
    if os.path.exists(path) or not glob.has_magic(str(path)):
        return [existing(path)]
    found = sorted(glob.glob(str(path), recursive=True))
    if not found:
        raise DataError(f"{path}: nothing fits this pattern.")
    return [Path(name).absolute() for name in found]


def named_file(folder: Path, name: str, where: str, beside: str = "the table's folder") -> Path:
    """Return the file a row of a table names, relative to a folder, for which ``beside`` stands in messages.

    Raises:
        DataError: There is none, or the name cannot be one.
    """
    if is_address(name.strip()):
        raise DataError(f"{where}: {name[:80]} is an address; only local files are read. Download it first.")
    plain = without_scheme(name.strip())
    spellings = (name, plain, plain.replace("\\", "/"), plain.strip("\"'"), unquote(plain))
    try:
        found = next((folder / one for one in spellings if (folder / one).is_file()), None)
    except (OSError, ValueError) as error:  # too long, or with a NUL
        raise DataError(f"{where}: {name[:80]!r} is no path ({getattr(error, 'strerror', None) or error}).") from error
    found = found or _differently_spelled(folder, plain.replace("\\", "/"))
    if found is None:
        raise DataError(f"{where}: {name[:200]} not found. Paths are relative to {beside}.{_moved(folder, plain)}")
    return found


def _moved(folder: Path, name: str) -> str:
    """Return what to do where a folder on the way to a file is another one now, as after a copy from elsewhere."""
    parts = Path(name.replace("\\", "/")).parts
    ends = (Path(*parts[place:]) for place in range(1, len(parts)))
    try:
        end = next((one for one in ends if (folder / one).is_file()), None)
    except (OSError, ValueError):
        return ""
    return "" if end is None else f" There is {end}: leave out what stands before it."


def _differently_spelled(folder: Path, name: str) -> Path | None:
    """Return the one file whose path differs from a name in case and Unicode form only."""
    found = folder
    for part in Path(name).parts:
        if part in ("..", "/", ".") or (found / part).exists():
            found = found / part
            continue
        fitting = [one for one in _entries(found, _changed(found)) if _key(one) == _key(part)]
        if len(fitting) != 1:
            return None
        found = found / fitting[0]
    return found if found.is_file() else None


@functools.lru_cache(maxsize=8)
def _entries(folder: Path, _changed: int) -> tuple[str, ...]:
    return tuple(sorted(os.listdir(folder))) if folder.is_dir() else ()


def _changed(folder: Path) -> int:
    return folder.stat().st_mtime_ns if folder.is_dir() else 0


def _key(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
