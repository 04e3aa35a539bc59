"""Which files of a text task are its training and its held-out part, and the rows in them.

A table is one part or, by a column ``split``, several. A folder holds one table, tables of parts (``dev.jsonl.gz``,
``train-00000.parquet``) or shards, text files (one text each), or text files in class folders.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote

from treelora_cli.backend.values import DataRequest
from treelora_cli.data.columns import TEXTS, has_text_alone, in_known_names
from treelora_cli.data.divided import answered_part, divide_rows
from treelora_cli.data.files import decode, read_bytes, refuse_archives_in
from treelora_cli.data.folders import Folder, Passed, scan
from treelora_cli.data.layout import Labelled, read_layout
from treelora_cli.data.names import TEST, TRAIN, VAL, part_of, parts_among
from treelora_cli.data.one_hot import with_one_label
from treelora_cli.data.paths import existing, once, parts_given, paths_of
from treelora_cli.data.pixels import is_image
from treelora_cli.data.table_folders import TableParts, not_read, tables_in
from treelora_cli.data.tables import TEXT_SUFFIXES, Row, read_table, table_suffix
from treelora_cli.errors import DataError

WRONG_KIND = (
    "This project's backend is causal-lm: give JSONL, JSON, CSV or parquet with messages, prompt+answer,"
    " sentence+label or text."
)
ABOUT = re.compile(r"(read[ _-]?me|licen[cs]e|notice|changelog|changes|citation)\b.*", re.IGNORECASE)
"""Texts beside the data that say something about it."""

Parts = tuple[list[Row], list[Row]]
"""Training and held-out rows."""


def read_parts(request: DataRequest, notes: list[str]) -> Parts:
    """Return training and held-out rows of everything a request names.

    Raises:
        DataError: Missing or malformed data, or data of another kind.
    """
    train, test = _read_all(once(paths_of(request), notes), request, notes)
    if request.val is not None:
        outer, inner = _read_all([existing(request.val)], request, notes)
        test = inner or outer
    return train, test


def _read_all(paths: Sequence[Path], request: DataRequest, notes: list[str]) -> Parts:
    train: list[Row] = []
    test: list[Row] = []
    found: dict[str, list[Row]] = {TEST: [], VAL: []}
    held_out = parts_given(paths, notes)
    for path in paths:
        more = _Reader(request, notes).read(path)
        if path in held_out:
            found[held_out[path]] += [*more[0], *more[1]]
        else:
            train += more[0]
            test += more[1]
    return train, [*test, *answered_part(train, found[TEST], found[VAL], notes, "examples")]


def _texts_in(path: Path) -> Folder:
    """Find text files: by their ending or, where none has it, those without any that hold text."""
    found = scan(path, lambda file: table_suffix(file) == ".txt", Passed())
    if not found.files and not found.inner:
        found = scan(path, lambda file: table_suffix(file) == ".md" and not ABOUT.fullmatch(file.stem), Passed())
    if not found.files and not found.inner:
        found = scan(path, _is_bare_text, Passed())
    return found


def _refuse_table(path: Path, lines: Sequence[str]) -> None:
    """Raise ``DataError`` when every line of a text file is a record, and so no text to learn."""
    tabs = {line.count("\t") for line in lines}
    if all(line.lstrip().startswith("{") and line.rstrip().endswith("}") for line in lines):
        seen, advice = "is a JSON record", "Pass --format jsonl"
    elif all(line.startswith("__label__") for line in lines):
        seen, advice = "begins with __label__", "Write it as a table with a head: label, text"
    elif len(lines) > 1 and len(tabs) == 1 and tabs != {0}:
        seen, advice = "has as many tabs", "If they divide columns, pass --format tsv --map 1=label --map 2=text"
        names = dict.fromkeys(lines[0].split("\t"), "")
        if {"label", "text", "answer", "messages"} & set(in_known_names([Row(names, "")])[0].values):
            advice = "The first names columns: pass --format tsv"
    else:
        return
    raise DataError(f"{path}: every line {seen}. {advice}; if lines are texts to learn, pass --format text.")


def _is_bare_text(file: Path) -> bool:
    if file.suffix and not file.suffix[1:].isdigit():
        return False
    try:
        with file.open("rb") as opened:
            head = opened.read(4096)
    except OSError:
        return False
    return bool(head.strip()) and not any(sign < 9 for sign in head) and not ABOUT.fullmatch(file.name)


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
        rows = in_known_names(read_table(path, self.request.data_format, self.request.columns, self.notes))
        if has_text_alone(rows):
            rows = with_one_label(rows, TEXTS, self.notes)
        if self.request.data_format is None and table_suffix(path) in TEXT_SUFFIXES:
            _refuse_table(path, [str(row.values.get("text")) for row in rows])
        return rows

    def _tables(self, paths: Sequence[Path]) -> list[Row]:
        return [row for path in paths for row in self._table(path)]

    def _read_folder(self, path: Path) -> Parts:
        tables = tables_in(path, self.notes)
        if tables is not None:
            return self._read_tables(tables)
        texts = _texts_in(path)
        if texts.files or texts.inner:
            return self._read_texts(texts)
        refuse_archives_in(path)
        pictures = any(is_image(entry) for entry in path.glob("**/*") if entry.is_file())
        raise DataError(f"{path} holds {'images' if pictures else 'no table'}. {WRONG_KIND}")

    def _read_tables(self, tables: TableParts) -> Parts:
        train, test, val = (self._tables(paths) for paths in (tables.train, tables.test, tables.val))
        if not tables.divided:
            return divide_rows(train, self.notes, "examples")
        return train, answered_part(train, test, val, self.notes, "examples")

    def _read_texts(self, folder: Folder) -> Parts:
        """Read text files: one text each; in class folders the folder's name is the label."""
        own = [file for file in folder.files if not ABOUT.fullmatch(file.stem)]
        if len(own) < len(folder.files):
            self.notes.append(f"{len(folder.files) - len(own)} texts about the data were left out.")
        if own and folder.inner:
            seen = ", ".join(f"{inner.name}/" for inner in folder.inner[:3])
            raise DataError(
                f"{folder.path} holds {len(own)} texts beside folders of texts ({seen}): are the folders labels?"
                " Separate them, or name files."
            )
        meant = parts_among(file.stem for file in own)
        if own and TRAIN in meant.values():
            return self._read_text_parts(own, meant)
        if not folder.inner:
            return self._free(own or folder.files), []
        if all(part_of(inner.name) is not None and not inner.inner for inner in folder.inner):
            found: dict[str, list[Row]] = {TRAIN: [], TEST: [], VAL: []}
            for inner in folder.inner:
                found[str(part_of(inner.name))] += self._free(inner.all_files())
            train, test, val = found[TRAIN], found[TEST], found[VAL]
            return (train, answered_part(train, test, val, self.notes, "examples")) if train else (test or val, [])
        passed = Passed()
        layout = read_layout(folder, self.request.classes, passed, "texts")
        labels = {label for label, _ in (*layout.train, *layout.test)}
        if len(labels) == 1 and self.request.classes is None:
            (name,) = labels
            raise DataError(
                f"{folder.path} holds texts in {name}/ only. If they are texts to learn, give that folder; if '{name}'"
                f" is their label, pass --classes {quote(name)}"
            )
        self.notes += passed.lines(folder.path, "texts")
        return self._labelled(layout.train), self._labelled(layout.test)

    def _read_text_parts(self, files: Sequence[Path], meant: Mapping[str, str | None]) -> Parts:
        """Read ``train.txt`` and ``valid.txt``: a text a line."""
        found: dict[str, list[Row]] = {TRAIN: [], TEST: [], VAL: []}
        beside = [file for file in files if meant[file.stem] is None]
        if beside:
            self.notes.append(not_read(beside))
        for file in files:
            part = meant[file.stem]
            if part is not None:
                found[part] += read_table(file, "text", {}, self.notes)
        return found[TRAIN], answered_part(found[TRAIN], found[TEST], found[VAL], self.notes, "examples")

    def _free(self, files: Sequence[Path]) -> list[Row]:
        return [Row({"text": self._text(file)}, file.name) for file in files]

    def _labelled(self, files: Sequence[Labelled]) -> list[Row]:
        return [Row({"text": self._text(file), "label": label}, f"{label}/{file.name}") for label, file in files]

    def _text(self, file: Path) -> str:
        return decode(read_bytes(file), file, self.notes, western=True)
