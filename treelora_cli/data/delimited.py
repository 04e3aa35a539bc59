"""CSV as people have it: commas, semicolons or tabs, ``sep=;`` first, spaces after commas in the head."""

from __future__ import annotations

import csv
import io
import re
import sys
from collections.abc import Iterator

from treelora_cli.data.files import lines_of
from treelora_cli.errors import DataError

_DELIMITERS = ",;\t|"
_SEP_LINE = re.compile(r"sep=(.)\r?\n", re.IGNORECASE)
_LOOKED_AT = 20


def read_delimited(text: str, name: str, tabs: bool) -> Iterator[tuple[dict[str, str], int]]:
    """Yield each record by column name, and its line.

    Args:
        text: The file.
        name: For messages.
        tabs: The file's name says that tabs divide it.

    Raises:
        DataError: Malformed CSV, records of another length than the head, or a column named twice.
    """
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the library's own is short for a document
    named = _SEP_LINE.match(text)
    skipped = 0
    if named:
        text, skipped = text[named.end() :], 1
    delimiter = named[1] if named else "\t" if tabs else _delimiter(text)
    commas, spaced = (_first_line(text).count(sign) for sign in (delimiter, f"{delimiter} "))
    after_space = commas > 0 and commas == spaced
    if delimiter == "\t" and _quotes_are_signs(text):
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=csv.QUOTE_NONE)
    else:
        reader = csv.reader(
            io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=after_space
        )
    head: list[str] = []
    try:
        for fields in reader:
            line = reader.line_num + skipped
            if not fields or (not head and not any(field.strip() for field in fields)):
                continue
            if not head:
                head = _head(fields, f"{name}:{line}")
            elif len(fields) != len(head):
                raise DataError(f"{name}:{line}: the number of fields differs from the header's.")
            else:
                yield dict(zip(head, fields, strict=True)), line
    except csv.Error as error:
        raise DataError(f"{name}:{reader.line_num + skipped}: invalid CSV ({error}).") from error


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


def _delimiter(text: str) -> str:
    """Return what divides the head: of several signs in it, that by which the first records are as long as it."""
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
