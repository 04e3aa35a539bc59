"""Which files of a text task are its training and its held-out part, and the rows in them.

A table is one part or, by a column ``split``, several. A folder holds one table, tables of parts (``dev.jsonl.gz``,
``train-00000.parquet``) or shards, text files (one text each), or text files in class folders.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from treelora_cli.backend.values import DataRequest
from treelora_cli.data.files import decode, read_bytes
from treelora_cli.data.layout import Folder, Labelled, Passed, read_layout, scan, val_unused
from treelora_cli.data.names import TEST, TRAIN, VAL, part_of, parts_among
from treelora_cli.data.paths import existing, paths_of
from treelora_cli.data.pixels import is_image
from treelora_cli.data.tables import Row, divide_rows, is_table, read_table, table_stem, table_suffix
from treelora_cli.errors import DataError

WRONG_KIND = (
    "This project's backend is causal-lm: give JSONL, JSON, CSV or parquet with messages, prompt+answer,"
    " sentence+label or text."
)
_ABOUT = {"labels.json", "dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json"}
"""Tables beside the data that say something about it."""

Parts = tuple[list[Row], list[Row]]
"""Training and held-out rows."""


def read_parts(request: DataRequest, notes: list[str]) -> Parts:
    """Return training and held-out rows of everything a request names.

    Raises:
        DataError: Missing or malformed data, or data of another kind.
    """
    train, test = _read_all(paths_of(request), request, notes)
    if request.val is not None:
        outer, inner = _read_all([existing(request.val)], request, notes)
        test = inner or outer
    return train, test


def _read_all(paths: Sequence[Path], request: DataRequest, notes: list[str]) -> Parts:
    train: list[Row] = []
    test: list[Row] = []
    for path in paths:
        more = _Reader(request, notes).read(path)
        train += more[0]
        test += more[1]
    return train, test


class _Reader:
    def __init__(self, request: DataRequest, notes: list[str]) -> None:
        self.request = request
        self.notes = notes

    def read(self, path: Path) -> Parts:
        """Read a file or a folder."""
        if path.is_dir():
            return self._read_folder(path)
        if is_image(path):
            raise DataError(f"{path.name}: an image. {WRONG_KIND}")
        return divide_rows(self._table(path), self.notes, "examples")

    def _table(self, path: Path) -> list[Row]:
        return read_table(path, self.request.data_format, self.request.columns, self.notes)

    def _tables(self, paths: Sequence[Path]) -> list[Row]:
        return [row for path in paths for row in self._table(path)]

    def _read_folder(self, path: Path) -> Parts:
        passed = Passed()
        tables = scan(path, lambda file: is_table(file) and file.name.lower() not in _ABOUT, passed)
        if tables.files:
            return self._read_tables(path, tables.files)
        if tables.inner:
            return self._read_inner(tables)
        texts = scan(path, lambda file: table_suffix(file) == ".txt", Passed())
        if texts.files or texts.inner:
            return self._read_texts(texts)
        pictures = any(is_image(entry) for entry in path.glob("**/*") if entry.is_file())
        raise DataError(f"{path} holds {'images' if pictures else 'no table'}. {WRONG_KIND}")

    def _read_tables(self, folder: Path, files: Sequence[Path]) -> Parts:
        found: dict[str | None, list[Path]] = {TRAIN: [], TEST: [], VAL: [], None: []}
        meant = parts_among(table_stem(file) for file in files)
        for file in files:
            found[meant[table_stem(file)]].append(file)
        others = found[None]
        if found[TRAIN]:
            if others:
                self.notes.append(f"Not read, beside train and test: {', '.join(file.name for file in others)}.")
            return self._held_out(self._tables(found[TRAIN]), self._tables(found[TEST]), self._tables(found[VAL]))
        if len(files) == 1 or len({re.sub(r"\d+", "", file.name) for file in files}) == 1:
            return divide_rows(self._tables(files), self.notes, "examples")
        names = ", ".join(sorted(table_stem(file).lower() for file in files))
        raise DataError(f"{folder} holds several tables and no train.*: {names}. Name one of them.")

    def _held_out(self, train: list[Row], test: list[Row], val: list[Row]) -> Parts:
        if test and val:
            self.notes.append(val_unused(len(val), "examples"))
        return train, test or val

    def _read_inner(self, folder: Folder) -> Parts:
        """Read tables in folders: of parts, or in a single one."""
        if len(folder.inner) == 1:
            return self._read_folder(folder.inner[0].path)
        parts = [part_of(inner.name) for inner in folder.inner]
        if None in parts or TRAIN not in parts:
            names = ", ".join(f"{inner.name}/" for inner in folder.inner)
            raise DataError(f"{folder.path} holds tables in {names}. Name one of them.")
        found: dict[str, list[Path]] = {TRAIN: [], TEST: [], VAL: []}
        for part, inner in zip(parts, folder.inner, strict=True):
            found[str(part)] += inner.all_files()
        return self._held_out(*(self._tables(found[part]) for part in (TRAIN, TEST, VAL)))

    def _read_texts(self, folder: Folder) -> Parts:
        """Read text files: one text each; in class folders the folder's name is the label."""
        if folder.files:
            return self._free(folder.all_files()), []
        if all(part_of(inner.name) is not None and not inner.inner for inner in folder.inner):
            found: dict[str, list[Row]] = {TRAIN: [], TEST: [], VAL: []}
            for inner in folder.inner:
                found[str(part_of(inner.name))] += self._free(inner.all_files())
            return self._held_out(found[TRAIN] or found[TEST], found[TEST] if found[TRAIN] else [], found[VAL])
        passed = Passed()
        layout = read_layout(folder, self.request.classes, passed, "texts")
        self.notes += passed.lines(folder.path, "texts")
        return self._labelled(layout.train), self._labelled(layout.test)

    def _free(self, files: Sequence[Path]) -> list[Row]:
        return [Row({"text": self._text(file)}, file.name) for file in files]

    def _labelled(self, files: Sequence[Labelled]) -> list[Row]:
        return [Row({"text": self._text(file), "label": label}, f"{label}/{file.name}") for label, file in files]

    def _text(self, file: Path) -> str:
        return decode(read_bytes(file), file, self.notes, western=True)
