"""Tables of examples: CSV, JSONL, JSON and parquet, read into rows that know their line."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treelora_cli.errors import DataError

TABLE_SUFFIXES = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class Row:
    """One record.

    Attributes:
        values: By column name, after renaming.
        where: File and line (or record number), for messages.
    """

    values: dict[str, Any]
    where: str


def table_format(path: Path, named: str | None) -> str:
    """Return the format of a table: as named, or by the file's ending.

    Raises:
        DataError: Neither says.
    """
    if named in set(TABLE_SUFFIXES.values()):
        return str(named)
    found = TABLE_SUFFIXES.get(path.suffix.lower()) if named is None else None
    if found is None:
        raise DataError(
            f"{path}: unknown format '{named or path.suffix}'. Use {', '.join(sorted(set(TABLE_SUFFIXES.values())))}."
        )
    return found


def read_table(path: Path, data_format: str | None, columns: Mapping[str, str]) -> list[Row]:
    """Read all rows of a table, renaming the column ``source`` of ``--map source=name`` to ``name``.

    Raises:
        DataError: Malformed content (file and line named), no rows, or a mapped column that is not there.
    """
    kind = table_format(path, data_format)
    readers = {"csv": _read_csv, "jsonl": _read_jsonl, "json": _read_json, "parquet": _read_parquet}
    try:
        rows = readers[kind](path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start}).") from error
    if not rows:
        raise DataError(f"{path} holds no examples.")
    return [_rename(row, columns) for row in rows]


def _rename(row: Row, columns: Mapping[str, str]) -> Row:
    for source in columns:
        if source not in row.values:
            raise DataError(f"{row.where}: no column '{source}' to map. Found {', '.join(map(str, row.values))}.")
    return Row({columns.get(name, name): value for name, value in row.values.items()}, row.where)


def _read_csv(path: Path) -> list[Row]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, strict=True)
        rows = []
        try:
            for record in reader:
                where = f"{path.name}:{reader.line_num}"
                if None in record or None in record.values():
                    raise DataError(f"{where}: the number of fields differs from the header's.")
                rows.append(Row(dict(record), where))
        except csv.Error as error:
            raise DataError(f"{path.name}:{reader.line_num}: invalid CSV ({error}).") from error
    return rows


def _read_jsonl(path: Path) -> list[Row]:
    rows = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{path.name}:{number}"
                rows.append(_record(_parse_json(line, where), where))
    return rows


def _read_json(path: Path) -> list[Row]:
    text = path.read_text(encoding="utf-8-sig")
    content = _parse_json(text, path.name)
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
        if len(lists) != 1:
            raise DataError(f"{path.name}: expected a list of records.")
        content = lists[0]
    if not isinstance(content, list):
        raise DataError(f"{path.name}: expected a list of records.")
    return [_record(value, f"{path.name} record {index + 1}") for index, value in enumerate(content)]


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = where if ":" in where else f"{where}:{error.lineno}"
        raise DataError(f"{place}: invalid JSON ({error.msg}, column {error.colno}).") from error
    except RecursionError as error:
        raise DataError(f"{where}: JSON nested too deeply.") from error


def _record(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a record with named fields, got {type(value).__name__}.")
    return Row(value, where)


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        records: Iterable[dict[str, Any]] = parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{path.name}: invalid parquet ({str(error).splitlines()[0]}).") from error
    return [Row(dict(record), f"{path.name} row {index + 1}") for index, record in enumerate(records)]
