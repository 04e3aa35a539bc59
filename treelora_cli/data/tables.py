"""Tables of examples: CSV, JSON, JSONL, parquet and plain text, packed or not, read into rows that know their line."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from treelora_cli.data.delimited import read_delimited
from treelora_cli.data.documents import is_message_list, records_in
from treelora_cli.data.files import decode, lines_of, read_bytes, refuse_archive, refuse_zeros, unpacked_name
from treelora_cli.data.labelling_tools import refuse_tools_own
from treelora_cli.errors import DataError, first_line

TABLE_SUFFIXES = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
DELIMITED = ("csv", "tsv")
FORMATS = ("arrow", "csv", "json", "jsonl", "parquet", "text", "tsv")
TEXT_SUFFIXES = {".txt": "text", ".md": "text"}
_SPACE = re.compile(r"\s*")


@dataclass(frozen=True)
class Row:
    """One record.

    Attributes:
        values: By column name, after renaming.
        where: File and line (or record number), for messages.
    """

    values: dict[str, Any]
    where: str


def table_suffix(path: Path) -> str:
    """Return the ending that tells a file's format, that of its packing left out."""
    return unpacked_name(path).suffix.lower()


def table_stem(path: Path) -> str:
    """Return a file's name without its endings."""
    return unpacked_name(path).stem


def is_table(path: Path) -> bool:
    """Return whether a file's name is that of a table."""
    return table_suffix(path) in TABLE_SUFFIXES


def table_format(path: Path, named: str | None) -> str:
    """Return the format of a table: as named, or by the file's ending.

    Raises:
        DataError: Neither says.
    """
    if named in FORMATS:
        return named
    found = {**TABLE_SUFFIXES, **TEXT_SUFFIXES}.get(table_suffix(path)) if named is None else None
    if found is None:
        refuse_archive(path)
        raise DataError(
            f"{path}: unknown format '{named or path.suffix}'. Pass --format with one of {', '.join(FORMATS)}."
        )
    return found


def read_table(
    path: Path, data_format: str | None, columns: Mapping[str, str], notes: list[str] | None = None
) -> list[Row]:
    """Read all rows of a table, renaming the column ``source`` of ``--map source=name`` to ``name``.

    Args:
        path: The file.
        data_format: One of ``FORMATS``; by the file's ending when ``None``.
        columns: Name expected by source column. Sources that are all numbers count the columns of a CSV without a head.
        notes: Takes what to tell the user, as of an encoding.

    Raises:
        DataError: Malformed content (file and line named), no rows, or a mapped column that is not there.
    """
    kind = table_format(path, data_format)
    read = _READERS[kind]
    counted = kind in DELIMITED and bool(columns) and all(name.isdecimal() for name in columns)
    if counted:
        read = partial(read, numbered=frozenset(columns))
    rows = list(read(read_bytes(path), path, [] if notes is None else notes))
    if not rows:
        raise DataError(f"{path} holds no examples.")
    if counted:
        _refuse_names(rows[0], columns)
    return [_rename(row, columns) for row in rows]


def _refuse_names(first: Row, columns: Mapping[str, str]) -> None:
    """Raise ``DataError`` when the first record of a table whose columns are counted is what they are called."""
    if any(str(first.values.get(source)).strip().lower() == name for source, name in columns.items()):
        names = ", ".join(map(str, first.values.values()))
        raise DataError(f"{first.where}: names the columns ({names}). Use these names in --map, or leave it out.")


def _rename(row: Row, columns: Mapping[str, str]) -> Row:
    inner = {source: _inside(row.values, source) for source in columns if source not in row.values and "." in source}
    row = replace(row, values={**row.values, **{source: value for source, value in inner.items() if value is not None}})
    for source in columns:
        if source not in row.values:
            raise DataError(f"{row.where}: no column '{source}' to map. Found {', '.join(map(str, row.values))}.")
    return Row({columns.get(name, name): value for name, value in row.values.items()}, row.where)


def _inside(values: Mapping[str, Any], name: str) -> Any:
    """Return what ``translation.en`` names in the record of a column; ``None`` where it names nothing."""
    found: Any = values
    for part in name.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found


