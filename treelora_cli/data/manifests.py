"""Tables that list labelled images: paths relative to the table, or the images themselves."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treelora_cli.backend.values import DataRequest
from treelora_cli.data.divided import answered_part, divide_rows
from treelora_cli.data.folders import Folder, Passed, scan
from treelora_cli.data.inputs import PICTURES
from treelora_cli.data.label_files import label_names, named, names_beside
from treelora_cli.data.labels import (
    Several,
    column_of_names,
    label_notes,
    label_texts,
    refuse_quantities,
    refuse_several,
)
from treelora_cli.data.names import part_of
from treelora_cli.data.one_hot import with_one_label
from treelora_cli.data.paths import named_file
from treelora_cli.data.pixels import IMAGE_SUFFIXES, is_image, looks_like_image
from treelora_cli.data.table_folders import TableParts
from treelora_cli.data.tables import (
    DELIMITED,
    TABLE_SUFFIXES,
    Row,
    column_called,
    plain_name,
    read_table,
    table_stem,
    table_suffix,
)
from treelora_cli.errors import SKIP_BAD, DataError, skipped

WRONG_KIND = "This project's backend is vit: give an image folder CLASS/*.png or a CSV with path,label."
_LABELS = (
    *("label", "class", "category", "target", "labels", "class_name", "label_name", "class_id", "choice", "cls"),
    *("breed", "species"),
)
_BOXES = {"xmin", "ymin", "xmax", "ymax", "bbox", "x1", "y1", "x2", "y2", "roix1", "roiy1", "roix2", "roiy2"}
"""Columns of a place in the image, without signs."""
_SHOWN = 20
_COLOURS, _COLOUR_DIMENSIONS, _WHITE = 3, 3, 255
_DATA_URI = re.compile(r"data:image/[\w.+-]+;base64,", re.IGNORECASE)


@dataclass(frozen=True)
class ImageItem:
    """One labelled image.

    Attributes:
        name: For messages.
        label: Class name.
        read: Returns the encoded bytes.
        numbered: If the label is a number, nothing names it.
    """

    name: str
    label: str
    read: Callable[[], bytes]
    numbered: bool = False


Parts = tuple[list[ImageItem], list[ImageItem]]
"""Training and held-out images."""


def read_manifest(path: Path, request: DataRequest, notes: list[str]) -> Parts:
    """Read the images that one table lists, divided by its column of parts if it has one.

    Raises:
        DataError: No columns of images and labels, a row without one of them, or a file that is not there.
    """
    train, test = divide_rows(_rows(path, request, notes), notes, "images")
    return items_of_rows(path, train, test, request, notes)


def items_of_rows(
    path: Path, train: Sequence[Row], test: Sequence[Row], request: DataRequest, notes: list[str]
) -> Parts:
    """Return the images that rows list; paths in them are relative to the folder of ``path``."""
    reader = _Reader(path, train or test, request, notes)
    return reader.items(train), reader.items(test)


def read_manifests(parts: TableParts, request: DataRequest, notes: list[str]) -> Parts:
    """Read the images that the tables of a folder list."""
    if not parts.divided:
        both = [read_manifest(path, request, notes) for path in parts.train]
        return [item for train, _ in both for item in train], [item for _, test in both for item in test]
    tables = {path: _rows(path, request, notes) for path in (*parts.train, *parts.test, *parts.val)}
    first = tables[parts.train[0]]
    test, val = ([row for path in paths for row in tables[path]] for paths in (parts.test, parts.val))
    held_out = answered_part(first, test, val, notes, "images")
    kept = {id(row) for row in held_out}
    readers = {path: _Reader(path, first, request, notes) for path in tables}
    train = [item for path in parts.train for item in readers[path].items(tables[path])]
    listed = ((path, [row for row in tables[path] if id(row) in kept]) for path in (*parts.test, *parts.val))
    return train, [item for path, rows in listed for item in readers[path].items(rows)]


def _rows(path: Path, request: DataRequest, notes: list[str]) -> list[Row]:
    rows = read_table(path, request.data_format, request.columns, notes)
    found = list(rows[0].values) if rows else []
    picture = column_called(PICTURES, found)
    if picture is None or column_called(_LABELS, found) is not None:
        return rows
    return with_one_label(rows, {picture}, notes)


class _Reader:
    """Makes images of the rows of one table."""

    def __init__(self, path: Path, rows: Sequence[Row], request: DataRequest, notes: list[str]) -> None:
        found = list(rows[0].values)
        picture, label = column_called(PICTURES, found), column_called(_LABELS, found)
        if picture is None or label is None:
            all_names = [name for column in found for name in _with_inner(column, rows[0].values[column])]
            shown = ", ".join([*all_names[:_SHOWN], *(["..."] if len(all_names) > _SHOWN else [])])
            delimited = request.data_format in DELIMITED or TABLE_SUFFIXES.get(table_suffix(path)) in DELIMITED
            if delimited and any(Path(str(name)).suffix.lower() in IMAGE_SUFFIXES for name in found):
                raise DataError(
                    f"{path.name}: its first line is a record ({shown}). Where no line names the"
                    " columns, count them: --map 1=path --map 2=label"
                )
            raise DataError(f"Found {shown}. {WRONG_KIND} Or name the columns: --map SOURCE=path --map SOURCE=label")
        self.picture = picture
        notes += _columns_notes(rows, label)
        self.names = label_names(request.label_names, path)
        self.label = label if self.names else column_of_names(rows, label)
        self.request, self.notes = request, notes
        self.path = path

    def items(self, rows: Sequence[Row]) -> list[ImageItem]:
        """Return the images of rows, each once; bad ones are skipped if the request says so."""
        if not rows:
            return []
        self.files = _Files(self.path, [row.values.get(self.picture) for row in rows])
        labels = label_texts(rows, self.label)
        if self.names is not None:
            labels = named(labels, rows, self.names[1], self.names[0])
        known = [label for label in labels if label is not None and not isinstance(label, Several)]
        if self.request.label_prefix is None:
            refuse_quantities(known, rows[0].where)
        self.notes += label_notes(known)
        self.notes += names_beside(known, self.path) if self.names is None else []
        bad: list[str] = []
        items: dict[str, ImageItem] = {}
        repeated = 0
        for row, label, item in self._read(rows, labels, bad):
            before = items.setdefault(item.name, item)
            if before is not item:
                repeated += 1
                self._check_same(before, row, label)
        if bad:
            self.notes.append(skipped(bad, "rows"))
        if repeated:
            self.notes.append(f"{repeated} rows name an image that an earlier one names; each is learned once.")
        return list(items.values())

    def _check_same(self, before: ImageItem, row: Row, label: str) -> None:
        if before.label != (self.request.label_prefix or "") + label:
            raise DataError(
                f"{row.where}: {before.name} is '{label}' here and '{before.label}' before; an image has one class."
            )

    def _read(
        self, rows: Sequence[Row], labels: Sequence[str | None], bad: list[str]
    ) -> Iterator[tuple[Row, str, ImageItem]]:
        known = set(labels)
        for row, label in zip(rows, labels, strict=True):
            try:
                if label is None:
                    raise DataError(f"{row.where}: empty label.{SKIP_BAD}")
                refuse_several(label, known, row.where)
                yield row, label, self._item(row, label)
            except DataError as error:
                if not self.request.skip_bad:
                    raise
                bad.append(str(error))

    def _item(self, row: Row, label: str) -> ImageItem:
        label, numbered = (self.request.label_prefix or "") + label, self.names is None
        value = row.values.get(self.picture)
        if isinstance(value, list) and len(value) == 1 and not isinstance(value[0], list):
            value = value[0]
        content = _content(value) or _drawn(value, row.where)
        if content is not None:
            return ImageItem(row.where, label, lambda: content, numbered)
        if isinstance(value, dict):
            value = value.get("path")
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{row.where}: '{self.picture}' is neither a path nor image bytes. Write image files.")
        file = self.files.find(value, row.where)
        return ImageItem(str(file), label, file.read_bytes, numbered)


def _with_inner(column: str, value: Any) -> list[str]:
    """Return a column's name, or those of the fields of the records in it, as ``--map`` takes them."""
    if not isinstance(value, dict) or not value or isinstance(value.get("bytes"), bytes):
        return [str(column)]
    return [f"{column}.{inner}" for inner in value]


