"""CSV as people have it: commas, semicolons or tabs, ``sep=;`` first, spaces after commas in the head."""

from __future__ import annotations

import csv
import io
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from treelora_cli.data.files import lines_of
from treelora_cli.errors import DataError

_DELIMITERS = ",;\t|"
_SEP_LINE = re.compile(r"sep=(.)\r?\n", re.IGNORECASE)
_LOOKED_AT = 20
_SENTENCE = 3
"""Spaces; names of columns have fewer."""


def read_delimited(
    text: str, name: str, tabs: bool, numbered: frozenset[str] = frozenset()
) -> Iterator[tuple[dict[str, str], int]]:
    """Yield each record by column name, and its line.

    Args:
        text: The file.
        name: For messages.
        tabs: The file's name says that tabs divide it.
        numbered: Columns asked for by number: unless the first line has all of these names, it is a record, and
            columns are called "1", "2", ...

    Raises:
        DataError: Malformed CSV, records of another length than the first line, or a column named twice.
    """
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the library's own is short for a document
    named = _SEP_LINE.match(text)
    skipped = 0
    if named:
        text, skipped = text[named.end() :], 1
    reader = _reader(text, named[1] if named else _delimiter(text, tabs))
    head: list[str] = []
    try:
        for fields in reader:
            line = reader.line_num + skipped
            if not any(field.strip() for field in fields):  # also rows that a spreadsheet leaves at the end
                continue
            if not head and numbered.issubset(field.strip() for field in fields):
                head = _head(fields, f"{name}:{line}")
                continue
            head = head or [str(place) for place in range(1, len(fields) + 1)]
            if len(fields) != len(head):
                raise DataError(f"{name}:{line}: the number of fields differs from the first line's.")
            yield dict(zip(head, fields, strict=True)), line
    except csv.Error as error:
        raise DataError(f"{name}:{reader.line_num + skipped}: invalid CSV ({error}).") from error


def _reader(text: str, delimiter: str) -> Any:
    """Return the library's reader of a text without its ``sep=`` line."""
    lines = io.StringIO(text, newline="")
    if delimiter == "\t" and _quotes_are_signs(text):
        return csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE)
    commas, spaced = (_first_line(text).count(sign) for sign in (delimiter, f"{delimiter} "))
    return csv.reader(lines, delimiter=delimiter, strict=True, skipinitialspace=commas > 0 and commas == spaced)


def lacks_head(rows: Sequence[Mapping[str, object]]) -> bool:
    """Return whether the names of columns that nobody knows are rather a first record.

    They are where one stands below itself, too, or reads like a sentence.
    """
    return recurring(rows) is not None or any(str(name).count(" ") >= _SENTENCE for name in rows[0])


def recurring(rows: Sequence[Mapping[str, object]]) -> int | None:
    """Return the place of the first column whose name stands below itself, too, from 0; ``None`` where none does."""
    names = list(rows[0])
    return next((place for place, name in enumerate(names) if any(row.get(name) == name for row in rows)), None)


def _first_line(text: str) -> str:
    return text.lstrip("\r\n").split("\n", 1)[0]


def _quotes_are_signs(text: str) -> bool:
    """Return whether quotes in a file with tabs are signs like any other, as in many corpora, and enclose no fields.

    They are where taking them for enclosing fails, or swallows ends of lines and tabs, and each line by itself has as
    many fields as the head.
    """
    if '"' not in text or _enclose(text):
        return False
    counts = {line.count("\t") for line in lines_of(text) if line}
    return len(counts) == 1


def _enclose(text: str) -> bool:
    lengths = set()
    try:
        for fields in csv.reader(io.StringIO(text, newline=""), delimiter="\t", strict=True):
            if any("\t" in field and "\n" in field for field in fields):
                return False
            lengths.add(len(fields))
    except csv.Error:
        return False
    return len(lengths - {0}) <= 1


def _head(fields: list[str], where: str) -> list[str]:
    named = [field.strip() for field in fields]
    unnamed = named.count("") > 1  # columns that a spreadsheet leaves at the right
    head = [f"column {place}" if unnamed and not name else name for place, name in enumerate(named, start=1)]
    twice = next((field for field in head if head.count(field) > 1), None)
    if twice is not None:
        raise DataError(f"{where}: two columns are called '{twice}'.")
    return head


def _delimiter(text: str, tabs: bool) -> str:
    """Return what divides the head: of several signs in it, that by which the first records are as long as it.

    Tabs do where the file's name says so, and there is one.
    """
    if tabs and "\t" in text:
        return "\t"
    found = [sign for sign in _DELIMITERS if sign in _first_line(text)]
    if len(found) < 2:
        return found[0] if found else ","
    return max(found, key=lambda sign: (_agreeing(text, sign), -_DELIMITERS.index(sign)))


def _agreeing(text: str, sign: str) -> int:
    """Count records among the first with as many fields as the head."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=sign)
    lengths: list[int] = []
    try:
        for fields in reader:
            if fields:
                lengths.append(len(fields))
            if len(lengths) > _LOOKED_AT:
                break
    except csv.Error:
        pass
    return sum(length == lengths[0] for length in lengths) if lengths and lengths[0] > 1 else 0
