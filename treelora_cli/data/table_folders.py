"""Which tables in a folder are its training and its held-out part."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from treelora_cli.data.folders import Folder, Passed, scan
from treelora_cli.data.names import TEST, TRAIN, VAL, part_of, parts_among, says_unlabelled
from treelora_cli.data.tables import is_table, table_stem, table_suffix
from treelora_cli.errors import DataError

ABOUT = {
    *("labels.json", "dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json", "config.json"),
    *("metadata.json", "dataset-metadata.json", "info.json", "description.json", "croissant.json", "package.json"),
}
"""Tables beside the data that say something about it."""
_EXAMPLE = re.compile(r"(sample|example|gender)[ _-]?submission", re.IGNORECASE)
_SHARD = re.compile(r"part-\d+")


@dataclass(frozen=True)
class TableParts:
    """The tables of each part of a dataset.

    Attributes:
        train, test, val: Files.
        divided: There are parts; otherwise a column of ``train`` may tell them.
    """

    train: list[Path]
    test: list[Path]
    val: list[Path]
    divided: bool


def tables_in(root: Path, notes: list[str]) -> TableParts | None:
    """Find the tables in a folder, or in folders of parts below it; ``None`` when there are none.

    Raises:
        DataError: It cannot be told which of them is meant.
    """
    folder = scan(root, lambda file: is_table(file) and file.name.lower() not in ABOUT, Passed())
    while not folder.files and len(folder.inner) == 1:
        folder = folder.inner[0]
    if folder.files:
        return _by_name(folder.path, folder.files, notes)
    return _by_folder(folder, notes) if folder.inner else None


def _by_name(folder: Path, files: Sequence[Path], notes: list[str]) -> TableParts | None:
    files = [file for file in files if not _EXAMPLE.match(file.name)]
    if not files:
        return None
    meant = parts_among(table_stem(file) for file in files)
    found: dict[str | None, list[Path]] = {TRAIN: [], TEST: [], VAL: [], None: []}
    for file in files:
        found[meant[table_stem(file)]].append(file)
    if found[TRAIN]:
        if found[None]:
            notes.append(not_read(found[None]))
        for part in (TRAIN, TEST, VAL):
            _refuse_twice(found[part])
        return TableParts(found[TRAIN], found[TEST], found[VAL], divided=True)
    if len(files) == 1 or len({re.sub(r"\d+", "", file.name) for file in files}) == 1 or _are_shards(files):
        return TableParts(list(files), [], [], divided=False)
    names = ", ".join(sorted(table_stem(file).lower() for file in files))
    raise DataError(f"{folder} holds several tables and no train.*: {names}. Name one of them.")


def not_read(files: Sequence[Path]) -> str:
    """Return what to tell of files beside those of parts."""
    return f"Not read, beside train and test: {', '.join(file.name for file in files)}."


def _are_shards(files: Sequence[Path]) -> bool:
    return all(_SHARD.match(file.name) for file in files) and len({table_suffix(file) for file in files}) == 1


def _refuse_twice(files: Sequence[Path]) -> None:
    """Raise ``DataError`` when a part is there in two formats, which would be learned twice."""
    named = defaultdict(list)
    for file in files:
        named[table_stem(file).lower()].append(file)
    for same in named.values():
        if len(same) > 1:
            raise DataError(f"{same[0]} and {same[1].name} are the same part in two formats. Name one of them.")


def _by_folder(folder: Folder, notes: list[str]) -> TableParts:
    unlabelled = [inner for inner in folder.inner if part_of(inner.name) is None and says_unlabelled(inner.name)]
    notes += [f"{inner.path} says that it has no labels: its tables were left out." for inner in unlabelled]
    folder = replace(folder, inner=tuple(inner for inner in folder.inner if inner not in unlabelled))
    parts = [part_of(inner.name) for inner in folder.inner]
    if None in parts or TRAIN not in parts:
        names = ", ".join(f"{inner.name}/" for inner in folder.inner)
        raise DataError(f"{folder.path} holds tables in {names}. Name one of them.")
    found: dict[str, list[Path]] = {TRAIN: [], TEST: [], VAL: []}
    for part, inner in zip(parts, folder.inner, strict=True):
        found[str(part)] += inner.all_files()
    return TableParts(found[TRAIN], found[TEST], found[VAL], divided=True)