def _columns_notes(rows: Sequence[Row], label: str) -> list[str]:
    """Return what to tell of columns that could be labels, too, or that name a place in the image."""
    names = [str(name) for name in rows[0].values]
    places = [name for name in names if plain_name(name) in _BOXES]
    known = set(map(plain_name, _LABELS))
    others = [name for name in names if name != label and plain_name(name) in known and not _same(rows, label, name)]
    notes = []
    if others:
        notes.append(f"The label is column '{label}'; not used: {', '.join(others)}.")
    if places:
        notes.append(f"{', '.join(places)} are not used: each image is learned as a whole.")
    return notes


def _same(rows: Sequence[Row], one: str, other: str) -> bool:
    """Return whether two columns divide the rows alike."""
    pairs = {(str(row.values.get(one)), str(row.values.get(other))) for row in rows}
    return len(pairs) == len({pair[0] for pair in pairs}) == len({pair[1] for pair in pairs})


def _content(value: Any) -> bytes | None:
    """Return the image that a cell holds: bytes, alone or beside a path, or base64; ``None`` for a path."""
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        value = value["bytes"]
    if isinstance(value, bytes):
        return value
    if isinstance(value, str) and len(value) > 64:
        text = _DATA_URI.sub("", value.strip(), count=1)
        try:
            data = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            return None
        return data if looks_like_image(data[:32]) else None
    return None


