"""Labels in a file beside each image, as an unpacked WebDataset has them: ``0001.jpg`` with ``0001.cls``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from treelora_cli.backend.values import DataRequest
from treelora_cli.data.folders import Folder
from treelora_cli.data.manifests import Parts, items_of_rows
from treelora_cli.data.names import TEST, TRAIN, VAL, parts_among
from treelora_cli.data.tables import Row
from treelora_cli.errors import DataError

_READ = (".cls", ".json")
_UNCLEAR = (".txt", ".xml", ".caption")


def read_beside(folder: Folder, request: DataRequest, notes: list[str]) -> Parts | None:
    """Read images of no class folder by the files beside them; ``None`` where there are none.

    Args:
        folder: Images, directly in it or in folders of parts.
        request: Says how labels are read.
        notes: Takes lines for the user.

    Raises:
        DataError: Some images have such a file and others none, or it holds no label.
    """
    images = _images(folder)
    counts = {ending: _count(images, ending) for ending in _READ}
    ending = next((one for one in _READ if counts[one]), None)
    if ending is None:
        return None
    count = counts[ending]
    lacking = next((image for image in images if not image.with_suffix(ending).is_file()), None)
    if lacking is not None:
        raise DataError(f"{lacking} has no {ending} file beside it, as {count} of {len(images)} images have.")
    notes.append(f"The label of each image is in the {ending} file beside it.")
    parts = parts_among(inner.name for inner in folder.inner)
    found: dict[str | None, list[Row]] = {TRAIN: _rows(folder.files, ending), TEST: [], VAL: [], None: []}
    for inner in folder.inner:
        found[parts[inner.name]] += _rows(inner.files, ending)
    held_out = found[TEST] or found[VAL]
    train = found[TRAIN] or held_out
    if found[None] or not train:
        raise DataError(f"{folder.path}: images in folders that are no parts. Give one of them.")
    return items_of_rows(folder.path / "images", train, held_out if found[TRAIN] else [], request, notes)


def refuse_unclear(folder: Folder) -> None:
    """Raise ``DataError`` where files beside images may be labels, captions or boxes."""
    images = _images(folder)
    for ending in _UNCLEAR:
        if count := _count(images, ending):
            raise DataError(
                f"{folder.path}: {count} images have a {ending} file beside them; whether it holds a class, caption or"
                " boxes cannot be told. Write a table of path,label, or folders CLASS/*.png."
            )


def _images(folder: Folder) -> list[Path]:
    return [*folder.files, *(file for inner in folder.inner for file in inner.files)]


def _count(images: Sequence[Path], ending: str) -> int:
    return sum(image.with_suffix(ending).is_file() for image in images)


def _rows(images: Sequence[Path], ending: str) -> list[Row]:
    return [Row({"path": str(image), **_record(image.with_suffix(ending))}, str(image)) for image in images]


def _record(path: Path) -> dict[str, Any]:
    """Return what a file beside an image says: a label, or a JSON object with one."""
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
        record = {"label": text} if path.suffix == ".cls" else json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as text or JSON ({error}).") from error
    if not isinstance(record, dict):
        record = {"label": record}
    return {name: value for name, value in record.items() if name != "path"}