def column_called(wanted: Sequence[str], names: Sequence[str]) -> str | None:
    """Return the first of the wanted columns that is there: by its very name, else whatever its case and signs."""
    exact = next((name for name in wanted if name in names), None)
    if exact is not None:
        return exact
    plain = {plain_name(str(name)): name for name in reversed(names)}
    return next((plain[key] for key in map(plain_name, wanted) if key in plain), None)


def plain_name(name: str) -> str:
    """Return a column's name without case and signs."""
    return re.sub(r"[\W_]", "", name.lower())


def check_text(row: Row) -> None:
    """Raise ``DataError`` when a row holds text that no encoding can write, such as half a surrogate pair."""
    for name, value in row.values.items():
        if not _writable(name) or not _writable(value):
            raise DataError(f"{row.where}: {name!a} holds half a surrogate pair, which is no text. Mend it.")


def _writable(value: Any) -> bool:
    return not any(
        not text.isascii() and any("\ud800" <= sign <= "\udfff" for sign in text) for text in texts_in(value)
    )


def texts_in(value: Any, *, keys: bool = True) -> Iterator[str]:
    """Yield every text in a value, with or without the keys of records, however deep it is nested."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            yield one
        elif isinstance(one, dict):
            waiting += [*(one if keys else ()), *one.values()]
        elif isinstance(one, list):
            waiting += one


# -- formats --------------------------------------------------------------------------------------


def _read_csv(
    data: bytes, path: Path, notes: list[str], *, tabs: bool = False, numbered: frozenset[str] = frozenset()
) -> Iterator[Row]:
    text = decode(data, path, notes, western=True)
    refuse_zeros(text, path)
    for values, line in read_delimited(text, path.name, tabs, numbered):
        yield Row(dict(values), f"{path.name}:{line}")


def _read_text(data: bytes, path: Path, notes: list[str]) -> Iterator[Row]:
    text = decode(data, path, notes, western=True)
    refuse_zeros(text, path)
    for number, line in enumerate(lines_of(text), start=1):
        if line.strip():
            yield Row({"text": line}, f"{path.name}:{number}")


def _read_jsonl(data: bytes, path: Path, notes: list[str]) -> Iterator[Row]:
    text = decode(data, path, notes, western=False)
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    places = [(line, f"{path.name}:{number}") for number, line in lines]
    try:
        return iter([_record(_parse_json(line, where), where) for line, where in places])
    except DataError as error:
        return _over_lines(text, path, error, whole_line=_is_json(lines[0][1]))


def _over_lines(text: str, path: Path, error: DataError, *, whole_line: bool) -> Iterator[Row]:
    """Read records, or a list of them, that are written over several lines each.

    Raises:
        DataError: They are not; ``error`` where the first line was whole.
    """
    try:
        values = _json_values(text, path.name)
        if len(values) == 1 and isinstance(values[0][0], list) and values[0][0] and not is_message_list(values[0][0]):
            return iter([_record(one, f"{path.name} record {index + 1}") for index, one in enumerate(values[0][0])])
        return iter([_record(value, f"{path.name}:{line}") for value, line in values])
    except DataError as other:
        raise (error if whole_line else other) from other


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _read_json(data: bytes, path: Path, notes: list[str]) -> Iterator[Row]:
    text = decode(data, path, notes, western=False)
    values = _json_values(text, path.name)
    if len(values) > 1:  # records one after the other
        return (_record(value, f"{path.name}:{line}") for value, line in values)
    content = values[0][0] if values else None
    refuse_tools_own(content, path.name)
    if is_message_list(content):
        content = [content]
    if isinstance(content, dict):
        content = records_in(content)
    if not isinstance(content, list):
        raise DataError(f"{path.name}: expected a list of records.")
    return (_record(value, f"{path.name} record {index + 1}") for index, value in enumerate(content))


def _json_values(text: str, name: str) -> list[tuple[Any, int]]:
    """Return the JSON values that stand one after the other in a text, each with its line."""
    decoder = json.JSONDecoder(object_pairs_hook=_object)
    values = []
    place, line = _end_of_space(text, 0), 1
    seen = 0
    while place < len(text):
        line += text.count("\n", seen, place)
        seen = place
        try:
            value, place = decoder.raw_decode(text, place)
        except json.JSONDecodeError as error:
            raise DataError(f"{name}:{error.lineno}: invalid JSON ({error.msg}, column {error.colno}).") from error
        except RecursionError as error:
            raise DataError(f"{name}: JSON nested too deeply.") from error
        except ValueError as error:  # a number of thousands of digits
            raise DataError(f"{name}:{line}: invalid JSON ({error}).") from error
        values.append((value, line))
        place = _end_of_space(text, place)
    return values


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON.

    Raises:
        ValueError: A name is there twice, of which Python would keep the last.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"'{twice}' is there twice in one record")
    return found


def _end_of_space(text: str, place: int) -> int:
    found = _SPACE.match(text, place)
    return place if found is None else found.end()


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: invalid JSON ({error.msg}, column {error.colno}).") from error
    except RecursionError as error:
        raise DataError(f"{where}: JSON nested too deeply.") from error
    except ValueError as error:  # a number of thousands of digits
        raise DataError(f"{where}: invalid JSON ({error}).") from error


def _record(value: Any, where: str) -> Row:
    if is_message_list(value):
        return Row({"messages": value}, where)
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a record with named fields, got {type(value).__name__}.")
    return Row(value, where)


def _read_parquet(data: bytes, path: Path, notes: list[str]) -> Iterator[Row]:
    from pyarrow import parquet

    return _read_arrow_table(data, path, "parquet", lambda buffer: parquet.ParquetFile(buffer).read())


def _read_arrow(data: bytes, path: Path, notes: list[str]) -> Iterator[Row]:
    """Read what ``save_to_disk`` of ``datasets`` writes (a stream), or a feather file."""
    import pyarrow

    opened = pyarrow.ipc.open_file if data.startswith(b"ARROW1") else pyarrow.ipc.open_stream
    return _read_arrow_table(data, path, "arrow", lambda buffer: opened(buffer).read_all())


def _read_arrow_table(data: bytes, path: Path, kind: str, read: Callable[[Any], Any]) -> Iterator[Row]:
    import pyarrow

    try:
        table = read(pyarrow.BufferReader(data))
        names = class_names(table.schema.metadata or {})
        records = [dict(record) for record in table.to_pylist()]
    except MemoryError:
        raise
    except Exception as error:  # arrow's own errors, and Python's for values it cannot hold, such as year 20000
        raise DataError(f"{path.name}: invalid {kind} ({first_line(error, 'damaged')}).") from error
    twice = next((name for name, count in Counter(table.column_names).items() if count > 1), None)
    if twice is not None:
        raise DataError(f"{path.name}: two columns are called '{twice}'.")
    for column, found in names.items():
        if len(set(found)) < len(found):
            raise DataError(f"{path.name}: the class names of '{column}' in its schema are not distinct.")
    for index, record in enumerate(records):
        row = Row(record, f"{path.name} row {index + 1}")
        yield replace(row, values={**record, **{key: _name_of(row, key, names[key]) for key in names if key in record}})


def class_names(metadata: Mapping[bytes, bytes]) -> dict[str, list[str]]:
    """Return the class names by column that ``datasets`` writes beside a table's schema, those of lists included."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        named = {column: _names_in(feature) for column, feature in features.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    return {
        column: names
        for column, names in named.items()
        if isinstance(names, list) and names and all(isinstance(name, str) for name in names)
    }


def _names_in(feature: Any) -> Any:
    """Return the names of a class label, or of the labels in a list."""
    inner = feature[0] if isinstance(feature, list) and len(feature) == 1 else feature.get("feature", feature)
    return inner.get("names") if isinstance(inner, dict) else None


def _name_of(row: Row, column: str, names: Sequence[str]) -> Any:
    """Return the name of a number; -1 is how ``datasets`` writes a missing label."""
    value = row.values[column]
    if isinstance(value, list):
        return [_name_at(row, column, one, names) for one in value]
    return _name_at(row, column, value, names)


def _name_at(row: Row, column: str, value: Any, names: Sequence[str]) -> Any:
    if not isinstance(value, int | float) or isinstance(value, bool) or value != value:
        return value
    if value == -1:
        return None
    if value != int(value) or not 0 <= value < len(names):
        raise DataError(f"{row.where}: {column} {value} is not among the file's {len(names)} class names.")
    return names[int(value)]


_READERS: dict[str, Callable[..., Iterator[Row]]] = {
    "csv": _read_csv,
    "tsv": partial(_read_csv, tabs=True),
    "jsonl": _read_jsonl,
    "json": _read_json,
    "parquet": _read_parquet,
    "arrow": _read_arrow,
    "text": _read_text,
}