def _drawn(value: Any, where: str) -> bytes | None:
    """Return the image of rows of pixels from 0 to 255, grey or of three colours; ``None`` for anything else.

    Raises:
        DataError: Rows of other numbers.
    """
    if not (isinstance(value, list) and value and isinstance(value[0], list)):
        return None
    import io

    import numpy as np
    from PIL import Image

    try:
        pixels = np.asarray(value)
    except ValueError as error:
        raise DataError(f"{where}: rows of pixels of different lengths.") from error
    if pixels.ndim == _COLOUR_DIMENSIONS and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    grey = pixels.ndim == _COLOUR_DIMENSIONS - 1
    colour = pixels.ndim == _COLOUR_DIMENSIONS and pixels.shape[2] == _COLOURS
    if not (grey or colour) or pixels.size == 0 or pixels.dtype.kind not in "iu":
        raise DataError(f"{where}: pixels are rows of whole numbers, or of three of them. Write image files.")
    if pixels.min() < 0 or pixels.max() > _WHITE:
        raise DataError(f"{where}: pixels from {pixels.min()} to {pixels.max()}; they have to be from 0 to 255.")
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


class _Files:
    """Files by the names in a table: relative to it or, for bare names, in the one folder below that has them all.

    There their endings may be left out. ``train.csv`` means ``train/`` where ``test/`` has files of the same names.
    """

    def __init__(self, table: Path, names: Sequence[Any]) -> None:
        self.table = table
        self._names = {str(name).strip() for name in names if isinstance(name, str | int)}
        self._below: dict[str, Path] | None = None

    def find(self, name: str, where: str) -> Path:
        """Return a file.

        Raises:
            DataError: There is none, or several folders have all files of the table.
        """
        try:
            return named_file(self.table.parent, name, where)
        except DataError:
            if "/" in name or "\\" in name or name.strip() not in self._folder(where):
                raise
            return self._folder(where)[name.strip()]

    def _folder(self, where: str) -> dict[str, Path]:
        """Return the files of the folder that has all of the table's names, by these."""
        if self._below is None:
            folders = list(_by_folder(scan(self.table.parent, is_image, Passed())))
            fitting = [folder for folder in folders if self._names <= set(folder[1])]
            part = part_of(table_stem(self.table))
            if len(fitting) > 1 and part is not None:
                fitting = [folder for folder in fitting if part_of(folder[0].name) == part] or fitting
            if len(fitting) > 1:
                shown = ", ".join(str(path) for path, _ in fitting[:2])
                raise DataError(f"{where}: files of these names are in {shown}. Write paths from {self.table.parent}.")
            self._below = fitting[0][1] if fitting else {}
        return self._below


def _by_folder(folder: Folder) -> Iterator[tuple[Path, dict[str, Path]]]:
    """Yield each folder and its files, by their names with and without their endings."""
    if folder.files:
        yield folder.path, {name: file for file in folder.files for name in (file.stem, file.name)}
    for inner in folder.inner:
        yield from _by_folder(inner)
